"""Learners survive the disk, and broken files are named."""

import json

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast.checkpoint import DESCRIPTION, WEIGHTS

ALL = {
    "maml": lambda model: mf.MAML(model, inner_lr=0.07, inner_steps=3, outer_loss={"squared": 0.3, "absolute": 0.7}),
    "fomaml": lambda model: mf.FOMAML(model, inner_lr=0.07),
    "reptile": lambda model: mf.Reptile(model, inner_steps=2),
    "meta-sgd": lambda model: mf.MetaSGD(model, first_order=True),
    "maml-r": lambda model: mf.MAMLR(model, inner_steps="exact", momentum=0.0),
    "maml-r without weights": lambda model: mf.MAMLR(model, weigh_items=False),
}


def make_learner(name="maml", ids=("a", "b", "c", "d"), **arguments):
    torch.manual_seed(1)
    learner = ALL[name](mf.DotRecommender(4, 2, **arguments))
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learner.item_ids = list(ids)
    learner.rating_range = (0.5, 5.0)
    return learner


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("arguments", [{}, {"loss": "squared", "sparse": True}])
def test_a_saved_learner_comes_back_the_same(tmp_path, name, arguments):
    learner = make_learner(name, **arguments)
    learner.model.initialized.fill_(True)
    learner.save(tmp_path / "new" / "folder")
    loaded = mf.load(tmp_path / "new" / "folder")
    assert type(loaded) is type(learner)
    assert loaded.hyperparameters == learner.hyperparameters
    assert loaded.model.hyperparameters == learner.model.hyperparameters
    assert loaded.rating_range == (0.5, 5.0)
    state, same = learner.state_dict(), loaded.state_dict()
    assert state.keys() == same.keys()
    assert all(torch.equal(state[key], same[key]) for key in state)
    user, other = learner.adapt(["a", "c"], [5, 1]), loaded.adapt(["a", "c"], [5, 1])
    assert np.array_equal(user.predict(["b", "d"]), other.predict(["b", "d"]))


@pytest.mark.parametrize(
    "ids",
    [
        np.array([3, 1, 4, 15]), np.array([3, 1, 4, 15], np.int16), np.array([2**63, 1, 2, 3], np.uint64),
        np.array(["ä", "x,y", "", "film"]), np.array(["1", 1, "a", 2], object),
    ],
)  # fmt: skip
def test_item_ids_keep_their_values_and_types(tmp_path, ids):
    learner = mf.MAML(mf.DotRecommender(4, 2))
    learner.item_ids = ids
    learner.save(tmp_path)
    loaded = mf.load(tmp_path).item_ids
    assert loaded.dtype == ids.dtype
    assert loaded.tolist() == ids.tolist()
    assert [type(value) for value in loaded.tolist()] == [type(value) for value in ids.tolist()]


def test_a_learner_that_was_never_fitted_can_be_saved(tmp_path):
    mf.MetaSGD(mf.DotRecommender(4, 2)).save(tmp_path)
    loaded = mf.load(tmp_path)
    assert loaded.item_ids is None
    assert loaded.rating_range is None
    assert not bool(loaded.model.initialized)


def test_precision_is_kept(tmp_path):
    learner = mf.MAMLR(mf.DotRecommender(4, 2)).double()
    learner.save(tmp_path)
    loaded = mf.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float64}
    assert torch.equal(loaded.model.item_embedding.weight, learner.model.item_embedding.weight)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    make_learner("maml").save(tmp_path)
    make_learner("maml-r").save(tmp_path)
    assert isinstance(mf.load(tmp_path), mf.MAMLR)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([DESCRIPTION, WEIGHTS])


def test_ids_that_json_does_not_have_are_refused(tmp_path):
    learner = make_learner(ids=[("a", 1), ("a", 2), ("b", 1), ("b", 2)])
    with pytest.raises(TypeError, match=r"item_ids: only integers and strings can be saved, got tuple \('a', 1\)"):
        learner.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{DESCRIPTION}: no such file"):
        mf.load(tmp_path / "nowhere")
    make_learner().save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS}: no such file"):
        mf.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "not valid JSON"),
        (lambda text: "[1, 2]", "expected a JSON object, got list"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 99'), "must be 1, got 99"),
        (lambda text: text.replace('"MAML"', '"Unheard"'), "not a saved learner: KeyError: 'Unheard'"),
        (lambda text: json.dumps({"format_version": 1}), "not a saved learner: KeyError: 'class'"),
        (lambda text: text.replace('"inner_lr": 0.07', '"inner_lr": -1'), "not a saved learner: ValueError: inner_lr"),
        (lambda text: text.replace('"inner_lr"', '"unknown"'), "not a saved learner: TypeError"),
    ],
)
def test_a_broken_description_is_named(tmp_path, change, message):
    make_learner().save(tmp_path)
    path = tmp_path / DESCRIPTION
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"{DESCRIPTION}: .*{message}"):
        mf.load(tmp_path)


@pytest.mark.parametrize("change", [lambda data: data[:-8], lambda data: b"", lambda data: b"\xff" * 64])
def test_broken_weights_are_named(tmp_path, change):
    make_learner().save(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: does not hold the weights of this learner"):
        mf.load(tmp_path)


def test_weights_of_another_learner_are_named(tmp_path):
    make_learner("meta-sgd").save(tmp_path / "one")
    make_learner("maml").save(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).write_bytes((tmp_path / "one" / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=f"{WEIGHTS}: does not hold the weights of this learner"):
        mf.load(tmp_path / "other")
