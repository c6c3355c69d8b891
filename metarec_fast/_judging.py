"""What one predictor is asked for, batch by batch, and the metrics of what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metarec_fast._sampled_ranks import sampled_ranks
from metarec_fast.metrics import (
    CatalogueRanks,
    average_draws,
    query_ndcg,
    rating_errors,
    standard_deviations,
    summarize,
)
from metarec_fast.tasks import Entries, TaskBatch


class Predictor(Protocol):
    """What can be evaluated: a learner, a baseline, or anything else with these.

    It may also have `name`, `rating_range` (lowest and highest rating seen in training), and `predicts_ratings`: False
    if its scores say only what ranks first, and errors of ratings would mean nothing.
    """

    @property
    def item_ids(self) -> Any:
        """Original ids of the items, [N]."""

    def predict(self, batch: TaskBatch) -> Tensor:
        """Scores of the query entries, [n]."""

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        """Scores of every item for each task, [T, N]."""


class Judge:
    """Collects the metrics of one predictor, draw by draw and batch by batch."""

    def __init__(
        self, name: str, predictor: Predictor, rating_range: tuple[float, float] | None, relevant_from: float | None
    ) -> None:
        self.name, self.predictor = name, predictor
        self.range = {} if rating_range is None else {"rating_range": rating_range}
        self.relevant_from = relevant_from
        self.metrics: list[dict[str, list[Tensor]]] = []  # of each draw, what each batch adds
        self.missed: list[dict[int, Tensor]] = []  # of each draw, list length → what CatalogueRanks.missed gives

    def begin_draw(self) -> None:
        self.metrics.append({})
        self.missed.append({})

    def add(
        self, batch: TaskBatch, rated: Entries, negatives: Tensor | None, lengths: Sequence[int], catalogue: bool
    ) -> None:
        """Judges a batch: the query set; the catalogue but for what is `rated`; the query among `negatives` [T, M]."""
        assert batch.query is not None
        scores = self._check("predict", self.predictor.predict(batch), (len(batch.query),))
        results = query_ndcg(scores, batch.query, lengths)
        if _predicts_ratings(self.predictor):
            results = rating_errors(scores, batch.query, **self.range) | results
        if catalogue or negatives is not None:
            shape = (batch.num_tasks, len(self.predictor.item_ids))
            scores = self._check("score_catalogue", self.predictor.score_catalogue(batch), shape)
        if catalogue:
            ranks = CatalogueRanks(scores, rated, batch.query, self.relevant_from)
            results |= ranks.metrics(lengths)
            for length in lengths:
                self.missed[-1][length] = ranks.missed(length, self.missed[-1].get(length))
        if negatives is not None:
            results |= sampled_ranks(scores, batch.query, negatives, lengths, self.relevant_from)
        for name, values in results.items():
            self.metrics[-1].setdefault(name, []).append(values)

    def _check(self, method: str, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
        scores = scores.detach().cpu()
        if scores.shape != shape:
            raise ValueError(f"{self.name}.{method}: expected scores of shape {shape}, got {tuple(scores.shape)}")
        if not bool(scores.isfinite().all()):
            count = int((~scores.isfinite()).sum())
            raise ValueError(f"{self.name}.{method}: expected finite scores, got {count} that are not")
        return scores

    def per_user(self, query_sizes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Metrics of each user, means over the draws, [U]; from how many ratings each draw has to predict, [D, U]."""
        return average_draws(self._draws(), query_sizes)

    def figures(self, query_sizes: NDArray[np.int64]) -> dict[str, float]:
        covered = self._coverage()
        coverage = {name: float(np.mean([draw[name] for draw in covered])) for name in covered[0]}
        return summarize(self.per_user(query_sizes), query_sizes.sum(0)) | coverage

    def spread(self, query_sizes: NDArray[np.int64]) -> dict[str, float]:
        """The standard deviation of each figure over the draws."""
        draws = zip(self._draws(), query_sizes, self._coverage(), strict=True)
        return standard_deviations([summarize(draw, sizes) | coverage for draw, sizes, coverage in draws])

    def _draws(self) -> list[dict[str, NDArray[np.float64]]]:
        return [{name: torch.cat(values).numpy() for name, values in draw.items()} for draw in self.metrics]

    def _coverage(self) -> list[dict[str, float]]:
        return [{f"coverage@{k}": float(1 - missed.mean()) for k, missed in draw.items()} for draw in self.missed]


class Chance:
    """The same score for every item: all are tied, and ties count as ranked in random order."""

    predicts_ratings = False

    def __init__(self, item_ids: Any) -> None:
        self.item_ids = item_ids

    def predict(self, batch: TaskBatch) -> Tensor:
        assert batch.query is not None
        return torch.zeros(len(batch.query))

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        return torch.zeros(batch.num_tasks, len(self.item_ids))


@contextmanager
def evaluation_mode(predictors: Iterable[Predictor]) -> Iterator[None]:
    """Modules among the predictors are in evaluation mode meanwhile."""
    predicting = [predictor for predictor in predictors if isinstance(predictor, nn.Module)]
    training = [module for predictor in predicting for module in predictor.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _predicts_ratings(predictor: Predictor) -> bool:
    """Whether scores are on the scale of the ratings: a learner's are where its model's loss is squared."""
    model_loss = getattr(getattr(predictor, "model", None), "loss", "squared")
    return bool(getattr(predictor, "predicts_ratings", model_loss == "squared"))
