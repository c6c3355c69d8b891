"""The dot-product recommender's meta-parameters: p_i = m + b_i + c + u·e_i."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metarec_fast._arguments import INNER_LOSSES, PAIRWISE
from metarec_fast._kept import Kept
from metarec_fast.encoder import FeatureEncoder
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.features import Features

if TYPE_CHECKING:
    from metarec_fast.data import Interactions

_TABLE_SCALE = 0.1  # standard deviation of a new item vector's length
_DAMPING = 3.0  # an item's bias starts as if it had this many more ratings, average ones


class DotRecommender(nn.Module):
    """What all users share: item vectors and biases, the global offset, and where every user starts.

    Args:
        num_items: N, size of the catalogue.
        dim: D, width of user and item vectors.
        loss: How scores are compared with targets: "squared" (ratings) or "logistic" (y in [0, 1]); or with those of
            items that were not chosen: "bpr" (Rendle et al. 2009) or "softmax" (over the item and its negatives).
        sparse: Give the item embeddings sparse gradients, which cost what a batch touches, not what the catalogue
            holds; they need an optimiser that takes them, such as `metarec_fast.SparseAdam`.
        user_features: What is known of users: moves where a user starts by W x, found by `TaskBatch.user_ids`.
        item_features: What is known of items: their vectors and biases get W x too, which is all that an item has
            which nobody has rated. They are found by the learner's `item_ids`.

    Raises:
        ValueError: A size is below 1, or the loss is unknown.
    """

    initialized: Tensor  # bool, whether the parameters mean something already

    def __init__(
        self,
        num_items: int,
        dim: int,
        loss: str = "squared",
        sparse: bool = False,
        user_features: Features | None = None,
        item_features: Features | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_items", num_items), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: must be ≥ 1, got {value}")
        if loss not in INNER_LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(INNER_LOSSES)}, got {loss!r}")
        self.num_items, self.dim, self.loss, self.sparse = int(num_items), int(dim), loss, bool(sparse)

        self.item_embedding = nn.Embedding(self.num_items, self.dim, sparse=self.sparse)  # e
        self.item_bias = nn.Embedding(self.num_items, 1, sparse=self.sparse)  # b
        self.user_init = nn.Parameter(torch.zeros(self.dim))  # u at the start
        self.user_bias_init = nn.Parameter(torch.zeros(()))  # c at the start
        self.offset = nn.Parameter(torch.zeros(()))  # m
        self.register_buffer("initialized", torch.tensor(False))
        self.user_encoder = encoder_of("user_features", user_features, self.dim)
        self.item_encoder = encoder_of("item_features", item_features, self.dim, self.num_items)
        self._kept_tables = Kept()
        nn.init.normal_(self.item_embedding.weight, std=_TABLE_SCALE / self.dim**0.5)
        nn.init.zeros_(self.item_bias.weight)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, features apart."""
        return {"num_items": self.num_items, "dim": self.dim, "loss": self.loss, "sparse": self.sparse}

    @torch.no_grad()
    def initialize(self, log: Interactions) -> None:
        """Sets offset and item biases to damped averages of the log: of ratings, or for "logistic" their log-odds.

        For losses that compare items, biases are the logarithms of how often items were chosen, which is what they
        would become if users did not differ.

        Raises:
            ValueError: The log has no ratings, another number of items, or targets that do not fit the loss.
        """
        self.check_log(log)
        offset, item_biases = averages(log, self.loss)
        self.offset.fill_(offset)
        self.item_bias.weight.copy_(torch.from_numpy(item_biases)[:, None])
        self.initialized.fill_(True)

    def check_log(self, log: Interactions) -> None:
        """Raises ValueError unless the log has ratings, this model's number of items, and targets for its loss."""
        check_log(log, self.num_items, self.loss)

    def lookup(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Item vectors [n, D] and biases [n], through the embeddings, features included."""
        rows, biases = self.item_embedding(items), self.item_bias(items).squeeze(1)
        if self.item_encoder is None:
            return rows, biases
        more = self.item_encoder(self.item_encoder.bound_rows(items))  # [n, D + 1]
        return rows + more[:, :-1], biases + more[:, -1]

    def tables(self) -> tuple[Tensor, Tensor]:
        """All item vectors [N, D] and biases [N], features included, for reading only.

        Without gradients, what features add is computed once for the same parameters, at the price of a copy of these.
        """
        rows, biases = self.item_embedding.weight, self.item_bias.weight.squeeze(1)
        encoder = self.item_encoder
        if encoder is None:
            return rows, biases

        def with_features() -> tuple[Tensor, Tensor]:
            more = self.of_features()
            return rows + more[:, :-1], biases + more[:, -1]

        rows_of_all, biases_of_all = self._kept_tables.get(
            encoder.changes, (encoder.weight, rows, biases), with_features
        )
        return rows_of_all, biases_of_all

    def of_features(self) -> Tensor:
        """What features of items add to their vectors and, in the last column, their biases, [N, D + 1]."""
        encoder = self.item_encoder
        assert encoder is not None
        added: Tensor = encoder(encoder.matrix.select(encoder.rows))
        return added

    def start(self, users: FeatureMatrix | None = None) -> tuple[Tensor, Tensor]:
        """Where users start, given their features [T, F]: vectors [T, D] and biases [T], without them [D] and [].

        Raises:
            ValueError: There are features, but the model has none.
        """
        if users is None:
            return self.user_init, self.user_bias_init
        if self.user_encoder is None:
            raise ValueError("users: the model has no user features")
        moved = self.user_encoder(users)
        return self.user_init + moved[:, :-1], self.user_bias_init + moved[:, -1]

    def unknown_items(self, item_ids: Any) -> tuple[Tensor, Tensor]:
        """Vectors [n, D] and biases [n] of items that are not among the N: the mean ones, moved by their features."""
        vector, bias = self.item_embedding.weight.mean(0), self.item_bias.weight.mean()
        if self.item_encoder is None:
            count = len(item_ids)
            return vector.expand(count, -1), bias.expand(count)
        more = self.item_encoder(self.item_encoder.rows_of(item_ids))
        return vector + more[:, :-1], bias + more[:, -1]

    def feature_tables(self) -> dict[str, Features]:
        """The tables of features that there are, of "user" and "item"."""
        encoders = {"user": self.user_encoder, "item": self.item_encoder}
        return {name: encoder.features for name, encoder in encoders.items() if encoder is not None}

    def bind_items(self, item_ids: Any) -> None:
        """Finds the features of the items, given their original ids [N]; learners do it as their `item_ids` are set."""
        if self.item_encoder is not None:
            self.item_encoder.features.warn_if_unknown("item_features", item_ids)
            self.item_encoder.bind(item_ids)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters.items())


def encoder_of(name: str, features: Features | None, dim: int, num_ids: int = 0) -> FeatureEncoder | None:
    """What adds features to vectors of width `dim`, None for None; TypeError under the argument's name for others."""
    if features is None:
        return None
    if not isinstance(features, Features):
        raise TypeError(f"{name}: expected Features, got {type(features).__name__}")
    return FeatureEncoder(features, dim, num_ids)


def check_log(log: Interactions, num_items: int, loss: str) -> None:
    """Raises ValueError unless the log has ratings, a model's number of items, and targets for its loss."""
    if log.num_items != num_items:
        raise ValueError(f"log: expected {num_items} items, like the model, got {log.num_items}")
    if len(log) == 0:
        raise ValueError("log: expected at least one rating, got none")
    if loss == "logistic":
        check_probabilities("log.ratings", log.ratings)


def check_probabilities(name: str, targets: Any) -> None:
    """Raises ValueError unless all targets lie in [0, 1], what the logistic loss is for."""
    values = np.asarray(targets)
    outside = np.flatnonzero((values < 0) | (values > 1))
    if outside.size:
        raise ValueError(
            f"{name}: the logistic loss needs targets in [0, 1], got {values[outside[0]]} at position {outside[0]}"
        )


def averages(log: Interactions, loss: str) -> tuple[float, NDArray[np.float64]]:
    """What scores are where users do not differ: the mean, and by how much each item's damped mean differs, [N]; of
    ratings, or for "logistic" of their log-odds. For losses that compare items, logarithms of how often items were
    chosen, centred, and 0."""
    if loss in PAIRWISE:
        popularity = np.log(np.bincount(log.items, minlength=log.num_items) + 1.0)
        return 0.0, popularity - popularity.mean()
    ratings = log.ratings.astype(np.float64)
    mean = float(ratings.mean())
    sums = np.bincount(log.items, ratings, minlength=log.num_items)
    counts = np.bincount(log.items, minlength=log.num_items)
    item_means = (sums + _DAMPING * mean) / (counts + _DAMPING)
    if loss == "logistic":
        item_means, mean = _log_odds(item_means), float(_log_odds(np.array(mean)))
    return mean, item_means - mean


def _log_odds(probability: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    clipped = np.clip(probability, 1e-3, 1 - 1e-3)
    odds: np.ndarray[Any, Any] = np.log(clipped / (1 - clipped))
    return odds
