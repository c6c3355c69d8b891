"""Drives CMake, the one build description, from pip; what the package is stands in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def wants_cuda() -> bool:
    """METAREC_CUDA=0/1 decides; without it, whether nvcc is there (never whether a GPU is)."""
    choice = os.environ.get("METAREC_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"METAREC_CUDA: expected 0 or 1, got {choice!r}")
    return choice == "1" or (choice == "" and shutil.which("nvcc") is not None)


def can_compile() -> bool:
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None


class CMakeBuild(build_ext):
    """Configures, builds and installs every target of CMakeLists.txt into the package."""

    def run(self) -> None:
        package = ROOT if self.editable_mode or self.inplace else Path(self.build_lib).resolve()
        work = ROOT / "build" / f"{sys.implementation.cache_tag}"
        cuda = "ON" if wants_cuda() else "OFF"
        configure = ["cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMETAREC_CUDA={cuda}"]
        if "METAREC_CUDA_ARCHITECTURES" in os.environ:
            configure += [f"-DMETAREC_CUDA_ARCHITECTURES={os.environ['METAREC_CUDA_ARCHITECTURES']}"]
        build = ["cmake", "--build", str(work)]
        install = ["cmake", "--install", str(work), "--strip", "--prefix", str(package / "metarec_fast")]
        for command in (configure, build, install):
            subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "metarec_fast").glob("*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if can_compile() or os.environ.get("METAREC_REQUIRE_EXTENSION") == "1":
    extensions = [Extension("metarec_fast._C", sources=[])]
else:
    print("metarec_fast: no C++ compiler found, installing without the compiled operators (slow)", file=sys.stderr)
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
