"""Baselines of other libraries: their scores are the formulas they stand for, and nobody needs the libraries."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from metarec_fast import _library_baselines
from metarec_fast.baselines import (
    BASELINES,
    LIBRARY_BASELINES,
    ImplicitALS,
    LenskitALS,
    LenskitItemKNN,
    fit_baselines,
    is_baseline,
)
from metarec_fast.data import Interactions
from metarec_fast.evaluation import evaluate
from metarec_fast.tasks import Entries, TaskBatch

EVERY = list(LIBRARY_BASELINES)


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((60, 25)) < 0.4)
    taste = rng.normal(0, 0.7, (60, 2)) @ rng.normal(0, 0.7, (2, 25))
    ratings = 3 + rng.normal(0, 0.6, 25)[items] + taste[users, items] + rng.normal(0, 0.3, len(users))
    return Interactions.from_arrays(users, items, ratings.clip(1, 5)).align_items(np.arange(27))[0]  # two cold items


@pytest.fixture
def batch():
    """Tasks with four, no and one support entries; a cold item among those known, and among those asked about."""
    items, ratings = torch.tensor([0, 4, 9, 25, 3]), torch.tensor([5.0, 4.5, 2.0, 4.0, 1.0])
    support = Entries(items, ratings, torch.tensor([0, 4, 4, 5]))
    return TaskBatch(support, Entries(torch.tensor([1, 2, 26, 5, 0, 7]), None, torch.tensor([0, 2, 3, 6])))


def known_to(batch, task):
    """Items and ratings of a task's support."""
    begin, end = batch.support.offsets[task : task + 2].tolist()
    return batch.support.items[begin:end].numpy(), batch.support.targets[begin:end].double().numpy()


def fit(name, log, **settings):
    pytest.importorskip(LIBRARY_BASELINES[name].library)
    return LIBRARY_BASELINES[name](**settings).fit(log)


def test_implicit_users_solve_their_normal_equations(log, batch):
    """(Σ_i c_i e_i e_iᵀ + λ I) u = Σ_{i rated} c_i e_i, over all items, c_i = 1 where not rated."""
    baseline = fit("implicit-als", log, dim=3, confidence=4.0, ridge=0.5)
    table = baseline.model.item_factors.astype(np.float64)
    scores = baseline.score_catalogue(batch).numpy()
    for task in range(batch.num_tasks):
        rated = np.isin(np.arange(27), known_to(batch, task)[0])
        confidence = np.where(rated, 4.0, 1.0)
        matrix = sum(c * np.outer(row, row) for c, row in zip(confidence, table, strict=True)) + 0.5 * np.eye(3)
        user = np.linalg.solve(matrix, (confidence * rated) @ table)
        np.testing.assert_allclose(scores[task], table @ user, rtol=1e-4, atol=1e-5)
    assert (scores[1] == 0).all()
    assert (scores[:, 25:] == 0).all()


def test_implicit_items_are_those_of_the_objective(log):
    """After many sweeps, each item solves its normal equations given the users, as they do given the items."""
    baseline = fit("implicit-als", log, dim=2, confidence=3.0, ridge=2.0, sweeps=300)
    users, items = baseline.model.user_factors.astype(np.float64), baseline.model.item_factors
    rows = np.repeat(np.arange(log.num_users), log.sizes())
    for item in range(25):
        rated = np.isin(np.arange(log.num_users), rows[log.items == item])
        confidence = np.where(rated, 3.0, 1.0)
        matrix = (users * confidence[:, None]).T @ users + 2 * np.eye(2)
        expected = np.linalg.solve(matrix, (confidence * rated) @ users)
        np.testing.assert_allclose(items[item], expected, rtol=1e-3, atol=1e-4)  # conjugate gradients, 3 steps


def test_implicit_does_not_look_at_ratings(log, batch):
    baseline = fit("implicit-als", log)
    support = Entries(batch.support.items, None, batch.support.offsets)
    torch.testing.assert_close(baseline.predict(TaskBatch(support, batch.query)), baseline.predict(batch))
    assert not ImplicitALS.predicts_ratings


def test_lenskit_als_scores_are_biases_and_a_ridge_on_what_they_leave(log, batch):
    """m + b_i + c + u·e_i with (EᵀE + n λ I) u = Eᵀ r over the n rated items."""
    baseline = fit("lenskit-als", log, dim=3, ridge=0.2, damping=2.0)
    table = baseline.scorer.item_embeddings.astype(np.float64)
    mean = log.ratings.mean(dtype=np.float64)
    sums = np.bincount(log.items, log.ratings - mean, 27)
    item_scores = mean + sums / (np.bincount(log.items, minlength=27) + 2)
    scores = baseline.score_catalogue(batch).numpy()
    for task in range(batch.num_tasks):
        items, ratings = known_to(batch, task)
        left = ratings - item_scores[items]
        bias = left.sum() / (len(left) + 2)
        rows = table[items]
        matrix = rows.T @ rows + (len(left) * 0.2 if len(left) else 1) * np.eye(3)
        user = np.linalg.solve(matrix, rows.T @ (left - bias))
        np.testing.assert_allclose(scores[task], item_scores + bias + table @ user, rtol=1e-4)
    assert LenskitALS.predicts_ratings


