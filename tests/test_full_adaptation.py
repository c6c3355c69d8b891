"""adapt="all": a task's item rows and biases adapt with its user, with exact gradients of first and second order."""

from dataclasses import replace

import pytest
import torch
from problems import Draw, compare_with_reference, relative_error, tracked
from test_meta_step import OUTER
from torch.library import opcheck

from metarec_fast import _ops, reference
from metarec_fast import functional as F

# 12 items for up to 40 entries: support repeats items, and the query asks for adapted ones.
FEW = 12


def loop_of(draw, steps, **settings):
    return draw.loop(steps, adapt="all", extra_count=1.5, inner_lr=0.05 * draw.uniform(steps), **settings)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("losses", OUTER)
def test_every_gradient_equals_autograd_through_the_reference(losses, loss, first_order):
    draw = Draw(1)
    model, batch = draw.model(FEW, num_tasks=6), draw.batch(num_items=FEW, weights=True)
    compare_with_reference(model, batch, loop_of(draw, 4, loss=loss, first_order=first_order), losses)


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_any_width_and_number_of_steps(dim, steps):
    draw = Draw(2)
    model, batch = draw.model(FEW, dim), draw.batch((5, 0, 17), (3, 2, 16), num_items=FEW)
    compare_with_reference(model, batch, loop_of(draw, steps), {"squared": 1.0})


def test_large_supports():
    draw = Draw(3)
    compare_with_reference(draw.model(90), draw.batch((200, 1), (20, 3), num_items=90), loop_of(draw, 3), OUTER[0])


@pytest.mark.parametrize("first_order", [False, True])
def test_the_multi_step_loss_weighs_every_step(first_order):
    draw = Draw(4)
    model, batch = draw.model(FEW), draw.batch(num_items=FEW, weights=True)
    loop = loop_of(draw, 4, first_order=first_order)
    compare_with_reference(model, batch, loop, {"squared": 1.0}, draw.uniform(5))


def test_queries_with_negatives():
    draw = Draw(5)
    batch = draw.batch(num_items=FEW, negatives=2)
    batch.support.negatives, batch.support.targets = None, draw.uniform(len(batch.support))
    compare_with_reference(draw.model(FEW), batch, loop_of(draw, 3), {"bpr": 0.5, "softmax": 0.5})


@pytest.mark.parametrize("num_items", [FEW, 400])
@pytest.mark.parametrize("steps", [0, 3, 20])
@pytest.mark.parametrize("first_order", [False, True])
def test_gradients_through_the_scores_equal_the_reference(first_order, steps, num_items):
    draw = Draw(6)
    batch = draw.batch(num_items=num_items, weights=True)
    leaves, model, batch, loop = tracked(draw.model(num_items), batch, loop_of(draw, steps, first_order=first_order))
    results = []
    for run in (_ops.adapt_and_score, reference.adapt_and_score):
        fast, scores = run(model, batch, loop)
        value = scores.sin().sum() + fast.user.sum() + fast.bias.square().sum()
        results.append(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True, allow_unused=True))
    for name, actual, expected in zip(leaves, *results, strict=True):
        assert relative_error(actual, expected) < 1e-10, name


@pytest.mark.parametrize("num_items", [FEW, 400])
@pytest.mark.parametrize("dim", [7, 16, 32, 64])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_few_steps_on_many_items_go_by_factors_of_rows_and_give_the_same(first_order, loss, dim, num_items):
    draw = Draw(11)
    model = draw.model(num_items, dim)
    batch = draw.batch((16, 5, 21, 8), (16, 3, 0, 9), num_items=num_items, weights=True)
    loop = loop_of(draw, 4, loss=loss, first_order=first_order)
    compare_with_reference(model, batch, loop, {"squared": 0.5, "absolute": 0.5})
    one_rate = replace(loop, inner_lr=loop.inner_lr[1])
    compare_with_reference(model, batch, one_rate, {"squared": 1.0})
    last = torch.tensor([0, 0, 0, 0, 1], dtype=torch.float64)  # judged at every step, rows are gone over themselves
    by_factors, by_rows = (_ops.meta_step(model, batch, loop, {"squared": 1.0}, kappa) for kappa in (None, last))
    for name, gradient in by_factors.grads.items():
        assert relative_error(gradient, by_rows.grads[name]) < 1e-11, name


