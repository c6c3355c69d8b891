"""The operator mlp_adapt_and_score: scores and gradients equal those of the reference."""

import pytest
import torch
from problems import Draw, relative_error
from torch import nn
from torch.library import opcheck
from towers import draw_loop, draw_tower, leaves_of, raw_inputs

from metarec_fast import _mlp_ops, mlp_reference
from metarec_fast import functional as F
from metarec_fast._mlp_arguments import TowerLoop
from metarec_fast.tasks import Entries, TaskBatch


@pytest.mark.parametrize("hidden", [(), (9,), (9, 5), (16, 33, 8)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("first_order", [False, True])
def test_scores_and_every_gradient_equal_the_reference(hidden, activation, first_order):
    draw = Draw(len(hidden))
    tower, batch = draw_tower(draw, hidden, activation=activation), draw.batch(weights=True)
    rates = 0.05 * draw.uniform(4, 2 * len(tower.layers))
    leaves, tower, loop = leaves_of(tower, TowerLoop(rates, 4, "logistic", first_order))
    actual, expected = (run(tower, batch, loop) for run in (_mlp_ops.adapt_and_score, mlp_reference.adapt_and_score))
    assert relative_error(actual, expected) < 1e-12
    arriving = draw.normal(len(expected))
    gradients = (torch.autograd.grad(scores, leaves, arriving, allow_unused=True) for scores in (actual, expected))
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, torch.zeros_like(one) if other is None else other) < 1e-10


def test_the_reference_is_sgd_on_the_module_it_stands_for():
    """One task, by hand: torch.nn and torch.optim, a rate for each tensor."""
    draw = Draw(1)
    tower, batch = draw_tower(draw, num_tasks=1), draw.batch((13,), (4,))
    module = nn.Sequential(nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), [p for each in tower.layers for p in each], strict=True):
            parameter.copy_(value)

    def inputs(entries):
        return torch.cat([tower.user_part.expand(len(entries), -1), tower.item_table[entries.items]], dim=1)

    rates = [0.05, 0.02, 0.0, 0.03, 0.04, 0.01]
    groups = [{"params": [value], "lr": rate} for value, rate in zip(module.parameters(), rates, strict=True)]
    optimizer = torch.optim.SGD(groups)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(inputs(batch.support))[:, 0], batch.support.targets).backward()
        optimizer.step()
    expected = module(inputs(batch.query))[:, 0].detach()
    rates = torch.tensor([rates], dtype=torch.float64)
    torch.testing.assert_close(mlp_reference.adapt_and_score(tower, batch, TowerLoop(rates, 3)), expected)


