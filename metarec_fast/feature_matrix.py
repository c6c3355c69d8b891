"""Features of R users or items as a matrix X [R, F], centred, sparse where they are categories.

    row r = Σ_v w_v 1_v − Σ_c known_rc mean_c, then the dense columns

v the values that row r has, of weight w_v; mean_c what column c has on average. So a row of which nothing is known is
0, and so is the average row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_CHUNK = 4096  # rows at a time where they are written out


@dataclass(frozen=True, eq=False)
class FeatureMatrix:
    """X [R, F] with F = V + P: V values of C categorical columns, and P numbers.

    `matrix @ weight` is differentiable with respect to the weight.
    """

    values: Tensor  # int64 [n], in [0, V), row by row
    weights: Tensor  # [n]
    offsets: Tensor  # int64 [R + 1]
    known: Tensor  # [R, C], 1 where the row has this column
    dense: Tensor  # [R, P]
    column_of: Tensor  # int64 [V], the column of each value
    means: Tensor  # [V], mean weight of each value among the rows that have its column

    @property
    def num_rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def width(self) -> int:
        """F, how many numbers a row has."""
        return self.means.numel() + self.dense.shape[1]

    def __matmul__(self, weight: Tensor) -> Tensor:
        """X times a weight [F, K]: [R, K], in the weight's precision under autocast too."""
        with torch.autocast(weight.device.type, enabled=False):
            return self._times(weight)

    def _times(self, weight: Tensor) -> Tensor:
        of_values, of_numbers = weight.split([self.means.numel(), self.dense.shape[1]])
        kind = weight.dtype
        product: Tensor = self.dense.to(kind) @ of_numbers
        if self.means.numel() and self.num_rows:
            bags = embedding_bag(
                self.values, of_values, self.offsets, mode="sum", include_last_offset=True,
                per_sample_weights=self.weights.to(kind),
            )  # fmt: skip
            means = of_values.new_zeros(self.known.shape[1], weight.shape[1])
            means = means.index_add(0, self.column_of, self.means.to(kind)[:, None] * of_values)  # [C, K]
            product = product + bags - self.known.to(kind) @ means
        return product

    def to_dense(self) -> Tensor:
        """X written out, [R, F]."""
        return self @ torch.eye(self.width, device=self.dense.device)

    def transposed_product(self, other: Tensor) -> Tensor:
        """Xᵀ times rows [R, K]: [F, K]."""
        rows = torch.arange(self.num_rows).repeat_interleave(self.offsets.diff())
        sums = other.new_zeros(self.means.numel(), other.shape[1])
        sums.index_add_(0, self.values, self.weights[:, None] * other[rows])
        sums -= self.means[:, None] * (self.known.T @ other)[self.column_of]
        return torch.cat([sums, self.dense.T @ other])

    def gram(self) -> Tensor:
        """Xᵀ X, [F, F]."""
        total = torch.zeros(self.width, self.width)
        for begin in range(0, self.num_rows, _CHUNK):
            rows = self.select(torch.arange(begin, min(begin + _CHUNK, self.num_rows))).to_dense()
            total.addmm_(rows.T, rows)
        return total

    def select(self, rows: Tensor) -> FeatureMatrix:
        """The rows at positions [n]; a row of zeros for −1."""
        if self.num_rows == 0:  # there is nothing to point at
            return self.nothing(len(rows))
        here = rows >= 0
        rows = rows.clamp(min=0)
        begins = self.offsets[rows]
        sizes = torch.where(here, self.offsets[rows + 1] - begins, 0)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        places = torch.arange(int(offsets[-1]), device=rows.device) + (begins - offsets[:-1]).repeat_interleave(sizes)
        scale = here[:, None]
        return replace(
            self, values=self.values[places], weights=self.weights[places], offsets=offsets,
            known=self.known[rows] * scale, dense=self.dense[rows] * scale,
        )  # fmt: skip

    def nothing(self, num_rows: int) -> FeatureMatrix:
        """Rows [n, F] of the same columns of which nothing is known: zeros."""
        return replace(
            self, values=self.values[:0], weights=self.weights[:0], offsets=self.offsets.new_zeros(num_rows + 1),
            known=self.known.new_zeros(num_rows, self.known.shape[1]),
            dense=self.dense.new_zeros(num_rows, self.dense.shape[1]),
        )  # fmt: skip

    def to(self, device: torch.device) -> FeatureMatrix:
        """A copy on `device`."""
        return FeatureMatrix(*(getattr(self, part.name).to(device) for part in fields(self)))

    def with_dense(self, columns: Tensor) -> FeatureMatrix:
        """With further numbers [R, p] behind the others."""
        return replace(self, dense=torch.cat([self.dense, columns], 1))


def only_numbers(dense: Tensor) -> FeatureMatrix:
    """The matrix of R rows of numbers, [R, P]."""
    nothing = torch.zeros(0, dtype=torch.int64)
    offsets = torch.zeros(len(dense) + 1, dtype=torch.int64)
    return FeatureMatrix(
        nothing, nothing.float(), offsets, dense.new_zeros(len(dense), 0), dense, nothing, nothing.float()
    )


def below(upper: FeatureMatrix, lower: FeatureMatrix) -> FeatureMatrix:
    """The rows of both, of the same columns."""
    return replace(
        upper,
        values=torch.cat([upper.values, lower.values]),
        weights=torch.cat([upper.weights, lower.weights]),
        offsets=torch.cat([upper.offsets, upper.offsets[-1] + lower.offsets[1:]]),
        known=torch.cat([upper.known, lower.known]),
        dense=torch.cat([upper.dense, lower.dense]),
    )


def beside(left: FeatureMatrix, right: FeatureMatrix) -> FeatureMatrix:
    """[left, right]: values of the left matrix, then those of the right one, then the numbers of both."""
    rows = torch.cat([torch.arange(part.num_rows).repeat_interleave(part.offsets.diff()) for part in (left, right)])
    order = rows.argsort(stable=True)
    first, columns = left.means.numel(), left.known.shape[1]
    return FeatureMatrix(
        torch.cat([left.values, right.values + first])[order], torch.cat([left.weights, right.weights])[order],
        left.offsets + right.offsets, torch.cat([left.known, right.known], 1), torch.cat([left.dense, right.dense], 1),
        torch.cat([left.column_of, right.column_of + columns]), torch.cat([left.means, right.means]),
    )  # fmt: skip
