"""The factor model: what EM computes, what it recovers, and how a new user is folded in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metarec_fast._variational import Inference
from metarec_fast.data import Interactions
from metarec_fast.factor_model import FactorModel
from metarec_fast.tasks import Entries, TaskBatch


def make_log(rng, num_users=300, num_items=80, dim=3, noise=0.5, share=0.3, noisy_items=()):
    """Ratings drawn from the model, and the true score of every user and item."""
    table = rng.normal(0, 0.5, (num_items, dim))
    bias = rng.normal(0, 0.4, num_items)
    scores = 3 + bias + rng.normal(0, 0.5, (num_users, 1)) + rng.normal(size=(num_users, dim)) @ table.T
    users, items = np.nonzero(rng.random((num_users, num_items)) < share)
    scale = np.where(np.isin(items, list(noisy_items)), 4, 1) * noise
    return Interactions.from_arrays(users, items, scores[users, items] + scale * rng.normal(size=len(users))), scores


def make_support(items, targets, sizes, weights=None):
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    return Entries(torch.tensor(items, dtype=torch.int64), torch.tensor(targets), offsets, weights)


def predictions(model, batch):
    user, bias = model.fold_in(batch)
    return model.offset + model.item_bias + bias[:, None] + user @ model.item_table.T


def whole_log(log):
    return TaskBatch(make_support(log.items, log.ratings, log.sizes()))


def naive_half_step(vectors, covariances, known, free, ratings_of_row, prior_mean, prior_covariance):
    """Posterior of one row: a Bayesian regression on the other side's uncertain vectors (K wide, float64)."""
    precision = np.linalg.inv(prior_covariance)
    evidence = precision @ prior_mean
    for other, residual, variance in ratings_of_row:
        second = np.outer(vectors[other], vectors[other]) + covariances[other]
        precision = precision + second[np.ix_(free, free)] / variance
        evidence = evidence + (residual * vectors[other][free] - second[free, known]) / variance
    covariance = np.linalg.inv(precision)
    return covariance @ evidence, covariance


def test_a_sweep_gives_the_posteriors_of_a_loop_over_users_and_items():
    rng = np.random.default_rng(0)
    log, _ = make_log(rng, num_users=12, num_items=9)
    inference = Inference(log, dim=2, seed=0, choices=False)
    inference.sweep(learn_noise=False)
    inference.sweep(learn_noise=True)
    inference.item_noise = torch.linspace(0.5, 2, log.num_items)
    inference.user_noise = torch.linspace(2, 0.5, log.num_users)

    width = 4  # (b, e, 1) and (1, u, c)
    items, noise = inference.items.double().numpy().copy(), inference.noise
    item_covariance = np.zeros((log.num_items, width, width))
    item_covariance[:, :-1, :-1] = inference.item_covariance.numpy()
    item_prior = inference.item_prior_mean[0].double().numpy(), inference.item_prior_covariance.double().numpy()
    user_prior = np.zeros(width - 1), np.diag([1, 1, inference.bias_variance])
    users = np.repeat(np.arange(log.num_users), log.sizes())
    residuals = log.ratings - inference.offset
    item_noise, user_noise = inference.item_noise.double().numpy(), inference.user_noise.double().numpy()
    variances = noise * item_noise[log.items] * user_noise[users]
    rows = list(zip(users, log.items, residuals, variances, strict=True))

    user_vectors, user_covariance = np.ones((log.num_users, width)), np.zeros((log.num_users, width, width))
    for user in range(log.num_users):
        own = [(item, residual, variance) for u, item, residual, variance in rows if u == user]
        mean, covariance = naive_half_step(items, item_covariance, 0, [1, 2, 3], own, *user_prior)
        user_vectors[user, 1:], user_covariance[user, 1:, 1:] = mean, covariance
    new_items = np.ones((log.num_items, width))
    new_covariance = np.zeros((log.num_items, width, width))
    for item in range(log.num_items):
        own = [(user, residual, variance) for user, i, residual, variance in rows if i == item]
        mean, covariance = naive_half_step(user_vectors, user_covariance, 3, [0, 1, 2], own, *item_prior)
        new_items[item, :-1], new_covariance[item, :-1, :-1] = mean, covariance
    expected_errors = [
        residual**2
        - 2 * residual * user_vectors[user] @ new_items[item]
        + np.trace(
            (np.outer(user_vectors[user], user_vectors[user]) + user_covariance[user])
            @ (np.outer(new_items[item], new_items[item]) + new_covariance[item])
        )
        for user, item, residual, _ in rows
    ]
    new_noise = np.mean(np.array(expected_errors) / item_noise[log.items] / user_noise[users])

    inference.sweep(learn_noise=False)
    assert inference.noise == pytest.approx(new_noise, rel=1e-4)
    # Users end normalised, which must change no score: compare means and variances of scores, not coordinates.
    latent = user_vectors[:, 1:] - user_vectors[:, 1:].mean(0)
    spread = latent.T @ latent / log.num_users + user_covariance[:, 1:, 1:].mean(0)
    root = np.linalg.cholesky(spread[:2, :2])
    shift = user_vectors[:, 1:].mean(0)
    np.testing.assert_allclose(inference.items[:, 1:3], new_items[:, 1:3] @ root, rtol=1e-3, atol=1e-4)
    bias = new_items[:, 0] + new_items[:, 1:3] @ shift[:2] + shift[2]
    np.testing.assert_allclose(inference.items[:, 0], bias, rtol=1e-3, atol=1e-4)
    assert inference.bias_variance == pytest.approx(spread[2, 2], rel=1e-4)
    block = new_covariance[:, 1:3, 1:3]
    np.testing.assert_allclose(inference.item_covariance[:, 1:, 1:], root.T @ block @ root, rtol=1e-3, atol=1e-5)


