"""Known and new users and items: every set against loops over ratings, and every leak refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import metarec_fast as mf
from metarec_fast.baselines import fit_baselines
from metarec_fast.quadrants import QUADRANTS, Quadrant, QuadrantSplit


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((50, 40)) < rng.uniform(0.02, 0.8, (50, 1)))
    ratings, times = rng.integers(1, 6, len(users)).astype(float), rng.permutation(len(users))
    return mf.Interactions.from_arrays(users + 100, items + 7, ratings, times)


def triples(log):
    """(user, item) → (rating, time), by original ids."""
    found = {}
    for user in range(log.num_users):
        for row in range(int(log.offsets[user]), int(log.offsets[user + 1])):
            key = log.user_ids[user].item(), log.item_ids[log.items[row]].item()
            found[key] = log.ratings[row].item(), log.times[row].item()
    return found


@pytest.mark.parametrize("order", ["random", "time"])
def test_every_rating_is_where_its_user_and_item_belong(log, order):
    split = mf.split_quadrants(log, valid=0.1, test=0.3, items=0.25, order=order, seed=3)
    users = mf.split_users(log, valid=0.1, test=0.3, seed=3)
    new_items = {log.item_ids[item].item() for item in split.new_items}
    assert len(new_items) == round(0.25 * 40)

    everything = triples(log)
    assert triples(split.valid) == {
        key: value for key, value in everything.items() if key[0] in users.valid.user_ids and key[1] not in new_items
    }
    assert triples(split.train) == triples(split.quadrants["warm"].support)
    for part, near, far in ((users.train, "warm", "item-cold"), (users.test, "user-cold", "both-cold")):
        own = {key: value for key, value in everything.items() if key[0] in part.user_ids}
        support, held, cold = (triples(log) for log in (*split.quadrants[near], split.quadrants[far].query))
        assert triples(split.quadrants[far].support) == support
        assert len(support) + len(held) + len(cold) == len(own)
        assert support | held | cold == own
        assert {item for _, item in cold} <= new_items
        assert not new_items & {item for _, item in (*support, *held)}
        for user in part.user_ids.tolist():
            kept = [time for (other, _), (_, time) in support.items() if other == user]
            later = [time for (other, _), (_, time) in held.items() if other == user]
            known = len(kept) + len(later)
            assert len(later) == min(round(0.3 * known), max(known - 1, 0))
            if order == "time" and later:
                assert max(kept) < min(later)
    if order == "time":
        first = {}
        for (_, item), (_, time) in everything.items():
            first[item] = min(time, first.get(item, time))
        assert min(first[item] for item in new_items) > max(first[item] for item in set(first) - new_items)


def test_a_seed_gives_the_same_split_and_another_one_another(log):
    one, same, other = (mf.split_quadrants(log, seed=seed) for seed in (0, 0, 1))
    for name in QUADRANTS:
        for part, twin in zip(one.quadrants[name], same.quadrants[name], strict=True):
            assert triples(part) == triples(twin)
    assert one.new_items.tolist() != other.new_items.tolist()
    again = mf.split_quadrants(
        log, valid=0.0, seed=0
    )  # more users to train on, the same new items and held out ratings
    assert again.new_items.tolist() == one.new_items.tolist()
    assert triples(one.quadrants["warm"].query).items() <= triples(again.quadrants["warm"].query).items()


def test_items_that_nobody_rated_are_not_new(log):
    wider = log.align_items(np.arange(1000))[0]
    split = mf.split_quadrants(wider, items=6, order="time")
    assert len(split.new_items) == 6
    assert set(split.new_items.tolist()) <= set(wider.items.tolist())


def test_whatever_leaks_is_refused(log):
    split = mf.split_quadrants(log, valid=0.2)
    warm, user_cold, item_cold, both_cold = (split.quadrants[name] for name in QUADRANTS)

    def refused(message, **changes):
        quadrants = changes.pop("quadrants", {})
        with pytest.raises(ValueError, match=message):
            replace(split, quadrants={**split.quadrants, **quadrants}, **changes)

    everything = log.select_users(log.user_index(split.train.user_ids))
    known_items = ~np.isin(everything.items, split.new_items)
    refused(r"train: expected known items only, got \d+", train=everything)
    refused(r"valid: expected known items only, got \d+", valid=log.select_users(log.user_index(split.valid.user_ids)))
    refused(r"warm: user \d+ has item \d+ both in the query and in train", train=everything.select_rows(known_items))
    refused(r"user \d+ is in both train and valid", valid=split.train)
    refused(r"user \d+ is in both train and test", quadrants={"user-cold": warm})
    refused(r"warm: user \d+ is not in train", quadrants={"warm": user_cold})
    refused(
        r"user-cold: user \d+ has item \d+ both in the query and in support",
        quadrants={"user-cold": Quadrant(user_cold.support, user_cold.support)},
    )
    refused(
        r"the query of warm: expected known items only, got \d+",
        quadrants={"warm": Quadrant(warm.support, item_cold.query)},
    )
    refused(
        r"the query of both-cold: expected new items only, got \d+",
        quadrants={"both-cold": Quadrant(both_cold.support, user_cold.query)},
    )
    refused(
        r"the support of user-cold: expected known items only, got \d+",
        quadrants={"user-cold": Quadrant(both_cold.query, user_cold.query)},
    )
    refused(
        r"item-cold: its support has a rating that is not in train",
        quadrants={"item-cold": Quadrant(warm.query, item_cold.query)},
    )
    refused(
        r"warm: expected the same users in support and query",
        quadrants={"warm": Quadrant(warm.support, user_cold.query)},
    )
    renumbered = split.valid.align_items(split.valid.item_ids[::-1])[0]
    refused(r"valid: its items are numbered differently", valid=renumbered)
    with pytest.raises(ValueError, match="quadrants: expected warm, user-cold, item-cold, both-cold, got warm"):
        QuadrantSplit(split.train, split.valid, {"warm": warm}, split.new_items)


def test_each_quadrant_is_judged_with_baselines_that_know_the_training_log_alone(log):
    split = mf.split_quadrants(log)
    learner = mf.MAML(mf.DotRecommender(log.num_items, 3))
    learner.fit(split.train, split.valid, epochs=1, progress=False)
    reports = mf.evaluate_quadrants(learner, split, seed=2, support=4, k=(1, 3), draws=2)
    assert list(reports) == list(QUADRANTS)
    baselines = fit_baselines(split.train, ["bias", "popularity"], seed=2)
    for name, (support, query) in split.quadrants.items():
        alone = mf.evaluate(learner, query, 4, support_from=support, k=(1, 3), seed=2, draws=2, baselines=baselines)
        for predictor in ("maml", "bias", "popularity"):
            assert reports[name].results[predictor] == alone.results[predictor]

    lines = str(reports).splitlines()
    assert lines[0].split() == ["rmse", *QUADRANTS]
    assert lines[1].split()[0] == "maml"
    for name in QUADRANTS:
        report = reports[name]
        assert f" {report.results['maml']['rmse']:.4f} ±{report.spread['maml']['rmse']:.4f}" in lines[1]
    assert lines[len(mf.BASELINES) + 2] == ""  # chance has no error of ratings
    assert lines[len(mf.BASELINES) + 3].split() == ["ndcg@3", *QUADRANTS]
    assert lines[-3].split() == ["chance", *(f"{reports[name].chance['ndcg@3']:.4f}" for name in QUADRANTS)]
    warm = reports["warm"]
    assert lines[-1].startswith(f"To predict: warm {len(warm.user_ids)} users, {warm.query_sizes.sum()} ratings; ")
    assert reports.table(["mae"]).splitlines()[0].split() == ["mae", *QUADRANTS]


def test_baselines_alone_and_given_ones_are_judged(log):
    split = mf.split_quadrants(log)
    assert list(mf.evaluate_quadrants(None, split, catalogue=False)["warm"].results) == list(mf.BASELINES)
    given = fit_baselines(split.train, ["bias"])
    assert list(mf.evaluate_quadrants(None, split, given)["both-cold"].results) == ["bias"]
    with pytest.raises(ValueError, match=r"metrics: expected some of .*, got 'auc'"):
        mf.evaluate_quadrants(None, split, given).table(["auc"])


def test_bad_arguments_are_refused_by_name(log):
    timeless = mf.Interactions.from_arrays([1, 2, 3], [1, 2, 3])
    for message, arguments in (
        (r'order: expected "random" or "time", got "?\'?latest', {"order": "latest"}),
        (r"test: expected at least one new user, got 0\.0", {"test": 0.0}),
        (r"items: expected some of the 40 items that are rated to be new, not all, got 0", {"items": 0}),
        (r"items: expected some of the 40 items that are rated to be new, not all, got 40", {"items": 40}),
        (r"items: a fraction of the items must be in \[0, 1\), got 1\.0", {"items": 1.0}),
        (r"valid and test: ", {"valid": 0.5, "test": 0.5}),
    ):
        with pytest.raises(ValueError, match=message):
            mf.split_quadrants(log, **arguments)
    with pytest.raises(ValueError, match='order: "time" needs a log with times, this one has none'):
        mf.split_quadrants(timeless, order="time")
    with pytest.raises(TypeError, match="seed: expected an int, got float"):
        mf.split_quadrants(log, seed=0.5)
