"""A user who was not in training: by original ids, from ratings to recommendations."""

import numpy as np
import pytest
import torch

import metarec_fast as mf

IDS = ["m7", "m3", "m1", "m9", "m5", "m2"]
ALL = [mf.MAML, mf.FOMAML, mf.Reptile, mf.MetaSGD, mf.MAMLR]


def make_learner(algorithm=mf.MAML, ids=IDS, loss="squared", **arguments):
    torch.manual_seed(0)
    model = mf.DotRecommender(len(IDS), 3, loss=loss)
    with torch.no_grad():
        model.item_embedding.weight.normal_()
        model.item_bias.weight.normal_(std=0.3)
        model.offset.fill_(3.0)
    learner = algorithm(model, **arguments)
    learner.item_ids = ids
    return learner


def batch_of(rows, ratings, query):
    entries = mf.Entries(torch.tensor(rows), torch.tensor(ratings), torch.tensor([0, len(rows)]))
    return mf.TaskBatch(entries, mf.Entries(torch.tensor(query), None, torch.tensor([0, len(query)])))


@pytest.mark.parametrize("algorithm", ALL)
def test_an_adapted_user_predicts_what_the_learner_does(algorithm):
    learner = make_learner(algorithm)
    user = learner.adapt(["m3", "m9"], [5, 1])
    batch = batch_of([1, 3], [5.0, 1.0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(user.predict(IDS), learner.predict(batch).cpu().numpy(), rtol=1e-5)
    fast = learner.fast_weights(batch)
    torch.testing.assert_close(user.vector, fast.user[0])
    torch.testing.assert_close(user.bias, fast.bias[0])


@pytest.mark.parametrize("algorithm", ALL)
def test_recommendations_are_the_best_predictions_without_the_seen_items(algorithm):
    user = make_learner(algorithm).adapt(["m3", "m9"], [5, 1])
    items, scores = user.recommend(k=3)
    rest = [item for item in IDS if item not in ("m3", "m9")]
    expected = sorted(rest, key=lambda item: -user.predict([item])[0])[:3]
    assert list(items) == expected
    np.testing.assert_allclose(scores, user.predict(expected), rtol=1e-5)


@pytest.mark.parametrize("algorithm", [mf.MAML, mf.Reptile])
def test_seen_items_are_recommended_when_asked_for(algorithm):
    user = make_learner(algorithm).adapt(["m3", "m9", "m3"], [5, 1, 4])
    items, scores = user.recommend(k=len(IDS), exclude_seen=False)
    assert sorted(items) == sorted(IDS)
    np.testing.assert_allclose(scores, user.predict(items), rtol=1e-5)
    assert list(scores) == sorted(scores, reverse=True)


def test_fewer_items_than_asked_for_come_where_fewer_are_left():
    user = make_learner().adapt(IDS[:4], [3, 4, 5, 2])
    items, scores = user.recommend(k=6)
    assert sorted(items) == sorted(IDS[4:])
    assert len(scores) == 2


def test_more_items_than_the_catalogue_has_are_refused():
    with pytest.raises(ValueError, match=r"k: must be in \[1, 6\], the number of items, got 7"):
        make_learner().adapt(["m3"], [5]).recommend(k=7)


@pytest.mark.parametrize("algorithm", ALL)
def test_a_user_without_ratings_is_the_start(algorithm):
    learner = make_learner(algorithm)
    user = learner.adapt([], [])
    assert torch.equal(user.vector, learner.model.user_init.detach())
    assert torch.equal(user.bias, learner.model.user_bias_init.detach())
    assert len(user.recommend(k=6)[0]) == 6


def test_unknown_items_are_ignored_with_one_warning_and_predicted_as_the_mean():
    learner = make_learner()
    with pytest.warns(UserWarning, match="2 items that the learner does not know are ignored, the first is 'new'") as w:
        user = learner.adapt(["m3", "new", "newer"], [5, 1, 1])
    assert len(w) == 1
    known = learner.adapt(["m3"], [5])
    assert torch.equal(user.vector, known.vector)
    scores = user.predict(["m1", "new", "m2"])
    assert scores[1] == pytest.approx(user.predict(IDS).mean(), rel=1e-5)
    np.testing.assert_allclose(scores[[0, 2]], user.predict(["m1", "m2"]))


@pytest.mark.parametrize(
    "ids",
    [
        np.array([70, 30, 10, 90, 50, 20]), [70, 30, 10, 90, 50, 20], np.array([70, 30, 10, 90, 50, 20], np.uint16),
        list(np.array([70, 30, 10, 90, 50, 20])),
    ],
)  # fmt: skip
def test_integer_ids_come_back_as_they_were_given(ids):
    learner = make_learner(ids=ids)
    user = learner.adapt(np.array([30, 90]), np.array([5.0, 1.0]))
    items, _ = user.recommend(k=2)
    assert items.dtype == np.asarray(ids).dtype
    assert set(items.tolist()) <= {70, 10, 50, 20}


def test_ratings_outside_the_range_seen_in_training_are_accepted():
    learner = make_learner()
    learner.rating_range = (1.0, 5.0)
    user = learner.adapt(["m3"], [9.0])
    assert np.isfinite(user.predict(IDS)).all()


def test_predicting_nothing_gives_nothing():
    assert make_learner().adapt(["m3"], [5]).predict([]).shape == (0,)


@pytest.mark.parametrize(
    ("items", "ratings", "error", "message"),
    [
        (["m3", "m1"], [5], ValueError, "ratings: expected 2, one per item, got 1"),
        (["m3", "m1"], [5, float("nan")], ValueError, "ratings: must be finite, got nan at position 1"),
        (["m3"], ["good"], TypeError, "ratings: expected numbers, got <U4"),
        ("m3", [5], TypeError, "items: expected an array, list or column, got str"),
    ],
)
def test_bad_ratings_are_named(items, ratings, error, message):
    with pytest.raises(error, match=message):
        make_learner().adapt(items, ratings)


def test_the_logistic_loss_wants_ratings_between_zero_and_one():
    learner = make_learner(loss="logistic")
    assert learner.adapt(["m3"], [1]).predict(["m3"]) > learner.adapt(["m3"], [0]).predict(["m3"])
    with pytest.raises(ValueError, match=r"ratings: the logistic loss needs targets in \[0, 1\], got 5 at position 0"):
        learner.adapt(["m3"], [5])


def test_a_learner_that_does_not_know_its_items_says_so():
    learner = mf.MAML(mf.DotRecommender(3, 2))
    assert learner.item_ids is None
    with pytest.raises(ValueError, match="item_ids: not known yet"):
        learner.adapt([1], [5])


def test_item_ids_that_do_not_fit_are_refused():
    learner = mf.MAML(mf.DotRecommender(3, 2))
    with pytest.raises(ValueError, match="item_ids: expected 3, one per row, got 2"):
        learner.item_ids = [1, 2]
    with pytest.raises(ValueError, match="item_ids: each id must come once, got 2 different ones among 3"):
        learner.item_ids = ["a", "b", "a"]