def test_ratings_of_new_users_are_predicted_nearly_as_well_as_the_truth_allows():
    rng = np.random.default_rng(1)
    log, scores = make_log(rng, num_users=600)
    train, new = log.select_users(np.arange(500)), log.select_users(np.arange(500, 600))
    truth = scores[500:]
    model = FactorModel.fit(train, dim=6)
    error = np.sqrt(np.mean((predictions(model, whole_log(new)).numpy() - truth) ** 2))

    # The ridge with the true item parameters, and the best that knows only biases.
    biases = np.sqrt(np.mean((truth - truth.mean(0) - (truth - truth.mean(0)).mean(1, keepdims=True)) ** 2))
    assert error < 0.4 * biases
    assert error < 0.35
    assert model.noise == pytest.approx(0.25, rel=0.1)


def test_width_beyond_what_the_data_hold_does_not_overfit():
    rng = np.random.default_rng(2)
    log, scores = make_log(rng, num_users=500, dim=2, share=0.15)
    train, new = log.select_users(np.arange(400)), log.select_users(np.arange(400, 500))
    errors = {
        dim: np.sqrt(
            np.mean((predictions(FactorModel.fit(train, dim=dim), whole_log(new)).numpy() - scores[400:]) ** 2)
        )
        for dim in (2, 16)
    }
    assert errors[16] < 1.05 * errors[2]


def test_fold_in_is_the_ridge_of_each_task():
    rng = np.random.default_rng(3)
    model = FactorModel.fit(make_log(rng)[0], dim=5)
    sizes = [4, 0, 1, 13]
    items, targets = rng.integers(0, 80, sum(sizes)), rng.normal(3, 1, sum(sizes))
    weights = torch.from_numpy(rng.uniform(0.5, 2, sum(sizes)))
    support = make_support(items, targets, sizes, weights)
    user, bias = model.fold_in(TaskBatch(support))

    table = np.concatenate([model.item_table.double(), np.ones((80, 1))], 1)
    for task, (begin, end) in enumerate(zip(support.offsets[:-1], support.offsets[1:], strict=True)):
        own = items[begin:end]
        rows, w = table[own], model.support_weights.double().numpy()[own] * weights.numpy()[begin:end]
        start = model.user_start.double().numpy()[own].sum(0) / np.sqrt(len(own) + 1)
        residuals = targets[begin:end] - model.offset - model.item_bias.double().numpy()[own] - rows @ start
        ridge = (rows * w[:, None]).T @ rows + model.pull * np.eye(6)
        expected = start + np.linalg.solve(ridge, (rows * w[:, None]).T @ residuals)
        np.testing.assert_allclose(torch.cat([user[task], bias[task, None]]), expected, rtol=1e-4, atol=1e-5)
    assert user[1].tolist() == [0] * 5
    assert bias[1] == 0


def test_support_weights_follow_noise_and_posterior_variance():
    rng = np.random.default_rng(4)
    model = FactorModel.fit(make_log(rng)[0], dim=2)
    for item in range(5):
        covariance = model.item_covariance[item]
        variance = covariance[0, 0] + model.user_variance * covariance[1:, 1:].trace()
        expected = 1 / (model.item_noise[item] + variance / model.noise)
        assert model.support_weights[item].item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.pull == pytest.approx(model.noise / model.user_variance)


