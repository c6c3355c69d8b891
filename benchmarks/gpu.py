"""The benchmark on a GPU: ours and the peers that make sense there, called and as CUDA graphs, beside copying.

    python -m benchmarks.gpu --seconds 150 --out runs/gpu

Equality first, as everywhere (docs/benchmarks.md). What compiles comes last, as far as the seconds reach.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock as clocks
from benchmarks import environment, measure, tables
from benchmarks.floors import Machine, bytes_once, floor_of
from benchmarks.implementations import (
    OURS,
    Outputs,
    Peer,
    Step,
    hand_adjoint,
    hand_adjoint_full,
    hand_batched,
    jax_jit,
    metarec_fast,
    mlp,
    serving,
    torch_func,
    training,
)
from benchmarks.workloads import MLP, ON_A_GPU, Problem, Workload

MODULES = (metarec_fast, serving, training, hand_adjoint, hand_adjoint_full, hand_batched, torch_func, mlp, jax_jit)
PEERS: tuple[Peer, ...] = tuple(peer for module in MODULES for peer in module.PEERS)
GRAPH = ", CUDA graph"
MEMORY_ERRORS = (torch.OutOfMemoryError,)


@dataclass
class Run:
    """What is known of one workload so far."""

    work: Workload
    machine: Machine
    device: torch.device
    moved: float = 0.0  # bytes that must move once
    peers: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    floor: dict[str, float] = field(default_factory=dict)

    def result(self) -> dict[str, Any]:
        """As JSON and the tables have it."""
        ours = min((peer["min_ms"] for peer in self.peers if peer["name"].startswith(OURS)), default=None)
        for peer in self.peers:
            peer["ratio_to_ours"] = None if ours is None else peer["min_ms"] / ours
        return {
            "name": self.work.name, "sizes": self.work.sizes, "tasks": self.work.num_tasks,
            "items": self.work.num_items, "dim": self.work.dim, "support": self.work.support,
            "query": self.work.query, "steps": self.work.steps, "floor": self.floor, "load": None, "cpus": 1,
            "peers": self.peers, "skipped": self.skipped,
        }  # fmt: skip

    def add(self, name: str, times: clocks.Times, first: float, peak: float | None, compiles: bool) -> None:
        achieved = self.moved / (1e6 * times.minimum)
        self.peers.append({
            "name": name, "min_ms": times.minimum, "median_ms": times.median, "back_to_back_ms": times.back_to_back,
            "calls": len(times.cold), "achieved_gb_s": achieved, "share_of_copy": achieved / self.machine.copy,
            "ratio_to_floor": times.minimum / self.floor["milliseconds"], "ratio_to_ours": None, "peak_mb": peak,
            "first_call_s": first, "compiled": compiles,
        })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device, end = torch.device(options.device), time.monotonic() + options.seconds
    machine = clocks.measure(device, size=1 << 20 if options.tiny else 1 << 30, seconds=0.05 if options.tiny else 1.0)
    report: dict[str, Any] = {"environment": describe(device), "machine": machine._asdict(), "workloads": []}
    print("\n".join(f"{key}: {value}" for key, value in report["environment"].items()))
    print(tables.machine_line(machine), flush=True)

    runs = [Run(tiny(work) if options.tiny else work, machine, device) for work in _chosen(options.workload)]
    failed: list[str] = []
    for compiles in (False, True):
        for run in runs:
            failed += extend(run, compiles, options, end)
            report["workloads"] = [each.result() for each in runs if each.floor]
            _write(report, options.out)
            if run.floor and (compiles or not _compiled(run.work, options.peer)):
                print(tables.terminal(run.result()), flush=True)
    for run in runs:
        if not run.floor:
            failed.append(f"{run.work.name}: not reached in the time given")
    for reason in failed:
        print(f"FAILED: {reason}")
    print(f"{options.out}/results.json, {options.out}/table.md")
    return 1 if failed else 0


def extend(run: Run, compiles: bool, options: argparse.Namespace, end: float) -> list[str]:
    """Adds the peers that compile, or those that do not; returns what went wrong."""
    wanted = [peer for peer in _able(run.work, options.peer) if peer.compiles == compiles]
    failed: list[str] = []
    if not wanted:
        return failed
    if time.monotonic() > end:
        run.skipped |= {peer.name: "not reached in the time given" for peer in wanted}
        return failed
    if compiles:
        torch.compiler.reset()
    problem = Problem.draw(run.work, device=run.device)
    run.moved = bytes_once(problem)
    run.floor = floor_of(problem, run.machine, run.machine.copy)._asdict()
    ours = next(peer for peer in _able(run.work, None) if peer.name == OURS)
    expected = _copied(ours.prepare(problem)())
    for peer in wanted:
        reason = peer.missing() if time.monotonic() < end else "not reached in the time given"
        if reason is not None:
            run.skipped[peer.name] = reason
            continue
        try:
            time_peer(run, peer, problem, expected, options.seconds_each)
        except AssertionError as error:
            failed.append(f"{run.work.name}: {peer.name} is not equal: {error}")
        except MEMORY_ERRORS:
            run.skipped[peer.name] = "needs more memory than the GPU has left"
        except Exception as error:  # whatever a peer's compiler may raise; ours must not
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            run.skipped[peer.name] = text
            if peer.name.startswith(OURS):
                failed.append(f"{run.work.name}: {peer.name}: {text}")
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def time_peer(run: Run, peer: Peer, problem: Problem, expected: Outputs, seconds: float) -> None:
    """Compares, then times the peer as it is called and, on a GPU, as a CUDA graph."""
    clock = clocks.Clock(run.device, by_events=peer.name != "JAX jit")
    begin = time.perf_counter()
    step = peer.prepare(problem)
    outputs = step()
    clock.wait()
    first = time.perf_counter() - begin
    measure.check_equal(outputs, expected, run.work)
    del outputs
    run.add(peer.name, clock.times(step, seconds), first, _peak(step, run.device), peer.compiles)
    if run.device.type != "cuda" or not clock.by_events or run.work.kind == "train":
        return  # a training step samples on the CPU
    try:
        replay, outputs = clocks.capture(step)
    except RuntimeError as error:
        run.skipped[peer.name + GRAPH] = f"cannot be captured: {str(error).splitlines()[0]}"
        if peer.name.startswith(OURS):
            raise
        return
    replay()
    measure.check_equal(outputs, expected, run.work)
    run.add(peer.name + GRAPH, clock.times(replay, seconds), first, None, peer.compiles)


def profile(device: torch.device, work: Workload) -> None:
    """Each main operator once, between marks that `ncu --profile-from-start off` looks for."""
    problem = Problem.draw(work, device=device)
    steps: list[Step] = [metarec_fast.prepare(replace(problem, workload=work))]
    steps.append(metarec_fast.prepare(replace(problem, workload=replace(work, adapt="all", inner_lr=0.02))))
    serve = Problem.draw(replace(work, kind="serve", num_tasks=256, query=0, prior_pull=0.1), device=device)
    steps.append(serving.ours(serve))
    steps.append(_on_tensor_cores(serving.ours(serve)))
    steps.append(next(peer for peer in training.PEERS if peer.name == OURS).prepare(replace(problem)))
    tower = replace(MLP, num_tasks=work.num_tasks, num_items=work.num_items, dim=work.dim, steps=work.steps)
    steps.append(metarec_fast.prepare(Problem.draw(tower, device=device)))
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for step in steps:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _on_tensor_cores(step: Step) -> Step:
    def run() -> Outputs:
        asked = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision(asked)

    return run


def describe(device: torch.device) -> dict[str, str]:
    """The GPU, beside what every run says."""
    if device.type != "cuda":
        return environment.describe(torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    return {
        "GPU": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 1e9:.0f} GB, {properties.L2_cache_size / 1e6:.0f} MB of L2",
        "CUDA": str(torch.version.cuda),
        **environment.describe(torch.get_num_threads()),
    }


def tiny(work: Workload) -> Workload:
    """So small that the CPU does it in no time: to see that everything runs."""
    support = 4 if isinstance(work.support, int) else (2, 5)
    return replace(
        work, num_tasks=min(work.num_tasks, 3), num_items=400, dim=8, support=support, query=min(work.query, 3),
        steps=min(work.steps, 3),
    )  # fmt: skip


def _able(work: Workload, wanted: str | None) -> list[Peer]:
    return [
        peer
        for peer in PEERS
        if peer.effort(work) is not None and (wanted is None or wanted in peer.name or peer.name == OURS)
    ]


def _compiled(work: Workload, wanted: str | None) -> bool:
    return any(peer.compiles for peer in _able(work, wanted))


def _copied(outputs: Outputs) -> Outputs:
    """What a training step changes further must not change what others are compared with."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in outputs.items()}


