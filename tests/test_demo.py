"""The demo leaves what it promises: a report of every algorithm beside the baselines, plots, a checkpoint."""

import importlib.util
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import metarec_fast as mf

DEMO = Path(__file__).parent.parent / "examples" / "movielens.py"
NAMES = (
    "maml", "fomaml", "reptile", "meta-sgd", "maml-r",
    "global-mean", "item-mean", "bias", "item-knn", "ease", "ppca-fold-in", "als-fold-in", "vb-fold-in",
    "popularity", "random",
)  # fmt: skip
RANKING = (
    "ndcg@10", "ndcg_linear@10", "catalogue_ndcg@10", "catalogue_hr@10", "catalogue_recall@10", "catalogue_mrr",
    "coverage@10",
)  # fmt: skip


@pytest.fixture
def demo(monkeypatch):
    """The demo as a module, on 60 users' made-up ratings of 40 films instead of MovieLens."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 20)
    items = np.concatenate([rng.choice(40, 20, replace=False) for _ in range(60)])
    log = mf.Interactions.from_arrays(users, items, rng.integers(1, 11, 1200) / 2)
    log = replace(log, item_titles={item: f"Film {item}" for item in log.item_ids.tolist()})
    monkeypatch.setattr(mf, "load_movielens_small", lambda: log)
    spec = importlib.util.spec_from_file_location("movielens_demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_report_plots_and_checkpoint_are_there(demo, tmp_path, capsys):
    demo.main(["--quick", "--out", str(tmp_path / "demo")])
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert set(report) == {"results", "spread", "seeds", "chance"}
    assert tuple(report["results"]) == NAMES
    for name, figures in report["results"].items():
        errors = () if name in ("popularity", "random") else ("rmse", "mae", "mae_user")
        assert {*errors, *RANKING} <= set(figures), name
        assert all(math.isfinite(value) for value in figures.values())
        assert report["seeds"][name] == {metric: [value] for metric, value in figures.items()}
    for plot in ("learning_curves.png", "comparison.png"):
        assert (tmp_path / "demo" / plot).read_bytes().startswith(b"\x89PNG")
    learner = mf.load(tmp_path / "demo" / "checkpoint")
    assert isinstance(learner, mf.MAMLR)
    assert learner.item_ids.tolist() == list(range(40))

    printed = capsys.readouterr().out
    assert f"\nchance {report['chance']['ndcg@10']:.4f} {report['chance']['catalogue_ndcg@10']:.4f}" in re.sub(
        "[ –]+", " ", printed
    )
    recommended = printed.partition("may like")[2]
    assert recommended.count("Film") == 10
    assert not {line.split("Film")[1] for line in known_lines(printed)} & {
        line.split("Film")[1] for line in recommended.splitlines() if "Film" in line
    }


def test_means_are_over_the_splits_and_are_shown_with_their_deviation(demo, tmp_path, capsys):
    demo.main(["--epochs", "1", "--seeds", "2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    for name in NAMES:
        values = report["seeds"][name]["ndcg@5"]
        assert len(values) == 2
        assert report["results"][name]["ndcg@5"] == pytest.approx(sum(values) / 2)
        assert report["spread"][name]["ndcg@5"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    printed = capsys.readouterr().out
    bias = report["results"]["bias"]["rmse"], report["spread"]["bias"]["rmse"]
    assert re.search(r"^bias +{:.4f} ±{:.4f} ".format(*bias), printed, re.MULTILINE)
    rmse = [report["seeds"][name]["rmse"] for name in ("maml-r", "vb-fold-in")]
    assert f"{(sum(rmse[0]) - sum(rmse[1])) / 2:+.4f} ±" in printed.partition("less that of vb-fold-in: ")[2]


def known_lines(printed):
    """What the newcomer has rated, a line for each film."""
    return [line for line in printed.partition("may like")[0].splitlines() if "Film" in line]