def test_items_with_noisier_ratings_are_trusted_less():
    noisy = [0, 1, 2, 3]
    model = FactorModel.fit(make_log(np.random.default_rng(5), noisy_items=noisy)[0], dim=3)
    assert model.item_noise[noisy].min() > model.item_noise[4:].max()
    assert model.support_weights[noisy].max() < model.support_weights[4:].min()


def test_an_item_without_ratings_gets_the_prior_and_one_with_few_shrinks_to_it():
    log, _ = make_log(np.random.default_rng(6))
    users = np.repeat(np.arange(log.num_users), log.sizes())
    often, once, cold = (
        80,
        81,
        82,
    )  # a perfect item that a hundred users rated, another that one user rated, and one more
    fans = np.arange(100)
    extended, _ = Interactions.from_arrays(
        np.concatenate([users, fans, [7]]),
        np.concatenate([log.items, np.full(100, often), [once]]),
        np.concatenate([log.ratings, np.full(101, 6.0)]),
    ).align_items(np.arange(83))
    model = FactorModel.fit(extended, dim=3, choices=False)

    rows = torch.cat([model.item_bias[:, None], model.item_table], 1)
    torch.testing.assert_close(rows[cold], rows[:82].mean(0), rtol=1e-3, atol=1e-4)
    assert rows[cold, 0] < rows[once, 0] < rows[often, 0]
    volume = torch.linalg.det(model.item_covariance)
    assert volume[cold] > volume[once] > volume[:81].max()
    weights = model.support_weights
    assert weights[cold] < weights[once] < weights[:81].min()


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    log, _ = make_log(np.random.default_rng(7), num_users=60)
    one, same, other = (FactorModel.fit(log, dim=4, sweeps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.item_table, same.item_table)
    assert torch.equal(one.support_weights, same.support_weights)
    assert not torch.equal(one.item_table, other.item_table)


def test_ratings_that_are_all_alike_are_predicted_as_such():
    log = Interactions.from_arrays([0, 0, 1, 1, 2], [0, 1, 0, 2, 1], [4.0] * 5)
    model = FactorModel.fit(log, dim=2)
    scores = predictions(model, TaskBatch(make_support([0, 2], [4.0, 4.0], [2, 0])))
    torch.testing.assert_close(scores, torch.full((2, 3), 4.0), rtol=1e-3, atol=1e-3)
    assert model.support_weights.isfinite().all()


def test_one_rating_is_enough_to_fit():
    model = FactorModel.fit(Interactions.from_arrays(["a"], ["x"], [3.0]), dim=1)
    assert predictions(model, TaskBatch(make_support([0], [3.0], [1]))).item() == pytest.approx(3.0, abs=1e-3)


def test_a_batch_without_tasks_is_folded_in_to_nothing():
    model = FactorModel.fit(Interactions.from_arrays([0, 1], [0, 1], [1.0, 2.0]), dim=2)
    user, bias = model.fold_in(TaskBatch(make_support([], np.zeros(0), [])))
    assert user.shape == (0, 2)
    assert bias.shape == (0,)


@pytest.mark.parametrize(("argument", "value"), [("dim", 0), ("sweeps", 0)])
def test_sizes_below_one_are_refused_by_name(argument, value):
    log = Interactions.from_arrays([0], [0], [1.0])
    with pytest.raises(ValueError, match=rf"{argument}: must be ≥ 1, got {value}"):
        FactorModel.fit(log, **{argument: value})


def test_an_empty_log_is_refused():
    with pytest.raises(ValueError, match="log: expected at least one rating"):
        FactorModel.fit(Interactions.from_arrays([], [], []))


def test_fold_in_names_what_does_not_fit():
    model = FactorModel.fit(Interactions.from_arrays([0, 1], [0, 1], [1.0, 2.0]), dim=2)
    with pytest.raises(ValueError, match=r"support\.targets: expected ratings"):
        model.fold_in(TaskBatch(Entries(torch.tensor([0]), None, torch.tensor([0, 1]))))
    with pytest.raises(IndexError, match=r"support\.items: ids must be in \[0, 2\), got 5 at position 1"):
        model.fold_in(TaskBatch(make_support([0, 5], [1.0, 2.0], [2])))
