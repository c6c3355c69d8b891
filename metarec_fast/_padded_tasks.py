"""Tasks of different sizes side by side, as torch.func goes through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from metarec_fast._ragged import pad
from metarec_fast.tasks import Entries


@dataclass(frozen=True)
class Padded:
    """Entries of T tasks, or under vmap of one: without the first dimension."""

    items: Tensor  # int64 [T, S]
    weights: Tensor  # [T, S], 0 where there is no entry
    targets: Tensor | None  # [T, S]
    negatives: Tensor | None  # int64 [T, S, M]
    log_q: Tensor | None  # [T, S, 1 + M]

    @property
    def candidates(self) -> Tensor:
        """Each entry's item and its negatives, [..., S, 1 + M]."""
        own = self.items[..., None]
        return own if self.negatives is None else torch.cat([own, self.negatives], -1)

    def parts(self) -> dict[str, Tensor]:
        """What is there, for vmap to go through."""
        named = {name: getattr(self, name) for name in _PARTS}
        return {name: value for name, value in named.items() if value is not None}


_PARTS = tuple(field.name for field in fields(Padded))


def task_of(parts: Mapping[str, Tensor]) -> Padded:
    """One task, or many, of which these are the `parts`."""
    return Padded(**{name: parts.get(name) for name in _PARTS})  # type: ignore[arg-type]


def padded_tasks(entries: Entries, tasks: slice) -> Padded:
    """The entries of some tasks, padded with item 0 of weight 0."""
    offsets = entries.offsets[tasks.start : tasks.stop + 1]
    rows = slice(int(offsets[0]), int(offsets[-1]))
    offsets = offsets - offsets[0]

    def padded(values: Tensor | None) -> Tensor | None:
        return None if values is None else pad(values[rows], offsets)

    kind = next((v for v in (entries.targets, entries.weights, entries.log_q) if v is not None), None)
    ones = torch.ones(len(entries), dtype=None if kind is None else kind.dtype, device=entries.items.device)
    items, weights = padded(entries.items), padded(ones if entries.weights is None else entries.weights)
    assert items is not None
    assert weights is not None
    return Padded(items, weights, padded(entries.targets), padded(entries.negative_rows), padded(entries.log_q))


def largest_twice(entries: Entries) -> Entries:
    """Two tasks as large as the batch's largest may be."""
    size = entries.size_bound if len(entries) else 0
    rows = torch.arange(2 * size, device=entries.items.device) % max(1, len(entries))
    offsets = torch.tensor([0, size, 2 * size], device=entries.items.device)

    def taken(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach()[rows]

    items = entries.items[rows]
    parts = taken(entries.targets), offsets, taken(entries.weights), taken(entries.negatives), taken(entries.log_q)
    return Entries.unchecked(items, *parts, max_size=size, max_item=entries.max_item)
