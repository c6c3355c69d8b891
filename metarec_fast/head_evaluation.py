"""Judges a learner on each of its heads apart: adapt on some of what is known of a user, predict the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast.data import Interactions
from metarec_fast.evaluation import evaluate
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.report import Report
from metarec_fast.sampler import Size, TaskSampler

if TYPE_CHECKING:
    from metarec_fast.learner import Learner
    from metarec_fast.tasks import TaskBatch


def evaluate_heads(
    learner: Learner,
    log: Interactions,
    support: Size | Mapping[str, Size] = 10,
    order: Literal["random", "time"] = "random",
    seed: int = 0,
    *,
    adapt_on: Sequence[str] | None = None,
    k: int | Sequence[int] | None = None,
) -> dict[str, Report]:
    """Adapts to some entries of each user, of whichever heads, and judges each head by his other entries there.

    Args:
        learner: Whose model is a `MultiTaskRecommender`.
        log: Of `join_heads`, of users that were not in training.
        support, order, seed: Which entries of a user to adapt on, as in `TaskSampler`; the rest is predicted. Or how
            many of each head, "rest" for all of them: {"rating": 10, "click": "rest"}; of others none.
        adapt_on: Heads whose entries are adapted on, of those drawn; None for all. The entries to predict are the same,
            but users without any entry to adapt on do not count.
        k: As in `evaluate`; lists are ranked within the query set, not in the catalogue.

    Returns:
        Figures by head, of those heads that have something to predict; of logistic ones nDCG only.

    Raises:
        ValueError: There is no such head, or nothing to judge.
        TypeError: The model has no heads.
    """
    model = learner.model
    if not isinstance(model, MultiTaskRecommender):
        raise TypeError(f"learner: expected one whose model has heads, got a {type(model).__name__}")
    rows = {head: model.rows_of(head) for head in model.heads}
    allowed = np.zeros(model.num_items, bool)
    for head in rows if adapt_on is None else adapt_on:
        allowed[model.rows_of(head)] = True

    log = learner.catalogue.align(log)
    drawn = _drawn(model, log, support, order, seed)
    rest, known = log.select_rows(~drawn), log.select_rows(drawn & allowed[log.items])
    reports = {}
    for head, span in rows.items():
        queries = rest.select_rows((rest.items >= span.start) & (rest.items < span.stop))
        if len(queries):
            reports[head] = evaluate(
                _HeadPredictor(learner, head), queries, "rest", k=k, catalogue=False, support_from=known, seed=seed
            )
    if not reports:
        raise ValueError(f"log: no user has more entries than the support of {support!r} takes")
    return reports


class _HeadPredictor:
    """A learner as the predictor of one head's entries."""

    rating_range = None

    def __init__(self, learner: Learner, head: str) -> None:
        self.name, self.item_ids, self._learner = learner.name, learner.item_ids, learner
        self.predicts_ratings = learner.model.heads[head].loss == "squared"

    def predict(self, batch: TaskBatch) -> Tensor:
        return self._learner.predict(batch)

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        return self._learner.score_catalogue(batch)


def _drawn(
    model: MultiTaskRecommender,
    log: Interactions,
    support: Size | Mapping[str, Size],
    order: Literal["random", "time"],
    seed: int,
) -> NDArray[np.bool_]:
    """Which entries of the log are in the supports that are drawn, bool [n]."""
    if not isinstance(support, Mapping):
        return _supports_of(log, support, order, seed)
    drawn = np.zeros(len(log), bool)
    for head, size in support.items():
        span = model.rows_of(head)
        own = (log.items >= span.start) & (log.items < span.stop)
        drawn[own] = True if size == "rest" else _supports_of(log.select_rows(own), size, order, seed)
    return drawn


def _supports_of(log: Interactions, size: Size, order: Literal["random", "time"], seed: int) -> NDArray[np.bool_]:
    keys = []
    for batch in TaskSampler(log, size, 1 if size == "rest" else "rest", order=order, seed=seed, shuffle=False):
        assert batch.users is not None
        users = batch.users[batch.support.task_ids()]
        keys.append((users * log.num_items + batch.support.items).numpy())
    return np.isin(log.item_keys(), np.concatenate(keys))
