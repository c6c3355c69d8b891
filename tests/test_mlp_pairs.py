"""Losses of the MLP tower that compare an entry's item with its negatives, inside and outside; and biases of items."""

import math

import pytest
import torch
from problems import Draw, relative_error
from torch.library import opcheck
from torch.nn.functional import softplus
from towers import compare_with_reference, draw_loop, draw_tower, leaves_of, raw_inputs

from metarec_fast import _mlp_ops, mlp_reference
from metarec_fast import functional as F
from metarec_fast._mlp_arguments import TowerLoop
from metarec_fast.tasks import Entries, TaskBatch

DOUBLE = torch.float64


@pytest.mark.parametrize("hidden", [(), (9,), (9, 5), (16, 33, 8)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("loss", "negatives"), [("bpr", 1), ("bpr", 3), ("softmax", 2)])
def test_every_gradient_equals_autograd_through_the_reference(hidden, activation, first_order, loss, negatives):
    """Supports of 13 · 4 and 40 · 2 candidates have a first layer of their own, those of 5 · 4 and less have not."""
    draw = Draw(len(hidden) + negatives)
    tower = draw_tower(draw, hidden, activation=activation)
    tower.item_bias = draw.normal(60)
    batch = draw.batch(weights=True, negatives=negatives, log_q=loss == "softmax")
    rates = 0.1 * draw.uniform(4, 2 * len(tower.layers))
    loop = TowerLoop(rates, 4, loss, first_order)
    compare_with_reference(tower, batch, loop, {loss: 1.0})


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_any_number_of_steps_agrees(steps, loss):
    draw = Draw(steps)
    tower, batch = draw_tower(draw, activation="gelu"), draw.batch(negatives=2)
    compare_with_reference(tower, batch, draw_loop(draw, steps, loss=loss), {"bpr": 0.3, "softmax": 0.7})


@pytest.mark.parametrize(("inner", "outer"), [("bpr", {"absolute": 0.5, "logistic": 0.5}), ("logistic", {"bpr": 1.0})])
def test_one_part_may_compare_while_the_other_does_not(inner, outer):
    draw = Draw(7)
    tower, single, pairs = draw_tower(draw), draw.batch(weights=True), draw.batch(weights=True, negatives=2)
    parts = (pairs.support, single.query) if inner == "bpr" else (single.support, pairs.query)
    compare_with_reference(tower, TaskBatch(*parts), draw_loop(draw, 3, loss=inner), outer)


def test_losses_of_both_kinds_may_be_mixed_outside():
    draw = Draw(8)
    tower, batch = draw_tower(draw), draw.batch(negatives=3)
    query = batch.query
    both = Entries(query.items, draw.uniform(len(query)), query.offsets, negatives=query.negatives)
    compare_with_reference(
        tower,
        TaskBatch(batch.support, both),
        draw_loop(draw, 3, loss="bpr"),
        {"squared": 0.5, "bpr": 0.2, "softmax": 1.0},
    )


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_biases_of_items_are_added_to_scores(loss, activation):
    draw = Draw(9)
    tower, batch, loop = (
        draw_tower(draw, activation=activation),
        draw.batch(weights=True),
        draw_loop(draw, 3, loss=loss),
    )
    without = _mlp_ops.adapt_and_score(tower, batch, loop)
    tower.item_bias = draw.normal(60)
    compare_with_reference(tower, batch, loop, {"logistic": 1.0})
    start = _mlp_ops.adapt_and_score(tower, batch, TowerLoop(loop.inner_lr[0], 0, loss))
    tower.item_bias = None
    zero = _mlp_ops.adapt_and_score(tower, batch, TowerLoop(loop.inner_lr[0], 0, loss))
    assert not torch.allclose(without, zero)
    assert not torch.allclose(start, zero)


def test_the_reference_compares_an_item_with_its_negatives():
    """One linear layer, one step, by hand."""
    draw = Draw(10)
    tower, batch = draw_tower(draw, (), num_tasks=1), draw.batch((4,), (3,), negatives=2)
    (weight, bias), user = tower.layers[0], tower.user_part[0]

    def scores(row, items):
        return torch.cat([user.expand(*items.shape, -1), tower.item_table[items]], -1) @ row

    row = weight[0].clone().requires_grad_()
    own, others = scores(row, batch.support.items), scores(row, batch.support.negatives)
    (slope,) = torch.autograd.grad(softplus(others - own[:, None]).mean(), row)
    candidates = torch.cat([batch.query.items[:, None], batch.query.negatives], 1)
    expected = scores(row.detach() - 0.3 * slope, candidates) + bias
    found = F.mlp_adapt_and_score(
        tower.user_part, tower.item_table, tower.layers, batch, inner_lr=0.3, inner_steps=1, loss="bpr"
    )
    torch.testing.assert_close(found, expected)


def test_one_negative_may_be_a_vector_and_scores_have_the_item_first():
    draw = Draw(11)
    tower, batch = draw_tower(draw), draw.batch(negatives=1)
    arguments = tower.user_part, tower.item_table, tower.layers
    flat = TaskBatch(*(_with_negatives(part, part.negatives[:, 0]) for part in (batch.support, batch.query)))
    result, other = (F.mlp_meta_step(*arguments, each, loss="bpr", outer_loss="bpr") for each in (batch, flat))
    assert torch.equal(result.grads["item_table"].rows, other.grads["item_table"].rows)
    ids = [batch.support.items, batch.support.negatives[:, 0], batch.query.items, batch.query.negatives[:, 0]]
    assert torch.equal(result.grads["item_table"].ids, torch.cat(ids))
    scores = F.mlp_adapt_and_score(*arguments, batch, loss="bpr")
    assert scores.shape == (len(batch.query), 2)
    own = F.mlp_adapt_and_score(*arguments, TaskBatch(batch.support, batch.query.without_negatives()), loss="bpr")
    torch.testing.assert_close(scores[:, 0], own)
    torch.testing.assert_close(other.loss, result.loss)


def test_many_equal_negatives_are_one_negative():
    """The mean over negatives, for bpr; for softmax M equal ones count as one whose score is larger by log M."""
    draw = Draw(12)
    tower, one = draw_tower(draw), draw.batch(negatives=1)
    arguments = tower.user_part, tower.item_table, tower.layers
    many = TaskBatch(*(_with_negatives(part, part.negatives.expand(-1, 4)) for part in (one.support, one.query)))
    results = [F.mlp_meta_step(*arguments, batch, loss="bpr", outer_loss="bpr") for batch in (one, many)]
    torch.testing.assert_close(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].grads["layers"], results[1].grads["layers"])
    shift = torch.tensor([0.0, -math.log(4)], dtype=DOUBLE)
    shifted = TaskBatch(
        *(_with_negatives(part, part.negatives, shift.expand(len(part), 2)) for part in (one.support, one.query))
    )
    results = [F.mlp_meta_step(*arguments, batch, loss="softmax", outer_loss="softmax") for batch in (shifted, many)]
    torch.testing.assert_close(results[0].loss, results[1].loss)
    torch.testing.assert_close(results[0].grads["user_part"], results[1].grads["user_part"])


