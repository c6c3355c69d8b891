"""Comparing two predictors on the same users: the bootstrap against a loop, and against what theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest

import metarec_fast as mf
from metarec_fast import _random
from metarec_fast.metrics import summarize


def report_of(per_user, query_sizes):
    """A report of made-up users."""
    sizes = np.asarray(query_sizes)
    results = {name: summarize(metrics, sizes) for name, metrics in per_user.items()}
    return mf.Report(results, {}, per_user, np.arange(len(sizes)), sizes, {"k": [1]})


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    hard = rng.gamma(2, 0.3, 40)
    ndcg = rng.random(40)
    ndcg[[3, 7]] = np.nan
    per_user = {
        name: {"mse": hard * rng.uniform(0.5, 1.5, 40) * factor, "mae_user": rng.random(40), "ndcg@1": ndcg**factor}
        for name, factor in (("a", 0.9), ("b", 1.0))
    }
    per_user["c"] = {"ndcg@1": ndcg}
    return report_of(per_user, rng.integers(1, 60, 40))


@pytest.mark.parametrize("metric", ["rmse", "mae", "mae_user", "ndcg@1"])
def test_the_interval_is_that_of_a_loop_over_resamples(report, metric):
    result = report.compare("a", "b", metric, resamples=300, seed=4)
    own = {"rmse": "mse", "mae": "mae_user"}.get(metric, metric)
    one, other = report.per_user["a"][own], report.per_user["b"][own]
    users = [user for user in range(40) if not math.isnan(one[user])]

    def figure(values, drawn):
        weights = [report.query_sizes[user] if metric in ("rmse", "mae") else 1 for user in drawn]
        mean = sum(w * values[user] for w, user in zip(weights, drawn, strict=True)) / sum(weights)
        return mean**0.5 if metric == "rmse" else mean

    found = []
    for resample in range(300):
        key = _random.key_of(4, _random.RESAMPLES, resample)
        drawn = [users[i] for i in _random.below(_random.at(key, np.arange(len(users))), len(users))]
        found.append(figure(one, drawn) - figure(other, drawn))
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(found, (0.025, 0.975))))
    turned = min(sum(value <= 0 for value in found), sum(value >= 0 for value in found))
    assert result.p_value == min(1, 2 * (turned + 1) / 301)
    assert result.difference == pytest.approx(report.results["a"][metric] - report.results["b"][metric])


def test_the_interval_of_a_normal_difference_is_that_of_theory():
    rng = np.random.default_rng(1)
    common, noise = rng.normal(0, 5, 2000), rng.normal(0.1, 1, 2000)
    result = report_of({"a": {"ndcg@1": common + noise}, "b": {"ndcg@1": common}}, np.ones(2000, np.int64)).compare(
        "a", "b", "ndcg@1", resamples=4000
    )
    half = 1.96 * noise.std() / 2000**0.5  # the common part cancels: unpaired, it would be five times as wide
    assert result.difference == pytest.approx(noise.mean())
    # The quantile of 4,000 resamples has a standard error of 0.042 standard deviations, a fiftieth of the half width.
    assert (result.low, result.high) == pytest.approx((noise.mean() - half, noise.mean() + half), abs=0.07 * half)
    assert result.p_value < 0.01


def test_ninety_five_of_a_hundred_intervals_hold_the_true_difference():
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(200):
        mse = {name: {"mse": rng.gamma(4, 0.25, 60)} for name in ("a", "b")}  # the same in truth
        low, high = report_of(mse, np.full(60, 5)).compare("a", "b", resamples=300, seed=trial)[1:3]
        held += low <= 0 <= high
    assert 178 <= held <= 199  # 190, and three standard deviations below


def test_comparing_turns_its_sign_with_its_arguments_and_does_not_change(report):
    one, other = report.compare("a", "b"), report.compare("b", "a")
    assert one == report.compare("a", "b")
    assert one.low != report.compare("a", "b", seed=1).low
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
    assert report.compare("a", "a") == (0, 0, 0, 1)


def test_blocks_of_resamples_change_nothing(report, monkeypatch):
    whole = report.compare("a", "b", resamples=100)
    monkeypatch.setattr("metarec_fast._bootstrap._LARGEST_COUNTS", 7 * 40)
    assert report.compare("a", "b", resamples=100) == pytest.approx(tuple(whole), rel=1e-12)


def test_what_cannot_be_compared_is_refused_by_name(report):
    for message, arguments in (
        (r"name: expected one of a, b, c, got 'x'", ("x", "b")),
        (r"baseline: expected one of a, b, c, got 'x'", ("a", "x")),
        (r"metric: expected one of those of a, rmse, mae, mae_user, ndcg@1, got 'auc'", ("a", "b", "auc")),
        (r"metric: expected one of those of c, ndcg@1, got 'rmse'", ("a", "c")),
        (r"resamples: must be ≥ 1, got 0", ("a", "b", "rmse", 0)),
    ):
        with pytest.raises(ValueError, match=message):
            report.compare(*arguments)
    covered = report_of(report.per_user, report.query_sizes)
    covered.results["a"]["coverage@1"] = 0.5
    with pytest.raises(ValueError, match=r"metric: expected one of those of a, .*, got 'coverage@1'"):
        covered.compare("a", "b", "coverage@1")
