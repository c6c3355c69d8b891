"""Results as text: a table for the terminal, and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.floors import Machine
from benchmarks.implementations import OURS

COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("implementation", "name", lambda peer: peer["name"]),
    ("min ms", "min_ms", lambda peer: f"{peer['min_ms']:.3f}"),
    ("median ms", "median_ms", lambda peer: f"{peer['median_ms']:.3f}"),
    ("one after the other ms", "back_to_back_ms", lambda peer: f"{peer['back_to_back_ms']:.3f}"),
    ("GB/s", "achieved_gb_s", lambda peer: f"{peer['achieved_gb_s']:.0f}"),
    ("of copying", "share_of_copy", lambda peer: f"{100 * peer['share_of_copy']:.0f} %"),
    ("of the floor", "ratio_to_floor", lambda peer: _ratio(peer["ratio_to_floor"])),
    ("of ours", "ratio_to_ours", lambda peer: _ratio(peer["ratio_to_ours"])),
    ("peak MB", "peak_mb", lambda peer: "–" if peer["peak_mb"] is None else f"{peer['peak_mb']:.1f}"),
    ("first call s", "first_call_s", lambda peer: f"{peer['first_call_s']:.1f}" if peer["compiled"] else ""),
)
"""Title, what it shows, and how; a run shows those that it measured."""
NOISY = 3  # medians of that many minima: on a quiet machine they are below 1.5
BELOW = 0.7  # of the floor: more than moving and computing at once explain


def machine_line(machine: Machine) -> str:
    return (
        f"copy {machine.copy:.1f} GB/s, read {machine.read:.1f} GB/s, "
        f"{machine.multiply_adds:.0f} · 10⁹ multiply-adds/s, measured now"
    )


def rows_of(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The titles, then a row for each implementation, fastest first."""
    peers = sorted(result["peers"], key=lambda peer: peer["min_ms"])
    shown = [(title, show) for title, key, show in COLUMNS if not peers or key in peers[0]]
    return [tuple(title for title, _ in shown), *(tuple(show(peer) for _, show in shown) for peer in peers)]


def verdict(result: dict[str, Any]) -> str:
    """Who wins, in a sentence, whoever it is."""
    peers = sorted(result["peers"], key=lambda peer: peer["min_ms"])
    others = [peer for peer in peers if not peer["name"].startswith(OURS)]
    ours = next((peer for peer in peers if peer["name"].startswith(OURS)), None)
    if ours is None:
        return f"{OURS}: no result. {result['skipped'].get(OURS, '')}".strip()
    if not others:
        return f"{OURS} alone."
    best = others[0]
    if best["min_ms"] < ours["min_ms"]:
        return f"A PEER WINS: {best['name']}, {ours['min_ms'] / best['min_ms']:.2f} times as fast as {ours['name']}."
    return f"{ours['name']} is {best['min_ms'] / ours['min_ms']:.2f} times as fast as {best['name']}, the fastest peer."


def noise(result: dict[str, Any]) -> str:
    """A warning where times or floor say more about what else the machine does."""
    signs = []
    scattered = [peer["name"] for peer in result["peers"] if peer["median_ms"] > NOISY * peer["min_ms"]]
    if scattered:
        signs.append(f"medians above {NOISY} minima ({'; '.join(scattered)})")
    if result["load"] is not None and result["load"] > result["cpus"] + 0.5:
        signs.append(f"load {result['load']:.1f} on {result['cpus']} CPUs")
    if any(peer["ratio_to_floor"] < BELOW for peer in result["peers"]):
        signs.append("times below the floor, which was measured too slow")
    return f"NOISY: {', '.join(signs)}." if signs else ""


def left_out(result: dict[str, Any]) -> list[str]:
    """A line for each reason: "reason: names"."""
    names: dict[str, list[str]] = {}
    for name, reason in result["skipped"].items():
        names.setdefault(reason, []).append(name)
    return [f"{reason}: {'; '.join(each)}" for reason, each in names.items()]


def floor_line(result: dict[str, Any]) -> str:
    floor = result["floor"]
    return (
        f"floor {floor['milliseconds']:.3f} ms: {floor['megabytes']:.1f} MB at {floor['bandwidth']:.1f} GB/s, "
        f"{floor['multiply_adds']:.1f} million multiply-adds"
    )


def terminal(result: dict[str, Any]) -> str:
    rows = rows_of(result)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["", f"{result['name']}: {result['sizes']}", f"  {floor_line(result)}"]
    lines += ["  " + "  ".join(_aligned(row, widths)).rstrip() for row in rows]
    lines += [f"  {sentence}" for sentence in (verdict(result), noise(result)) if sentence]
    lines += [f"  left out, {line}" for line in left_out(result)]
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Benchmark", "", *(f"- {key}: {value}" for key, value in report["environment"].items())]
    lines += [f"- {machine_line(Machine(**report['machine']))}", "", *_summary(report), ""]
    for result in report["workloads"]:
        lines += [f"## {result['name']}", "", f"{result['sizes']}; {floor_line(result)}.", ""]
        header, *rows = rows_of(result)
        lines += [_bar(header), _bar(["---"] + ["---:"] * (len(header) - 1)), *map(_bar, rows), ""]
        lines += [f"{verdict(result)} {noise(result)}".strip(), ""]
        lines += [f"- left out, {line}" for line in left_out(result)]
        lines += [""] if result["skipped"] else []
    return "\n".join(lines)


def _summary(report: dict[str, Any]) -> list[str]:
    lines = [_bar(("workload", OURS + " ms", "of the floor", "result")), _bar(("---", "---:", "---:", "---"))]
    for result in report["workloads"]:
        ours = min((peer for peer in result["peers"] if peer["name"].startswith(OURS)), key=_time, default=None)
        time = "–" if ours is None else f"{ours['min_ms']:.3f}"
        ratio = _ratio(None if ours is None else ours["ratio_to_floor"])
        lines.append(_bar((result["name"], time, ratio, verdict(result))))
    return lines


def _time(peer: dict[str, Any]) -> float:
    time: float = peer["min_ms"]
    return time


def _ratio(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "–"
    return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if i == 0 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
