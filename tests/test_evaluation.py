"""Evaluation: the figures of a loop over users, beside baselines, under every awkward input."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import warnings

import numpy as np
import pytest
import torch

from metarec_fast.baselines import BASELINES, Baseline, Bias, fit_baselines
from metarec_fast.data import Interactions, split_users
from metarec_fast.evaluation import evaluate
from metarec_fast.sampler import TaskSampler


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((60, 30)) < rng.uniform(0.05, 0.9, (60, 1)))
    ratings = 3 + rng.normal(0, 0.7, 30)[items] + rng.normal(0, 0.7, 60)[users] + rng.normal(0, 0.5, len(users))
    return split_users(Interactions.from_arrays(users, items, ratings.round().clip(1, 5)), valid=0.0, test=0.5)


class Table:
    """Predicts a fixed score for every item."""

    def __init__(self, scores, item_ids, **attributes):
        self.scores, self.item_ids = torch.as_tensor(scores, dtype=torch.float32), np.asarray(item_ids)
        self.__dict__.update(attributes)

    def predict(self, batch):
        return self.scores[batch.query.items]

    def score_catalogue(self, batch):
        return self.scores.expand(batch.num_tasks, -1)


def naive(predictor, log, k, rating_range, draw=0, **sampling):
    """All figures, user by user, for predictors whose scores never tie."""
    squared, absolute, users, listed = [], [], [], {length: set() for length in k}
    sampler = TaskSampler(log, batch_size=1, shuffle=False, **sampling)
    sampler.set_epoch(draw)
    for batch in sampler:
        seen, wanted = set(batch.support.items.tolist()), set(batch.query.items.tolist())
        targets, scores = batch.query.targets.double().numpy(), predictor.predict(batch).double().numpy()
        errors = scores.clip(*rating_range) - targets
        squared += (errors**2).tolist()
        absolute += abs(errors).tolist()
        row = {"mae_user": abs(errors).mean()}
        ranked = [
            item for item in predictor.score_catalogue(batch)[0].argsort(descending=True).tolist() if item not in seen
        ]
        hits = [item in wanted for item in ranked]
        row["catalogue_mrr"] = 1 / (1 + hits.index(True))
        discount = 1 / np.log2(np.arange(len(ranked) + len(targets)) + 2)
        for length in k:
            for name, gains in (("ndcg", 2**targets - 1), ("ndcg_linear", targets)):
                reached = gains[np.argsort(-scores)][:length]
                ideal = np.sort(gains)[::-1][:length]
                row[f"{name}@{length}"] = reached @ discount[: len(reached)] / (ideal @ discount[: len(ideal)])
            first = np.array(hits[:length])
            row[f"catalogue_ndcg@{length}"] = (
                first @ discount[: len(first)] / discount[: min(length, len(wanted))].sum()
            )
            row[f"catalogue_hr@{length}"] = first.any()
            row[f"catalogue_recall@{length}"] = first.sum() / len(wanted)
            listed[length].update(ranked[:length])
        users.append(row)
    figures = {name: float(np.mean([row[name] for row in users])) for name in users[0]}
    coverage = {f"coverage@{length}": len(items) / log.num_items for length, items in listed.items()}
    return figures | coverage | {"rmse": float(np.sqrt(np.mean(squared))), "mae": float(np.mean(absolute))}


@pytest.mark.parametrize(
    "sampling", [{"support": 4, "query": "rest"}, {"support": (0, 3), "query": 5, "order": "time"}]
)
def test_figures_are_those_of_a_loop_over_users(split, sampling):
    learner = fit_baselines(split.train, ["vb-fold-in"])["vb-fold-in"]  # no two scores tie
    report = evaluate(learner, split.test, k=(1, 3, 40), seed=5, **sampling)
    expected = naive(learner, split.test, (1, 3, 40), (1, 5), seed=5, **sampling)
    assert report.results["vb-fold-in"] == pytest.approx(expected, rel=1e-6)


def test_figures_of_several_draws_are_means_over_them_and_the_spread_their_standard_deviation(split):
    learner = fit_baselines(split.train, ["vb-fold-in"])["vb-fold-in"]
    report = evaluate(learner, split.test, support=4, k=(1, 3), seed=5, draws=3)
    draws = [naive(learner, split.test, (1, 3), (1, 5), draw, support=4, query="rest", seed=5) for draw in range(3)]
    expected = {name: statistics.mean(draw[name] for draw in draws) for name in draws[0]}
    expected["rmse"] = statistics.mean(draw["rmse"] ** 2 for draw in draws) ** 0.5  # over all ratings of all draws
    assert report.results["vb-fold-in"] == pytest.approx(expected, rel=1e-6)
    spread = {name: statistics.stdev(draw[name] for draw in draws) for name in draws[0]}
    assert report.spread["vb-fold-in"] == pytest.approx(spread, rel=1e-5)
    assert report.query_sizes.tolist() == [3 * max(size - 4, 1) for size in split.test.sizes() if size > 1]
    assert report.user_ids.tolist() == split.test.user_ids[split.test.sizes() > 1].tolist()


def test_the_first_of_several_draws_is_the_only_one_of_a_single_draw(split):
    table = Table(range(30), split.train.item_ids)
    one, two = (evaluate(table, split.test, support=3, draws=draws) for draws in (1, 2))
    assert one.spread == {}
    assert "spread" not in json.loads(one.to_json())
    # Of two values a and b, with mean m, the standard deviation is |a − b|/√2 = √2 |a − m|.
    for name, value in two.spread["table"].items():
        if name != "rmse":
            assert value == pytest.approx(2**0.5 * abs(one.results["table"][name] - two.results["table"][name]))
    assert json.loads(two.to_json())["spread"] == two.spread


def test_several_draws_are_shown_with_their_deviation(split):
    report = evaluate(None, split.test, support=3, k=(1, 5), baselines=split.train, draws=2)
    lines = str(report).splitlines()
    bias = next(line for line in lines if line.startswith("bias"))
    assert f"{report.results['bias']['rmse']:.4f} ±{report.spread['bias']['rmse']:.4f}" in bias
    assert "±" not in next(line for line in lines if line.startswith("chance"))
    assert len({len(line.rstrip("* ")) for line in lines[2:9]}) == 1
    assert lines[-1].endswith("; mean ± standard deviation over 2 draws of the support")


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_batch_size_changes_no_figure(split, batch_size):
    names = ("global-mean", "item-mean", "popularity", "random")  # sums, and so equal to the last bit
    baselines = fit_baselines(split.train, names)
    one = evaluate(None, split.test, support=3, baselines=baselines, draws=2)
    other = evaluate(None, split.test, support=3, baselines=baselines, draws=2, batch_size=batch_size)
    assert one.results == other.results
    assert one.chance == other.chance
    assert one.spread == other.spread


def test_everything_stands_beside_the_baselines_with_the_agreed_metric_keys(split):
    report = evaluate(None, split.test, support=3, k=(1, 5), baselines=split.train)
    assert list(report.results) == list(BASELINES)
    ratings = ["rmse", "mae", "mae_user"]
    ranking = [f"{name}@{k}" for name in ("ndcg", "ndcg_linear") for k in (1, 5)]
    catalogue = [f"catalogue_{name}@{k}" for name in ("ndcg", "hr", "recall") for k in (1, 5)]
    rest = ["catalogue_mrr", "coverage@1", "coverage@5"]
    assert sorted(report.results["bias"]) == sorted(ratings + ranking + catalogue + rest)
    assert sorted(report.results["random"]) == sorted(ranking + catalogue + rest)
    assert sorted(report.chance) == sorted(ranking + catalogue + rest)
    assert all(math.isfinite(value) for figures in report.results.values() for value in figures.values())


def test_a_learner_comes_first_under_its_name(split):
    item_ids = split.train.item_ids
    report = evaluate(Table(range(30), item_ids, name="mine"), split.test, support=3, baselines=split.train)
    assert next(iter(report.results)) == "mine"
    assert list(evaluate(Table(range(30), item_ids), split.test, support=3).results) == ["table"]


def test_a_constant_predictor_is_at_chance_and_random_scores_are_near_it(split):
    report = evaluate(Table([3] * 30, split.train.item_ids), split.test, support=3, baselines=split.train)
    for name, value in report.chance.items():
        assert report.results["table"][name] == pytest.approx(value, rel=1e-12)
    seeds = [
        evaluate(None, split.test, 3, k=5, seed=s, baselines=fit_baselines(split.train, ["random"], s))
        for s in range(20)
    ]
    for name in ("ndcg@5", "catalogue_ndcg@5", "catalogue_recall@5", "catalogue_hr@5", "catalogue_mrr"):
        values = [report.results["random"][name] - report.chance[name] for report in seeds]
        assert abs(np.mean(values)) < 4 * np.std(values) / 20**0.5, name


def test_predictions_are_clipped_to_the_scale_of_the_learner_else_of_the_training_log(split):
    item_ids, log = split.train.item_ids, split.test
    targets = [batch.query.targets.double() for batch in TaskSampler(log, 3, "rest", shuffle=False)]
    error = lambda guess: float(((torch.cat(targets) - guess) ** 2).mean().sqrt())  # noqa: E731
    wild = Table([99] * 30, item_ids)
    assert evaluate(wild, log, 3).results["table"]["rmse"] == pytest.approx(error(99))
    assert evaluate(wild, log, 3, baselines=split.train).results["table"]["rmse"] == pytest.approx(error(5))
    bias = {"bias": Bias().fit(split.train)}
    assert evaluate(wild, log, 3, baselines=bias).results["table"]["rmse"] == pytest.approx(error(5))
    narrow = Table([99] * 30, item_ids, rating_range=(1, 4))
    assert evaluate(narrow, log, 3, baselines=split.train).results["table"]["rmse"] == pytest.approx(error(4))


def test_ranking_uses_scores_as_they_are_not_clipped(split):
    item_ids = split.train.item_ids
    inside, beyond = Table(np.linspace(2, 4, 30), item_ids), Table(np.linspace(20, 40, 30), item_ids)
    one, other = (evaluate(table, split.test, 3, baselines=split.train) for table in (inside, beyond))
    assert one.results["table"]["ndcg@5"] == other.results["table"]["ndcg@5"]
    assert one.results["table"]["rmse"] != other.results["table"]["rmse"]


def test_scores_that_are_no_ratings_get_no_rating_errors(split):
    class Model:
        loss = "logistic"

    for attributes in ({"predicts_ratings": False}, {"model": Model()}):
        report = evaluate(Table(range(30), split.train.item_ids, **attributes), split.test, support=3)
        assert "rmse" not in report.results["table"]
        assert "ndcg@1" in report.results["table"]


def test_the_log_is_mapped_to_the_learners_items_by_original_ids(split):
    shuffled = np.random.default_rng(0).permutation(30)
    straight = Table(np.arange(30), split.train.item_ids)
    other = Table(np.arange(30)[shuffled], split.train.item_ids[shuffled])
    one, two = (evaluate(table, split.test, 3, baselines=split.train) for table in (straight, other))
    for name, figures in one.results.items():
        if name != "random":
            assert figures == pytest.approx(two.results[name], rel=1e-3), name


def test_ratings_of_unknown_items_are_left_out_with_one_warning(split):
    known = split.train.item_ids[:20]
    dropped = (split.test.items >= 20).sum(), (split.train.items >= 20).sum()
    message = f"evaluate: {dropped[0]} ratings of log and {dropped[1]} ratings of baselines are ignored"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = evaluate(Table(range(20), known), split.test, support=3, baselines=split.train)
    assert [str(one.message)[: len(message)] for one in caught] == [message]
    assert caught[0].filename == __file__
    aligned = split.test.align_items(known)[0]
    assert report.settings["ratings"] == sum(max(size - 3, 1) for size in aligned.sizes() if size > 1)


def test_users_with_one_rating_do_not_count():
    log = Interactions.from_arrays(["a", "b", "b", "c"], ["x", "x", "y", "y"], [5.0, 1.0, 2.0, 4.0])
    report = evaluate(None, log, support=1, baselines=log)
    assert report.user_ids.tolist() == ["b"]
    assert report.query_sizes.tolist() == [1]


def test_an_empty_support_predicts_for_a_user_nobody_knows(split):
    report = evaluate(None, split.test, support=0, baselines=split.train)
    assert report.results["bias"]["rmse"] > 0
    assert report.settings["ratings"] == sum(size for size in split.test.sizes() if size > 1)


def test_per_user_figures_average_to_those_reported(split):
    report = evaluate(None, split.test, support=3, baselines=split.train)
    for name, figures in report.results.items():
        own = report.per_user[name]
        assert all(len(values) == len(report.user_ids) == len(report.query_sizes) for values in own.values())
        assert np.nanmean(own["ndcg@5"]) == pytest.approx(figures["ndcg@5"])
    squared = report.per_user["bias"]["mse"]
    assert np.sqrt(np.average(squared, weights=report.query_sizes)) == pytest.approx(report.results["bias"]["rmse"])


def test_only_items_rated_well_enough_need_be_found(split):
    best = evaluate(None, split.test, support=3, k=3, baselines=split.train, relevant_from=5)
    every = evaluate(None, split.test, support=3, k=3, baselines=split.train)
    assert best.chance["catalogue_mrr"] < every.chance["catalogue_mrr"]
    assert best.results["bias"]["rmse"] == every.results["bias"]["rmse"]
    nothing = evaluate(None, split.test, support=3, k=3, baselines=split.train, relevant_from=6)
    assert "catalogue_mrr" not in nothing.results["bias"]


def test_the_catalogue_is_not_scored_where_it_is_not_wanted(split):
    learner = Table(range(30), split.train.item_ids, score_catalogue=None)
    report = evaluate(learner, split.test, support=3, catalogue=False)
    assert not [name for name in report.results["table"] if name.startswith(("catalogue", "coverage"))]


def test_modules_are_in_evaluation_mode_meanwhile_and_as_before_afterwards(split):
    class Module(torch.nn.Module):
        item_ids = split.train.item_ids

        def __init__(self):
            super().__init__()
            self.scale, self.frozen = torch.nn.Linear(1, 1), torch.nn.Dropout().eval()

        def predict(self, batch):
            assert not self.training
            assert not self.scale.training
            assert not torch.is_grad_enabled()
            return self.scale(batch.query.items[:, None].float())[:, 0]

    learner = Module()
    evaluate(learner, split.test, support=3, catalogue=False)
    assert learner.training
    assert learner.scale.training
    assert not learner.frozen.training


def test_printing_a_report_gives_a_table_with_the_best_marked(split):
    report = evaluate(None, split.test, support=3, k=(1, 5), baselines=split.train)
    lines = str(report).splitlines()
    assert lines[0].split() == ["ranking", "the", "query", "set", "ranking", "the", "catalogue"]
    assert lines[1].split() == [
        "rmse", "mae", "mae_user", "ndcg@5", "ndcg_linear@5", "ndcg@5", "hr@5", "recall@5", "mrr", "coverage@5",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[2 : 3 + len(BASELINES)]] == [*report.results, "chance"]
    assert {len(line.rstrip("* ")) for line in lines[2:9]} == {len(lines[2].rstrip("* "))}
    best = min((figures["rmse"], name) for name, figures in report.results.items() if "rmse" in figures)
    assert [line.split()[0] for line in lines if f"{best[0]:.4f}*" in line] == [best[1]]
    assert next(line for line in lines if line.startswith("popularity")).split()[1:4] == ["–"] * 3
    assert lines[-1].startswith(
        f"{len(report.user_ids)} users, {report.settings['ratings']} ratings to predict; support 3"
    )


def test_the_protocol_of_papers_ranks_the_query_set_alone_and_says_how_far_chance_gets(split):
    learner = Table(np.linspace(1, 5, 30), split.train.item_ids, score_catalogue=None)  # no catalogue is scored
    report = evaluate(learner, split.test, support="rest", query=4, protocol="metarec")
    assert report.results == evaluate(learner, split.test, "rest", 4, k=(1, 3, 5), catalogue=False).results
    ranking = [f"{name}@{k}" for name in ("ndcg", "ndcg_linear") for k in (1, 3, 5)]
    assert list(report.results["table"]) == ["rmse", "mae", "mae_user", *ranking]

    chance = {name: [] for name in ranking}
    for batch in TaskSampler(split.test, "rest", 4, batch_size=1, shuffle=False):
        targets = batch.query.targets.double().numpy()
        for name, gains in (("ndcg", 2**targets - 1), ("ndcg_linear", targets)):
            for k in (1, 3, 5):
                discount = 1 / np.log2(np.arange(min(k, len(gains))) + 2)
                reached = [np.array(order[:k]) @ discount for order in itertools.permutations(gains)]
                chance[f"{name}@{k}"].append(np.mean(reached) / np.max(reached))
    assert report.chance == pytest.approx({name: np.mean(values) for name, values in chance.items()})

    lines = str(report).splitlines()
    assert lines[0].split() == ["rmse", "mae", "mae_user", *ranking]
    assert lines[2].split()[0] == "chance"
    assert lines[-2].startswith("Protocol metarec, as in papers after MeLU: ")
    assert "(chance)" in lines[-1]
    assert evaluate(learner, split.test, support=3, k=2, protocol="metarec").settings["k"] == [2]


def test_a_table_can_be_asked_for_single_metrics(split):
    report = evaluate(None, split.test, support=3, baselines=split.train)
    assert report.table(["rmse", "ndcg@1"]).splitlines()[0].split() == ["rmse", "ndcg@1"]
    heading = report.table(["rmse", "ndcg@1", "catalogue_ndcg@1"]).splitlines()[0]
    assert heading.strip() == "ranking the query set  ranking the catalogue"
    with pytest.raises(ValueError, match=r"metrics: expected some of rmse, .*, got 'auc'"):
        report.table(["auc"])


def test_json_holds_results_chance_and_settings(split, tmp_path):
    report = evaluate(None, split.test, support=(1, 3), baselines=split.train)
    text = report.to_json(tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == text + "\n"
    loaded = json.loads(text)
    assert loaded["results"] == report.results
    assert loaded["chance"] == report.chance
    assert loaded["settings"]["support"] == [1, 3]
    assert loaded["settings"]["users"] == len(report.user_ids)


def refused(split, message, learner=None, log=None, **arguments):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(learner, split.test if log is None else log, **({"support": 3} | arguments))


def test_bad_arguments_are_refused_by_name(split):
    item_ids = split.train.item_ids
    table = Table(range(30), item_ids)
    refused(split, r"learner: expected a learner, or None beside baselines, got neither")
    refused(split, r"learner: expected a learner, or None beside baselines, got neither", baselines={})
    refused(split, r"log: expected Interactions, got list", table, log=[1])
    refused(split, r"k: expected whole numbers ≥ 1, got 0", table, k=(1, 0))
    refused(split, r"k: expected whole numbers ≥ 1, got 2\.5", table, k=(2.5,))
    refused(split, r"k: expected at least one list length, got none", table, k=())
    refused(split, r"batch_size: ", table, batch_size=0)
    refused(split, r"order: ", table, order="alphabetical")
    refused(split, r'protocol: expected "metarec" or None, got .melu.', table, protocol="melu")
    refused(split, r"draws: must be ≥ 1, got 0", table, draws=0)
    refused(split, r"draws: expected an int, got float 2\.0", table, draws=2.0)
    refused(split, r'draws: order="time" gives the same tasks every time, .*, got 2', table, draws=2, order="time")
    anonymous = Table(range(30), item_ids)
    anonymous.item_ids = None
    refused(split, r"learner\.item_ids: expected the original ids", anonymous)
    other = Table(range(30), item_ids[::-1])
    refused(split, r"baselines\['other'\]\.item_ids: expected the same ids", table, baselines={"other": other})
    refused(split, r"baselines: 'table' is the name of the learner too", table, baselines={"table": other})


def test_scores_of_another_shape_or_that_are_not_finite_are_refused_by_name(split):
    item_ids = split.train.item_ids
    refused(split, r"table\.predict: expected finite scores, got \d+ that are not", Table([math.nan] * 30, item_ids))

    class Short(Table):
        def predict(self, batch):
            return torch.zeros(1)

    class Infinite(Table):
        def score_catalogue(self, batch):
            return torch.full((batch.num_tasks, 30), -torch.inf)

    refused(split, r"short\.predict: expected scores of shape \(\d+,\), got \(1,\)", Short(range(30), item_ids))
    refused(split, r"infinite\.score_catalogue: expected finite scores", Infinite(range(30), item_ids))


def test_a_log_in_which_nobody_has_enough_ratings_is_refused(split):
    refused(
        split, "users? ", log=Interactions.from_arrays([0, 1], [0, 1], [1.0, 2.0]), baselines=split.train, support=1
    )


def test_baselines_satisfy_what_a_predictor_must_offer(split):
    learner: Baseline = Bias().fit(split.train)
    assert list(evaluate(learner, split.test, support=3).results) == ["bias"]
