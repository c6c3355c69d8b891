"""A new user by original ids: adapt to his ratings, predict others, recommend the best of the catalogue."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import functional
from metarec_fast._ids import as_column, faithful_array, find_ids
from metarec_fast.models import check_probabilities
from metarec_fast.results import AdaptedItems
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.learners import Learner


class Catalogue:
    """The original ids of a model's items, and their row numbers.

    Args:
        ids: Distinct ids, [N].
        num_items: N, as the model has it.

    Raises:
        ValueError: There are more or fewer ids than items, or one comes twice.
    """

    ids: NDArray[Any]

    def __init__(self, ids: Any, num_items: int) -> None:
        column = as_column("item_ids", ids)
        if not isinstance(column, np.ndarray):
            column = faithful_array([id_.item() if isinstance(id_, np.generic) else id_ for id_ in column])
        self.ids = column
        if len(self.ids) != num_items:
            raise ValueError(f"item_ids: expected {num_items}, one per item of the model, got {len(self.ids)}")
        # Integers are found by bisection; anything else by a dictionary, made once.
        self._rows = None if self.ids.dtype.kind in "iu" else {id_: row for row, id_ in enumerate(self.ids.tolist())}
        distinct = len(np.unique(self.ids)) if self._rows is None else len(self._rows)
        if distinct != num_items:
            raise ValueError(f"item_ids: each id must come once, got {distinct} different ones among {num_items}")

    def find(self, ids: Any) -> NDArray[np.int64]:
        """Row numbers of original ids, −1 for those unknown."""
        column = as_column("items", ids)
        if len(column) == 0:
            return np.empty(0, np.int64)
        if self._rows is None:
            return find_ids(self.ids, column)
        wanted = column.tolist() if isinstance(column, np.ndarray) else column
        return np.fromiter((self._rows.get(id_, -1) for id_ in wanted), np.int64, len(column))

    def align(self, log: Interactions) -> Interactions:
        """The log in this catalogue's numbering; ratings of other items are left out, with one warning."""
        if log.item_ids is self.ids or np.array_equal(log.item_ids, self.ids):
            return log
        aligned, dropped = log.align_items(self.ids)
        if dropped:
            warnings.warn(f"{dropped} ratings of items that the learner does not know are ignored", stacklevel=4)
        return aligned


