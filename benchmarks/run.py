"""Compares every implementation with ours, then times them by turns: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import charts, environment, measure, memory, tables
from benchmarks.floors import Machine, bandwidth_of, floor_of, measure_machine
from benchmarks.implementations import OURS, PEERS, Outputs, Peer, Step
from benchmarks.workloads import QUICK, WORKLOADS, Problem, Workload

EFFORTS = ("quick", "normal", "all")
LARGEST_TABLE = 2e9  # bytes of an item table that `--all` alone makes


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.seconds is None:
        options.seconds = 2.0 if options.quick else 10.0
    options.no_memory |= options.quick
    environment.keep_freed_memory()
    torch.set_num_threads(options.threads)
    effort = "quick" if options.quick else "all" if options.all else "normal"
    chosen = _chosen(options, effort)
    report: dict[str, Any] = {"environment": environment.describe(options.threads), "effort": effort, "workloads": []}
    print("\n".join(f"{key}: {value}" for key, value in report["environment"].items()))
    machine = measure_machine()
    report["machine"] = machine._asdict()
    print(tables.machine_line(machine))

    for work in chosen:
        machine = machine.better(measure_machine(seconds=0.05))
        report["machine"] = machine._asdict()
        result = run_workload(work, effort, machine, options)
        report["workloads"].append(result)
        print(tables.terminal(result), flush=True)
        _write(report, options.out)
    written = ", ".join(str(path) for path in charts.write(report, options.out))
    print(f"{options.out}/results.json, {options.out}/results.md, {written or charts.MISSING}")


def run_workload(work: Workload, effort: str, machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one workload, as JSON has it."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # it compiles a function for eight sizes at most, and then no more
    problem = Problem.draw(work)
    steps, first, skipped = _prepare(problem, effort, options.peer)
    bandwidth = bandwidth_of(problem, machine)
    timings = measure.time_interleaved(steps, first, options.seconds) if steps else {}
    # Twice, for others may be at work on this machine: the better one is the bound.
    floor = floor_of(problem, machine, max(bandwidth, bandwidth_of(problem, machine)))
    del problem
    compiled = {peer.name for peer in PEERS if peer.compiles}
    peers = [
        {
            "name": name,
            "min_ms": timing.minimum,
            "median_ms": timing.median,
            "calls": len(timing.calls),
            "first_call_s": timing.first,
            "compiled": name in compiled,
            "peak_mb": None
            if options.no_memory or work.group in charts.SWEEPS
            else memory.peak_megabytes(work.name, name, options.threads, options.quick),
            "ratio_to_floor": timing.minimum / floor.milliseconds,
            "ratio_to_ours": timing.minimum / timings[OURS].minimum if OURS in timings else None,
        }
        for name, timing in timings.items()
    ]
    size = {
        "tasks": work.num_tasks,
        "items": work.num_items,
        "dim": work.dim,
        "support": work.support,
        "query": work.query,
        "steps": work.steps,
    }
    return {
        "name": work.name,
        "sizes": work.sizes,
        **size,
        "floor": floor._asdict(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpus": os.cpu_count() or 1,
        "peers": peers,
        "skipped": skipped,
    }


def _prepare(
    problem: Problem, effort: str, wanted: str | None
) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """Steps that agree with the first of them, seconds of their first calls, and why others are left out."""
    steps: dict[str, Step] = {}
    first: dict[str, float] = {}
    skipped: dict[str, str] = {}
    expected: Outputs | None = None
    for peer in PEERS:
        if peer.effort(problem.workload) is None or not (wanted is None or wanted in peer.name or peer.name == OURS):
            continue
        reason = peer.missing() or _too_long(peer, problem.workload, effort)
        if reason is not None:
            skipped[peer.name] = reason
            continue
        begin = time.perf_counter()
        step = peer.prepare(problem)
        outputs = step()
        steps[peer.name], first[peer.name] = step, time.perf_counter() - begin
        expected = outputs if expected is None else expected
        try:
            measure.check_equal(outputs, expected, problem.workload)
        except AssertionError as error:
            raise AssertionError(f"{problem.workload.name}: {peer.name} is not equal: {error}") from error
    return steps, first, skipped


def _too_long(peer: Peer, work: Workload, effort: str) -> str | None:
    needed = peer.effort(work)
    if needed is None or EFFORTS.index(needed) <= EFFORTS.index(effort):
        return None
    option = "--quick" if effort == "quick" else "a run without --all"
    return f"{'compiles' if peer.compiles else 'runs'} too long for {option}"


def _chosen(options: argparse.Namespace, effort: str) -> list[Workload]:
    known = QUICK if options.quick else WORKLOADS
    if not options.workload:
        tables_fit = (each for each in known if effort == "all" or each.num_items * each.dim * 4 < LARGEST_TABLE)
        return list(tables_fit)
    names = options.workload.split(",")
    for name in names:
        if not any(name in (each.name, each.group) for each in known):
            every = ", ".join(dict.fromkeys(each.group for each in known))
            raise SystemExit(f"--workload: expected one of {every}, got {name!r}")
    return [each for each in known if each.name in names or each.group in names]


def _write(report: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (directory / "results.md").write_text(tables.markdown(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="of torch, and so of everybody")
    parser.add_argument("--workload", help="names or groups, separated by commas (default: all)")
    parser.add_argument("--peer", help="only implementations whose name contains this, beside ours")
    parser.add_argument(
        "--seconds", type=float, default=None, help="of timing for each workload (default: 10, with --quick: 2)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and few compiled peers: within 2 minutes")
    parser.add_argument("--all", action="store_true", help="also what compiles for minutes, and tables beyond 2 GB")
    parser.add_argument("--no-memory", action="store_true", help="no process for each implementation that measures it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of JSON, Markdown and charts")
    return parser


if __name__ == "__main__":
    main()
