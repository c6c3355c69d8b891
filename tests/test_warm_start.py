"""Warm starts: what each recovers from ratings drawn from a factor model, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metarec_fast import warm_start
from metarec_fast._choices import leading_directions
from metarec_fast._prior_mean import PriorMean
from metarec_fast._segments import segments_of
from metarec_fast.data import Interactions
from metarec_fast.feature_matrix import only_numbers
from metarec_fast.tasks import Entries, TaskBatch

NUM_ITEMS, DIM = 60, 2


def make_log(seed=0, num_users=400, share=0.4):
    """Ratings of training and of new users, the true scores of the new ones, and the true item vectors."""
    rng = np.random.default_rng(seed)
    table, bias = rng.normal(0, 0.6, (NUM_ITEMS, DIM)), rng.normal(0, 0.4, NUM_ITEMS)
    scores = 3 + bias + rng.normal(0, 0.4, (num_users, 1)) + rng.normal(size=(num_users, DIM)) @ table.T
    users, items = np.nonzero(rng.random((num_users, NUM_ITEMS)) < share)
    log = Interactions.from_arrays(users, items, scores[users, items] + 0.4 * rng.normal(size=len(users)))
    last = num_users - 100
    return log.select_users(np.arange(last)), log.select_users(np.arange(last, num_users)), scores[last:], table


def error(model, log, scores):
    """Error of all scores of the log's users, folded in on all of their ratings."""
    support = Entries(torch.from_numpy(log.items).long(), torch.from_numpy(log.ratings), torch.from_numpy(log.offsets))
    user, bias = model.fold_in(TaskBatch(support))
    predicted = model.offset + model.item_bias + bias[:, None] + user @ model.item_table.T
    return float((predicted.numpy() - scores).std())


def bias_error(scores):
    centred = scores - scores.mean(0)
    return float((centred - centred.mean(1, keepdims=True)).std())


@pytest.mark.parametrize("method", list(warm_start.METHODS))
def test_every_method_predicts_new_users_far_better_than_biases(method):
    train, new, scores, _ = make_log()
    model = warm_start.METHODS[method](train, dim=DIM, seed=1)
    assert error(model, new, scores) < 0.6 * bias_error(scores)  # the ridges of "als" are for noisier ratings
    assert model.dim == DIM


@pytest.mark.parametrize("method", list(warm_start.METHODS))
def test_the_same_seed_gives_the_same_model(method):
    train = make_log()[0]
    one, same = (warm_start.METHODS[method](train, dim=3, sweeps=2, seed=4) for _ in range(2))
    assert torch.equal(one.item_table, same.item_table)
    assert one.noise == same.noise


def test_given_vectors_in_any_coordinates_give_the_same_predictions():
    train, new, scores, table = make_log()
    true = torch.from_numpy(table)
    stretched = true @ torch.tensor([[9.0, 2.0], [-1.0, 0.1]], dtype=torch.float64)
    errors = [error(warm_start.given(vectors, train, sweeps=60), new, scores) for vectors in (true, stretched)]
    assert errors[0] < 0.35 * bias_error(scores)
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_given_biases_are_kept_up_to_what_all_users_share():
    train, _, _, table = make_log()
    bias = torch.linspace(-1, 1, NUM_ITEMS)
    model = warm_start.given(torch.from_numpy(table), train, item_bias=bias)
    torch.testing.assert_close(model.item_bias, bias)


def test_a_new_user_starts_where_users_are_who_rated_the_same_items():
    """Fans rate the second half of the items, love all of it, and say so in their ratings of the first half too."""
    rng = np.random.default_rng(0)
    fan = rng.random(300) < 0.5
    chance = np.where(np.arange(NUM_ITEMS) < 30, 0.2, np.where(fan[:, None], 0.5, 0.02))
    users, items = np.nonzero(rng.random((300, NUM_ITEMS)) < chance)
    ratings = 3 + np.where(fan[users], 0.8, -0.8) + 0.3 * rng.normal(size=len(users))
    model = warm_start.variational(Interactions.from_arrays(users, items, ratings), dim=2)

    chosen = torch.tensor([*range(30, 36), *range(6)])
    start = model.start_of(Entries(chosen, None, torch.tensor([0, 6, 12])))
    inputs = torch.cat([model.item_table, torch.ones(NUM_ITEMS, 1)], 1)
    scores = inputs @ start.T  # [N, 2]
    assert scores[:, 0].mean() > scores[:, 1].mean() + 0.3


