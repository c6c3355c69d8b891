"""Sampled ranks against loops, and against ranks in the whole catalogue where everything is sampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metarec_fast import _random
from metarec_fast._sampled_ranks import draw_unrated, sampled_ranks
from metarec_fast.data import Interactions
from metarec_fast.evaluation import evaluate
from metarec_fast.sampler import TaskSampler
from metarec_fast.tasks import Entries


@pytest.fixture(scope="module")
def log():
    rng = np.random.default_rng(0)
    users, items = np.nonzero(rng.random((30, 40)) < 0.3)
    return Interactions.from_arrays(users, items, rng.integers(1, 6, len(users)).astype(float))


class Table:
    """Predicts a score for each item, which no other item has."""

    def __init__(self, item_ids):
        self.item_ids = item_ids
        self.scores = torch.from_numpy(np.random.default_rng(1).permutation(len(item_ids))).float()

    def predict(self, batch):
        return self.scores[batch.query.items]

    def score_catalogue(self, batch):
        return self.scores.expand(batch.num_tasks, -1)


@pytest.mark.parametrize("relevant_from", [None, 4.0])
def test_each_relevant_item_is_ranked_among_itself_and_unrated_ones(log, relevant_from):
    table = Table(log.item_ids)
    report = evaluate(
        table, log, support=3, query=5, seed=2, k=(1, 4), sampled_negatives=7, relevant_from=relevant_from
    )
    rows = []
    for batch in TaskSampler(log, 3, 5, batch_size=1, shuffle=False, seed=2):
        (user,) = batch.users.tolist()
        unrated = sorted(set(range(40)) - set(log.items[log.rows(user)].tolist()))
        key = _random.key_of(2, 0, _random.UNRATED, user)
        negatives = sorted(unrated, key=lambda item: int(_random.at(key, item)[0]))[:7]
        found = []
        for item, rating in zip(batch.query.items.tolist(), batch.query.targets.tolist(), strict=True):
            if relevant_from is None or rating >= relevant_from:
                rank = 1 + sum(bool(table.scores[other] > table.scores[item]) for other in negatives)
                found.append([(rank <= 4) / math.log2(rank + 1), rank <= 4, rank <= 1])
        rows.append(np.mean(found, 0) if found else [math.nan] * 3)
    names = ("sampled_ndcg@4", "sampled_hr@4", "sampled_hr@1")
    for name, values in zip(names, np.transpose(rows), strict=True):
        np.testing.assert_allclose(report.per_user["table"][name], values, err_msg=name)
        assert report.results["table"][name] == pytest.approx(np.nanmean(values))
    # At random, each of 1 + 7 ranks is as likely as any other.
    assert report.chance["sampled_hr@4"] == pytest.approx(4 / 8)
    assert report.chance["sampled_ndcg@4"] == pytest.approx(sum(1 / math.log2(rank + 1) for rank in range(1, 5)) / 8)


def test_ties_count_as_ranked_in_random_order():
    query = Entries(torch.tensor([0, 1]), torch.tensor([5.0, 5.0]), torch.tensor([0, 1, 2, 2]))
    scores = torch.tensor([[2.0, 0.0, 3.0, 2.0, 1.0], [0.0, 9.0, 1.0, 2.0, 3.0], [0.0] * 5])
    result = sampled_ranks(scores, query, torch.tensor([[2, 3, 4]] * 3), (2,))
    torch.testing.assert_close(result["sampled_hr@2"], torch.tensor([0.5, 1.0, torch.nan]).double(), equal_nan=True)
    assert result["sampled_ndcg@2"][0].item() == pytest.approx(0.5 / math.log2(3))


def test_items_drawn_are_different_unrated_and_drawn_alike(log):
    drawn = draw_unrated([log], np.arange(30), 12, key=5)
    for user, row in enumerate(drawn.tolist()):
        assert len(set(row)) == 12
        assert not set(row) & set(log.items[log.rows(user)].tolist())
    # Of each item, over 400 keys: a share 12/unrated of them, within five standard deviations.
    unrated = np.setdiff1d(np.arange(40), log.items[log.rows(0)])
    counts = np.bincount(
        np.concatenate([draw_unrated([log], np.zeros(1, int), 12, key).numpy()[0] for key in range(400)]), minlength=40
    )[unrated]
    share = 12 / len(unrated)
    assert np.abs(counts - 400 * share).max() < 5 * (400 * share * (1 - share)) ** 0.5


def test_sampled_figures_do_not_depend_on_batches_and_change_with_draws(log):
    table = Table(log.item_ids)
    one, other = (
        evaluate(table, log, 3, draws=2, sampled_negatives=5, batch_size=size, catalogue=False) for size in (256, 4)
    )
    assert one.results == other.results
    assert one.spread == other.spread
    assert one.spread["table"]["sampled_ndcg@5"] > 0
    assert not [name for name in one.results["table"] if name.startswith("catalogue")]


def test_known_ratings_from_another_log_are_not_drawn_and_every_draw_has_its_own(log):
    chosen = np.random.default_rng(3).random(len(log)) < 0.5
    known, queries = log.select_rows(chosen), log.select_rows(~chosen)
    spread = evaluate(Table(log.item_ids), queries, 3, support_from=known, sampled_negatives=5, draws=2).spread["table"]
    assert spread["ndcg@5"] == 0  # the queries are the same in every draw
    assert spread["sampled_ndcg@5"] > 0  # what they are ranked among is not
    fewest = 40 - log.sizes().max()
    evaluate(Table(log.item_ids), queries, 3, support_from=known, sampled_negatives=int(fewest))
    message = rf"items that user \d+ has not rated, got {fewest + 1}, there are {fewest}$"
    with pytest.raises(ValueError, match=message):
        evaluate(Table(log.item_ids), queries, 3, support_from=known, sampled_negatives=int(fewest) + 1)


def test_sampled_figures_are_off_unless_asked_for_and_labelled_where_shown(log):
    table = Table(log.item_ids)
    assert not [name for name in evaluate(table, log, 3).results["table"] if name.startswith("sampled")]
    text = str(evaluate(table, log, 3, sampled_negatives=5))
    assert "sampled_ndcg@10" in text
    assert "among itself and 5 unrated ones drawn at random" in text
    assert text.endswith("(Krichene and Rendle 2020).")
    with pytest.raises(ValueError, match="sampled_negatives: must be ≥ 1, got 0"):
        evaluate(table, log, 3, sampled_negatives=0)
    with pytest.raises(TypeError, match="sampled_negatives: expected an int, got float"):
        evaluate(table, log, 3, sampled_negatives=9.5)
