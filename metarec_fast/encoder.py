"""Features as what they add to a vector and a bias: W x, a row of W for every value and every number."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from metarec_fast._compiling import left_uncompiled
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.features import Features

_SIZES = "how much there is to look up depends on the numbers in the batch"
_PARTS = tuple(field.name for field in fields(FeatureMatrix))


class FeatureEncoder(nn.Module):
    """Adds W x to the vectors of users or items: their vector in the first D columns, their bias in the last.

    x is centred, so that a row of which nothing is known gets 0, as the average row does. W starts at 0.

    Args:
        features: The table; its rows move to the module's device with it.
        dim: Width D of the vectors.
        num_ids: N, how many ids will be bound; as long as they are not, nothing is known of any.

    Attributes:
        weight: W [F, D + 1].
        rows: Where each of the ids that `bind` was given is in the table, int64 [N], −1 for nowhere.
    """

    rows: Tensor

    def __init__(self, features: Features, dim: int, num_ids: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features.width, dim + 1))
        self._ids: Any = None
        self._num_ids = num_ids
        self.changes = 0  # of the table and of what is bound
        self._set(features)

    @property
    def features(self) -> Features:
        """The table. One that `Features.extended` made of it may be assigned: with further rows of the same columns."""
        return self._features

    @features.setter
    def features(self, features: Features) -> None:
        if features.width != self.weight.shape[0]:
            raise ValueError(f"features: expected {self.weight.shape[0]} numbers a row, got {features.width}")
        if not features.has_columns_of(self._features):
            raise ValueError(
                "features: expected the columns, values and scales of the present table; `extended` keeps them"
            )
        self._set(features)

    def _set(self, features: Features) -> None:
        self._features = features
        for name in _PARTS:
            self.register_buffer(name, getattr(features.matrix, name).to(self.weight.device), persistent=False)
        self._find()

    def bind(self, ids: Any) -> None:
        """Finds the rows of original ids [N], for `bound_rows`."""
        self._ids = ids
        self._find()

    def _find(self) -> None:
        found = torch.full((self._num_ids,), -1) if self._ids is None else self._features.find(self._ids)
        self.changes += 1
        self.register_buffer("rows", found.to(self.weight.device), persistent=False)

    @left_uncompiled(_SIZES)
    def bound_rows(self, places: Tensor) -> FeatureMatrix:
        """The features of those of the bound ids that are at positions [n]."""
        return self.matrix.select(self.rows[places])

    @property
    def matrix(self) -> FeatureMatrix:
        """The rows of the table, where the weight is."""
        return FeatureMatrix(*(getattr(self, name) for name in _PARTS))

    @left_uncompiled(_SIZES)
    def rows_of(self, ids: Any) -> FeatureMatrix:
        """The features of original ids [n]; nothing for those that are not in the table."""
        return self.matrix.select(self.features.find(ids).to(self.weight.device))

    def forward(self, rows: FeatureMatrix) -> Tensor:
        """W x for each row, [n, D + 1]."""
        return rows @ self.weight

    def extra_repr(self) -> str:
        return repr(self.features)
