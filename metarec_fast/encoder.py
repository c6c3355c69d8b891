"""Features as what they add to a vector and a bias: W x, a row of W for every value and every number."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.features import Features

_PARTS = tuple(field.name for field in fields(FeatureMatrix))


class FeatureEncoder(nn.Module):
    """Adds W x to the vectors of users or items: their vector in the first D columns, their bias in the last.

    x is centred, so that a row of which nothing is known gets 0, as the average row does. W starts at 0.

    Args:
        features: The table; its rows move to the module's device with it.
        dim: Width D of the vectors.
        kind: dtype and device of the weight.

    Attributes:
        weight: W [F, D + 1].
    """

    def __init__(self, features: Features, dim: int, **kind: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features.width, dim + 1, **kind))
        self.features = features

    @property
    def features(self) -> Features:
        """The table. Another one may be assigned, of further users say, if its columns are the same."""
        return self._features

    @features.setter
    def features(self, features: Features) -> None:
        if features.width != self.weight.shape[0]:
            raise ValueError(f"features: expected {self.weight.shape[0]} numbers a row, got {features.width}")
        self._features = features
        for name in _PARTS:
            self.register_buffer(name, getattr(features.matrix, name).to(self.weight.device), persistent=False)

    @property
    def matrix(self) -> FeatureMatrix:
        """The rows of the table, where the weight is."""
        return FeatureMatrix(*(getattr(self, name) for name in _PARTS))

    def rows_of(self, ids: Any) -> FeatureMatrix:
        """The features of original ids [n]; nothing for those that are not in the table."""
        return self.matrix.select(self.features.find(ids).to(self.weight.device))

    def warn_if_unknown(self, name: str, ids: Any) -> None:
        """Warns if nothing is known of any of the ids, which then are of another kind, say strings and integers."""
        if len(ids) and bool((self.features.find(ids) < 0).all()):
            expected, found = (values[:1].tolist()[0] if len(values) else None for values in (self.features.ids, ids))
            warnings.warn(
                f"{name}: none of the {len(ids)} ids is in the table, which has ids such as {expected!r}; "
                f"they are such as {found!r}",
                stacklevel=4,
            )

    def forward(self, rows: FeatureMatrix) -> Tensor:
        """W x for each row, [n, D + 1]."""
        return rows @ self.weight

    def extra_repr(self) -> str:
        return repr(self.features)
