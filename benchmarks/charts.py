"""Charts of the results: time over K, T and N, and the ratio to the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.implementations import OURS

MISSING = "no charts: they need matplotlib, pip install 'metarec-fast[plots]'"
SWEEPS = {"deep": ("steps", "inner steps K"), "tasks": ("tasks", "tasks T"), "items": ("items", "items N")}


def write(report: dict[str, Any], directory: Path) -> list[Path]:
    """PNG files of what the report has; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for group, (key, label) in SWEEPS.items():
        results = [each for each in report["workloads"] if each["name"].partition("-")[0] == group]
        if len(results) < 2:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for name in dict.fromkeys(peer["name"] for each in results for peer in each["peers"]):
            points = [(each[key], peer["min_ms"]) for each in results for peer in each["peers"] if peer["name"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == OURS else 1)
        floors = [(each[key], each["floor"]["milliseconds"]) for each in results]
        axes.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms, minimum")
        axes.legend(fontsize="small")
        written.append(_save(figure, directory / f"time_over_{key}.png"))

    results = [each for each in report["workloads"] if each["peers"]]
    if results:
        figure, axes = pyplot.subplots(figsize=(7, 1 + 0.35 * len(results)), layout="constrained")
        names = [each["name"] for each in results]
        for position, each in enumerate(results):
            best = min((peer for peer in each["peers"] if not peer["name"].startswith(OURS)), key=_time, default=None)
            ours = next((peer for peer in each["peers"] if peer["name"] == OURS), None)
            for peer, color, label in ((ours, "tab:blue", OURS), (best, "tab:orange", "fastest peer")):
                if peer is not None:
                    axes.plot(peer["ratio_to_floor"], position, "o", color=color, label=label)
        axes.set(xscale="log", xlabel="time / floor", yticks=range(len(names)), yticklabels=names)
        axes.axvline(1, color="black", linestyle=":")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize="small")
        axes.invert_yaxis()
        written.append(_save(figure, directory / "ratio_to_floor.png"))
    return written


def _time(peer: dict[str, Any]) -> float:
    return peer["min_ms"]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
