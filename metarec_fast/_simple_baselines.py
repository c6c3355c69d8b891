"""Baselines that look at averages, counts or chance, and what all baselines share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import _random
from metarec_fast._ragged import sum_by_task
from metarec_fast.factor_model import check_ids

if TYPE_CHECKING:
    from typing_extensions import Self

    from metarec_fast.data import Interactions
    from metarec_fast.tasks import Entries, TaskBatch


class Baseline(ABC):
    """A predictor whose score is `item_scores[i] + user_bias[t]`, or more in subclasses.

    Args:
        seed: Of what is random, which for most is nothing.
    """

    name: ClassVar[str]
    predicts_ratings: ClassVar[bool] = True  # else scores say only what ranks first
    item_ids: NDArray[Any]  # [N], original ids
    rating_range: tuple[float, float]  # lowest and highest rating of the training log
    item_scores: Tensor  # [N]

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, log: Interactions) -> Self:
        """Learns from the ratings of the training users.

        Raises:
            ValueError: The log holds no rating.
        """
        if len(log) == 0:
            raise ValueError("log: expected at least one rating, got none")
        self.item_ids = log.item_ids
        self.rating_range = float(log.ratings.min()), float(log.ratings.max())
        self.item_scores = torch.from_numpy(self._fit(log)).float()
        return self

    def predict(self, batch: TaskBatch) -> Tensor:
        """Scores of the query entries after adapting to each task's support entries, [n].

        Raises:
            ValueError: The batch has no query.
            IndexError: An item id lies outside the catalogue.
        """
        query = self._query(batch)
        return self.item_scores[query.items] + self.user_bias(batch)[query.task_ids()]

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        """Scores of every item for each task, [T, N]."""
        self._check(batch)
        return self.item_scores + self.user_bias(batch)[:, None]

    def user_bias(self, batch: TaskBatch) -> Tensor:
        """What the support entries add to all scores of a task, [T]."""
        return torch.zeros(batch.num_tasks)

    @abstractmethod
    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        """The score of each item, [N]."""

    def _check(self, batch: TaskBatch) -> None:
        if not hasattr(self, "item_ids"):
            raise RuntimeError(f"{self.name}: call fit before predicting")
        check_ids("support.items", batch.support, len(self.item_ids))

    def _query(self, batch: TaskBatch) -> Entries:
        self._check(batch)
        if batch.query is None:
            raise ValueError("query: expected the entries to predict, got None")
        check_ids("query.items", batch.query, len(self.item_ids))
        return batch.query


class Factors(Baseline):
    """A predictor whose score is `item_scores[i] + c + u·e_i`, (u, c) folded in from the support entries."""

    item_table: Tensor  # e [N, D]

    def predict(self, batch: TaskBatch) -> Tensor:
        query = self._query(batch)
        user, bias = self._fold_in(batch)
        tasks = query.task_ids()
        products = (user[tasks] * self.item_table[query.items]).sum(1)
        return self.item_scores[query.items] + bias[tasks] + products

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        self._check(batch)
        user, bias = self._fold_in(batch)
        return self.item_scores + bias[:, None] + user @ self.item_table.T

    @abstractmethod
    def _fold_in(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """The user vectors u [T, D] and biases c [T]."""


class GlobalMean(Baseline):
    """The mean rating, for every user and item."""

    name = "global-mean"

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        return np.full(log.num_items, log.ratings.mean(dtype=np.float64))


class ItemMean(Baseline):
    """The mean rating of the item, as if it had `damping` more ratings, average ones."""

    name = "item-mean"

    def __init__(self, *, damping: float = 3.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.damping = _damping("damping", damping)

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        mean, residuals = _centred(log)
        return _damped_means(log.items, residuals, log.num_items, self.damping) + mean


class Bias(Baseline):
    """Global mean + item bias + user bias, by alternating damped least squares (Koren 2010, section 2.1).

    A new user's bias is the damped mean of what the ratings of his support entries leave.

    Args:
        item_damping, user_damping: How many ratings without bias count beside those of an item, of a user.
        sweeps: Rounds of item and user biases.
    """

    name = "bias"

    def __init__(
        self, *, item_damping: float = 3.0, user_damping: float = 4.0, sweeps: int = 10, seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        self.item_damping, self.user_damping = (
            _damping("item_damping", item_damping),
            _damping("user_damping", user_damping),
        )
        if sweeps < 1:
            raise ValueError(f"sweeps: must be ≥ 1, got {sweeps}")
        self.sweeps = sweeps

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        mean, residuals = _centred(log)
        users = np.repeat(np.arange(log.num_users), np.diff(log.offsets))
        user_bias: NDArray[np.float64] = np.zeros(log.num_users)
        for _ in range(self.sweeps):
            item_bias = _damped_means(log.items, residuals - user_bias[users], log.num_items, self.item_damping)
            user_bias = _damped_means(users, residuals - item_bias[log.items], log.num_users, self.user_damping)
        return item_bias + mean

    def user_bias(self, batch: TaskBatch) -> Tensor:
        return self._user_bias(batch.support)

    def _user_bias(self, support: Entries) -> Tensor:
        residuals = ratings_of(support).double() - self.item_scores[support.items]
        sums = sum_by_task(residuals, support.task_ids(), support.num_tasks)
        return (sums / (support.sizes() + self.user_damping).clamp(min=1e-9)).float()


class Popularity(Baseline):
    """How many users rated the item."""

    name = "popularity"
    predicts_ratings = False

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        return np.bincount(log.items, minlength=log.num_items).astype(np.float64)


class Random(Baseline):
    """Scores uniform in [0, 1), a function of seed, user (`batch.users`, else the task's position) and item."""

    name = "random"
    predicts_ratings = False

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        return np.zeros(log.num_items)

    def predict(self, batch: TaskBatch) -> Tensor:
        query = self._query(batch)
        return self._scores(self._keys(batch)[query.task_ids().numpy()], query.items.numpy())

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        self._check(batch)
        return self._scores(self._keys(batch)[:, None], np.arange(len(self.item_ids)))

    def _keys(self, batch: TaskBatch) -> NDArray[np.uint64]:
        users = np.arange(batch.num_tasks) if batch.users is None else batch.users.numpy()
        return _random.at(_random.key_of(self.seed, *b"random"), users)

    def _scores(self, keys: NDArray[np.uint64], items: NDArray[np.int64]) -> Tensor:
        bits = _random.at(keys, items) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24))


def ratings_of(support: Entries) -> Tensor:
    """The ratings to adapt to, [n].

    Raises:
        ValueError: There are none.
    """
    if support.targets is None:
        raise ValueError("support.targets: expected ratings to adapt to, got None")
    return support.targets


def _centred(log: Interactions) -> tuple[float, NDArray[np.float64]]:
    """The mean rating, and the ratings less it, [n]."""
    ratings = log.ratings.astype(np.float64)
    mean = float(ratings.mean())
    return mean, ratings - mean


def _damped_means(ids: NDArray[Any], values: NDArray[np.float64], length: int, damping: float) -> NDArray[np.float64]:
    """Mean of the values of each id, as if there were `damping` more of value 0; 0 where there are none, [length]."""
    sums, counts = np.bincount(ids, values, length), np.bincount(ids, minlength=length)
    means: NDArray[np.float64] = sums / np.maximum(counts + damping, 1e-9)
    return means


def _damping(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: must be ≥ 0, got {value}")
    return float(value)
