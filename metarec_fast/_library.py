"""Loads the compiled operators, and knows which are there and why others are not."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Library:
    """One shared library: whether it is loaded, and if not, why."""

    name: str
    loaded: bool
    reason: str = ""


def _load(name: str) -> Library:
    path = FOLDER / f"{name}.so"
    if not path.exists():
        return Library(name, False, "it was not built")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:  # built for a newer libtorch, or for another machine
        return Library(name, False, f"it does not load: {str(error).splitlines()[0]}")
    return Library(name, True)


def compiled_module(name: str) -> Library:
    """One of the package's modules that are compiled against Python."""
    try:
        import_module(f"metarec_fast.{name}")
    except ImportError as error:
        built = any(FOLDER.glob(f"{name}*.so"))
        return Library(name, False, f"it does not load: {error}" if built else "it was not built")
    return Library(name, True)


def _load_cpu() -> Library:
    """The operators for this processor, as wide as torch makes use of it (ATEN_CPU_CAPABILITY bounds both)."""
    levels = {"AVX512": ("_C_avx512", "_C_avx2"), "AVX2": ("_C_avx2",)}
    names = (*levels.get(torch.backends.cpu.get_cpu_capability(), ()), "_C")
    return _load(next((name for name in names if (FOLDER / f"{name}.so").exists()), "_C"))


def _load_cuda() -> Library:
    """The CUDA kernels, only where torch has CUDA of the major version they were built for."""
    built_for = FOLDER / "_C_cuda.version"
    if not built_for.exists():
        return Library("_C_cuda", False, "it was not built")
    if torch.version.cuda is None:
        return Library("_C_cuda", False, "torch was built without CUDA")
    if not cpu.loaded:
        return Library("_C_cuda", False, f"_C is missing: {cpu.reason}")
    version = built_for.read_text().strip()
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return Library("_C_cuda", False, f"it was built for CUDA {version}, torch for CUDA {torch.version.cuda}")
    return _load("_C_cuda")


cpu = _load_cpu()
cuda = _load_cuda()
if not cpu.loaded:
    warnings.warn(
        f"metarec_fast runs on its PyTorch reference, right but slow, because _C is missing: {cpu.reason} "
        "(`metarec-fast doctor` says more)",
        RuntimeWarning,
        stacklevel=2,
    )
_missed: set[str] = set()  # kinds of device of which it has been said that they have no kernels
if torch.version.cuda is not None and (FOLDER / "_C_cuda.version").exists() and not cuda.loaded:
    warnings.warn(
        f"metarec_fast has no CUDA kernels, and is slow on a GPU: {cuda.reason} (`metarec-fast doctor` says more)",
        RuntimeWarning,
        stacklevel=2,
    )
    _missed.add("cuda")


def loaded_for(tensor: Tensor) -> bool:
    """Whether there are kernels where `tensor` lives; says once, per kind of device, that there are none."""
    kind = tensor.device.type
    if kind in ("cpu", "meta"):
        return cpu.loaded
    if kind == "cuda" and cuda.loaded:
        return True
    if kind not in _missed and not torch.compiler.is_compiling():
        _missed.add(kind)
        reason = f"_C_cuda is missing: {cuda.reason}" if kind == "cuda" else "it has no kernels there"
        warnings.warn(
            f"metarec_fast runs on its PyTorch reference on {kind}, right but slow, because {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return False
