"""A pytest plugin for machines without a GPU: tensors that say they are on cuda:0, and hold others on the CPU.

    pytest -p pretended_gpu --device cuda tests/test_cuda.py

Operators run by their CPU kernels. As on a GPU, tensors of both devices in one operator are an error, and so is waiting
under `torch.cuda.set_sync_debug_mode("error")`. Streams, graphs, `torch.compile` and what looks at addresses are beyond
it. torch has to be told before it is imported (guard.cpp), hence the order of things here.
"""
# ruff: noqa: E402

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
LIBRARY = "METAREC_PRETENDED_GPU"  # environment variable: guard.cpp, built


def build(folder: Path) -> Path:
    """The library that torch is to find."""
    torch = Path(str(importlib.util.find_spec("torch").origin)).parent
    library = folder / "pretended_gpu.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", f"-I{torch}/include", "-o", str(library),
         str(HERE / "guard.cpp"), f"-L{torch}/lib", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return library


def why_not() -> str | None:
    """Why it cannot be used here."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "needs a C++ compiler"
    import torch

    return None if torch.version.cuda is None else "needs a torch without CUDA"


@pytest.hookimpl(tryfirst=True)  # before conftest.py asks for a GPU
def pytest_configure(config: Any) -> None:
    from metarec_fast import _library

    _library.cuda = _library.Library("_C_cuda", True)
    _pretend()


def _load(library: str) -> None:
    torch = Path(str(importlib.util.find_spec("torch").origin)).parent / "lib"
    for path in (torch / "libtorch_global_deps.so", torch / "libtorch_cpu.so", Path(library)):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


if LIBRARY in os.environ:
    _load(os.environ[LIBRARY])

import torch
import torch._dynamo  # lists torch's functions, each once: before some are replaced by one and the same
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select", "is_nonzero", "equal"}
_waiting_is_an_error = False


class OnGpu(torch.Tensor):
    """Says it is on cuda:0; `inner` is where its numbers are."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnGpu:
        kind: dict[str, Any] = {"dtype": inner.dtype, "device": "cuda:0", "layout": inner.layout}
        if inner.layout is torch.strided:
            kind |= {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **kind)
        tensor.inner = inner
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_gpu(kwargs.get("device")) or any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        return func(*args, **{name: value for name, value in kwargs.items() if name != "pin_memory"})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    there = [leaf for leaf in leaves if isinstance(leaf, OnGpu)]
    here = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnGpu)]
    name, ours, device = func.overloadpacket.__name__, func.namespace != "aten", kwargs.get("device")

    if there and name not in ("copy_", "_to_copy"):
        indices = name in ("index", "index_put", "index_put_", "_index_put_impl_")  # may be on the CPU
        for tensor in here:
            if not (tensor.dim() == 0 and not ours) and not (indices and not tensor.is_floating_point()):
                raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu: {func}")
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    masks = name == "index" and any(isinstance(each, OnGpu) and each.dtype is torch.bool for each in args[1])
    copies = name == "_to_copy" and device is not None and not kwargs.get("non_blocking")
    if (there and (name in WAITING or masks)) or (copies and _is_gpu(device) != bool(there)):
        _wait(str(func))

    dropped = ("pin_memory", "non_blocking") if name in ("empty", "_to_copy") else ()
    moved = {
        key: torch.device("cpu") if _is_gpu(value) else value for key, value in kwargs.items() if key not in dropped
    }
    result = func(*tree_map(_inner, args), **tree_map(_inner, moved))
    if name == "copy_":
        return args[0]
    if not (_is_gpu(device) if device is not None else there):
        return result
    result = tree_map(lambda value: OnGpu(value) if isinstance(value, torch.Tensor) else value, result)
    return result if ours else return_and_correct_aliasing(func, args, kwargs, result)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _is_gpu(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _wait(what: str) -> None:
    if _waiting_is_an_error:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def _set_sync_debug_mode(mode: str) -> None:
    global _waiting_is_an_error
    _waiting_is_an_error = mode == "error"


def _pretend() -> None:
    """From now on, in this thread and those that begin later."""
    nothing, event = (lambda *args, **kwargs: None), SimpleNamespace(synchronize=lambda: None)
    stream = SimpleNamespace(record_event=lambda *args: event, wait_event=nothing, wait_stream=nothing)
    replaced: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: False, "device_count": lambda: 1, "_lazy_init": nothing,
        "is_bf16_supported": lambda *args, **kwargs: True, "synchronize": nothing, "set_rng_state": nothing,
        "set_sync_debug_mode": _set_sync_debug_mode, "Stream": lambda *args: stream, "Event": lambda *args: event,
        "current_stream": lambda *args: stream, "stream": nullcontext, "device": nullcontext,
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.record_stream = nothing  # type: ignore[assignment]
    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    run = threading.Thread.run

    def run_there_too(thread: threading.Thread) -> None:
        with _Mode():
            run(thread)

    threading.Thread.run = run_there_too  # type: ignore[method-assign]
    _Mode().__enter__()


_status = 1


def pytest_sessionfinish(session, exitstatus):
    global _status
    _status = int(exitstatus)


def pytest_unconfigure(config):
    """Ends with the tests' own verdict: threads that torch keeps for a device which is not there can abort its exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)
