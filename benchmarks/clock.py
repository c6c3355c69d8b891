"""How long a call takes on a device: by a GPU's own clock, by the processor's elsewhere. And what the device can do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.floors import Machine

Call = Callable[[], Any]


@dataclass
class Times:
    """Of one call, in ms."""

    cold: list[float]  # each after a buffer of twice the GPU's L2 cache was written
    back_to_back: float  # one call after the other, on average: with rows in L2, and Python as far as it is slower

    @property
    def minimum(self) -> float:
        return min(self.cold)

    @property
    def median(self) -> float:
        return statistics.median(self.cold)


class Clock:
    """Times calls on one device.

    Args:
        device: A GPU, or the CPU, where "cold" means no more than one at a time.
        by_events: False for calls whose work is not on torch's stream: they wait for it themselves.
    """

    def __init__(self, device: torch.device, by_events: bool = True) -> None:
        self.device, self.by_events = device, by_events and device.type == "cuda"
        self._flush: Tensor | None = None
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, call: Call, seconds: float, most: int = 200) -> Times:
        """About half of the seconds for either way, at least three calls each."""
        self.wait()
        begin = time.perf_counter()
        call()
        self.wait()
        usual = max(time.perf_counter() - begin, 1e-6)
        count = max(3, min(most, int(seconds / 2 / usual)))
        return Times(self._cold(call, count), self._back_to_back(call, count))

    def _cold(self, call: Call, count: int) -> list[float]:
        if not self.by_events:
            return [self._by_hand(call) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            if self._flush is not None:
                self._flush.zero_()
            begin.record()
            call()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) for begin, end in events]

    def _by_hand(self, call: Call) -> float:
        if self._flush is not None:
            self._flush.zero_()
        self.wait()
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    def _back_to_back(self, call: Call, count: int) -> float:
        self.wait()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        self.wait()
        return 1e3 * (time.perf_counter() - begin) / count


def capture(call: Call) -> tuple[Call, Any]:
    """The call as a CUDA graph, and its results, which every replay writes anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def measure(device: torch.device, size: int = 1 << 30, seconds: float = 1.0) -> Machine:
    """Bandwidth of a copy, bytes read and written, and of a sum; multiply-adds of a matrix product in float32."""
    clock = Clock(device)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(clock, lambda: target.copy_(source), seconds / 3) / 1e9
    read = source.nbytes / _best(clock, source.sum, seconds / 3) / 1e9
    width = 4096 if device.type == "cuda" else 256
    left, right, out = (torch.ones(width, width, device=device) for _ in range(3))
    product = _best(clock, lambda: torch.mm(left, right, out=out), seconds / 3)
    return Machine(copy, read, width**3 / product / 1e9)


def _best(clock: Clock, call: Call, seconds: float) -> float:
    """Seconds of the fastest call."""
    return clock.times(call, seconds).minimum / 1e3