def test_without_choices_every_user_starts_at_zero():
    model = warm_start.variational(make_log()[0], dim=2, choices=False)
    assert model.user_start is None
    assert not model.start_of(Entries(torch.tensor([1, 2]), None, torch.tensor([0, 2]))).any()


def test_leading_directions_are_those_of_the_singular_value_decomposition():
    log = make_log()[0]
    of_users, of_items, _ = segments_of(log)
    chosen = torch.zeros(log.num_users, NUM_ITEMS)
    chosen[torch.arange(log.num_users).repeat_interleave(of_users.sizes), of_users.ids] = 1
    chosen *= (of_users.sizes + 1.0).rsqrt()[:, None]
    directions, features = leading_directions(of_users, of_items, NUM_ITEMS, seed=0)
    torch.testing.assert_close(chosen @ directions, features, rtol=1e-4, atol=1e-5)
    assert float(features.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
    lengths, expected = features.norm(dim=0), torch.linalg.svdvals(chosen)
    torch.testing.assert_close(lengths / lengths[0], expected / expected[0], rtol=1e-3, atol=1e-4)


def test_the_prior_mean_finds_what_features_say_and_nothing_where_they_say_nothing():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=generator)
    noise = torch.randn(500, 3, generator=generator)
    true = torch.randn(6, 3, generator=generator)
    found = {}
    for name, coefficients in (("something", true), ("nothing", torch.zeros(6, 3))):
        prior = PriorMean(only_numbers(features), torch.zeros(features.shape[1], dtype=torch.int64))
        for _ in range(50):
            found[name], intercept = prior.regress(2 + features @ coefficients + noise, torch.eye(3))
    torch.testing.assert_close(found["something"], true, rtol=0, atol=0.15)  # three standard errors, 1/√500 each
    assert found["nothing"].abs().max() < 0.05
    torch.testing.assert_close(intercept, torch.full((3,), 2.0), rtol=0, atol=0.15)


def test_small_logs_take_one_thread_and_leave_the_others_as_they_were(monkeypatch):
    seen = []
    monkeypatch.setattr(warm_start.Inference, "run", lambda self, sweeps: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        warm_start.variational(make_log()[0], dim=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.parametrize("method", list(warm_start.METHODS))
@pytest.mark.parametrize("argument", ["dim", "sweeps"])
def test_sizes_below_one_are_refused_by_name(method, argument):
    with pytest.raises(ValueError, match=rf"{argument}: must be ≥ 1, got 0"):
        warm_start.METHODS[method](make_log()[0], **{argument: 0})


def test_strengths_must_be_positive():
    train = make_log()[0]
    with pytest.raises(ValueError, match=r"ridge: must be > 0 and finite, got 0"):
        warm_start.ppca(train, ridge=0)
    with pytest.raises(ValueError, match=r"item_ridge: must be > 0 and finite, got inf"):
        warm_start.als(train, item_ridge=float("inf"))


def test_given_names_what_does_not_fit():
    train = make_log()[0]
    with pytest.raises(TypeError, match=r"item_table: expected a tensor, got list"):
        warm_start.given([[1.0]], train)
    with pytest.raises(ValueError, match=r"item_table: expected shape \[60, D\], got \(3, 2\)"):
        warm_start.given(torch.zeros(3, 2), train)
    with pytest.raises(ValueError, match=r"item_table: expected finite numbers, got 1 that are not"):
        warm_start.given(torch.tensor([[1.0]] * 59 + [[float("nan")]]), train)
    with pytest.raises(ValueError, match=r"item_bias: expected shape \[60\], got \(2,\)"):
        warm_start.given(torch.ones(60, 2), train, item_bias=torch.zeros(2))