@pytest.mark.parametrize("support", [[0, 1024, 2048, 5], [0, 1, 2, 5], [7, 1024, 7, 0]])
@pytest.mark.parametrize("steps", [1, 3])
def test_items_a_power_of_two_apart_are_told_apart(support, steps):
    # Which of them a task has is first looked up by their remainders.
    draw = Draw(13)
    model, batch = draw.model(2100), draw.batch((4,), (5,), num_items=2100)
    batch.support.items = torch.tensor(support)
    batch.query.items = torch.tensor([1024, 0, 2049, 5, 1031])
    compare_with_reference(model, batch, loop_of(draw, steps), {"squared": 1.0})


def test_adapted_rows_are_those_of_the_reference():
    draw = Draw(7)
    model, batch, loop = draw.model(FEW), draw.batch(num_items=FEW, weights=True), loop_of(draw, 5)
    actual, expected = _ops.adapt(model, batch.support, loop), reference.adapt(model, batch.support, loop)
    for one, other in zip((*actual[:2], *actual.items), (*expected[:2], *expected.items), strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("dim", [7, 16])
def test_gradients_of_adapted_rows_equal_the_reference(first_order, loss, dim):
    draw = Draw(11)
    leaves, model, batch, loop = tracked(
        draw.model(FEW, dim),
        draw.batch(num_items=FEW, weights=True),
        loop_of(draw, 3, first_order=first_order, loss=loss),
    )
    results = []
    for run in (_ops.adapt, reference.adapt):
        fast = run(model, batch.support, loop)
        rows, biases = fast.items
        value = rows.sin().sum() + (biases * rows[:, 0]).sum() + fast.user.square().sum() + fast.bias.square().sum()
        results.append(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True, allow_unused=True))
    for name, actual, expected in zip(leaves, *results, strict=True):
        assert relative_error(actual, expected) < 1e-10, name


def test_adapted_rows_cannot_be_differentiated_twice():
    draw = Draw(12)
    leaves, model, batch, loop = tracked(draw.model(FEW), draw.batch(num_items=FEW), loop_of(draw, 2))
    value = _ops.adapt(model, batch.support, loop).items.rows.square().sum()
    (gradient,) = torch.autograd.grad(value, leaves["item_table"], create_graph=True)
    with pytest.raises(RuntimeError, match="^adapt cannot be differentiated twice"):
        gradient.sum().backward()


def test_gradcheck_in_double_precision():
    draw = Draw(8)
    leaves, model, batch, loop = tracked(
        draw.model(6, 3), draw.batch((3, 0, 6), (2, 1, 3), num_items=6, weights=True), loop_of(draw, 2)
    )
    assert torch.autograd.gradcheck(
        lambda *values: _ops.meta_step(model, batch, loop, {"squared": 1.0}, None).loss, tuple(leaves.values())
    )
    assert torch.autograd.gradcheck(
        lambda *values: tuple(_ops.adapt(model, batch.support, loop).items), tuple(leaves.values())
    )


def test_opcheck_finds_nothing_and_it_compiles_into_one_graph():
    draw = Draw(9)
    _, model, batch, loop = tracked(draw.model(FEW), draw.batch(num_items=FEW, weights=True), loop_of(draw, 3))
    arguments = (
        *_ops._inputs(model, batch.support), *_ops.judged_query(batch), *_ops._loop(loop), "squared", None, 127,
    )  # fmt: skip
    opcheck(torch.ops.metarec_fast.meta_step, arguments)
    opcheck(torch.ops.metarec_fast.adapt_all, (*_ops._inputs(model, batch.support), *_ops._loop(loop)))

    def loss(table):
        return F.meta_step(model.user_init, table, model.item_bias, batch, adapt="all", inner_steps=3).loss

    (eager,) = torch.autograd.grad(loss(model.item_table), model.item_table)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(model.item_table), model.item_table)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.cpu
def test_the_same_bits_for_any_number_of_threads():
    draw = Draw(10, torch.float32)
    model, batch = draw.model(200), draw.batch((7, 0, 30, 4) * 40, (5, 3, 1, 4) * 40, num_items=200)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        grads = F.meta_step(model.user_init, model.item_table, model.item_bias, batch, adapt="all").grads
        results.append([grads["user_init"], grads["item_table"].rows, grads["offset"]])
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))