def _with_negatives(part, negatives, log_q=None):
    return Entries(part.items, None, part.offsets, negatives=negatives.contiguous(), log_q=log_q)


def test_tasks_without_entries_have_defined_results():
    draw = Draw(13)
    tower, loop = draw_tower(draw, num_tasks=4), draw_loop(draw, 3, loss="bpr")
    compare_with_reference(tower, draw.batch((0, 3, 2, 1), (2, 0, 0, 1), negatives=2), loop, {"bpr": 1.0})
    nothing = _mlp_ops.meta_step(tower, draw.batch((3, 0, 2, 1), (0, 0, 0, 0), negatives=2), loop, {"bpr": 1.0})
    assert nothing.loss == 0
    assert nothing.grads["item_table"].rows.shape == (18, 7)
    assert not nothing.grads["item_table"].rows.any()


def test_gradcheck_in_double_precision():
    draw = Draw(14)
    tower = draw_tower(draw, (4,), num_tasks=3, user_width=2, dim=2, num_items=5, activation="gelu")
    tower.item_bias = draw.normal(5)
    leaves, tower, loop = leaves_of(tower, TowerLoop(0.1 * draw.uniform(2, 4), 2, "bpr"))
    batch = draw.batch((3, 0, 5), (2, 1, 3), num_items=5, weights=True, negatives=2)
    assert torch.autograd.gradcheck(lambda *_: _mlp_ops.meta_step(tower, batch, loop, {"bpr": 1.0}).loss, tuple(leaves))
    assert torch.autograd.gradcheck(lambda *_: F.mlp_adapt_and_score(
        leaves[0], leaves[1], tower.layers, batch, item_bias=tower.item_bias, inner_lr=leaves[2], inner_steps=2,
        activation="gelu", loss="softmax"), tuple(leaves))  # fmt: skip


