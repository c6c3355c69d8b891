"""A new user by original ids: adapt to his ratings, predict others, recommend the best of the catalogue."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import functional
from metarec_fast._ids import as_column
from metarec_fast.adapted_module import AdaptedModule, best_items
from metarec_fast.models import check_probabilities
from metarec_fast.module_tasks import ModuleTasks
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.results import AdaptedItems
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.encoder import FeatureEncoder
    from metarec_fast.feature_matrix import FeatureMatrix
    from metarec_fast.learner import Learner


class AdaptedUser:
    """One user after adaptation; `learner.adapt` makes it. Takes and gives original item ids.

    Attributes:
        vector: u [D]. With the item vectors extended by their biases, scores are inner products, so that any
            nearest-neighbour index can serve them.
        bias: c, a scalar.
        seen: Row numbers of the items adapted on, int64 [S].
    """

    def __init__(self, learner: Learner, support: Entries, features: FeatureMatrix | None = None) -> None:
        fast = learner.fast_weights(TaskBatch(support), features)
        self.vector: Tensor = fast.user[0]
        self.bias: Tensor = fast.bias[0]
        self.seen: Tensor = support.items
        self._learner, self._adapted = learner, fast.items

    @torch.no_grad()
    def predict(self, items: Any) -> NDArray[Any]:
        """The scores [n] of items by original id. An item that the learner does not know gets the mean of all, moved
        by its features if the model knows these.

        Adapted on ratings, scores are ratings, not clipped; with the logistic loss they are log-odds.
        """
        model = self._learner.model
        rows = self._learner.catalogue.find(items)
        wanted = torch.from_numpy(np.maximum(rows, 0)).to(self.vector.device)
        vectors, biases = model.lookup(wanted)
        scores = biases + vectors @ self.vector
        if self._adapted is not None:
            for row, score in zip(self.seen.tolist(), self._seen_scores(self._adapted), strict=True):
                scores[wanted == row] = score
        if (rows < 0).any():
            vectors, biases = model.unknown_items(items)
            scores = torch.where(torch.from_numpy(rows < 0).to(scores.device), biases + vectors @ self.vector, scores)
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
        constant: Tensor = self._learner.model.offset + self.bias
        return constant

    def _seen_scores(self, adapted: AdaptedItems) -> Tensor:
        """Of the items adapted on, by their adapted rows, without the constant, [S]."""
        return adapted.biases + adapted.rows @ self.vector

    def __repr__(self) -> str:
        return f"AdaptedUser(dim={len(self.vector)}, seen={len(self.seen)})"


class AdaptedHeads(AdaptedUser):
    """As `AdaptedUser`, head by head; `learner.adapt` makes it where the model is a `MultiTaskRecommender`.

    user = learner.adapt([("rating", "m3"), ("click", "m9")], [5.0, 1.0])
    items, scores = user.recommend(k=10, head="rating")
    """

    def predict(self, items: Any, head: str | None = None) -> NDArray[Any]:
        """The scores [n] of items under a head by original id, or without one of pairs (head, item).

        An item that the learner does not know gets the mean of its head. With the logistic loss scores are log-odds.

        Raises:
            ValueError: There is no such head; those that there are are listed.
        """
        if head is not None:
            self._learner.model.rows_of(head)
            items = [(head, item) for item in list(as_column("items", items))]
        return super().predict(items)

    @torch.no_grad()
    def recommend(
        self, k: int = 10, exclude_seen: bool = True, head: str | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The k best items under a head and their scores, best first: original ids [k] and scores [k].

        Args:
            k: How many, 1 … N.
            exclude_seen: Leave out the items adapted on, under whichever head; fewer may be left, and are returned.
            head: Which; by default the first.

        Raises:
            ValueError: k is below 1 or above the number of items, or there is no such head.
        """
        model = self._learner.model
        rows = model.rows_of(next(iter(model.heads)) if head is None else head)
        vectors, biases = model.lookup(torch.arange(rows.start, rows.stop, device=self.vector.device))
        scores = biases + vectors @ self.vector + self._constant()
        seen = self.seen % model.items_per_head if exclude_seen else self.seen[:0]
        return best_items(scores, model.ids_of_one_head(self._learner.catalogue.ids), k, seen)


def adapt(
    learner: Learner, items: Any, ratings: Any, features: Mapping[str, Any] | None = None, *, user: Any = None
) -> AdaptedUser | AdaptedModule:
    """Adapts to a user who need not have been in training.

    Args:
        items: What he rated, by original ids, [n]. Items that the learner does not know are ignored, with one warning.
        ratings: How much, finite numbers, [n]; in [0, 1] for the logistic loss; not looked at by losses that compare
            items with others ("bpr", "softmax"). Outside the range seen in training is fine. No ratings give the user
            with whom adaptation starts.
        features: What else is known of him, by column of the model's user features: {"age": 31}. Columns that are left
            out count as average.
        user: Or: his original id in the model's table of user features; if he is not there he counts as average.

    Returns:
        The adapted user.

    Raises:
        ValueError: Lengths differ, or a rating is not finite, or `learner.item_ids` are not known, or there are
            features that the model does not have.
        TypeError: Ratings are not numbers.
    """
    if features is not None and user is not None:
        raise ValueError("features and user: expected one of them, got both")
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
    if isinstance(learner.model, MultiTaskRecommender):
        learner.model.check_targets("ratings", np.maximum(rows, 0), np.where(rows < 0, 0, targets))
    elif learner.model.loss == "logistic":
        check_probabilities("ratings", targets)

    known = rows >= 0
    if not known.all():
        first = as_column("items", items)[int(np.argmin(known))]
        warnings.warn(
            f"{int((~known).sum())} items that the learner does not know are ignored, the first is {first!r}",
            stacklevel=2,
        )
    like = learner.model.offset
    support = Entries(
        torch.from_numpy(rows[known]),
        torch.from_numpy(targets[known].astype(np.float64)).to(like.dtype),
        torch.tensor([0, int(known.sum())], device="cpu"),
    ).to(like.device)
    if isinstance(learner.tasks, ModuleTasks):
        return AdaptedModule(learner, support, features, user)
    kind = AdaptedHeads if isinstance(learner.model, MultiTaskRecommender) else AdaptedUser
    return kind(learner, support, _user_features(learner, features, user))


def _user_features(learner: Learner, features: Mapping[str, Any] | None, user: Any) -> FeatureMatrix | None:
    """Features of one user, [1, F], from what is given of him or found under his id."""
    encoder: FeatureEncoder | None = learner.model.user_encoder
    if features is not None:
        if encoder is None:
            raise ValueError("features: the learner's model has no user features")
        return encoder.features.encode(features).to(encoder.weight.device)
    if user is not None and not isinstance(user, Hashable):
        raise TypeError(f"user: expected an id, got {type(user).__name__}")
    return None if encoder is None or user is None else encoder.rows_of([user])


def _first_of_each(items: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k entries whose item did not come before."""
    kept = list({item: place for place, item in reversed(list(enumerate(items.tolist())))}.values())
    places = torch.tensor(sorted(kept)[:k], device=items.device)
    return items[places], scores[places]