def test_scores_have_the_gradients_that_meta_step_has():
    draw = Draw(2)
    batch = draw.batch()
    leaves, tower, loop = leaves_of(draw_tower(draw, activation="gelu"), draw_loop(draw, 3))
    scores = _mlp_ops.adapt_and_score(tower, batch, loop)
    sizes = batch.query.sizes()
    shares = 1 / (sizes[batch.query.task_ids()] * (sizes > 0).sum())
    loss = (shares * (scores - batch.query.targets) ** 2).sum()
    result = _mlp_ops.meta_step(tower, batch, loop, {"squared": 1.0})
    torch.testing.assert_close(loss, result.loss)
    for one, other in zip(*(torch.autograd.grad(each, leaves) for each in (loss, result.loss)), strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck_in_double_precision():
    draw = Draw(3)
    tower = draw_tower(draw, (4, 3), num_tasks=3, user_width=2, dim=2, num_items=5, activation="gelu")
    leaves, tower, loop = leaves_of(tower, TowerLoop(0.05 * draw.uniform(1, 6), 2))
    batch = draw.batch((3, 0, 5), (2, 1, 3), num_items=5, weights=True)
    assert torch.autograd.gradcheck(lambda *_: _mlp_ops.adapt_and_score(tower, batch, loop), tuple(leaves))


def test_opcheck_finds_nothing_and_it_compiles_into_one_graph():
    draw = Draw(4)
    leaves, tower, loop = leaves_of(draw_tower(draw), draw_loop(draw, 2))
    batch = draw.batch(weights=True)
    query = batch.query.items, batch.query.offsets
    arguments = *raw_inputs(tower, batch.support), *query, *_mlp_ops._loop(tower, loop)
    opcheck(torch.ops.metarec_fast.mlp_adapt_and_score, arguments)

    def score(table):
        return F.mlp_adapt_and_score(
            tower.user_part, table, tower.layers, batch, inner_lr=loop.inner_lr, inner_steps=2
        ).sum()

    (eager,) = torch.autograd.grad(score(tower.item_table), leaves[1])
    (compiled,) = torch.autograd.grad(torch.compile(score, fullgraph=True)(tower.item_table), leaves[1])
    torch.testing.assert_close(compiled, eager)


def test_a_second_differentiation_is_refused():
    draw = Draw(5)
    leaves, tower, loop = leaves_of(draw_tower(draw), draw_loop(draw, 2))
    scores = _mlp_ops.adapt_and_score(tower, draw.batch(), loop)
    gradients = torch.autograd.grad(scores.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="^mlp_adapt_and_score cannot be differentiated twice"):
        gradients[3].sum().backward()


def test_no_task_an_empty_task_and_one_entry():
    draw = Draw(6)
    loop = draw_loop(draw, 3)
    none = _mlp_ops.adapt_and_score(draw_tower(draw, num_tasks=0), draw.batch((), ()), loop)
    assert none.shape == (0,)
    tower, batch = draw_tower(draw, num_tasks=3), draw.batch((0, 1, 2), (2, 3, 0))
    expected = mlp_reference.adapt_and_score(tower, batch, loop)
    torch.testing.assert_close(_mlp_ops.adapt_and_score(tower, batch, loop), expected)
    weights = [part for layer in tower.layers for part in layer]
    start = mlp_reference.score(weights, tower.user_part[0], tower.item_table[batch.query.items[:2]], "relu")
    torch.testing.assert_close(expected[:2], start)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_float32_equals_the_reference(activation):
    draw = Draw(7, torch.float32)
    tower, batch = draw_tower(draw, (32, 17), activation=activation), draw.batch()
    loop = draw_loop(draw, 4)
    # Some dozens of roundings through the steps.
    torch.testing.assert_close(
        _mlp_ops.adapt_and_score(tower, batch, loop), mlp_reference.adapt_and_score(tower, batch, loop),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_gelu_is_right_far_out_too():
    """One support entry that says nothing, so that the score is W_2 gelu(x)."""
    points = torch.tensor([-50.0, -9.0, -5.5, -1.0, -1e-9, 0.0, 1e-9, 0.3, 4.0, 9.0, 50.0], dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    entries = Entries(torch.arange(11), None, torch.tensor([0, 11]))
    nothing = Entries(torch.arange(0), zero[:0], torch.tensor([0, 0]))
    table = points[:, None].requires_grad_()
    scores = F.mlp_adapt_and_score(
        one[:, :0], table, [(one, zero), (one, zero)], TaskBatch(nothing, entries), activation="gelu"
    )
    expected = nn.functional.gelu(table[:, 0])
    torch.testing.assert_close(scores, expected, rtol=1e-13, atol=1e-16)
    slopes = (torch.autograd.grad(each.sum(), table)[0] for each in (scores, expected))
    torch.testing.assert_close(*slopes, rtol=1e-13, atol=1e-16)


def test_without_a_query_it_says_so():
    draw = Draw(8)
    tower, batch = draw_tower(draw), TaskBatch(draw.batch().support)
    with pytest.raises(ValueError, match=r"^batch.query: expected Entries, got None"):
        F.mlp_adapt_and_score(tower.user_part, tower.item_table, tower.layers, batch)
