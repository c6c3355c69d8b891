"""Negatives for users who come without: items that they did not choose."""

from __future__ import annotations

from typing import Any

import torch

from metarec_fast.tasks import Entries

_TRIES = 20  # after that a user has chosen nearly everything, and a few of his own items among many do no harm


def draw_negatives(entries: Entries, num_items: int, count: int) -> Entries:
    """The entries with `count` negatives each, [n, count], drawn uniformly from what their task does not hold.

    The same entries get the same negatives, every time.
    """
    generator = torch.Generator().manual_seed(0)
    items, tasks = entries.items.cpu(), entries.task_ids().cpu()
    own = (tasks * num_items + items).unique()
    kind: dict[str, Any] = {"generator": generator, "device": "cpu"}
    negatives = torch.randint(num_items, (len(entries), count), **kind)
    for _ in range(_TRIES):
        taken = torch.isin(tasks[:, None] * num_items + negatives, own)
        if not bool(taken.any()):
            break
        negatives[taken] = torch.randint(num_items, (int(taken.sum()),), **kind)
    max_item = max(entries.max_item, num_items - 1)
    return entries.with_items(entries.items, negatives.to(entries.items.device), max_item=max_item)
