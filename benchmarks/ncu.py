"""What Nsight Compute measured, a line for each kernel:  python -m benchmarks.ncu FILE.csv"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable
from pathlib import Path

METRICS = {
    "Duration": "time",
    "DRAM Throughput": "DRAM",
    "L2 Cache Throughput": "L2",
    "Compute (SM) Throughput": "SM",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
    "Grid Size": "blocks",
}


def kernels(lines: Iterable[str]) -> list[dict[str, str]]:
    """Of each launch the kernel's name and those metrics that are there, with their units."""
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        launch = found.setdefault(row["ID"], {"kernel": short(row["Kernel Name"])})
        title = METRICS.get(row["Metric Name"])
        if title is not None:
            unit = row["Metric Unit"] if row["Metric Unit"] in ("%", "us", "ms", "ns", "usecond", "msecond") else ""
            launch[title] = f"{row['Metric Value']} {unit}".strip()
    return list(found.values())


def short(name: str) -> str:
    """Without namespaces and arguments."""
    name = re.sub(r"\(.*\)$", "", re.sub(r"metarec_fast::(cuda::)?|\(anonymous namespace\)::|^void ", "", name))
    return name if len(name) <= 60 else name[:57] + "..."


def table(found: list[dict[str, str]]) -> str:
    titles = ["kernel", *dict.fromkeys(title for launch in found for title in launch if title != "kernel")]
    lines = [titles, ["---"] * len(titles), *([launch.get(title, "") for title in titles] for launch in found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(path: str) -> int:
    found = kernels(Path(path).read_text().splitlines())
    if not found:
        print(f"{path}: no kernel was profiled; what the profiler said:")
        print("\n".join(Path(path).read_text().splitlines()[:10]))
        return 1
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
