"""The machine and the versions that times belong to."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("torch", "jax", "torchopt", "higher", "learn2learn", "numpy")


def describe(threads: int) -> dict[str, str]:
    """Processor, number of threads and of CPUs, their load, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "processor": _processor(),
        "threads": f"{threads} of {os.cpu_count()} CPUs, load {load} before",
        "python": platform.python_version(),
        **versions,
    }


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory that a step frees, for the next one; False where it is another allocator.

    Otherwise it may hand megabytes back after every step, and whether it does depends on where a process's last
    allocation lies: a step of 0.7 ms then takes 2.3 ms, for page faults. jemalloc and tcmalloc keep it anyway.
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
