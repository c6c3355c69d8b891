"""The dot-product recommender's parameters and their start."""

import numpy as np
import pytest
import torch

from metarec_fast.data import Interactions
from metarec_fast.models import DotRecommender


def small_log(ratings):
    """Item "a" rated thrice, "b" once, "c" not at all, though it is in the catalogue."""
    log = Interactions.from_arrays(["u", "v", "w", "u"], ["a", "a", "a", "b"], ratings)
    return log.align_items(["a", "b", "c"])[0]


def test_the_start_is_the_mean_rating_and_damped_item_biases():
    model = DotRecommender(3, 4)
    model.initialize(small_log([4.0, 5.0, 4.0, 1.0]))
    assert float(model.offset.detach()) == pytest.approx(3.5)
    expected = [(0.5 + 1.5 + 0.5) / (3 + 3), -2.5 / (1 + 3), 0.0]
    torch.testing.assert_close(model.item_bias.weight.detach().squeeze(1), torch.tensor(expected))
    assert bool(model.initialized)


def test_the_logistic_start_is_log_odds():
    model = DotRecommender(3, 4, loss="logistic")
    model.initialize(small_log([1.0, 0.0, 1.0, 1.0]))
    mean = 0.75
    assert float(model.offset.detach()) == pytest.approx(np.log(mean / (1 - mean)))
    share = (2 + 3 * mean) / (3 + 3)
    start = model.offset + model.item_bias.weight[0, 0]
    assert float(start.detach()) == pytest.approx(np.log(share / (1 - share)), rel=1e-5)


def test_items_all_liked_start_at_finite_log_odds():
    model = DotRecommender(3, 2, loss="logistic")
    model.initialize(small_log([1.0, 1.0, 1.0, 1.0]))
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_starting_keeps_the_parameters_that_an_optimiser_holds():
    model = DotRecommender(3, 2)
    before = [id(parameter) for parameter in model.parameters()]
    model.initialize(small_log([4.0, 5.0, 4.0, 1.0]))
    assert [id(parameter) for parameter in model.parameters()] == before


def test_sparse_embeddings_get_sparse_gradients():
    model = DotRecommender(5, 2, sparse=True)
    rows, biases = model.lookup(torch.tensor([1, 3]))
    (rows.sum() + biases.sum()).backward()
    assert model.item_embedding.weight.grad.is_sparse
    assert model.item_bias.weight.grad.is_sparse


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_items": 0, "dim": 4}, ValueError, "num_items: must be ≥ 1, got 0"),
        ({"num_items": 3, "dim": 0}, ValueError, "dim: must be ≥ 1, got 0"),
        ({"num_items": 3.0, "dim": 4}, TypeError, "num_items: expected an int, got float"),
        ({"num_items": 3, "dim": 4, "loss": "hinge"}, ValueError, "loss: expected one of squared, logistic"),
    ],
)
def test_bad_sizes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        DotRecommender(**arguments)


def test_logs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="log: expected 7 items, like the model, got 3"):
        DotRecommender(7, 2).initialize(small_log([4.0, 5.0, 4.0, 1.0]))
    with pytest.raises(ValueError, match=r"log.ratings: the logistic loss needs targets in \[0, 1\], got 4.0"):
        DotRecommender(3, 2, loss="logistic").initialize(small_log([4.0, 5.0, 4.0, 1.0]))
    empty = Interactions.from_arrays([], [], []).align_items(["a"])[0]
    with pytest.raises(ValueError, match="log: expected at least one rating, got none"):
        DotRecommender(1, 2).initialize(empty)
