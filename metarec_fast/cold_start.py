"""What each further rating of somebody new is worth: error by the number of ratings known, beside the baselines.

    support_s = the first s ratings of a user, in an order drawn once;    query = all after the first max(sizes)

so that every size is judged on the same ratings of the same users, and a support holds every smaller one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from metarec_fast import _plots
from metarec_fast._columns import as_int
from metarec_fast._judging import Predictor
from metarec_fast.baselines import is_baseline
from metarec_fast.data import Interactions
from metarec_fast.evaluation import align_logs, evaluate, item_ids_of, predictors_of
from metarec_fast.report import LOWER_IS_BETTER, align
from metarec_fast.tasks import Entries, TaskBatch

_SIZES = (0, 1, 2, 3, 5, 10, 20, 50)


@dataclass(frozen=True)
class ColdStartCurve:
    """What `cold_start_curve` found. Printing it gives a table.

    Attributes:
        metric: What was measured.
        sizes: Ratings known, ascending.
        values: By predictor, the figure at each size.
        chance: What ranking at random gives at every size, if the metric is one of ranking.
        num_users: Users who have enough ratings; every size is judged on all of them.
        num_ratings: Their ratings that were predicted, the same for every size.
    """

    metric: str
    sizes: list[int]
    values: dict[str, list[float]]
    chance: float | None
    num_users: int
    num_ratings: int

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A line for each predictor, those that are no baselines drawn thick; a PNG.

        Raises:
            ImportError: Matplotlib (the extra `plots`) is not installed.
        """
        pyplot = _plots.pyplot()
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        positions, colours = np.log1p(self.sizes), _plots.colours(self.values)
        for name in self.by_last_value():
            mine = not is_baseline(name)
            axes.plot(
                positions, self.values[name], marker="o", markersize=4 if mine else 3, label=name, color=colours[name],
                linewidth=2.5 if mine else 1.2, zorder=3 if mine else 2,
            )  # fmt: skip
        if self.chance is not None:
            axes.axhline(self.chance, color="grey", linestyle="--", linewidth=1, label="chance")
        axes.set_xticks(positions, [str(size) for size in self.sizes])
        axes.set_xlabel("ratings known of a user (logarithmic)")
        axes.set_ylabel(f"{self.metric} ({describe(self.metric)})")
        axes.set_title(f"Cold start: {self.caption()}", fontsize="medium")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def by_last_value(self) -> list[str]:
        """The predictors from top to bottom of a plot's right end."""
        return sorted(self.values, key=lambda name: -self.values[name][-1])

    def caption(self) -> str:
        """What all sizes were judged on."""
        return f"the same {self.num_ratings:,} ratings of the same {self.num_users:,} users for every size"

    def __str__(self) -> str:
        best = min if self.metric in LOWER_IS_BETTER else max
        bests = [best(column) for column in zip(*self.values.values(), strict=True)]
        rows = [[f"{self.metric}, ratings known", *(f"{size} " for size in self.sizes)]]
        for name, values in self.values.items():
            cells = zip(values, bests, strict=True)
            rows.append([name, *(f"{value:.4f}{'*' if value == least else ' '}" for value, least in cells)])
        if self.chance is not None:
            rows.append(["chance", *[f"{self.chance:.4f} "] * len(self.sizes)])
        return "\n".join([*map(str.rstrip, align(rows)[0]), "", self.caption()])


