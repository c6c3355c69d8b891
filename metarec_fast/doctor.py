"""Says which compiled parts are active, and why others are not."""

from __future__ import annotations

import platform
import shutil
import subprocess

import torch

import metarec_fast
from metarec_fast import _library, _usual


def diagnose() -> tuple[list[str], bool]:
    """What there is to say, line by line, the verdict last; and whether the fast path on the CPU is active."""
    tasks = _library.compiled_module("_tasks")
    fast = _library.cpu.loaded and tasks.loaded
    facts = {
        "metarec_fast": f"{metarec_fast.__version__} in {_library.FOLDER}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CPU": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "CUDA": _cuda(),
        "C++ compiler": _version("c++"),
        "nvcc": _version("nvcc"),
        "_C": f"{_state(_library.cpu)} (operators on the CPU, {_library.cpu.name})",
        "_C_cuda": f"{_state(_library.cuda)} (operators on the GPU{_built_for()})",
        "_calls": f"{_state(_usual.library)} (calls of operators without a detour)",
        "_tasks": f"{_state(tasks)} (task sampler)",
    }
    width = max(map(len, facts))
    return [*(f"{name:{width}s}  {fact}" for name, fact in facts.items()), "", _verdict(fast)], fast


def _verdict(fast: bool) -> str:
    if fast and _library.cuda.loaded and torch.cuda.is_available():
        return "The fast path is active, on the CPU and on the GPU."
    if fast and torch.cuda.is_available():
        return "The fast path is active on the CPU; on the GPU it is not, see _C_cuda."
    if fast:
        return "The fast path is active."
    if shutil.which("c++") is None:
        return "The slow path is active: install a C++ compiler (GCC ≥ 12), then the package again, from source."
    return "The slow path is active: install the package again with `pip install --no-build-isolation .`"


def _state(library: _library.Library) -> str:
    return "active" if library.loaded else f"missing: {library.reason}"


def _built_for() -> str:
    """Which CUDA the kernels that are there were built with."""
    file = _library.FOLDER / "_C_cuda.version"
    return f", built for CUDA {file.read_text().strip()}" if file.exists() else ""


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but no GPU can be used"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _version(program: str) -> str:
    """What a compiler calls itself."""
    path = shutil.which(program)
    if path is None:
        return "none"
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, which does not run: {error}"
    lines = [line for line in said.splitlines() if "release" in line] or said.splitlines() or [path]
    return lines[0].strip()
