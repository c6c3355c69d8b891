"""Ragged rows of many tasks, one task after the other: padding them, and summing them task by task."""

from __future__ import annotations

import torch
from torch import Tensor


def pad(rows: Tensor, offsets: Tensor, fill: float = 0.0) -> Tensor:
    """Rows [n, ...] as [T, S, ...], S the size of the largest task; `fill` after the last row of each task."""
    sizes = offsets.diff()
    width = int(sizes.max()) if sizes.numel() else 0
    padded = rows.new_full((len(sizes), width, *rows.shape[1:]), fill)
    padded[_filled(sizes, width)] = rows
    return padded


def unpad(padded: Tensor, offsets: Tensor) -> Tensor:
    """The rows [n, ...] of which `pad` made [T, S, ...]."""
    return padded[_filled(offsets.diff(), padded.shape[1])]


def sum_by_task(values: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    """Sums of values [n] over the entries of each task, [T]; one after the other, so batching changes no bit."""
    return values.new_zeros(num_tasks).index_add_(0, tasks, values)


def _filled(sizes: Tensor, width: int) -> Tensor:
    return torch.arange(width, device=sizes.device) < sizes[:, None]  # [T, S]
