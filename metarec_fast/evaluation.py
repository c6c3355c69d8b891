"""Judges predictors on users never seen before: adapt on some of a user's ratings, predict the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metarec_fast.baselines import fit_baselines
from metarec_fast.data import Interactions
from metarec_fast.metrics import CatalogueRanks, query_ndcg, rating_errors, summarize
from metarec_fast.report import Report
from metarec_fast.sampler import Size, TaskSampler
from metarec_fast.tasks import TaskBatch

_LARGEST_SCORES = 1 << 26  # numbers in the scores of a batch for the whole catalogue: 256 MiB


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


def evaluate(
    learner: Predictor | None,
    log: Interactions,
    support: Size = 10,
    query: Size = "rest",
    order: Literal["random", "time"] = "random",
    seed: int = 0,
    k: int | Sequence[int] = (1, 5, 10),
    baselines: Interactions | Mapping[str, Predictor] | None = None,
    catalogue: bool = True,
    batch_size: int = 256,
    *,
    relevant_from: float | None = None,
) -> Report:
    """Adapts to some ratings of each user in the log and judges the predictions of others, beside baselines.

    All predictors get the same tasks, in the numbering of the learner's items: ratings of items that it does not know
    are left out, with one warning. `metarec_fast.metrics` says how the figures are computed. rmse and mae are means
    over ratings, the other figures means over users; users without anything to predict do not count. Neither
    `batch_size` nor the presence of other predictors changes a figure.

    Args:
        learner: What is to be judged; None to see the baselines alone.
        log: Ratings of users that were not in training.
        support, query, order, seed: Which ratings of a user to adapt on and which to predict, as in `TaskSampler`.
        k: Lengths of the ranked lists. A list longer than the catalogue is the whole catalogue.
        baselines: The training log, on which all baselines are fitted, or fitted predictors by name: baselines, or
            other learners to compare with.
        catalogue: Whether to rank the whole catalogue too.
        batch_size: Users at a time; fewer where scores of the catalogue would take too much memory.
        relevant_from: For the catalogue metrics, the lowest rating of an item worth finding; None takes every item
            that the user rated.

    Returns:
        Figures by predictor and metric.

    Raises:
        ValueError: There is nothing to judge, item ids do not fit, no user has enough ratings, or a predictor gives
            scores of another shape or that are not finite.
    """
    lengths = _check_lengths(k)
    item_ids = _item_ids(learner, baselines)
    tasks, train = _align(log, baselines, item_ids)
    with torch.device("cpu"):  # where metrics and baselines are, whatever the default
        predictors = _predictors(learner, baselines if train is None else train, item_ids, seed)
    rating_range = _rating_range(learner, predictors, train)
    if catalogue:
        batch_size = min(batch_size, max(1, _LARGEST_SCORES // max(1, len(item_ids))))

    judges = {name: _Judge(name, predictor, rating_range, relevant_from) for name, predictor in predictors.items()}
    chance = _Judge("chance", _Chance(item_ids), rating_range, relevant_from)
    users: list[Tensor] = []
    sizes: list[Tensor] = []
    with torch.no_grad(), torch.device("cpu"), _evaluation_mode(predictors.values()):
        for batch in TaskSampler(tasks, support, query, batch_size, order, seed, shuffle=False):
            assert batch.users is not None
            assert batch.query is not None
            for judge in (*judges.values(), chance):
                judge.add(batch, lengths, catalogue)
            users.append(batch.users)
            sizes.append(batch.query.sizes())

    query_sizes = torch.cat(sizes).numpy()
    return Report(
        results={name: judge.figures(query_sizes) for name, judge in judges.items()},
        chance=chance.figures(query_sizes),
        per_user={name: judge.per_user() for name, judge in judges.items()},
        user_ids=tasks.user_ids[torch.cat(users).numpy()],
        query_sizes=query_sizes,
        settings={
            "support": support, "query": query, "order": order, "seed": int(seed), "k": lengths,
            "relevant_from": relevant_from, "rating_range": rating_range, "users": len(query_sizes),
            "ratings": int(query_sizes.sum()),
        },
    )  # fmt: skip


class _Judge:
    """Collects the metrics of one predictor, batch by batch."""

    def __init__(
        self, name: str, predictor: Predictor, rating_range: tuple[float, float] | None, relevant_from: float | None
    ) -> None:
        self.name, self.predictor = name, predictor
        self.range = {} if rating_range is None else {"rating_range": rating_range}
        self.relevant_from = relevant_from
        self.metrics: dict[str, list[Tensor]] = {}
        self.missed: dict[int, Tensor] = {}  # list length → what CatalogueRanks.missed gives

    def add(self, batch: TaskBatch, lengths: Sequence[int], catalogue: bool) -> None:
        assert batch.query is not None
        scores = self._check("predict", self.predictor.predict(batch), (len(batch.query),))
        results = query_ndcg(scores, batch.query, lengths)
        if _predicts_ratings(self.predictor):
            results = rating_errors(scores, batch.query, **self.range) | results
        if catalogue:
            shape = (batch.num_tasks, len(self.predictor.item_ids))
            scores = self._check("score_catalogue", self.predictor.score_catalogue(batch), shape)
            ranks = CatalogueRanks(scores, batch.support, batch.query, self.relevant_from)
            results |= ranks.metrics(lengths)
            for length in lengths:
                self.missed[length] = ranks.missed(length, self.missed.get(length))
        for name, values in results.items():
            self.metrics.setdefault(name, []).append(values)

    def _check(self, method: str, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
        scores = scores.detach().cpu()
        if scores.shape != shape:
            raise ValueError(f"{self.name}.{method}: expected scores of shape {shape}, got {tuple(scores.shape)}")
        if not bool(scores.isfinite().all()):
            count = int((~scores.isfinite()).sum())
            raise ValueError(f"{self.name}.{method}: expected finite scores, got {count} that are not")
        return scores

    def per_user(self) -> dict[str, NDArray[np.float64]]:
        return {name: torch.cat(values).numpy() for name, values in self.metrics.items()}

    def figures(self, query_sizes: NDArray[np.int64]) -> dict[str, float]:
        coverage = {f"coverage@{length}": float(1 - missed.mean()) for length, missed in self.missed.items()}
        return summarize(self.per_user(), query_sizes) | coverage


class _Chance:
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
def _evaluation_mode(predictors: Iterable[Predictor]) -> Iterator[None]:
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


def _check_lengths(k: int | Sequence[int]) -> list[int]:
    lengths = [k] if isinstance(k, int) else list(k)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise ValueError(f"k: expected whole numbers ≥ 1, got {length!r}")
    if not lengths:
        raise ValueError("k: expected at least one list length, got none")
    return [int(length) for length in dict.fromkeys(lengths)]


def _item_ids(learner: Predictor | None, baselines: Interactions | Mapping[str, Predictor] | None) -> NDArray[Any]:
    """The catalogue in which everything is numbered: the learner's, else that of the baselines."""
    if learner is not None:
        if learner.item_ids is None:
            raise ValueError("learner.item_ids: expected the original ids of its items, got None")
        return np.asarray(learner.item_ids)
    if isinstance(baselines, Interactions):
        return baselines.item_ids
    if not baselines:
        raise ValueError("learner: expected a learner, or None beside baselines, got neither")
    return np.asarray(next(iter(baselines.values())).item_ids)


