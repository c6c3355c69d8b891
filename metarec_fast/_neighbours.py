"""Baselines that predict what biases leave from what they leave of the user's other items: item kNN and EASE.

    p_i = m + b_i + c + Σ_{j∈S} r_j B_ji,    r_j = y_j − m − b_j − c

Both learn B from the residuals of the training users; the most rated items alone have neighbours.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast._simple_baselines import Bias

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.tasks import Entries, TaskBatch

_MOST_ITEMS = 3000  # with neighbours: their matrix has the square of it
_USERS_AT_ONCE = 2048
_MOST_USERS = 50_000  # that the matrix is learned from, evenly spaced


class _Neighbours(Bias):
    """Biases, and a matrix from residuals of rated items to those of others."""

    influence: Tensor  # B [M, M], from j to i
    slots: Tensor  # [N], position of each item among the M that have neighbours, else −1

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        item_scores = super()._fit(log)
        counts = np.bincount(log.items, minlength=log.num_items)
        chosen = np.sort(np.argsort(-counts, kind="stable")[:_MOST_ITEMS])
        slots = np.full(log.num_items, -1)
        slots[chosen] = np.arange(len(chosen))
        self.slots = torch.from_numpy(slots)
        self.influence = self._learn(*self._products(log, item_scores, len(chosen)))
        return item_scores

    def _products(self, log: Interactions, item_scores: NDArray[np.float64], width: int) -> tuple[Tensor, Tensor]:
        """Σ_u r_uj r_ui and in how many terms both were rated, [M, M] each."""
        sizes = log.sizes()
        users = np.repeat(np.arange(log.num_users), sizes)
        residuals = log.ratings - item_scores[log.items]
        sums = np.bincount(users, residuals, log.num_users)
        residuals -= (sums / np.maximum(sizes + self.user_damping, 1e-9))[users]
        slots = self.slots.numpy()[log.items]
        products, both = torch.zeros(width, width), torch.zeros(width, width)
        taken = np.unique(np.linspace(0, log.num_users - 1, min(log.num_users, _MOST_USERS)).astype(np.int64))
        for begin in range(0, len(taken), _USERS_AT_ONCE):
            block = taken[begin : begin + _USERS_AT_ONCE]
            rows = np.concatenate([np.arange(log.offsets[user], log.offsets[user + 1]) for user in block])
            rows = rows[slots[rows] >= 0]
            places = np.searchsorted(block, users[rows]), slots[rows]
            dense = torch.zeros(len(block), width)
            dense[places] = torch.from_numpy(residuals[rows]).float()
            rated = torch.zeros_like(dense)
            rated[places] = 1
            products += dense.T @ dense
            both += rated.T @ rated
        return products, both

    @abstractmethod
    def _learn(self, products: Tensor, both: Tensor) -> Tensor:
        """B, from Σ_u r_uj r_ui and in how many terms both were rated, [M, M] each."""

    def _combine(self, residuals: Tensor, rated: Tensor) -> Tensor:
        """What to add to biases, [T, M], given the user's residuals and which items they are of, [T, M]."""
        return residuals @ self.influence

    def predict(self, batch: TaskBatch) -> Tensor:
        query = self._query(batch)
        slots = self.slots[query.items]
        added = self._added(batch.support)[query.task_ids(), slots.clamp(min=0)]
        return super().predict(batch) + torch.where(slots >= 0, added, 0)

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        scores = super().score_catalogue(batch)
        scores[:, self.slots >= 0] += self._added(batch.support)
        return scores

    def _added(self, support: Entries) -> Tensor:
        bias = self._user_bias(support)
        assert support.targets is not None
        tasks, slots = support.task_ids(), self.slots[support.items]
        values = (support.targets - self.item_scores[support.items] - bias[tasks]).float()
        known = slots >= 0
        residuals = torch.zeros(support.num_tasks, len(self.influence))
        residuals[tasks[known], slots[known]] = values[known]
        rated = torch.zeros_like(residuals)
        rated[tasks[known], slots[known]] = 1
        return self._combine(residuals, rated)


class ItemKNN(_Neighbours):
    """Item kNN on residuals: their mean over the user's items, weighted by shrunk cosine similarity (Koren 2010,
    section 2.2), of all his items that are similar.

    Args:
        shrinkage: Users in common at which a similarity counts half.
        damping: Similarity to a residual of 0 that is averaged in.
    """

    name = "item-knn"

    def __init__(self, *, shrinkage: float = 50.0, damping: float = 0.5, seed: int = 0) -> None:
        super().__init__(seed=seed)
        for name, value in (("shrinkage", shrinkage), ("damping", damping)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}: must be > 0 and finite, got {value}")
        self.shrinkage, self.damping = shrinkage, damping

    def _learn(self, products: Tensor, both: Tensor) -> Tensor:
        length = products.diagonal().clamp(min=1e-9).sqrt()
        similarity = products / length / length[:, None] * (both / (both + self.shrinkage))
        return similarity.clamp(min=0).fill_diagonal_(0)

    def _combine(self, residuals: Tensor, rated: Tensor) -> Tensor:
        return (residuals @ self.influence) / (rated @ self.influence + self.damping)


class EASE(_Neighbours):
    """EASE on residuals (Steck 2019): the linear map from a user's residuals to themselves with a zero diagonal.

    Args:
        ridge: λ, on the entries of the map.
    """

    name = "ease"

    def __init__(self, *, ridge: float = 100.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge: must be > 0 and finite, got {ridge}")
        self.ridge = ridge

    def _learn(self, products: Tensor, both: Tensor) -> Tensor:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(products + self.ridge * torch.eye(len(products))))
        return (-inverse / inverse.diagonal()).fill_diagonal_(0)
