"""Builds the CUDA operators for the CPU, and puts them in the place of the others: see README.md."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from metarec_fast import _autograd, _ops

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMESPACE = "metarec_fast_simulated"


def cuda_headers() -> Path | None:
    """Where CUDA's headers are; None where there is no nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    top = next(line.split("=", 1)[1] for line in said.stderr.splitlines() if line.startswith("#$ TOP="))
    return Path(top).resolve() / "include"


def build(kind: str = "plain") -> Path:
    """The library with the simulated operators; `kind` is plain, address, thread or coverage."""
    folder = ROOT / "build" / f"simulated-{kind}"
    configure = ["cmake", "-S", str(HERE), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-DCUDA_INCLUDES={cuda_headers()}"]
    if kind in ("address", "thread"):
        configure.append(f"-DSANITIZER={kind}")
    configure.append(f"-DCOVERAGE={'ON' if kind == 'coverage' else 'OFF'}")
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "_C_simulated.so"


def use(library: Path) -> None:
    """From now on metarec_fast runs on the simulated operators."""
    torch.ops.load_library(str(library))
    _autograd.register(NAMESPACE)
    _ops.ops = _autograd.ops = getattr(torch.ops, NAMESPACE)
