"""Metrics against naive ones: loops over users, and the average over every order of tied items."""

from __future__ import annotations

import math
from itertools import chain, pairwise, permutations, product

import numpy as np
import pytest
import torch

from metarec_fast.metrics import (
    CatalogueRanks,
    average_draws,
    query_ndcg,
    rating_errors,
    standard_deviations,
    summarize,
)
from metarec_fast.tasks import Entries

CASES = range(40)


def entries(items, targets=None, sizes=None):
    offsets = torch.tensor([0, *np.cumsum([len(items)] if sizes is None else sizes)])
    targets = None if targets is None else torch.tensor(targets, dtype=torch.float64)
    return Entries(torch.tensor(items, dtype=torch.int64), targets, offsets)


def per_task(query, *columns):
    bounds = query.offsets.tolist()
    return [tuple(column[begin:end].tolist() for column in columns) for begin, end in pairwise(bounds)]


def orders(scores):
    """Every order of positions in which the scores do not increase."""
    return [
        order for order in permutations(range(len(scores))) if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]


def naive_ndcg(scores, targets, k, gain):
    gains = [max(gain(target), 0) for target in targets]
    ideal = sum(g / math.log2(j + 2) for j, g in enumerate(sorted(gains, reverse=True)[:k]))
    if ideal == 0:
        return math.nan
    reached = [sum(gains[i] / math.log2(j + 2) for j, i in enumerate(order[:k])) for order in orders(scores)]
    return float(np.mean(reached)) / ideal


def naive_catalogue(scores, seen, wanted, k):
    """The four metrics of one task, and each item's probability of being in its first k."""
    candidates = [item for item in range(len(scores)) if item not in seen]
    wanted = set(wanted) - set(seen)
    if not wanted:
        return [math.nan] * 4, np.zeros(len(scores))
    rows, listed = [], []
    for order in orders([scores[item] for item in candidates]):
        ranked = [candidates[position] for position in order]
        hits = [item in wanted for item in ranked]
        best = sum(1 / math.log2(j + 2) for j in range(min(k, len(wanted))))
        rows.append([
            sum(hit / math.log2(j + 2) for j, hit in enumerate(hits[:k])) / best,
            any(hits[:k]),
            sum(hits[:k]) / len(wanted),
            1 / (1 + hits.index(True)),
        ])  # fmt: skip
        listed.append([item in ranked[:k] for item in range(len(scores))])
    return np.mean(rows, 0).tolist(), np.mean(listed, 0)


def random_query(rng, num_tasks=6, values=(0.5, 1.0, 2.5, 4.0, 5.0), largest=6):
    sizes = rng.integers(0, largest, num_tasks)
    n = int(sizes.sum())
    return entries(rng.integers(0, 9, n).tolist(), rng.choice(values, n).tolist(), sizes)


def random_catalogue(rng, num_items=7, levels=4):
    num_tasks = 4
    draw = [rng.permutation(num_items) for _ in range(num_tasks)]
    seen = [row[: rng.integers(0, 3)].tolist() for row in draw]
    wanted = [row[-rng.integers(1, 4) :].tolist() if rng.random() < 0.8 else [] for row in draw]
    support, query = (
        entries(list(chain(*part)), [1.0] * sum(map(len, part)), list(map(len, part))) for part in (seen, wanted)
    )
    return (
        torch.from_numpy(rng.integers(0, levels, (num_tasks, num_items)).astype(np.float32)),
        support,
        query,
        seen,
        wanted,
    )


def test_rating_errors_of_a_case_done_by_hand():
    query = entries([0, 1, 2], [4.0, 2.0, 5.0], [2, 0, 1])
    errors = rating_errors(torch.tensor([5.0, 1.0, 7.0]), query, (0.5, 5.0))
    torch.testing.assert_close(errors["mse"], torch.tensor([1.0, torch.nan, 0.0]).double(), equal_nan=True)
    torch.testing.assert_close(errors["mae_user"], torch.tensor([1.0, torch.nan, 0.0]).double(), equal_nan=True)
    unclipped = rating_errors(torch.tensor([5.0, 1.0, 7.0]), query)
    assert unclipped["mse"][2] == 4
    assert unclipped["mae_user"][2] == 2


