"""What `benchmarks/gpu.sh` needs, and what of it is there.

python -m benchmarks.gpu_check                  the machine; ends with 1 where nothing can run
python -m benchmarks.gpu_check --loaded         whether the CUDA operators that were built are used
python -m benchmarks.gpu_check --architecture   of the GPU, as CMake names it
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
from pathlib import Path

NEEDED = {"torch": "nothing runs", "numpy": "nothing runs", "safetensors": "nothing runs", "tqdm": "nothing runs"}
USEFUL = {
    "pybind11": "nothing can be built; give --binaries",
    "pytest": "tests do not run",
    "xdist": "tests run one after the other",
    "polars": "tests of Parquet files fail or are skipped",
    "triton": "nobody is compiled",
    "jax": "JAX is left out",
}
PROGRAMS = {
    "nvcc": "nothing can be built; give --binaries",
    "cmake": "nothing can be built; give --binaries",
    "ninja": "nothing can be built; give --binaries",
    "compute-sanitizer": "memcheck, racecheck, synccheck and initcheck do not run",
    "ncu": "kernels are not profiled",
}


def missing() -> list[str]:
    """A sentence for each thing that is not there, and what follows."""
    packages = [f"{name}: not installed, {so}" for name, so in {**NEEDED, **USEFUL}.items() if not _installed(name)]
    return packages + [f"{name}: not on the PATH, {so}" for name, so in PROGRAMS.items() if shutil.which(name) is None]


def check() -> int:
    sentences = missing()
    for sentence in sentences:
        print(sentence)
    if any(not _installed(name) for name in NEEDED):
        return 1
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, nvcc {_nvcc() or 'none'}")
    if torch.version.cuda is None:
        print("torch was built without CUDA: install one with it")
        return 1
    if not torch.cuda.is_available():
        print("torch finds no GPU: is there one, and is its driver new enough?")
        return 1
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, compute capability {properties.major}.{properties.minor}")
    nvcc = _nvcc()
    if nvcc and nvcc.split(".")[0] != torch.version.cuda.split(".")[0]:
        print(
            f"what nvcc {nvcc} builds is not loaded by a torch for CUDA {torch.version.cuda}: they need the same major"
        )
        return 1
    return 0


def loaded() -> int:
    from metarec_fast import _library

    for library in (_library.cpu, _library.cuda):
        print(f"{library.name}: {'loaded' if library.loaded else library.reason}")
    return 0 if _library.cuda.loaded else 1


def architecture() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}")
    return 0


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _nvcc() -> str | None:
    """Its version."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    said = subprocess.run([Path(path), "--version"], capture_output=True, text=True, check=False).stdout
    return next((word.strip("V,") for word in said.split() if word.startswith("V") and word[1:2].isdigit()), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaded", action="store_true")
    parser.add_argument("--architecture", action="store_true")
    options = parser.parse_args()
    return loaded() if options.loaded else architecture() if options.architecture else check()


if __name__ == "__main__":
    raise SystemExit(main())
