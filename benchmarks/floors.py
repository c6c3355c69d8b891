"""What the hardware allows: bandwidths and peak measured on the spot, and the least that a workload has to do.

floor = bytes once / measured bandwidth + multiply-adds / measured peak      (not overlapped)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.workloads import Problem, Workload

FLOAT, ID = 4, 8  # bytes


class Machine(NamedTuple):
    """Measured with the number of threads that torch is set to."""

    copy: float  # GB/s of a large copy, read and written bytes
    read: float  # GB/s of reading a large tensor once
    multiply_adds: float  # 10⁹ a second, of the best matrix product that fits into L2

    def better(self, other: Machine) -> Machine:
        """The larger of both figures each: others may have been at work during one of the measurements."""
        return Machine(*map(max, self, other))


class Floor(NamedTuple):
    """The least time of a workload, in ms, and what it consists of."""

    milliseconds: float
    megabytes: float
    bandwidth: float  # GB/s: of gathering this workload's rows, or of reading for "serve"
    multiply_adds: float  # 10⁶


def best_time(call: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit into `seconds`, at least five."""
    call()
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - begin), calls + 1
    return best


def measure_machine(seconds: float = 0.15) -> Machine:
    """Each figure is the best of many calls within `seconds`."""
    source = torch.ones(2**25)  # 128 MiB: beyond the caches
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best_time(lambda: target.copy_(source), seconds) / 1e9
    matrix, vector = source.view(-1, 64), torch.ones(64)
    read = source.nbytes / min(best_time(source.sum, seconds), best_time(lambda: matrix @ vector, seconds)) / 1e9
    peak = 0.0
    for size in (128, 192, 256, 384, 512):
        left, right, out = torch.ones(size, size), torch.ones(size, size), torch.empty(size, size)
        product = partial(torch.mm, left, right, out=out)
        peak = max(peak, size**3 / best_time(product, seconds) / 1e9)
    return Machine(copy, read, peak)


def gather_bandwidth(problem: Problem) -> float:
    """GB/s, read and written, of copying the rows of this very batch from the table into one buffer that is there."""
    ids = problem.batch.support.items
    if problem.batch.query is not None:
        ids = torch.cat([ids, problem.batch.query.items])
    rows = torch.empty(len(ids), problem.workload.dim)
    gather = partial(torch.index_select, problem.item_table, 0, ids, out=rows)
    return 2 * rows.nbytes / best_time(gather, seconds=0.15) / 1e9


def bandwidth_of(problem: Problem, machine: Machine) -> float:
    """GB/s at which this workload's bytes can move."""
    return machine.read if problem.workload.kind == "serve" else gather_bandwidth(problem)


def floor_of(problem: Problem, machine: Machine, bandwidth: float) -> Floor:
    moved, multiply_adds = bytes_once(problem), count_multiply_adds(problem)
    seconds = moved / (1e9 * bandwidth) + multiply_adds / (1e9 * machine.multiply_adds)
    return Floor(1e3 * seconds, moved / 1e6, bandwidth, multiply_adds / 1e6)


def bytes_once(problem: Problem) -> float:
    """Everything that has to be read or written, once: rows, biases, ids, targets, gradient rows."""
    work = problem.workload
    row = (work.dim + (0 if work.kind == "mlp" else 1)) * FLOAT
    if work.kind == "serve":
        return work.num_items * row
    pairs = 2 if work.loss == "bpr" else 1
    support = len(problem.batch.support) * pairs
    query = 0 if problem.batch.query is None else len(problem.batch.query) * pairs
    read = (support + query) * (row + ID + FLOAT)
    if work.kind == "train":  # parameter and two moments are read and written; gradient rows need not exist
        return read + (support + query) * 5 * row
    if work.kind == "reptile":
        return read + (support * row if work.adapt == "all" else 0)
    if work.kind == "dense":  # gradient rows need not exist, but every row of the table does
        return read + work.num_items * row
    users = 2 * work.num_tasks * row if work.kind == "mlp" else 0
    return read + (query if work.first_order else support + query) * row + users


def count_multiply_adds(problem: Problem) -> float:
    """Of the cheapest form of the inner loop, its adjoint and the query; full adaptation by rank-one corrections."""
    work = problem.workload
    sizes, counts = problem.batch.support.sizes().unique(return_counts=True)
    if work.kind == "serve":
        return work.num_items * (work.dim + 1)
    if work.kind == "mlp":
        return work.num_tasks * _tower(work)
    inner = sum(count * _inner(work, size) for size, count in zip(sizes.tolist(), counts.tolist(), strict=True))
    return inner + work.num_tasks * work.query * 3 * (work.dim + 1)


def _tower(work: Workload) -> float:
    """Multiply-adds of one task under a tower, the first layer by products of inputs, and its adjoint."""
    S, Q, D, K, width = work.max_support, work.query, work.dim, work.steps, work.hidden[0]
    deeper = work.hidden[0] * work.hidden[1] + work.hidden[1]  # weights behind the first layer
    inputs = 3 * (S + Q) * D * width + (1.5 * S + 3 * Q) * S * D
    return inputs + K * S * (3 * S * width + 9 * deeper) + Q * (3 * S * width + 3 * deeper)


def _inner(work: Workload, S: int) -> float:
    """Multiply-adds of one task with S support entries."""
    D, K = work.dim + 1, work.steps
    forward_only = work.kind == "reptile" or work.first_order
    direct = (2 if forward_only else 6) * K * S * D
    if work.adapt == "all":  # rows change by rank-one terms: the direct form's products, and their history's
        return direct + (1 if forward_only else 3) * K * (K - 1) * (S + D)
    gram = S * (S + 1) / 2 * D + 2 * S * D + K * S * S
    normal = S * D * D / 2 + K * D * D if work.loss == "squared" else float("inf")
    if not forward_only:
        gram += 4 * S * D + 2 * K * S * S + S * S * D
        normal += 2 * S * D * D + 3 * K * D * D
    return min(direct, gram, normal)