class AdaptedUser:
    """One user after adaptation; `learner.adapt` makes it. Takes and gives original item ids.

    Attributes:
        vector: u [D]. With the item vectors extended by their biases, scores are inner products, so that any
            nearest-neighbour index can serve them.
        bias: c, a scalar.
        seen: Row numbers of the items adapted on, int64 [S].
    """

    def __init__(self, learner: Learner, support: Entries) -> None:
        fast = learner.fast_weights(TaskBatch(support))
        self.vector: Tensor = fast.user[0]
        self.bias: Tensor = fast.bias[0]
        self.seen: Tensor = support.items
        self._learner, self._adapted = learner, fast.items

    @torch.no_grad()
    def predict(self, items: Any) -> NDArray[Any]:
        """The scores [n] of items by original id; an item that the learner does not know gets the mean of all.

        Adapted on ratings, scores are ratings, not clipped; with the logistic loss they are log-odds.
        """
        rows = self._learner.catalogue.find(items)
        table, item_bias = self._learner.model.tables()
        wanted = torch.from_numpy(np.maximum(rows, 0)).to(table.device)
        scores = item_bias[wanted] + table[wanted] @ self.vector
        if self._adapted is not None:
            for row, score in zip(self.seen.tolist(), self._seen_scores(self._adapted), strict=True):
                scores[wanted == row] = score
        if (rows < 0).any():
            mean = item_bias.mean() + table.mean(0) @ self.vector
            scores = torch.where(torch.from_numpy(rows < 0).to(table.device), mean, scores)
        result: NDArray[Any] = (scores + self._constant()).cpu().numpy()
        return result

    @torch.no_grad()
    def recommend(self, k: int = 10, exclude_seen: bool = True) -> tuple[NDArray[Any], NDArray[Any]]:
        """The k best items and their scores, best first: original ids [k] and scores [k].

        Args:
            k: How many, 1 … N.
            exclude_seen: Leave out the items adapted on. Where fewer than k are left, fewer are returned.

        Raises:
            ValueError: k is below 1 or above the number of items.
        """
        learner = self._learner
        table, item_bias = learner.model.tables()
        # Items that have adapted are not scored by their shared rows.
        seen = self.seen.unique()
        hidden = seen if exclude_seen or self._adapted is not None else seen[:0]
        offsets = torch.tensor([0, len(hidden)], device=hidden.device)
        exclude = Entries.unchecked(
            hidden, None, offsets, max_size=len(hidden), max_item=int(hidden.max()) if len(hidden) else -1
        )
        best = functional.score_top_k(self.vector[None], self._constant()[None], table, item_bias, k, exclude=exclude)
        items, scores = best.items[0], best.scores[0]
        if self._adapted is not None and not exclude_seen:
            items = torch.cat([items, self.seen])
            scores = torch.cat([scores, self._seen_scores(self._adapted) + self._constant()])
            order = scores.argsort(descending=True, stable=True)
            items, scores = items[order], scores[order]
            items, scores = _first_of_each(items, scores, k)
        found = items >= 0
        return learner.catalogue.ids[items[found].cpu().numpy()], scores[found].cpu().numpy()

    def _constant(self) -> Tensor:
        return self._learner.model.offset + self.bias

    def _seen_scores(self, adapted: AdaptedItems) -> Tensor:
        """Of the items adapted on, by their adapted rows, without the constant, [S]."""
        return adapted.biases + adapted.rows @ self.vector

    def __repr__(self) -> str:
        return f"AdaptedUser(dim={len(self.vector)}, seen={len(self.seen)})"


def adapt(learner: Learner, items: Any, ratings: Any) -> AdaptedUser:
    """Adapts to a user who need not have been in training.

    Args:
        items: What he rated, by original ids, [n]. Items that the learner does not know are ignored, with one warning.
        ratings: How much, finite numbers, [n]; in [0, 1] for the logistic loss; not looked at by losses that compare
            items with others ("bpr", "softmax"). Outside the range seen in training is fine. No ratings give the user
            with whom adaptation starts.

    Returns:
        The adapted user.

    Raises:
        ValueError: Lengths differ, or a rating is not finite, or `learner.item_ids` are not known.
        TypeError: Ratings are not numbers.
    """
    rows = learner.catalogue.find(items)
    targets = np.asarray(as_column("ratings", ratings))
    if len(targets) == 0:
        targets = targets.astype(np.float32)
    if targets.dtype.kind not in "biuf":
        raise TypeError(f"ratings: expected numbers, got {targets.dtype}")
    if len(targets) != len(rows):
        raise ValueError(f"ratings: expected {len(rows)}, one per item, got {len(targets)}")
    bad = np.flatnonzero(~np.isfinite(targets))
    if bad.size:
        raise ValueError(f"ratings: must be finite, got {targets[bad[0]]} at position {bad[0]}")
    if learner.model.loss == "logistic":
        check_probabilities("ratings", targets)

    known = rows >= 0
    if not known.all():
        first = as_column("items", items)[int(np.argmin(known))]
        warnings.warn(
            f"{int((~known).sum())} items that the learner does not know are ignored, the first is {first!r}",
            stacklevel=2,
        )
    table = learner.model.item_embedding.weight
    support = Entries(
        torch.from_numpy(rows[known]),
        torch.from_numpy(targets[known].astype(np.float64)).to(table.dtype),
        torch.tensor([0, int(known.sum())], device="cpu"),
    ).to(table.device)
    return AdaptedUser(learner, support)


def _first_of_each(items: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k entries whose item did not come before."""
    kept = list({item: place for place, item in reversed(list(enumerate(items.tolist())))}.values())
    places = torch.tensor(sorted(kept)[:k], device=items.device)
    return items[places], scores[places]