def test_rmse_and_mae_are_means_over_entries_and_mae_user_over_users():
    query = entries([0, 1, 2, 3], [1.0, 1.0, 1.0, 1.0], [3, 1, 0])
    errors = rating_errors(torch.tensor([1.0, 1.0, 1.0, 3.0]), query)
    figures = summarize({name: value.numpy() for name, value in errors.items()}, query.sizes().numpy())
    assert figures == {"rmse": 1.0, "mae": 0.5, "mae_user": 1.0}


def test_ndcg_of_a_case_done_by_hand():
    query = entries([0, 1, 2], [3.0, 1.0, 2.0])
    result = query_ndcg(torch.tensor([0.1, 0.9, 0.5]), query, (1, 3))
    assert result["ndcg@1"].item() == pytest.approx(1 / 7)
    assert result["ndcg_linear@1"].item() == pytest.approx(1 / 3)
    half = 1 / math.log2(3)
    assert result["ndcg@3"].item() == pytest.approx((1 + 3 * half + 7 / 2) / (7 + 3 * half + 1 / 2))


@pytest.mark.parametrize("case", CASES)
def test_ndcg_equals_the_average_over_every_order_of_tied_entries(case):
    rng = np.random.default_rng(case)
    query = random_query(rng)
    scores = torch.from_numpy(rng.integers(0, 3, len(query)).astype(np.float32))
    result = query_ndcg(scores, query, (1, 3, 10))
    for name, gain in (("ndcg", lambda r: 2**r - 1), ("ndcg_linear", lambda r: r)):
        for k in (1, 3, 10):
            expected = [naive_ndcg(*task, k, gain) for task in per_task(query, scores, query.targets)]
            np.testing.assert_allclose(result[f"{name}@{k}"], expected, rtol=1e-12)


def test_ndcg_is_one_for_a_perfect_order_and_for_a_single_entry():
    query = entries([0, 1, 2, 3], [1.0, 4.0, 2.0, 3.0], [3, 1])
    for values in query_ndcg(query.targets * 2 - 7, query, (1, 2, 5)).values():
        torch.testing.assert_close(values, torch.ones(2).double())


def test_ndcg_does_not_count_users_without_gain_and_takes_negative_ratings_as_no_gain():
    query = entries([0, 1, 2, 3], [0.0, 0.0, -5.0, 1.0], [2, 2])
    result = query_ndcg(torch.tensor([1.0, 2.0, 1.0, 2.0]), query, (1,))
    torch.testing.assert_close(result["ndcg@1"], torch.tensor([torch.nan, 1.0]).double(), equal_nan=True)
    torch.testing.assert_close(result["ndcg_linear@1"], torch.tensor([torch.nan, 1.0]).double(), equal_nan=True)


def test_ndcg_stands_ratings_whose_power_of_two_overflows():
    query = entries([0, 1], [5000.0, 4999.0])
    assert query_ndcg(torch.tensor([1.0, 2.0]), query, (1,))["ndcg@1"].item() == pytest.approx(0.5)


def test_the_order_of_entries_changes_no_metric():
    rng = np.random.default_rng(0)
    items, targets = rng.permutation(30)[:12], rng.integers(1, 6, 12).astype(float)
    scores, order = torch.from_numpy(rng.integers(0, 3, 12).astype(np.float32)), rng.permutation(12)
    table = torch.from_numpy(rng.integers(0, 3, (1, 30)).astype(np.float32))
    straight, shuffled = (
        entries(items.tolist(), targets.tolist()),
        entries(items[order].tolist(), targets[order].tolist()),
    )
    nothing = entries([], [], [0])
    for one, other in (
        (query_ndcg(scores, straight, (3,)), query_ndcg(scores[order], shuffled, (3,))),
        (
            CatalogueRanks(table, nothing, straight).metrics((3,)),
            CatalogueRanks(table, nothing, shuffled).metrics((3,)),
        ),
    ):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name])


