"""Batches on their way to a device: to a GPU in one page-locked block each, on a stream of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarec_fast.tasks import TaskBatch

_ALIGNMENT = 256  # bytes; what CUDA's allocator gives


@dataclass
class Sent:
    """A batch that may still be on its way."""

    batch: TaskBatch
    block: Tensor | None = None  # uint8 [bytes]: where all tensors of the batch lie
    arrived: Any = None  # torch.cuda.Event


class Carrier:
    """Copies batches to one device: `send` may run in a thread of its own, `receive` where the batch is used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: TaskBatch) -> Sent:
        if self._stream is None:
            return Sent(batch if self.device.type == "cpu" else batch.to(self.device))
        with torch.cuda.stream(self._stream):
            moved, block = move_as_one(batch, self.device, pin=True)
            return Sent(moved, block, self._stream.record_event())

    def receive(self, sent: Sent) -> TaskBatch:
        """The batch, for work on the current stream, which waits for it; Python does not."""
        if sent.block is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent.arrived)
            sent.block.record_stream(current)
        return sent.batch


def move_as_one(batch: TaskBatch, device: torch.device, pin: bool) -> tuple[TaskBatch, Tensor]:
    """The batch on `device`, its tensors views of one block that was copied at once; and that block."""
    places: dict[int, int] = {}
    size = 0

    def place(tensor: Tensor) -> Tensor:
        nonlocal size
        places[id(tensor)] = size
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        return tensor

    def part(block: Tensor, tensor: Tensor) -> Tensor:
        begin = places[id(tensor)]
        return block[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    batch._map(place)
    block = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin)
    batch._map(lambda tensor: part(block, tensor).copy_(tensor))
    moved = block.to(device, non_blocking=True)
    return batch._map(lambda tensor: part(moved, tensor)), moved
