"""Trains learners and judges them beside the baselines on the same users, split by split; plots and JSON of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from metarec_fast import _plots
from metarec_fast.baselines import fit_baselines
from metarec_fast.data import UserSplit
from metarec_fast.evaluation import evaluate
from metarec_fast.history import History
from metarec_fast.learners import FOMAML, MAML, Learner, MetaSGD
from metarec_fast.maml_r import MAMLR
from metarec_fast.models import DotRecommender
from metarec_fast.report import Report, align
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
) -> tuple[Learner, History]:
    """Meta-trains one algorithm with its defaults, or with what `tune` trials find around them.

    Raises:
        ValueError: There is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    with torch.random.fork_rng(devices=[]):  # the start of the item vectors depends on the seed alone
        torch.manual_seed(seed)
        learner = ALGORITHMS[algorithm](DotRecommender(split.train.num_items, dim))
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


def summarize_seeds(
    reports: Iterable[Report],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """Means by name and metric, and the values of each report behind them; only figures that are numbers."""
    seeds: dict[str, dict[str, list[float]]] = {}
    for report in reports:
        for name, figures in report.results.items():
            for metric, value in figures.items():
                if math.isfinite(value):
                    seeds.setdefault(name, {}).setdefault(metric, []).append(value)
    means = {
        name: {metric: sum(values) / len(values) for metric, values in figures.items()}
        for name, figures in seeds.items()
    }
    return means, seeds


def write_json(path: Path, reports: Iterable[Report]) -> dict[str, dict[str, float]]:
    """Writes `{"results": means, "seeds": values}`; returns the means."""
    means, seeds = summarize_seeds(reports)
    path.write_text(json.dumps({"results": means, "seeds": seeds}, indent=1) + "\n", encoding="utf-8")
    return means


def format_table(
    results: Mapping[str, Mapping[str, float]],
    metrics: Iterable[str] = ("rmse", "mae", "mae_user", "ndcg@10", "catalogue_ndcg@10"),
) -> str:
    """A row for each name, a column for each metric; – where one means nothing."""
    rows = [["", *metrics]]
    for name, figures in results.items():
        rows.append([name, *(f"{figures[m]:.4f}" if m in figures else "–" for m in rows[0][1:])])
    return "\n".join(align(rows)[0])


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
