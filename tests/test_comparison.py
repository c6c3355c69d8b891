"""Training and judging side by side: the same seed gives the same figures, and the report has the promised layout."""

import json

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
    means = comparison.write_json(tmp_path / "report.json", [report, report])
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["results"] == means
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


def test_an_unknown_algorithm_is_named(split):
    with pytest.raises(ValueError, match="algorithm: expected one of maml, .*, got 'mamba'"):
        comparison.train("mamba", split)
