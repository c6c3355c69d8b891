"""Peak memory of one step, in a fresh process: `python -m benchmarks.memory NAME PEER THREADS QUICK` prints MB.

tracemalloc does not see torch's memory, so the operating system is asked: after two calls (which compile, and fill
caches) memory that is free goes back to the system, the high-water mark of the resident set is reset, and a call is
made. The result is the mark less what was resident before: outputs and temporaries, not inputs and not code.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def peak_megabytes(workload: str, peer: str, threads: int, quick: bool) -> float | None:
    """Of one call; None where the system cannot tell (it takes Linux) or the process failed."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", workload, peer, str(threads), str(int(quick))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.split()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None


def _resident(mark: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(mark):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: has no {mark}")


def main(name: str, peer_name: str, threads: str, quick: str) -> None:
    import torch

    from benchmarks.implementations import PEERS
    from benchmarks.workloads import QUICK, WORKLOADS, Problem

    torch.set_num_threads(int(threads))
    work = next(each for each in (QUICK if int(quick) else WORKLOADS) if each.name == name)
    peer = next(each for each in PEERS if each.name == peer_name and each.effort(work) is not None)
    step = peer.prepare(Problem.draw(work))
    for _ in range(2):
        step()
    with contextlib.suppress(AttributeError):  # not glibc: free memory is kept, and the result is a lower bound
        ctypes.CDLL(None).malloc_trim(0)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    outputs = step()
    print(max(0.0, (_resident("VmHWM") - before) / 1e3))
    del outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