def _align(
    log: Interactions, baselines: Interactions | Mapping[str, Predictor] | None, item_ids: NDArray[Any]
) -> tuple[Interactions, Interactions | None]:
    """The log, and the training log where there is one, in the numbering of `item_ids`; one warning for both."""
    if not isinstance(log, Interactions):
        raise TypeError(f"log: expected Interactions, got {type(log).__name__}")
    train = baselines if isinstance(baselines, Interactions) else None
    aligned = [
        (name, (part, 0) if np.array_equal(part.item_ids, item_ids) else part.align_items(item_ids))
        for name, part in (("log", log), ("baselines", train))
        if part is not None
    ]
    dropped = [f"{count} ratings of {name}" for name, (_, count) in aligned if count]
    if dropped:
        warnings.warn(
            f"evaluate: {' and '.join(dropped)} are ignored, the learner does not know their items", stacklevel=3
        )
    logs = [part for _, (part, _) in aligned]
    return logs[0], None if train is None else logs[1]


def _predictors(
    learner: Predictor | None,
    baselines: Interactions | Mapping[str, Predictor] | None,
    item_ids: NDArray[Any],
    seed: int,
) -> dict[str, Predictor]:
    """Everything to be judged by name, the learner first."""
    predictors: dict[str, Predictor] = {}
    if learner is not None:
        name = getattr(learner, "name", None)
        predictors[name if isinstance(name, str) else type(learner).__name__.lower()] = learner
    if isinstance(baselines, Interactions):
        baselines = fit_baselines(baselines, seed=seed)
    for name, predictor in (baselines or {}).items():
        if name in predictors:
            raise ValueError(f"baselines: {name!r} is the name of the learner too")
        if not np.array_equal(predictor.item_ids, item_ids):
            raise ValueError(f"baselines[{name!r}].item_ids: expected the same ids, in the same order, as the others")
        predictors[name] = predictor
    return predictors


def _rating_range(
    learner: Predictor | None, predictors: Mapping[str, Predictor], train: Interactions | None
) -> tuple[float, float] | None:
    """The scale to which predictions are clipped: as the learner saw it, else the baselines; None if nobody knows."""
    own = getattr(learner, "rating_range", None)
    if own is None and train is not None and len(train):
        own = train.ratings.min(), train.ratings.max()
    others = (getattr(predictor, "rating_range", None) for predictor in predictors.values())
    found = own if own is not None else next((limits for limits in others if limits is not None), None)
    return None if found is None else (float(found[0]), float(found[1]))


def _predicts_ratings(predictor: Predictor) -> bool:
    """Whether scores are on the scale of the ratings: a learner's are where its model's loss is squared."""
    model_loss = getattr(getattr(predictor, "model", None), "loss", "squared")
    return bool(getattr(predictor, "predicts_ratings", model_loss == "squared"))
