"""Ratings grouped by user or by item, and sums over every group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from metarec_fast.data import Interactions


class Segments:
    """The ids on the other side and the residuals of R users or items, one after the other.

    Args:
        ids: Who is on the other side of each rating, [n].
        residuals: The ratings less their mean, [n].
        sizes: Ratings of each user or item, [R].
    """

    def __init__(self, ids: Tensor, residuals: Tensor, sizes: Tensor) -> None:
        self.ids, self.residuals, self.sizes = ids, residuals, sizes
        self.offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    def sum(self, table: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums rows of the other side's table [M, ...], times a weight for each rating, over every group: [R, ...]."""
        sums = embedding_bag(
            self.ids, table.flatten(1), self.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return sums.view(-1, *table.shape[1:])

    def total(self, values: Tensor) -> Tensor:
        """Sums of one value for each rating, [R]."""
        return torch.segment_reduce(values, "sum", lengths=self.sizes, unsafe=True)


def segments_of(log: Interactions) -> tuple[Segments, Segments, float]:
    """The log's ratings by user and by item, less their mean, and the mean."""
    items, ratings = torch.from_numpy(log.items).long(), torch.from_numpy(log.ratings)
    sizes = torch.from_numpy(log.offsets).diff()
    mean = float(ratings.double().mean())
    residuals = (ratings.double() - mean).float()
    users = torch.arange(log.num_users).repeat_interleave(sizes)
    by_item = items.argsort(stable=True)
    counts = items.bincount(minlength=log.num_items)
    return Segments(items, residuals, sizes), Segments(users[by_item], residuals[by_item], counts), mean
