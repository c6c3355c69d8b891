"""Judging with supports from one log and queries from another: every set against a loop over users."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metarec_fast.data import Interactions
from metarec_fast.evaluation import evaluate


@pytest.fixture
def logs():
    """Ratings to predict, and ratings of mostly the same users that are known."""
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((40, 25)) < 0.3)
    ratings = rng.integers(1, 6, len(users)).astype(float)
    known = (rng.random(len(users)) < 0.6) & (users != 3) | (users == 4)  # of 3 nothing is known, of 4 everything is

    def part(chosen):
        log = Interactions.from_arrays(users[chosen], items[chosen], ratings[chosen])
        return log.align_items(np.arange(25))[0]

    return part(~known), part(known)


class Recorder:
    """Predicts a score for each item, which no other item has, and keeps every task."""

    name = "recorder"

    def __init__(self, item_ids):
        self.item_ids, self.scores = item_ids, torch.from_numpy(np.random.default_rng(1).permutation(25) / 5.0).float()
        self.tasks = []

    def predict(self, batch):
        for task, user in enumerate(batch.users.tolist()):
            sets = []
            for entries in (batch.support, batch.query):
                rows = slice(*entries.offsets[task : task + 2].tolist())
                sets.append(dict(zip(entries.items[rows].tolist(), entries.targets[rows].tolist(), strict=True)))
            self.tasks.append((user, *sets))
        return self.scores[batch.query.items]

    def score_catalogue(self, batch):
        return self.scores.expand(batch.num_tasks, -1)


def rated(log, user):
    """Item → rating of a user, by original id."""
    rows = log.rows(int(log.user_index([user])[0]))
    return dict(zip(log.items[rows].tolist(), log.ratings[rows].tolist(), strict=True))


@pytest.mark.parametrize(("support", "query", "order"), [(3, "rest", "random"), ((1, 4), 2, "random"), (2, 3, "time")])
def test_supports_come_from_the_one_log_and_queries_from_the_other(logs, support, query, order):
    log, known = logs
    recorder = Recorder(log.item_ids)
    report = evaluate(recorder, log, support, query, order, support_from=known, k=3)
    both = sorted(set(log.user_ids.tolist()) & set(known.user_ids.tolist()))
    assert report.user_ids.tolist() == both
    assert not {3, 4} & set(both)

    errors, found = [], []
    for user, (_, drawn, predicted) in zip(report.user_ids.tolist(), recorder.tasks, strict=True):
        own, wanted = rated(known, user), rated(log, user)
        assert drawn.items() <= own.items()
        assert predicted.items() <= wanted.items()
        low, high = support if isinstance(support, tuple) else (support, support)
        assert min(low, len(own)) <= len(drawn) <= min(high, len(own))
        assert len(predicted) == (len(wanted) if query == "rest" else min(query, len(wanted)))
        if order == "time":  # without times, the order of the log
            assert list(drawn) == list(own)[: len(drawn)]
            assert list(predicted) == list(wanted)[: len(predicted)]
        errors += [recorder.scores[item].item() - rating for item, rating in predicted.items()]
        # Ranked is all that the user is not known to have rated, whether it was drawn for the support or not.
        candidates = sorted(set(range(25)) - set(own), key=lambda item: -recorder.scores[item].item())
        found.append(len(set(candidates[:3]) & set(predicted)) / len(predicted))
    figures = report.results["recorder"]
    assert figures["rmse"] == pytest.approx(np.mean(np.square(errors)) ** 0.5)
    assert figures["catalogue_recall@3"] == pytest.approx(np.mean(found))
    assert report.query_sizes.sum() == len(errors)


def test_draws_differ_in_their_supports_and_batches_change_nothing(logs):
    log, known = logs
    runs = []
    for batch_size in (256, 5):
        recorder = Recorder(log.item_ids)
        report = evaluate(recorder, log, 3, 2, support_from=known, draws=2, batch_size=batch_size)
        runs.append((report.results, report.spread, recorder.tasks))
    assert runs[0] == runs[1]
    num_users = len(report.user_ids)
    first, second = runs[0][2][:num_users], runs[0][2][num_users:]
    assert [user for user, *_ in first] == [user for user, *_ in second] == list(range(num_users))
    assert first != second


def test_logs_are_mapped_to_the_learners_items_and_to_each_others_users(logs):
    log, known = logs
    order = np.random.default_rng(2).permutation(known.num_users)
    shuffled = known.select_users(order).align_items(np.arange(25)[::-1])[0]
    one, two = (evaluate(Recorder(log.item_ids), log, 2, support_from=part) for part in (known, shuffled))
    assert one.user_ids.tolist() == two.user_ids.tolist()
    # Other supports are drawn, for rows of other users, but a fixed score does not heed them.
    assert one.results["recorder"]["rmse"] == two.results["recorder"]["rmse"]
    assert one.results["recorder"]["catalogue_mrr"] == pytest.approx(two.results["recorder"]["catalogue_mrr"])

    dropped = (log.items >= 20).sum(), (known.items >= 20).sum()
    learner = Recorder(log.item_ids[:20])
    with pytest.warns(UserWarning, match="evaluate: {} ratings of log and {} ratings of support_from".format(*dropped)):
        evaluate(learner, log, 2, support_from=known, catalogue=False)


def test_logs_that_do_not_fit_each_other_are_refused_by_name(logs):
    log, known = logs
    for message, error, arguments in (
        (r"support_from: expected Interactions, got list", TypeError, {"support_from": [1]}),
        (r"support_from: user \d+ has item \d+ in log too", ValueError, {"support_from": log}),
        (r"support_from: none of the 37 users of log has ratings in both", ValueError,
         {"support_from": known.select_users([])}),
        (r"support: must be ≥ 1, got 0", ValueError, {"support_from": known, "support": 0}),
        (r"query: must be ≥ 1, got 0", ValueError, {"support_from": known, "query": 0}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            evaluate(Recorder(log.item_ids), log, **arguments)
