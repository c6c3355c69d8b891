"""Baselines: what they learn, how a new user adapts, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metarec_fast.baselines import (
    BASELINES,
    EASE,
    LIBRARY_BASELINES,
    Bias,
    GlobalMean,
    ItemKNN,
    ItemMean,
    Popularity,
    PPCAFoldIn,
    Random,
    VariationalFoldIn,
    fit_baselines,
)
from metarec_fast.data import Interactions
from metarec_fast.tasks import Entries, TaskBatch

NAMES = list(BASELINES)
INSTALLED = [  # and those of other libraries, where they are
    pytest.param(name, marks=pytest.mark.skipif(not made.installed(), reason=f"needs {made.library}"))
    for name, made in LIBRARY_BASELINES.items()
]
KNOWN = {**BASELINES, **LIBRARY_BASELINES}


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((40, 25)) < 0.4)
    ratings = 3 + rng.normal(0, 0.6, 25)[items] + rng.normal(0, 0.6, 40)[users] + rng.normal(0, 0.3, len(users))
    return Interactions.from_arrays(users, items, ratings.clip(1, 5)).align_items(np.arange(27))[0]  # two cold items


def entries(items, targets, sizes):
    targets = None if targets is None else torch.tensor(targets, dtype=torch.float32)
    return Entries(torch.tensor(items, dtype=torch.int64), targets, torch.tensor([0, *np.cumsum(sizes)]))


@pytest.fixture
def batch():
    """Tasks with three, no and one support entries; the second is asked about a cold item."""
    support = entries([0, 4, 9, 3], [5.0, 4.5, 4.0, 1.0], [3, 0, 1])
    return TaskBatch(support, entries([1, 2, 26, 5, 0, 7], None, [2, 1, 3]), users=torch.tensor([8, 3, 5]))


def test_there_is_a_baseline_of_every_name(log):
    assert NAMES == [
        "global-mean", "item-mean", "bias", "item-knn", "ease", "ppca-fold-in", "als-fold-in", "vb-fold-in",
        "popularity", "random",
      ]  # fmt: skip
    fitted = fit_baselines(log)
    assert list(fitted) == NAMES
    assert all(baseline.name == name for name, baseline in fitted.items())
    assert list(fit_baselines(log, ["bias"])) == ["bias"]


@pytest.mark.parametrize("name", [*NAMES, *INSTALLED])
def test_predictions_are_the_catalogue_scores_of_the_query_items(name, log, batch):
    baseline = KNOWN[name]().fit(log)
    scores = baseline.score_catalogue(batch)
    assert scores.shape == (3, 27)
    assert scores.dtype == torch.float32
    expected = scores[batch.query.task_ids(), batch.query.items]
    torch.testing.assert_close(baseline.predict(batch), expected)
    assert baseline.predict(batch).isfinite().all()


@pytest.mark.parametrize("name", [*NAMES, *INSTALLED])
def test_what_a_task_is_told_does_not_depend_on_the_rest_of_the_batch(name, log, batch):
    baseline = KNOWN[name]().fit(log)
    alone = TaskBatch(entries([3], [1.0], [1]), entries([5, 0, 7], None, [3]), users=torch.tensor([5]))
    torch.testing.assert_close(baseline.predict(alone), baseline.predict(batch)[3:])


@pytest.mark.parametrize("name", [*NAMES, *INSTALLED])
def test_every_baseline_knows_its_items_and_the_rating_scale(name, log):
    baseline = KNOWN[name]().fit(log)
    assert baseline.item_ids is log.item_ids
    assert baseline.rating_range == (log.ratings.min(), log.ratings.max())


@pytest.mark.filterwarnings("ignore:Ratings seem to have the same value")  # says LensKit
@pytest.mark.parametrize("name", [*NAMES, *INSTALLED])
def test_one_rating_is_enough_to_fit(name):
    log = Interactions.from_arrays(["a"], ["x"], [4.0])
    baseline = KNOWN[name]().fit(log)
    task = TaskBatch(entries([], [], [0]), entries([0], None, [1]))
    prediction = baseline.predict(task)
    assert prediction.isfinite().all()
    if baseline.predicts_ratings:
        torch.testing.assert_close(prediction, torch.tensor([4.0]), rtol=1e-3, atol=1e-3)


def test_means_are_those_of_the_log_damped(log, batch):
    mean = log.ratings.mean(dtype=np.float64)
    torch.testing.assert_close(GlobalMean().fit(log).predict(batch), torch.full((6,), float(mean)))
    scores = ItemMean(damping=2).fit(log).score_catalogue(batch)
    own = log.ratings[log.items == 4]
    assert scores[0, 4].item() == pytest.approx((own.sum() + 2 * mean) / (len(own) + 2), rel=1e-6)
    assert scores[0, 26].item() == pytest.approx(mean, rel=1e-6)
    assert torch.equal(scores[0], scores[2])


def test_bias_solves_its_damped_least_squares(log):
    baseline = Bias(item_damping=2, user_damping=3, sweeps=200).fit(log)
    users = np.repeat(np.arange(log.num_users), log.sizes())
    rows = np.concatenate([np.eye(log.num_items)[log.items], np.eye(log.num_users)[users]], 1)
    mean = log.ratings.mean(dtype=np.float64)
    damping = np.diag([2.0] * log.num_items + [3.0] * log.num_users)
    solution = np.linalg.solve(rows.T @ rows + damping, rows.T @ (log.ratings - mean))
    np.testing.assert_allclose(baseline.item_scores, mean + solution[: log.num_items], rtol=1e-5)


def test_a_new_users_bias_is_the_damped_mean_of_what_his_support_leaves(log, batch):
    baseline = Bias(user_damping=2).fit(log)
    bias = baseline.user_bias(batch)
    left = batch.support.targets - baseline.item_scores[batch.support.items]
    torch.testing.assert_close(bias, torch.stack([left[:3].sum() / 5, torch.tensor(0.0), left[3] / 3]))


def test_biases_without_damping_stand_an_empty_support_and_cold_items(log, batch):
    scores = Bias(item_damping=0, user_damping=0).fit(log).score_catalogue(batch)
    assert scores.isfinite().all()
    assert scores[1, 26].item() == pytest.approx(log.ratings.mean(), rel=1e-6)


@pytest.mark.parametrize("make", [VariationalFoldIn, PPCAFoldIn])
def test_fold_in_follows_the_taste_that_a_support_shows(make):
    rng = np.random.default_rng(1)
    taste = rng.choice([-1, 1], 200)
    users, items = np.nonzero(rng.random((200, 20)) < 0.6)
    ratings = 3 + taste[users] * np.where(items < 10, 1.0, -1.0) + rng.normal(0, 0.3, len(users))
    baseline = make(dim=2).fit(Interactions.from_arrays(users, items, ratings))
    likes_first = TaskBatch(entries([0, 1, 12], [4.0, 4.0, 2.0], [3]), entries([5, 15], None, [2]))
    prediction = baseline.predict(likes_first)
    torch.testing.assert_close(prediction, torch.tensor([4.0, 2.0]), rtol=0, atol=0.3)


def test_ease_is_the_ridge_of_each_item_on_the_others(log):
    """Its column i, by the normal equations of the residuals without item i."""
    baseline = EASE(ridge=2.0).fit(log)
    users = np.repeat(np.arange(log.num_users), log.sizes())
    item_scores = baseline.item_scores.double().numpy()
    residuals = np.zeros((log.num_users, log.num_items))
    residuals[users, log.items] = log.ratings - item_scores[log.items]
    bias = residuals.sum(1) / (log.sizes() + baseline.user_damping)
    residuals[users, log.items] -= bias[users]
    products = residuals.T @ residuals
    for item in range(log.num_items):
        others = np.delete(np.arange(log.num_items), item)
        ridge = products[np.ix_(others, others)] + 2 * np.eye(len(others))
        expected = np.linalg.solve(ridge, products[others, item])
        np.testing.assert_allclose(baseline.influence[others, item], expected, rtol=1e-3, atol=1e-4)
        assert baseline.influence[item, item] == 0


def test_item_knn_is_the_similarity_weighted_mean_of_the_users_residuals(log, batch):
    baseline = ItemKNN(shrinkage=3.0, damping=0.5).fit(log)
    predicted, biases = baseline.predict(batch), Bias().fit(log)
    user_bias = biases.user_bias(batch)
    for task in range(batch.num_tasks):
        own = batch.support.task_ids() == task
        items = batch.support.items[own]
        residuals = batch.support.targets[own] - biases.item_scores[items] - user_bias[task]
        for place in (batch.query.task_ids() == task).nonzero()[:, 0].tolist():
            item = int(batch.query.items[place])
            similar = baseline.influence[items, item]
            expected = biases.item_scores[item] + user_bias[task]
            expected = expected + (similar * residuals).sum() / (similar.sum() + 0.5)
            assert predicted[place].item() == pytest.approx(expected.item(), abs=1e-4)


def test_items_beyond_the_most_rated_are_predicted_by_biases(log, batch, monkeypatch):
    from metarec_fast import _neighbours

    monkeypatch.setattr(_neighbours, "_MOST_ITEMS", 3)
    scores, biases = ItemKNN().fit(log).score_catalogue(batch), Bias().fit(log).score_catalogue(batch)
    differ = (scores - biases).abs().amax(0) > 1e-6
    assert 0 < int(differ.sum()) <= 3


def test_popularity_counts_ratings(log, batch):
    scores = Popularity().fit(log).score_catalogue(batch)
    assert scores[2].tolist() == np.bincount(log.items, minlength=27).tolist()
    assert not Popularity.predicts_ratings


def test_random_scores_depend_on_seed_user_and_item_alone(log, batch):
    scores = Random(seed=1).fit(log).score_catalogue(batch)
    assert torch.equal(scores, Random(seed=1).fit(log).score_catalogue(batch))
    assert not torch.equal(scores, Random(seed=2).fit(log).score_catalogue(batch))
    assert len(scores.unique()) == scores.numel()
    assert scores.min() >= 0
    assert scores.max() < 1
    anonymous = TaskBatch(batch.support, batch.query)
    assert not torch.equal(Random(seed=1).fit(log).score_catalogue(anonymous), scores)


def test_random_scores_are_uniform():
    log = Interactions.from_arrays([0], [0], [1.0]).align_items(np.arange(50_000))[0]
    scores = Random().fit(log).score_catalogue(TaskBatch(entries([], [], [0, 0])))
    shares = torch.histc(scores, 10, 0, 1) / scores.numel()
    torch.testing.assert_close(shares, torch.full((10,), 0.1), rtol=0, atol=0.006)  # four standard deviations
    correlation = torch.corrcoef(scores)[0, 1]
    assert abs(correlation) < 0.02


def test_the_seed_reaches_what_is_random(log):
    one, other = (fit_baselines(log, ["vb-fold-in", "random"], seed=seed) for seed in (0, 1))
    assert not torch.equal(one["vb-fold-in"].model.item_table, other["vb-fold-in"].model.item_table)
    assert one["random"].seed == 0
    assert other["random"].seed == 1


def test_an_unknown_name_is_refused_with_those_that_exist(log):
    with pytest.raises(
        ValueError, match=r"names: expected some of global-mean, item-mean, .*, implicit-als, .*, got 'knn'"
    ):
        fit_baselines(log, ["bias", "knn"])


@pytest.mark.parametrize("name", [*NAMES, *INSTALLED])
def test_bad_input_is_refused_by_name(name, log, batch):
    with pytest.raises(ValueError, match="log: expected at least one rating"):
        KNOWN[name]().fit(Interactions.from_arrays([], [], []))
    with pytest.raises(RuntimeError, match=f"{name}: call fit before predicting"):
        KNOWN[name]().predict(batch)
    fitted = KNOWN[name]().fit(log)
    with pytest.raises(ValueError, match="query: expected the entries to predict, got None"):
        fitted.predict(TaskBatch(batch.support))
    with pytest.raises(IndexError, match=r"query\.items: ids must be in \[0, 27\), got 27 at position 1"):
        fitted.predict(TaskBatch(batch.support, entries([0, 27], None, [1, 1, 0])))
    with pytest.raises(IndexError, match=r"support\.items: ids must be in \[0, 27\), got 99 at position 0"):
        fitted.score_catalogue(TaskBatch(entries([99], [1.0], [1])))


@pytest.mark.parametrize("name", ["bias", "item-knn", "ease", "vb-fold-in", *INSTALLED[1:]])
def test_a_support_without_ratings_is_refused_where_it_is_needed(name, log):
    with pytest.raises(ValueError, match=r"support\.targets: expected ratings"):
        KNOWN[name]().fit(log).score_catalogue(TaskBatch(entries([1], None, [1])))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ItemMean(damping=-1), "damping: must be ≥ 0, got -1"),
        (lambda: Bias(item_damping=float("nan")), "item_damping: must be ≥ 0, got nan"),
        (lambda: Bias(user_damping=-2), "user_damping: must be ≥ 0, got -2"),
        (lambda: Bias(sweeps=0), "sweeps: must be ≥ 1, got 0"),
        (lambda: ItemKNN(shrinkage=0), "shrinkage: must be > 0 and finite, got 0"),
        (lambda: EASE(ridge=-1), "ridge: must be > 0 and finite, got -1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
