"""Calls the compiled operators, whose arguments are positional, and names what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast import _library
from metarec_fast._arguments import InnerLoop, Model, differentiable
from metarec_fast.results import AdaptedItems, FastWeights, MetaStep, SparseRows, TopK
from metarec_fast.tasks import Entries, TaskBatch

if _library.cpu.loaded:
    from metarec_fast import _autograd

ops = torch.ops.metarec_fast

EXACT = -1
"""`inner_steps` of the operators for the closed form."""


def can_run(model: Model, support: Entries, loop: InnerLoop, *, gradients: bool = False) -> bool:
    """Whether kernels can do it; adapt="all" has no gradient of its own yet and leaves that to the reference."""
    if not _library.loaded_for(model.item_table):
        return False
    if loop.adapt != "all":
        return True
    values = (*_inputs(model, support), loop.inner_lr)
    return not gradients and not (
        torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)
    )


def adapt(model: Model, support: Entries, loop: InnerLoop) -> FastWeights:
    if loop.adapt == "all":
        nothing = support.items.new_empty(0), torch.zeros_like(support.offsets)
        user, bias, rows, biases, _ = ops.adapt_all(*_inputs(model, support), *nothing, *_plain_loop(loop))
        return FastWeights(user, bias, AdaptedItems(rows, biases))
    return FastWeights(*ops.adapt(*_inputs(model, support), *_loop(loop)))


def adapt_and_score(model: Model, batch: TaskBatch, loop: InnerLoop) -> tuple[FastWeights, Tensor]:
    assert batch.query is not None
    inputs = (*_inputs(model, batch.support), batch.query.items, batch.query.offsets)
    if loop.adapt == "all":
        user, bias, rows, biases, scores = ops.adapt_all(*inputs, *_plain_loop(loop))
        return FastWeights(user, bias, AdaptedItems(rows, biases)), scores
    user, bias, scores = ops.adapt_and_score(*inputs, *_loop(loop))
    return FastWeights(user, bias), scores


def meta_step(
    model: Model, batch: TaskBatch, loop: InnerLoop, losses: dict[str, float], step_weights: Tensor | None
) -> MetaStep:
    query = batch.query
    assert query is not None
    given = differentiable(model, loop, batch.support)
    wanted = sum({_autograd.WANT[name] for name, value in given.items() if value is not None})
    loss, *gradients = ops.meta_step(
        *_inputs(model, batch.support), query.items, query.targets, query.offsets, query.weights, batch.weights,
        *_loop(loop), *(float(losses.get(name, 0.0)) for name in ("squared", "logistic", "absolute")),
        step_weights, wanted,
    )  # fmt: skip
    grads: dict[str, Tensor | SparseRows] = {
        name: gradient for (name, value), gradient in zip(given.items(), gradients, strict=True) if value is not None
    }
    ids = torch.cat([batch.support.items, query.items])
    for name in ("item_table", "item_bias"):
        rows = grads[name]
        assert isinstance(rows, Tensor)
        grads[name] = SparseRows(ids, rows)
    return MetaStep(loss, grads)


def score_top_k(
    user: Tensor, user_bias: Tensor, item_table: Tensor, item_bias: Tensor, k: int, exclude: Entries | None
) -> TopK:
    excluded = (None, None) if exclude is None else (exclude.items, exclude.offsets)
    return TopK(*ops.score_top_k(user, user_bias, item_table, item_bias, k, *excluded))


def coalesce_rows(gradient: SparseRows) -> SparseRows:
    return SparseRows(*ops.coalesce_rows(gradient.ids, gradient.rows))


def _inputs(model: Model, support: Entries) -> tuple[Tensor | None, ...]:
    return (
        model.user_init, model.user_bias_init, model.item_table, model.item_bias, model.offset,
        support.items, support.targets, support.offsets, support.weights,
    )  # fmt: skip


def _loop(loop: InnerLoop) -> tuple[Any, ...]:
    steps = EXACT if loop.inner_steps == "exact" else loop.inner_steps
    return (
        loop.inner_lr, loop.preconditioner, loop.prior_pull, loop.momentum, loop.extra_count, steps,
        loop.loss, loop.first_order, loop.form,
    )  # fmt: skip


def _plain_loop(loop: InnerLoop) -> tuple[Any, ...]:
    return loop.inner_lr, loop.extra_count, loop.inner_steps, loop.loss
