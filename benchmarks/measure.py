"""Equality, time and memory of implementations on one problem."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.implementations import Outputs, Step
from benchmarks.implementations.training import OUTER_LR
from benchmarks.workloads import Workload
from metarec_fast import SparseRows

CALLS_IN_A_TURN = 5


@dataclass
class Timing:
    """Times of one implementation, in ms; `first` is the first call, compilation included."""

    first: float
    calls: list[float] = field(default_factory=list)

    @property
    def minimum(self) -> float:
        return min(self.calls)

    @property
    def median(self) -> float:
        return statistics.median(self.calls)


def tolerance(work: Workload) -> float:
    """How far results may be apart, relative to the largest number of a tensor.

    A number is a sum of at most n = T (S + Q) products, whose roundings of 2⁻²⁴ each add up like √n, and it went
    through K steps; 16 times that lets the largest of many thousand errors pass.
    """
    terms = work.num_tasks * (work.max_support + work.query)
    return 16 * 2**-24 * (terms**0.5 + work.steps)


def check_equal(actual: Outputs, expected: Outputs, work: Workload) -> None:
    """Raises AssertionError, naming the output, unless all are equal up to rounding."""
    if set(actual) != set(expected):
        raise AssertionError(f"outputs {sorted(actual)} instead of {sorted(expected)}")
    for name, value in actual.items():
        if name == "learned":
            _check_learned(value, expected[name], work)
            continue
        left, right = _comparable(value), _comparable(expected[name])
        left = SparseRows(*(part.to(right.rows.device) for part in left))
        ids = torch.unique(torch.cat([left.ids, right.ids]))
        found, wanted = _sums(left, ids), _sums(right, ids)
        if found.shape != wanted.shape:
            raise AssertionError(f"{name}: shape {[*found.shape]} instead of {[*wanted.shape]}")
        # A unit of a tower that is within rounding of 0 is on for one and off for the other: a few numbers differ by
        # more, and all of them together by no more than the rest.
        order = 2 if work.kind == "mlp" else torch.inf
        largest, error = (float(torch.linalg.vector_norm(each, order)) for each in (wanted, found - wanted))
        # Reptile's moves are differences of parameters, which are of size 1, and round as those do.
        scale = max(largest, 1.0) if work.kind == "reptile" else largest
        if not error <= tolerance(work) * scale:
            what = "norm" if work.kind == "mlp" else "largest number"
            raise AssertionError(f"{name}: differs by {error:.2e}, where the {what} is {largest:.2e}")


def time_interleaved(
    steps: Mapping[str, Step], first: Mapping[str, float], seconds: float, least: int = 3
) -> dict[str, Timing]:
    """Times the steps by turns: a call that is not counted, for the caches, then five that are; slow ones one call.

    Each gets an equal share of `seconds`; one that has used its share waits, after at least `least` counted calls.
    """
    timings = {name: Timing(first[name]) for name in steps}
    share, spent = seconds / len(steps), dict.fromkeys(steps, 0.0)
    usual_seconds = {name: _seconds(step) for name, step in steps.items()}
    gc.collect()
    gc.disable()
    try:
        while True:
            waiting = [name for name in steps if spent[name] < share or len(timings[name].calls) < least]
            if not waiting:
                return timings
            for name in waiting:
                begin = time.perf_counter()
                usual = timings[name].minimum / 1e3 if timings[name].calls else usual_seconds[name]
                if usual < share / 10:
                    steps[name]()
                for _ in range(CALLS_IN_A_TURN if usual < share / 50 else 1):
                    start = time.perf_counter()
                    steps[name]()
                    timings[name].calls.append(1e3 * (time.perf_counter() - start))
                spent[name] += time.perf_counter() - begin
    finally:
        gc.enable()


def _seconds(step: Step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _comparable(value: Any) -> SparseRows:
    """Anything as rows in float64: a tensor as row 0 alone."""
    if isinstance(value, Sequence):
        ids = torch.cat([each.ids for each in value])
        return SparseRows(ids, torch.cat([_double(each.rows).to(ids.device) for each in value]))
    row = _double(value)[None]
    return SparseRows(torch.zeros(1, dtype=torch.int64, device=row.device), row)


def _double(value: Any) -> Tensor:
    """Other libraries' arrays too."""
    return value.detach().double() if isinstance(value, Tensor) else torch.from_numpy(np.array(value)).double()


def _sums(rows: SparseRows, ids: Tensor) -> Tensor:
    """The sum of the rows of each id, [ids, ...]."""
    place = torch.searchsorted(ids, rows.ids)
    return rows.rows.new_zeros(len(ids), *rows.rows.shape[1:]).index_add_(0, place, rows.rows)


def _check_learned(left: Tensor, right: Tensor, work: Workload) -> None:
    """Tables after Adam, whose step does not shrink with the gradient: where that is rounding, so is the step's sign.

    So single numbers may differ by a whole step, but on average over those touched by no more than a hundredth.
    """
    touched = work.num_tasks * (work.max_support + work.query) * work.dim
    difference = float((left - right).abs_().sum()) / touched
    if not difference <= 0.01 * OUTER_LR:
        raise AssertionError(f"learned: the tables differ by {difference:.2e} on average, after steps of {OUTER_LR}")
