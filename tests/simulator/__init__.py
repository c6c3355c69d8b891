"""Builds the CUDA operators for the CPU, and runs programs on them: see README.md."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMESPACE = "metarec_fast_simulated"
SCHEDULES = ("forward", "reverse", "random:1")
EXERCISE = HERE / "exercise.py"

_PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


def cuda_headers() -> Path | None:
    """Where CUDA's headers are; None where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    top = next(line.split("=", 1)[1] for line in said.stderr.splitlines() if line.startswith("#$ TOP="))
    return Path(top).resolve() / "include"


def missing() -> str:
    """Why there can be no simulator here; empty where there can."""
    if shutil.which("nvcc") is None:
        return "no nvcc: the CUDA sources are not checked"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the simulator of CUDA threads is for Linux on x86-64: the CUDA sources are not checked"
    return ""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Whoever else builds there, in another process of the tests, waits."""
    import fcntl  # where there is a simulator, there is this

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def build(kind: str = "plain", target: str = "_C_simulated", sources: Path = ROOT) -> Path:
    """The library with the simulated operators, or another target of CMakeLists.txt.

    Args:
        kind: plain, address, thread or coverage.
        sources: Where csrc is, if it is a copy, which is built beside itself.
    """
    from torch.utils import cpp_extension

    folder = (ROOT / "build" if sources == ROOT else sources) / f"simulated-{kind}"
    configure = ["cmake", "-S", str(HERE), "-B", str(folder), "-G", "Ninja", f"-DROOT={sources}"]
    configure += [f"-DCUDA_INCLUDES={cuda_headers()}", f"-DTORCH_INCLUDES={';'.join(cpp_extension.include_paths())}"]
    configure.append(f"-DTORCH_LIBRARY_PATHS={';'.join(cpp_extension.library_paths())}")
    configure.append(f"-DSANITIZER={kind if kind in ('address', 'thread') else ''}")
    configure.append(f"-DCOVERAGE={'ON' if kind == 'coverage' else 'OFF'}")
    with locked(folder):
        for command in (configure, ["cmake", "--build", str(folder), "--target", target]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return folder / ("_C_simulated.so" if target == "_C_simulated" else target)


def run(
    kind: str, *command: str | Path, schedule: str = "forward", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program that was built with a sanitizer, or that loads such a library, and keeps what it says."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **_PATHS, **_sanitizer(kind), "METAREC_SCHEDULE": schedule, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
    return done


def use(library: Path) -> None:
    """From now on metarec_fast runs on the simulated operators."""
    import torch

    from metarec_fast import _autograd, _mlp_autograd

    torch.ops.load_library(str(library))
    _autograd.register(NAMESPACE)
    _mlp_autograd.register(NAMESPACE)
    switch(NAMESPACE)


def switch(namespace: str) -> Any:
    """Lets metarec_fast call the operators of this namespace."""
    import torch

    from metarec_fast import _autograd, _mlp_autograd, _mlp_ops, _ops

    ops = getattr(torch.ops, namespace)
    for module in (_ops, _autograd, _mlp_ops, _mlp_autograd):
        module.ops = ops  # type: ignore[attr-defined]
    return ops


@cache
def _sanitizer(kind: str) -> dict[str, str]:
    """What a process needs that was not built with the sanitizer itself."""
    if kind == "address":
        preload = f"{_library('libasan.so')} {_library('libstdc++.so.6')}"  # this one, to see its exceptions
        return {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    if kind == "thread":
        return {"LD_PRELOAD": _library("libtsan.so"), "OMP_NUM_THREADS": "1", "TSAN_OPTIONS": "halt_on_error=1"}
    return {}


def _library(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
