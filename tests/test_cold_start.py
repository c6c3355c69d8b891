"""The cold-start curve: the same users and the same query for every size, nested supports, figures of `evaluate`."""

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast.baselines import fit_baselines


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 31, 60)
    users = np.repeat(np.arange(60), sizes)
    items = np.concatenate([rng.choice(40, size, replace=False) for size in sizes])
    log = mf.Interactions.from_arrays(users, items, rng.integers(1, 6, len(users)).astype(float), np.arange(len(users)))
    return mf.split_users(log, test=0.5, seed=0)


class Recorder:
    """Predicts the size of a task's support, and remembers what it was given."""

    def __init__(self, item_ids):
        self.item_ids, self.batches = item_ids, []

    def predict(self, batch):
        self.batches.append(batch)
        return batch.support.sizes()[batch.query.task_ids()].float()


def tasks(batch):
    """Items of the support and of the query of each user."""
    parts = (
        [each.tolist() for each in entries.items.split(entries.sizes().tolist())]
        for entries in (batch.support, batch.query)
    )
    return dict(zip(batch.users.tolist(), zip(*parts, strict=True), strict=True))


@pytest.mark.parametrize("order", ["random", "time"])
def test_all_sizes_have_the_same_users_and_queries_and_supports_are_nested(split, order):
    recorder = Recorder(split.test.item_ids)
    curve = mf.cold_start_curve(recorder, split.test, sizes=(7, 0, 3), order=order, min_query=4, seed=3)
    assert curve.sizes == [0, 3, 7]
    none, few, many = map(tasks, recorder.batches)
    qualified = split.test.select_users(np.flatnonzero(split.test.sizes() >= 11))
    assert 0 < qualified.num_users < split.test.num_users
    assert list(none) == list(few) == list(many) == list(range(qualified.num_users))
    assert curve.num_users == qualified.num_users
    assert curve.num_ratings == len(qualified) - 7 * qualified.num_users
    for user in many:
        rated = qualified.items[qualified.rows(user)].tolist()
        support, query = many[user]
        assert sorted(support + query) == sorted(rated)
        assert (support == rated[:7]) == (order == "time")
        assert few[user] == (support[:3], query)
        assert none[user] == ([], query)


def test_targets_go_with_their_items_and_the_figures_are_those_of_the_predictions(split):
    recorder = Recorder(split.test.item_ids)
    curve = mf.cold_start_curve(recorder, split.test, sizes=(1, 4), seed=1)
    batch = recorder.batches[1]
    ratings = {
        (user, int(item)): float(rating)
        for user, items, stars in zip(
            batch.users.tolist(),
            batch.support.items.split(batch.support.sizes().tolist()),
            batch.support.targets.split(batch.support.sizes().tolist()),
            strict=True,
        )
        for item, rating in zip(items, stars, strict=True)
    }
    log = split.test.select_users(np.flatnonzero(split.test.sizes() >= 9))
    for (user, item), rating in ratings.items():
        rows = log.rows(user)
        assert log.ratings[rows][log.items[rows] == item] == [rating]
    errors = [float((size - batch.query.targets).square().mean().sqrt()) for size in (1, 4)]
    assert curve.values == {"recorder": pytest.approx(errors)}
    assert curve.chance is None


def test_the_largest_size_is_what_evaluate_gives(split):
    baselines = fit_baselines(split.train)
    log = split.test.select_users(np.flatnonzero(split.test.sizes() >= 15))
    for metric in ("rmse", "ndcg@3", "catalogue_mrr"):
        curve = mf.cold_start_curve(None, split.test, (2, 10), metric, baselines, seed=2, batch_size=7)
        report = mf.evaluate(None, log, support=10, seed=2, k=3, baselines=baselines)
        expected = {name: figures[metric] for name, figures in report.results.items() if metric in figures}
        assert {name: values[-1] for name, values in curve.values.items()} == pytest.approx(expected)
        assert curve.chance == report.chance.get(metric)


def test_baselines_are_fitted_on_a_log_and_the_learner_is_put_in_evaluation_mode(split):
    class Learner(torch.nn.Module):
        name, item_ids, predicts_ratings = "mine", split.test.item_ids, True

        def predict(self, batch):
            assert not self.training
            return torch.full((len(batch.query),), 3.0)

    learner = Learner()
    curve = mf.cold_start_curve(learner, split.test, baselines=split.train)
    assert learner.training
    assert list(curve.values)[:3] == ["mine", "global-mean", "item-mean"]
    assert not {"popularity", "random"} & set(curve.values)


def test_by_default_at_least_half_of_the_users_have_enough_ratings(split):
    curve = mf.cold_start_curve(None, split.test, baselines=split.train)
    usual = np.median(split.test.sizes())
    assert curve.sizes == [size for size in (0, 1, 2, 3, 5, 10, 20, 50) if size + 5 <= usual]
    assert curve.num_users >= split.test.num_users / 2


def test_a_curve_prints_as_a_table_and_plots(split, tmp_path):
    curve = mf.cold_start_curve(None, split.test, (0, 5), "ndcg@5", baselines=split.train)
    lines = str(curve).splitlines()
    assert lines[0].split() == ["ndcg@5,", "ratings", "known", "0", "5"]
    best = max(values[1] for values in curve.values.values())
    marked = [line.split()[0] for line in lines if f"{best:.4f}*" in line and line.endswith("*")]
    assert marked == [name for name, values in curve.values.items() if values[1] == best]
    assert lines[-3].split() == ["chance", f"{curve.chance:.4f}", f"{curve.chance:.4f}"]
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_bad_arguments_are_refused_by_name(split):
    for message, arguments in (
        (r"sizes: expected whole numbers ≥ 0, at least one, got \[-1, 2\]", {"sizes": (-1, 2)}),
        (r"sizes: expected whole numbers ≥ 0, at least one, got \[\]", {"sizes": ()}),
        (r"sizes: expected an int, got float 1\.5", {"sizes": (1.5,)}),
        (r"sizes: no user of the log has the 105 ratings .* the most are \d\d$", {"sizes": (100,)}),
        (r"min_query: must be ≥ 1, got 0", {"min_query": 0}),
        (r"metric: expected one that a predictor has, such as rmse, .*, got 'auc'", {"metric": "auc"}),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            mf.cold_start_curve(None, split.test, baselines=split.train, **arguments)
