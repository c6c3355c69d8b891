"""Trains learners and judges them beside the baselines on the same users, split by split; plots and JSON of it."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from metarec_fast import _plots
from metarec_fast.baselines import fit_baselines
from metarec_fast.data import UserSplit
from metarec_fast.evaluation import evaluate
from metarec_fast.features import Features
from metarec_fast.history import History
from metarec_fast.learner import Learner
from metarec_fast.maml import FOMAML, MAML, MetaSGD
from metarec_fast.maml_r import MAMLR
from metarec_fast.models import DotRecommender
from metarec_fast.report import Report, align, format_deviation
from metarec_fast.reptile import Reptile
from metarec_fast.sampler import Size

ALGORITHMS: dict[str, Callable[[DotRecommender], Learner]] = {
    learner.name: learner for learner in (MAML, FOMAML, Reptile, MetaSGD, MAMLR)
}


def train(
    algorithm: str,
    split: UserSplit,
    *,
    dim: int = 16,
    epochs: int | None = None,
    seed: int = 0,
    progress: bool = True,
    support: Size = (3, 90),
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    tune: int | None = None,
    study: str | os.PathLike[str] | None = None,
    user_features: Features | None = None,
    item_features: Features | None = None,
) -> tuple[Learner, History]:
    """Meta-trains one algorithm, on features too where they are given, with its defaults or what `tune` trials find.

    Raises:
        ValueError: There is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    with torch.random.fork_rng(devices=[]):  # the start of the item vectors depends on the seed alone
        torch.manual_seed(seed)
        model = DotRecommender(split.train.num_items, dim, user_features=user_features, item_features=item_features)
        learner = ALGORITHMS[algorithm](model)
    valid = split.valid if split.valid.num_users else None
    history = learner.fit(
        split.train, valid, support=support, epochs=epochs, seed=seed, progress=progress, checkpoint=checkpoint,
        resume=resume, tune=tune, study=study,
    )  # fmt: skip
    return learner, history


def judge(learners: Mapping[str, Learner], split: UserSplit, support: Size = 10, seed: int = 0) -> Report:
    """All learners and all baselines on the test users of a split."""
    return evaluate(
        None, split.test, support=support, seed=seed, baselines={**learners, **fit_baselines(split.train, seed=seed)}
    )


class Summary(NamedTuple):
    """Figures over several reports, by name and metric; only those that are numbers.

    Attributes:
        results: Means.
        spread: Sample standard deviations, of what at least two reports have.
        seeds: The values of each report.
        chance: Means of the level of chance, by metric.
    """

    results: dict[str, dict[str, float]]
    spread: dict[str, dict[str, float]]
    seeds: dict[str, dict[str, list[float]]]
    chance: dict[str, float]


class Difference(NamedTuple):
    """Mean and sample standard deviation (NaN of a single one) of paired differences."""

    mean: float
    spread: float


def summarize_seeds(reports: Iterable[Report]) -> Summary:
    """What reports of several splits or seeds say together."""
    seeds: dict[str, dict[str, list[float]]] = {}
    chances: dict[str, list[float]] = {}
    for report in reports:
        named = [(seeds.setdefault(name, {}), figures) for name, figures in report.results.items()]
        for collected, figures in (*named, (chances, report.chance)):
            for metric, value in figures.items():
                if math.isfinite(value):
                    collected.setdefault(metric, []).append(value)
    return Summary(
        results={name: _means(figures) for name, figures in seeds.items()},
        spread={
            name: {metric: statistics.stdev(values) for metric, values in figures.items() if len(values) > 1}
            for name, figures in seeds.items()
        },
        seeds=seeds,
        chance=_means(chances),
    )


def differences(reports: Iterable[Report], baseline: str, metric: str = "rmse") -> dict[str, Difference]:
    """By how much each predictor's figure differs from the baseline's, report by report: name − baseline.

    What makes one split harder than another is in both figures, and cancels.

    Args:
        reports: Of several splits or seeds, at least one.
        baseline: Which predictor to compare with.
        metric: Predictors without it are left out.

    Raises:
        ValueError: A report has no such baseline, or the baseline no such metric; those known are listed.
    """
    paired: dict[str, list[float]] = {}
    for report in reports:
        if baseline not in report.results:
            raise ValueError(f"baseline: expected one of {', '.join(report.results)}, got {baseline!r}")
        if metric not in report.results[baseline]:
            raise ValueError(f"metric: expected one of {', '.join(report.results[baseline])}, got {metric!r}")
        for name, figures in report.results.items():
            if metric in figures:
                paired.setdefault(name, []).append(figures[metric] - report.results[baseline][metric])
    return {
        name: Difference(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)
        for name, values in paired.items()
        if name != baseline
    }


def write_json(path: Path, reports: Iterable[Report]) -> Summary:
    """Writes `{"results": means, "spread": deviations, "seeds": values, "chance": means}`; returns the same."""
    summary = summarize_seeds(reports)
    path.write_text(json.dumps(summary._asdict(), indent=1) + "\n", encoding="utf-8")
    return summary


def format_table(
    results: Mapping[str, Mapping[str, float]],
    metrics: Iterable[str] = ("rmse", "mae", "mae_user", "ndcg@10", "catalogue_ndcg@10"),
    *,
    spread: Mapping[str, Mapping[str, float]] | None = None,
    chance: Mapping[str, float] | None = None,
) -> str:
    """A row for each name, a column for each metric; – where one means nothing.

    Args:
        results: Figures by name and metric.
        metrics: The columns.
        spread: Standard deviations, shown behind the figures where there are any.
        chance: The level of ranking at random, shown as a last row.
    """
    deviating = any((spread or {}).values())

    def cell(name: str, figures: Mapping[str, float], metric: str) -> str:
        if metric not in figures:
            return "–"
        deviation = format_deviation((spread or {}).get(name, {}).get(metric)) if deviating else ""
        return f"{figures[metric]:.4f}{deviation}"

    rows = [["", *metrics]]
    for name, figures in {**results, **({"chance": chance} if chance else {})}.items():
        rows.append([name, *(cell(name, figures, metric) for metric in rows[0][1:])])
    return "\n".join(map(str.rstrip, align(rows)[0]))


def plot_learning_curves(histories: Mapping[str, History], path: Path) -> None:
    """Validation error over epochs, a line for each learner; a PNG."""
    pyplot = _plots.pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    metric = "rmse"
    for name, history in histories.items():
        judged = [(epoch.number, epoch.valid) for epoch in history.epochs if epoch.valid is not None]
        if judged:
            axes.plot(*zip(*judged, strict=True), marker="o", markersize=3, label=name)
        metric = history.metric
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{metric} of validation users (rating points)")
    axes.set_title("Learning curves")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_comparison(results: Mapping[str, Mapping[str, float]], path: Path, metric: str = "rmse") -> None:
    """One bar for each name, the best on top; a PNG."""
    pyplot = _plots.pyplot()
    named = sorted(((f[metric], name) for name, f in results.items() if metric in f), reverse=True)
    values, names = [value for value, _ in named], [name for _, name in named]
    colours = ["tab:blue" if name in ALGORITHMS else "lightgrey" for name in names]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, fmt="%.4f", padding=3)
    axes.set_xlim(min(values) * 0.95, max(values) * 1.02)
    axes.set_xlabel(f"{metric} of test users (rating points; the axis does not begin at zero)")
    axes.set_title("Users never seen in training: learners (blue) and baselines")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _means(values: Mapping[str, list[float]]) -> dict[str, float]:
    return {metric: sum(row) / len(row) for metric, row in values.items()}