def _peak(step: Step, device: torch.device) -> float | None:
    """MB that one call adds to what is allocated."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def _chosen(names: str | None) -> list[Workload]:
    if not names:
        return list(ON_A_GPU)
    chosen = [work for work in ON_A_GPU if {work.name, work.group} & set(names.split(","))]
    if not chosen:
        raise SystemExit(f"--workload: expected some of {', '.join(work.name for work in ON_A_GPU)}, got {names!r}")
    return chosen


def _write(report: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (directory / "table.md").write_text(tables.markdown(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu only shows that everything runs")
    parser.add_argument("--workload", help="names, separated by commas (default: all)")
    parser.add_argument("--peer", help="only implementations whose name contains this, beside ours")
    parser.add_argument("--seconds", type=float, default=150.0, help="of everything; what compiles comes last")
    parser.add_argument("--seconds-each", type=float, default=0.3, help="of timing one implementation")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, whose times mean nothing")
    parser.add_argument("--profile", action="store_true", help="no times: each main operator once, for ncu")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of JSON and Markdown")
    return parser


def _main() -> int:
    options = _parser().parse_args()
    if not options.profile:
        return main()
    work = next(work for work in ON_A_GPU if work.name == "tasks-4096")
    profile(torch.device(options.device), tiny(work) if options.tiny else work)
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
