"""Every operator on small ragged problems, once on the CPU and once on a GPU: how far apart are they?

    python tests/exercise_gpu.py [--only PART]… [--small] [--fill]

The cases are those of tests/simulator/exercise.py. Small and many, they are what compute-sanitizer watches; `--fill`
makes fresh memory not a number, so that what nobody writes is noticed. Ends with 2 where numbers differ.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import problems  # noqa: E402
import torch  # noqa: E402
from simulator.exercise import DIFFERENT, Case, Results, cases, difference  # noqa: E402


def cases_on(device: str, small: bool, only: Sequence[str]) -> list[Case]:
    problems.DEVICE = device
    return [case for case in cases(small) if any(part in case[0] for part in only)]


def results_on(device: str, case: Case) -> Results:
    problems.DEVICE = device
    return [result.cpu() for result in case[2]()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", action="append", help="cases whose names contain this")
    parser.add_argument("--small", action="store_true", help="one dtype, one width, few entries")
    parser.add_argument("--fill", action="store_true", help="fresh memory is not a number")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.fill:
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        torch.use_deterministic_algorithms(True, warn_only=True)
    pairs = zip(
        *(cases_on(device, options.small, options.only or [""]) for device in ("cpu", options.device)), strict=True
    )
    count, wrong = 0, 0
    for here, there in pairs:
        found = difference(results_on(options.device, there), results_on("cpu", here), here[1])
        count, wrong = count + 1, wrong + bool(found)
        if found:
            print(f"{here[0]}: {found}", flush=True)
    torch.use_deterministic_algorithms(False)
    problems.DEVICE = "cpu"
    print(f"{count} cases on {options.device}, {wrong} wrong")
    return DIFFERENT if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