@pytest.mark.parametrize("case", CASES)
def test_catalogue_metrics_equal_the_average_over_every_order_of_tied_items(case):
    scores, support, query, seen, wanted = random_catalogue(np.random.default_rng(case))
    ranks = CatalogueRanks(scores, support, query)
    for k in (1, 2, 4, 20):
        result = ranks.metrics((k,))
        tasks = [naive_catalogue(row, *sets, k) for row, *sets in zip(scores.tolist(), seen, wanted, strict=True)]
        names = (f"catalogue_ndcg@{k}", f"catalogue_hr@{k}", f"catalogue_recall@{k}", "catalogue_mrr")
        for column, name in enumerate(names):
            np.testing.assert_allclose(result[name], [task[0][column] for task in tasks], rtol=1e-10, err_msg=name)
        missed = np.prod([1 - listed for _, listed in tasks], 0)
        np.testing.assert_allclose(ranks.missed(k), missed, rtol=1e-12, atol=1e-15)


def test_catalogue_metrics_of_a_case_done_by_hand():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    ranks = CatalogueRanks(scores, entries([0]), entries([2, 4], [1.0, 1.0]))
    result = {name: value.item() for name, value in ranks.metrics((1, 2)).items()}
    assert result["catalogue_hr@1"] == 0
    assert result["catalogue_hr@2"] == 1
    assert result["catalogue_recall@2"] == 0.5
    assert result["catalogue_mrr"] == 0.5
    assert result["catalogue_ndcg@2"] == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
    assert ranks.missed(2).tolist() == [1, 0, 0, 1, 1]


def test_support_items_are_neither_ranked_nor_relevant():
    scores = torch.tensor([[9.0, 8.0, 1.0]])
    ranks = CatalogueRanks(scores, entries([0, 1]), entries([1, 2], [1.0, 1.0]))
    assert ranks.metrics((1,))["catalogue_recall@1"].item() == 1
    assert ranks.missed(3).tolist() == [1, 1, 0]


def test_only_items_rated_well_enough_are_relevant_where_a_rating_is_given():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    query = entries([0, 2, 0], [2.0, 4.0, 3.0], [2, 1])
    result = CatalogueRanks(scores, entries([], [], [0, 0]), query, relevant_from=4.0).metrics((1,))
    torch.testing.assert_close(result["catalogue_hr@1"], torch.tensor([0.0, torch.nan]).double(), equal_nan=True)
    assert result["catalogue_mrr"][0] == pytest.approx(1 / 3)


def test_a_constant_predictor_gets_the_chance_level():
    query = entries([3, 1], [5.0, 1.0])
    chance = (31 + 1) / 2 / 31
    assert query_ndcg(torch.zeros(2), query, (1,))["ndcg@1"].item() == pytest.approx(chance)
    ranks = CatalogueRanks(torch.zeros(1, 10), entries([0, 2]), query)
    result = {name: value.item() for name, value in ranks.metrics((4,)).items()}
    assert result["catalogue_recall@4"] == pytest.approx(4 / 8)
    assert result["catalogue_hr@4"] == pytest.approx(1 - (4 * 3) / (8 * 7))
    expected = sum((8 - rank) / (8 * 7 / 2) / rank for rank in range(1, 8))
    assert result["catalogue_mrr"] == pytest.approx(expected)
    assert ranks.missed(4).tolist() == pytest.approx([1, 0.5, 1] + [0.5] * 7)


