"""The benchmark of accuracy: a small run of each part, and the ridges that know the truth."""

import json

import numpy as np
import pytest
import torch

import metarec_fast as mf
from benchmarks import accuracy, synthetic


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_log_with_features_is_judged_for_new_users_and_new_items(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [f"{u},{i},{rng.integers(1, 6)}" for u in range(60) for i in rng.choice(30, 15, replace=False)]
    (tmp_path / "ratings.csv").write_text("\n".join(["user,item,rating", *rows]) + "\n")
    (tmp_path / "users.csv").write_text("user,gender\n" + "".join(f"{u},{'fm'[u % 2]}\n" for u in range(60)))
    (tmp_path / "items.csv").write_text("item,genre\n" + "".join(f"{i},{'abc'[i % 3]}\n" for i in range(30)))
    tables = ["--ratings", "ratings.csv", "--users", "users.csv", "--items", "items.csv"]
    accuracy.main([*tables, "--quick", "--splits", "2", "--dim", "2", "--support", "3", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "Users never seen, 3 ratings known" in printed
    assert "Items never rated" in printed

    result = json.loads((tmp_path / "runs/accuracy/accuracy.json").read_text())
    users = result["new_users"]
    assert {"maml-r", "maml-r, features", "bias", "item-knn", "vb-fold-in"} <= set(users["results"])
    for name, (difference, _) in users["differences"]["rmse"].items():
        per_split = np.subtract(users["seeds"][name]["rmse"], users["seeds"]["ppca-fold-in"]["rmse"])
        assert difference == pytest.approx(per_split.mean())
    items = result["new_items"]["results"]
    assert set(items) == {"maml-r", "maml-r, item features", "bias", "chance"}
    assert items["bias"]["ndcg@3, item-cold"] == pytest.approx(items["chance"]["ndcg@3, item-cold"])


def test_ridges_that_know_more_predict_better(monkeypatch):
    for name, value in {"NUM_USERS": 400, "NUM_ITEMS": 150, "NUM_NEWCOMERS": 200}.items():
        monkeypatch.setattr(synthetic, name, value)
    result = synthetic.judge(threads=1, num_ratings=15_000)["results"]
    for known in ("5 known", "10 known", "30 known"):
        true, best, learned = (
            result[name][known] for name in ("ridge, true items", "ridge, best estimate of items", "maml-r")
        )
        assert synthetic.NOISE < true < best < learned < 1.2 * true


def test_the_best_estimate_is_the_posterior_of_the_items(monkeypatch):
    for name, value in {"NUM_USERS": 60, "NUM_ITEMS": 20, "NUM_NEWCOMERS": 5}.items():
        monkeypatch.setattr(synthetic, name, value)
    world = synthetic.World(seed=1, num_ratings=2_000)
    model, item = world.best_estimate(), 3
    rows = np.flatnonzero(world.train.items == item)
    users = np.repeat(np.arange(60), world.train.sizes())[rows]
    x = np.c_[np.ones(len(rows)), world.users[users]]
    y = world.train.ratings[rows] - synthetic.OFFSET - world.user_bias[users]
    prior = np.diag([1 / synthetic.ITEM_BIAS**2] + [synthetic.DIM / synthetic.ITEM_SCALE**2] * synthetic.DIM)
    mean = np.linalg.solve(x.T @ x / synthetic.NOISE**2 + prior, x.T @ y / synthetic.NOISE**2)
    found = torch.cat([model.item_bias[item : item + 1], model.item_table[item] * synthetic.USER_BIAS])
    torch.testing.assert_close(found, torch.from_numpy(mean).float(), rtol=1e-3, atol=1e-4)  # its sums are float32
    assert isinstance(world.train, mf.Interactions)
