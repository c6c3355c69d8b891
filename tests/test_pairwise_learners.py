"""Learners on choices instead of ratings: losses bpr and softmax, from training to recommending."""

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast import Interactions, Reptile, TaskSampler, split_users
from metarec_fast.negatives import draw_negatives
from metarec_fast.tasks import Entries

NUM_ITEMS, HALF = 40, 20


def choices(num_users=120, seed=0):
    """Users like the first or the second half of the items, and chose twelve of it."""
    generator = np.random.default_rng(seed)
    users = np.repeat(np.arange(num_users), 12)
    chosen = [generator.choice(HALF, 12, replace=False) + HALF * (user % 2) for user in range(num_users)]
    return Interactions.from_arrays(users, np.concatenate(chosen), np.ones(len(users)))


def trained(algorithm, loss, *, sparse=False, **settings):
    torch.manual_seed(0)
    split = split_users(choices(), valid=0.2, test=0.2, seed=0)
    model = mf.DotRecommender(NUM_ITEMS, 4, loss=loss, sparse=sparse)
    learner = algorithm(model, inner_lr=0.1 if loss == "squared" else 1.0, **settings)
    outer_lr = 0.01 if algorithm is mf.MAMLR else 0.05  # its steps and rates learn at 50 times that
    history = learner.fit(
        split.train, valid=split.valid, support=4, epochs=8, patience=None, outer_lr=outer_lr, progress=False
    )
    return learner, history, split


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
@pytest.mark.parametrize("algorithm", [mf.MAML, mf.FOMAML, mf.MetaSGD, mf.MAMLR])
def test_training_finds_what_users_like(algorithm, loss):
    learner, history, split = trained(algorithm, loss)
    assert history.metric == loss
    assert history.best < 0.7 * history.epochs[0].valid
    items, scores = learner.adapt([25, 31, 22], [1, 1, 1]).recommend(k=10)
    assert np.mean(items >= HALF) >= 0.9
    assert (np.diff(scores) <= 0).all()
    report = mf.evaluate(learner, split.test, support=4, k=(5,), baselines=split.train)
    assert report.results[learner.name]["catalogue_ndcg@5"] > report.results["popularity"]["catalogue_ndcg@5"]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("inner", "outer", "metric"),
    [
        ("squared", "bpr", "bpr"),
        ("squared", {"squared": 0.5, "softmax": 0.5}, "outer_loss"),
        ("logistic", "softmax", "softmax"),
        ("bpr", "squared", "rmse"),
        ("softmax", {"logistic": 1.0}, "log_loss"),
        ("bpr", "softmax", "softmax"),
    ],
)
def test_any_outer_loss_trains_what_adapts_on_any_other(inner, outer, metric, sparse):
    learner, history, split = trained(mf.MAML, inner, outer_loss=outer, sparse=sparse)
    assert history.metric == metric
    assert all(np.isfinite(epoch.train_loss) for epoch in history.epochs[1:])
    assert history.epochs[-1].train_loss < history.epochs[1].train_loss
    batch = next(iter(TaskSampler(split.test, support=4, negatives=3)))
    assert learner.predict(batch).shape == (len(batch.query), 4)


def test_a_part_without_use_for_negatives_keeps_the_distinct_ids_of_the_sampler():
    batch = next(iter(TaskSampler(choices(), support=4, negatives=3)))
    less = batch.with_negatives_of(support=False, query=True)
    assert less.support.negatives is None
    assert less.query.negatives is not None
    (unique, local), (all_unique, all_local) = less.localize(), batch.localize()
    assert torch.equal(unique, all_unique)
    assert local.support.negatives is None
    assert torch.equal(local.query.negatives, all_local.query.negatives)


def test_a_learner_comes_back_from_disk_the_same(tmp_path):
    learner, _, split = trained(mf.MAML, "softmax")
    learner.save(tmp_path)
    batch = next(iter(TaskSampler(split.test, support=4)))
    torch.testing.assert_close(mf.load(tmp_path).predict(batch), learner.predict(batch))


def test_drawn_negatives_are_always_the_same_and_never_the_users_own():
    items = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    entries = Entries(items, None, torch.tensor([0, 5, 7]))
    one, other = (draw_negatives(entries, 7, 3).negatives for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == (7, 3)
    assert set(one[:5].flatten().tolist()) <= {5, 6}
    assert not set(one[5:].flatten().tolist()) & {0, 1}


def test_a_user_who_chose_everything_still_gets_negatives():
    entries = Entries(torch.arange(3), None, torch.tensor([0, 3]))
    assert draw_negatives(entries, 3, 2).negatives.shape == (3, 2)


def test_reptile_refuses_losses_of_pairs():
    with pytest.raises(ValueError, match="model: Reptile adapts on a loss of single scores, got loss='bpr'"):
        Reptile(mf.DotRecommender(NUM_ITEMS, 4, loss="bpr"))
