"""Training and judging side by side: the same seed gives the same figures, and the report has the promised layout."""

import json
import math

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast import comparison


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 12)
    items = np.concatenate([rng.choice(30, 12, replace=False) for _ in range(40)])
    log = mf.Interactions.from_arrays(users, items, rng.integers(1, 6, 480).astype(float))
    return mf.split_users(log, seed=0)


def run(split, name):
    learner, history = comparison.train(name, split, dim=3, epochs=2, seed=1, progress=False)
    return learner, history, comparison.judge({name: learner}, split, seed=1)


@pytest.mark.parametrize("name", list(comparison.ALGORITHMS))
def test_the_same_seed_gives_the_same_figures_whatever_was_drawn_before(split, name):
    first = run(split, name)[2].results
    torch.rand(7)
    assert run(split, name)[2].results == first


def test_report_and_plots_are_written(split, tmp_path):
    learner, history, report = run(split, "maml")
    summary = comparison.write_json(tmp_path / "report.json", [report, report])
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == summary._asdict()
    means = summary.results
    assert set(means) == {"maml", *mf.BASELINES}
    assert len(written["seeds"]["maml"]["rmse"]) == 2
    assert "rmse" not in means["popularity"]
    comparison.plot_learning_curves({"maml": history}, tmp_path / "curves.png")
    comparison.plot_comparison(means, tmp_path / "bars.png")
    for name in ("curves.png", "bars.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert learner.name == "maml"
    lines = comparison.format_table(means).splitlines()
    assert len({len(line) for line in lines}) == 1


def reports_of(*runs, chance=()):
    """Reports of made-up figures, one for each of several splits."""
    chance = chance or [{}] * len(runs)
    return [mf.Report(run, level, {}, np.arange(1), np.ones(1), {}) for run, level in zip(runs, chance, strict=True)]


def test_several_reports_are_summed_up_by_mean_deviation_and_chance():
    runs = (
        {"a": {"rmse": 1.0, "ndcg@10": 0.5}, "b": {"rmse": 3.0}},
        {"a": {"rmse": 2.0}, "b": {"rmse": math.nan}},
        {"a": {"rmse": 6.0}, "b": {"rmse": 4.0}},
    )
    summary = comparison.summarize_seeds(reports_of(*runs, chance=[{"ndcg@10": level} for level in (0.2, 0.3, 0.4)]))
    assert summary.results == {"a": {"rmse": 3.0, "ndcg@10": 0.5}, "b": {"rmse": 3.5}}
    assert summary.spread == {"a": {"rmse": pytest.approx(7**0.5)}, "b": {"rmse": pytest.approx(0.5**0.5)}}
    assert summary.seeds["a"]["rmse"] == [1.0, 2.0, 6.0]
    assert summary.chance == {"ndcg@10": pytest.approx(0.3)}
    table = comparison.format_table(summary.results, ["rmse", "ndcg@10"], spread=summary.spread, chance=summary.chance)
    assert [line.split() for line in table.splitlines()] == [
        ["rmse", "ndcg@10"],
        ["a", "3.0000", "±2.6458", "0.5000"],
        ["b", "3.5000", "±0.7071", "–"],
        ["chance", "–", "0.3000"],
    ]
    assert "±" not in comparison.format_table(summary.results, spread={"a": {}})


def test_differences_from_a_baseline_are_paired_split_by_split():
    runs = ({"a": {"rmse": 1.0}, "b": {"rmse": 3.0}, "c": {}}, {"a": {"rmse": 7.0}, "b": {"rmse": 8.0}, "c": {}})
    assert comparison.differences(reports_of(*runs), "b") == {"a": (-1.5, pytest.approx(0.5**0.5))}
    (alone,) = comparison.differences(reports_of(runs[0]), "b").values()
    assert alone.mean == -2
    assert math.isnan(alone.spread)
    with pytest.raises(ValueError, match="baseline: expected one of a, b, c, got 'd'"):
        comparison.differences(reports_of(*runs), "d")
    with pytest.raises(ValueError, match="metric: expected one of rmse, got 'auc'"):
        comparison.differences(reports_of(*runs), "b", "auc")


def test_an_unknown_algorithm_is_named(split):
    with pytest.raises(ValueError, match="algorithm: expected one of maml, .*, got 'mamba'"):
        comparison.train("mamba", split)