def test_opcheck_finds_nothing():
    draw = Draw(15)
    tower, batch = draw_tower(draw), draw.batch(weights=True, negatives=2, log_q=True)
    tower.item_bias = draw.normal(60)
    loop, query = draw_loop(draw, 2, loss="softmax"), batch.query
    inputs = raw_inputs(tower, batch.support)
    opcheck(
        torch.ops.metarec_fast.mlp_meta_step,
        (*inputs, query.items, query.offsets, query.targets, query.weights, query.negatives, query.log_q, batch.weights,
         *_mlp_ops._loop(tower, loop), "bpr=0.5,softmax=0.5"),
    )  # fmt: skip
    opcheck(
        torch.ops.metarec_fast.mlp_adapt_and_score,
        (*inputs, query.items, query.offsets, *_mlp_ops._loop(tower, loop)),
    )


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_float32_equals_the_reference(loss):
    draw = Draw(16, torch.float32)
    tower, batch = draw_tower(draw, (32, 17)), draw.batch(negatives=3)
    loop = draw_loop(draw, 4, loss=loss)
    actual, expected = (run(tower, batch, loop, {loss: 1.0}) for run in (_mlp_ops.meta_step, mlp_reference.meta_step))
    torch.testing.assert_close(actual.loss, expected.loss)
    # Some dozens of roundings through the steps.
    assert relative_error(actual.grads["user_part"], expected.grads["user_part"]) < 1e-5


@pytest.mark.cpu
def test_raw_calls_check_what_they_are_given():
    draw = Draw(17)
    tower, loop = draw_tower(draw), draw_loop(draw, 2, loss="bpr")
    single, pairs = draw.batch(), draw.batch(negatives=2)
    with pytest.raises(RuntimeError, match="support_negatives: needed by the losses bpr and softmax, and by no other"):
        _mlp_ops.meta_step(tower, single, loop, {"bpr": 1.0})
    with pytest.raises(RuntimeError, match="query_negatives: needed by the outer losses bpr and softmax"):
        _mlp_ops.meta_step(tower, TaskBatch(pairs.support, single.query), loop, {"bpr": 1.0})
    with pytest.raises(RuntimeError, match="query_targets: needed by the outer losses squared, logistic and absolute"):
        _mlp_ops.meta_step(tower, pairs, loop, {"squared": 1.0})
    outside = Entries.unchecked(
        pairs.support.items,
        None,
        pairs.support.offsets,
        None,
        60 + 0 * pairs.support.negatives,
        max_size=40,
        max_item=59,
    )
    with pytest.raises(RuntimeError, match=r"support_negatives: ids must be in \[0, 60\), got 60"):
        _mlp_ops.meta_step(tower, TaskBatch(outside, pairs.query), loop, {"bpr": 1.0})
    tower.item_bias = draw.normal(59)
    with pytest.raises(RuntimeError, match=r"item_bias: expected shape \[60\]"):
        _mlp_ops.meta_step(tower, pairs, loop, {"bpr": 1.0})