def cold_start_curve(
    learner: Predictor | None,
    log: Interactions,
    sizes: Sequence[int] | None = None,
    metric: str = "rmse",
    baselines: Interactions | Mapping[str, Predictor] | None = None,
    seed: int = 0,
    *,
    order: Literal["random", "time"] = "random",
    min_query: int = 5,
    batch_size: int = 256,
) -> ColdStartCurve:
    """Judges predictors on users of whom ever more ratings are known.

    Users who have max(sizes) + `min_query` ratings take part. Metrics of the catalogue rank all items but those of the
    largest support, whatever the size.

    Args:
        learner: What is to be judged; None to see the baselines alone.
        log: Ratings of users that were not in training, mapped as by `evaluate`.
        sizes: Ratings known; by default those of 0, 1, 2, 3, 5, 10, 20, 50 for which at least half of the users have
            enough.
        metric: One of those of `evaluate`, such as "rmse", "ndcg@10" or "catalogue_ndcg@10". Predictors for which it
            means nothing are left out.
        baselines: The training log, on which all baselines are fitted, once; or fitted predictors by name.
        seed: Of the baselines and of the order in which a user's ratings become known.
        order: "random", or "time" for a user's oldest ratings first.
        min_query: The fewest ratings to predict of a user, ≥ 1.
        batch_size: Users at a time.

    Returns:
        The figure of each predictor at each size.

    Raises:
        ValueError: There is no such metric, a size is no whole number ≥ 0, or no user has enough ratings. Else as
            `evaluate`.
    """
    item_ids = item_ids_of(learner, baselines)
    aligned = align_logs(
        {"log": log, "baselines": baselines if isinstance(baselines, Interactions) else None}, item_ids
    )
    log, train = aligned["log"], aligned.get("baselines")
    known = _check_sizes(sizes, log, as_int("min_query", min_query))
    enough = np.flatnonzero(log.sizes() >= known[-1] + min_query)
    if not len(enough):
        raise ValueError(
            f"sizes: no user of the log has the {known[-1] + min_query} ratings that {known[-1]} known and {min_query} "
            f"to predict need; the most are {log.sizes().max(initial=0)}"
        )
    with torch.device("cpu"):
        predictors = predictors_of(learner, baselines if train is None else train, item_ids, seed)

    labels = {(name, size): f"{name} knowing {size}" for name in predictors for size in known}
    length = metric.rpartition("@")[2]
    report = evaluate(
        None, log.select_users(enough), support=known[-1], query="rest", order=order, seed=seed,
        k=int(length) if length.isdigit() else 10, catalogue=metric.startswith(("catalogue", "coverage")),
        batch_size=batch_size,
        baselines={label: _KnowingLess(predictors[name], size) for (name, size), label in labels.items()},
    )  # fmt: skip
    figures = {
        name: [report.results[labels[name, size]][metric] for size in known]
        for name in predictors
        if metric in report.results[labels[name, known[0]]]
    }
    if not figures:
        available = dict.fromkeys(key for found in report.results.values() for key in found)
        raise ValueError(f"metric: expected one that a predictor has, such as {', '.join(available)}, got {metric!r}")
    return ColdStartCurve(
        metric, known, figures, report.chance.get(metric), len(report.user_ids), int(report.query_sizes.sum())
    )


def describe(metric: str) -> str:
    """Unit and direction of a metric, for the axis of a plot."""
    return "rating points, lower is better" if metric in LOWER_IS_BETTER else "higher is better"


class _KnowingLess(nn.Module):
    """A predictor that gets only the first ratings of every support; a module, so that one inside knows of its mode."""

    def __init__(self, predictor: Predictor, size: int) -> None:
        super().__init__()
        self.predictor, self.size = predictor, size
        self.item_ids = predictor.item_ids
        for name in ("rating_range", "predicts_ratings"):
            if hasattr(predictor, name):
                setattr(self, name, getattr(predictor, name))
        self.model = getattr(predictor, "model", None)

    def predict(self, batch: TaskBatch) -> Tensor:
        return self.predictor.predict(self._less(batch))

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        return self.predictor.score_catalogue(self._less(batch))

    def _less(self, batch: TaskBatch) -> TaskBatch:
        support, tasks = batch.support, batch.support.task_ids()
        kept = torch.arange(len(support)) - support.offsets[tasks] < self.size  # [n]
        sizes = support.sizes().clamp(max=self.size)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        assert support.targets is not None
        fewer = Entries(support.items[kept], support.targets[kept], offsets)
        return TaskBatch(fewer, batch.query, batch.users, user_ids=batch.user_ids)


def _check_sizes(sizes: Sequence[int] | None, log: Interactions, min_query: int) -> list[int]:
    """The sizes in ascending order, or the default ones that suit the log."""
    if min_query < 1:
        raise ValueError(f"min_query: must be ≥ 1, got {min_query}")
    if sizes is None:
        usual = float(np.median(log.sizes())) if log.num_users else 0.0
        return [size for size in _SIZES if size + min_query <= usual] or [0]
    checked = sorted({as_int("sizes", size) for size in sizes})
    if not checked or checked[0] < 0:
        raise ValueError(f"sizes: expected whole numbers ≥ 0, at least one, got {list(sizes)!r}")
    return checked
