"""What nvcc makes of the CUDA operators: it compiles, keeps to its budget, and needs of torch only the stable ABI."""

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import simulator
import torch

from metarec_fast import _library

ROOT = simulator.ROOT
BUDGET = Path(__file__).parent / "cuda_budget.json"

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the CUDA sources are not checked")


@cache
def cuda_library() -> Path:
    """The library that was installed with the package, or one built here."""
    installed = _library.FOLDER / "_C_cuda.so"
    if installed.exists():
        return installed
    folder = ROOT / "build" / "cuda"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMETAREC_CUDA=ON"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_C_cuda"]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
    return folder / "_C_cuda.so"


def output_of(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


# Resources ------------------------------------------------------------------------------------------------------------

# Of a multiprocessor: registers, bytes of shared memory, warps, blocks.
ARCHITECTURES = {80: (65536, 167936, 64, 32), 90: (65536, 233472, 64, 32)}
RESERVED = 1024  # bytes of shared memory that a block costs besides; on sm_90 they are in what most are said to have


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found:
        return found
    packages = (Path(folder) / "nvidia" for folder in sys.path if folder)
    return next((str(path) for package in packages for path in package.glob("*/bin/cuobjdump")), None)


def kernels_of(library: Path) -> dict[str, dict[str, int]]:
    """Of each kernel by name, template arguments and all: the most that it needs on any architecture.

    Warps are those that run at once on a multiprocessor, the fewest of any, without dynamic shared memory.
    """
    program = cuobjdump()
    assert program is not None
    text = output_of(program, "-res-usage", library)
    found = re.findall(r"arch = sm_(\d+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    mangled = [name for _, name, *_ in found if name]
    names = dict(zip(mangled, demangled(mangled), strict=True))
    kernels: dict[str, dict[str, int]] = {}
    architecture = 0
    for arch, name, *numbers in found:
        if arch:
            architecture = int(arch)
            continue
        registers, stack, shared, local = (int(number) for number in numbers)
        if architecture >= 90 and shared >= RESERVED:
            shared -= RESERVED
        kernel = kernels.setdefault(short(names[name]), {"registers": 0, "stack": 0, "shared": 0, "local": 0})
        for key, number in (("registers", registers), ("stack", stack), ("shared", shared), ("local", local)):
            kernel[key] = max(kernel[key], number)
        kernel[f"registers on {architecture}"] = registers
        kernel[f"shared on {architecture}"] = shared
    return kernels


def demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def short(signature: str) -> str:
    """The kernel's name and its template arguments, without namespaces, return type and parameters."""
    name = signature.replace("(anonymous namespace)::", "").replace("metarec_fast::cuda::", "")
    name = name.removeprefix("void ")
    depth = 0
    for place, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return re.sub(r"\((?:int|bool|metarec_fast::cuda::Way|Way)\)", "", name)


def warps_at_once(kernel: dict[str, int], threads: int, dynamic: int) -> int:
    """Of a multiprocessor, on the architecture where there are fewest."""
    fewest = 64
    for architecture, (registers, shared, warps, blocks) in ARCHITECTURES.items():
        if f"registers on {architecture}" not in kernel:
            continue
        per_block = -(-threads // 32)
        per_warp = -(-kernel[f"registers on {architecture}"] * 32 // 256) * 256
        taken = kernel[f"shared on {architecture}"] + dynamic + RESERVED
        fit = min(warps // per_block, blocks, registers // per_warp // per_block, shared // taken)
        fewest = min(fewest, fit * per_block)
    return fewest


@needs_nvcc
def test_the_cuda_sources_compile_without_a_warning_or_a_spill():
    assert cuda_library().exists()


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: the resources of CUDA kernels are not checked")
def test_kernels_keep_to_their_budget():
    kernels, budget = kernels_of(cuda_library()), json.loads(BUDGET.read_text())
    wrong = [f"{name} has no budget: see {BUDGET.name}" for name in kernels if name_in(budget, name) is None]
    wrong += [
        f"{name} has a budget, but there is no such kernel"
        for name in budget
        if not any(name_in(budget, kernel) == name for kernel in kernels)
    ]
    for name, kernel in kernels.items():
        entry = name_in(budget, name)
        if entry is None:
            continue
        allowed = budget[entry]
        if kernel["local"]:
            wrong.append(f"{name}: {kernel['local']} bytes of local memory")
        for key in ("registers", "shared", "stack"):
            if kernel[key] > allowed.get(key, 0):
                wrong.append(f"{name}: {key} {kernel[key]}, allowed {allowed.get(key, 0)}")
        warps = warps_at_once(kernel, allowed["threads"], allowed.get("dynamic", 0))
        if warps < allowed["warps"]:
            wrong.append(f"{name}: {warps} warps at once, expected {allowed['warps']}")
    assert not wrong, "\n".join(wrong)


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: instructions of CUDA kernels are not checked")
def test_rows_are_added_four_numbers_at_a_time_where_there_is_an_instruction_for_it():
    code = output_of(cuobjdump(), "-ptx", cuda_library())
    assert "red.global.add.v4.f32" in code


def name_in(budget: dict[str, dict[str, int]], kernel: str) -> str | None:
    """The first pattern of the budget that fits a kernel."""
    return next((pattern for pattern in budget if fnmatchcase(kernel, pattern)), None)


# Symbols --------------------------------------------------------------------------------------------------------------

LIBRARIES = sorted(_library.FOLDER.glob("_C*.so"))
UNSTABLE = re.compile(r"\b(?:c10|at|torch|caffe2)::")


def libraries() -> list[Path]:
    found = [path for path in LIBRARIES if path.name != "_C_cuda.so"]
    return [*found, cuda_library()] if shutil.which("nvcc") else found


def test_libraries_need_nothing_of_torch_but_its_stable_abi():
    for library in libraries():
        names = [
            line.split()[-1].split("@")[0] for line in output_of("nm", "-D", "--undefined-only", library).splitlines()
        ]
        used = [name for name in demangled(names) if UNSTABLE.search(name)]
        assert not used, f"{library.name}: {used}"
        assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)


@needs_nvcc
def test_the_cuda_library_brings_its_cuda_runtime():
    needed = output_of("objdump", "-p", cuda_library())
    assert "NEEDED" in needed
    assert "libcudart" not in needed


@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA: _C_cuda does not load")
def test_the_cuda_library_loads_without_a_gpu():
    load = f"import metarec_fast, torch; torch.ops.load_library({str(cuda_library())!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
