"""What the operators return: plain named tuples of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class SparseRows(NamedTuple):
    """Gradient rows of a table of which few rows were touched; ids may repeat, and repeated rows add up."""

    ids: Tensor  # int64 [n]
    rows: Tensor  # [n, D] or [n]

    def to_dense(self, num_rows: int) -> Tensor:
        """The gradient of the whole table, [num_rows, D] or [num_rows]."""
        dense = self.rows.new_zeros((num_rows, *self.rows.shape[1:]))
        return dense.index_add_(0, self.ids, self.rows)


class AdaptedItems(NamedTuple):
    """The adapted row and bias of each support entry's item; equal items of one task have equal rows."""

    rows: Tensor  # [n, D]
    biases: Tensor  # [n]


class FastWeights(NamedTuple):
    """What the tasks have become after their inner loop."""

    user: Tensor  # [T, D]
    bias: Tensor  # [T]
    items: AdaptedItems | None = None  # with adapt="all"


class MetaStep(NamedTuple):
    """The outer loss of a batch and its meta-gradients, by argument name."""

    loss: Tensor  # scalar; can be differentiated once
    grads: dict[str, Tensor | SparseRows]


class TowerMetaStep(NamedTuple):
    """The outer loss of a batch under an MLP tower and its meta-gradients, by argument name."""

    loss: Tensor  # scalar; can be differentiated once
    grads: dict[str, Any]
    """user_part [T, Du], item_table SparseRows, layers [(weight, bias), …], inner_lr."""


class TopK(NamedTuple):
    """The best items of each user, best first."""

    items: Tensor  # int64 [T, k]; −1 where fewer than k items were left
    scores: Tensor  # [T, k]; −inf there