def test_expected_reciprocal_rank_holds_for_a_large_catalogue():
    num_items, relevant = 20_000, 50
    ranks = CatalogueRanks(
        torch.zeros(1, num_items), entries([], [], [0]), entries(list(range(relevant)), [1.0] * relevant)
    )
    log_choose = lambda n, k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)  # noqa: E731
    expected = sum(
        math.exp(log_choose(num_items - rank, relevant - 1) - log_choose(num_items, relevant)) / rank
        for rank in range(1, num_items - relevant + 2)
    )
    assert ranks.metrics((1,))["catalogue_mrr"].item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("levels", [2, 1000])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_batching_changes_no_bit_of_the_metrics(levels, size):
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 30, 20)
    n, bounds = int(sizes.sum()), np.r_[0, np.cumsum(sizes)]
    items, targets = rng.integers(0, 50, n), rng.integers(1, 6, n).astype(float)
    scores = torch.from_numpy(rng.integers(0, levels, n).astype(np.float32))
    table = torch.from_numpy(rng.integers(0, levels, (20, 50)).astype(np.float32))

    def everything(size):
        batches, missed = [], None
        for begin in range(0, 20, size):
            end = min(begin + size, 20)
            part = slice(bounds[begin], bounds[end])
            query = entries(items[part].tolist(), targets[part].tolist(), sizes[begin:end])
            ranks = CatalogueRanks(table[begin:end], entries([], [], [0] * (end - begin)), query)
            errors = rating_errors(scores[part], query, (1, 5))
            batches.append(errors | query_ndcg(scores[part], query, (1, 5, 10)) | ranks.metrics((1, 5, 10)))
            missed = ranks.missed(5, missed)
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]} | {"missed": missed}

    whole = everything(20)
    for name, values in everything(size).items():
        np.testing.assert_array_equal(values, whole[name], err_msg=name)


@pytest.mark.parametrize(("num_tasks", "with_ratings"), [*product((0, 2), (False, True))])
def test_tasks_with_nothing_to_predict_do_not_count(num_tasks, with_ratings):
    empty = entries([], [] if with_ratings else None, [0] * num_tasks)
    ranks = CatalogueRanks(torch.zeros(num_tasks, 5), empty, empty)
    results = ranks.metrics((1,))
    if with_ratings:
        results = results | query_ndcg(torch.zeros(0), empty, (1,)) | rating_errors(torch.zeros(0), empty)
    assert all(value.shape == (num_tasks,) and value.isnan().all() for value in results.values())
    assert ranks.missed(1).tolist() == [1] * 5
    assert summarize({name: value.numpy() for name, value in results.items()}, empty.sizes().numpy()) == {}


def test_query_entries_without_ratings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"query\.targets: expected what was observed"):
        rating_errors(torch.zeros(1), entries([0]))


def test_averages_over_draws_are_over_all_their_entries_for_errors_and_else_over_the_draws_that_count():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, (3, 4))
    errors = [[rng.random(size) for size in draw] for draw in sizes]
    ndcg = np.where(rng.random((3, 4)) < 0.4, np.nan, rng.random((3, 4)))
    ndcg[:, 0] = np.nan
    draws = [
        {"mse": np.array([own.mean() for own in mse]), "ndcg@1": row} for mse, row in zip(errors, ndcg, strict=True)
    ]
    result = average_draws(draws, sizes)
    for task in range(4):
        assert result["mse"][task] == pytest.approx(np.concatenate([draw[task] for draw in errors]).mean())
        counted = [value for value in ndcg[:, task].tolist() if not math.isnan(value)]
        np.testing.assert_allclose(result["ndcg@1"][task], np.mean(counted) if counted else np.nan)
    one = average_draws(draws[:1], sizes[:1])
    np.testing.assert_array_equal(one["mse"], draws[0]["mse"])  # to the last bit


def test_a_figure_that_only_one_run_has_gets_no_deviation():
    assert standard_deviations([{"a": 1.0, "b": 1.0}, {"a": 3.0}]) == {"a": pytest.approx(2**0.5)}