def test_lenskit_als_scores_are_those_of_the_library(log, batch):
    baseline = fit("lenskit-als", log, dim=3)
    from lenskit.data import ItemList

    scores = baseline.score_catalogue(batch)
    for task in (0, 2):  # to a user without ratings it gives no score
        items, ratings = known_to(batch, task)
        known = ItemList(items, rating=ratings.astype(np.float32))
        expected = baseline.scorer(known, ItemList(np.arange(27))).scores()
        torch.testing.assert_close(scores[task], torch.from_numpy(expected))


def test_lenskit_item_knn_is_the_mean_over_the_most_similar_items(log, batch):
    """m_i + Σ_j s_ij (y_j − m_j)/Σ_j s_ij over the `most` similar items j that are known, else biases."""
    baseline = fit("lenskit-item-knn", log, most=2, damping=2.0)
    users = np.repeat(np.arange(log.num_users), log.sizes())
    counts = np.bincount(log.items, minlength=27)
    means = np.bincount(log.items, log.ratings, 27) / np.maximum(counts, 1)
    table = np.zeros((log.num_users, 27))
    table[users, log.items] = log.ratings - means[log.items]
    table /= np.maximum(np.linalg.norm(table, axis=0), 1e-30)
    similarity = table.T @ table
    np.fill_diagonal(similarity, 0)
    mean = log.ratings.mean(dtype=np.float64)
    item_scores = mean + counts * (means - mean) / (counts + 2)
    scores = baseline.score_catalogue(batch).numpy()
    for task in range(batch.num_tasks):
        items, ratings = known_to(batch, task)
        bias = (ratings - item_scores[items]).sum() / (len(items) + 2)
        for item in range(27):
            near = [j for j in np.argsort(-similarity[item, items]) if similarity[item, items[j]] > 1e-6][:2]
            if near:
                weights = similarity[item, items[near]]
                expected = means[item] + weights @ (ratings[near] - means[items[near]]) / weights.sum()
            else:
                expected = item_scores[item] + bias
            assert scores[task, item] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_scores_on_any_number_of_threads(name, log, batch):
    scores = fit(name, log, seed=3).score_catalogue(batch)  # LensKit's threads are set by now, and stay so
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        torch.testing.assert_close(fit(name, log, seed=3).score_catalogue(batch), scores, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)
    if name != "lenskit-item-knn":  # has nothing random
        assert not torch.equal(fit(name, log, seed=4).score_catalogue(batch), scores)


@pytest.mark.parametrize("name", EVERY)
def test_pytorch_keeps_its_threads_and_how_it_shares_tensors(name):
    """In a process of its own: LensKit sets both when it is first used."""
    pytest.importorskip(LIBRARY_BASELINES[name].library)
    code = f"""
import torch, metarec_fast as mf
torch.set_num_threads(3)
sharing = torch.multiprocessing.get_sharing_strategy()
mf.baselines.fit_baselines(mf.Interactions.from_arrays([0, 0, 1], [0, 1, 1], [3.0, 4.0, 5.0]), ["{name}"])
assert torch.get_num_threads() == 3
assert torch.multiprocessing.get_sharing_strategy() == sharing
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize("name", EVERY)
def test_they_stand_in_the_table_beside_the_others(name, log):
    pytest.importorskip(LIBRARY_BASELINES[name].library)
    report = evaluate(None, log, support=3, k=3, baselines=fit_baselines(log, ["bias", name]))
    assert list(report.results) == ["bias", name]
    assert ("rmse" in report.results[name]) is LIBRARY_BASELINES[name].predicts_ratings
    assert is_baseline(name)


def test_all_means_those_that_are_installed(log, monkeypatch):
    installed = [name for name, baseline in LIBRARY_BASELINES.items() if baseline.installed()]
    assert list(fit_baselines(log, "all")) == [*BASELINES, *installed]
    monkeypatch.setattr(_library_baselines, "find_spec", lambda name: None)
    assert list(fit_baselines(log, "all")) == list(BASELINES)


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(name, log, monkeypatch):
    monkeypatch.setattr(_library_baselines, "find_spec", lambda name: None)
    library = LIBRARY_BASELINES[name].library
    with pytest.raises(ImportError, match=rf"{name} needs {library}: pip install 'metarec-fast\[{library}\]'"):
        fit_baselines(log, ["bias", name])


def test_no_library_is_imported_before_one_is_used():
    code = "import sys, metarec_fast as mf; assert not {'implicit', 'lenskit', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (ImplicitALS, {"dim": 0}, "dim: must be ≥ 1, got 0"),
        (ImplicitALS, {"confidence": 0}, "confidence: must be > 0 and finite, got 0"),
        (LenskitALS, {"ridge": -1}, "ridge: must be > 0 and finite, got -1"),
        (LenskitALS, {"sweeps": 0}, "sweeps: must be ≥ 1, got 0"),
        (LenskitItemKNN, {"most": 0}, "most: must be ≥ 1, got 0"),
        (LenskitItemKNN, {"damping": float("inf")}, "damping: must be > 0 and finite, got inf"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make, settings, message):
    pytest.importorskip(make.library)
    with pytest.raises(ValueError, match=message):
        make(**settings)
