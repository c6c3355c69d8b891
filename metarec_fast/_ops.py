"""Calls the compiled operators, whose arguments are positional, and names what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from metarec_fast import _library
from metarec_fast._arguments import WANT, WANT_ALL, InnerLoop, Model, differentiable, is_autocast
from metarec_fast._compiling import constant
from metarec_fast.results import AdaptedItems, FastWeights, MetaStep, SparseRows, TopK
from metarec_fast.tasks import Entries, TaskBatch

if _library.cpu.loaded:
    from metarec_fast import _autograd  # noqa: F401

Result = TypeVar("Result")

ops = torch.ops.metarec_fast

EXACT = -1
"""`inner_steps` of the operators for the closed form."""


def either(kernels: Callable[..., Result], plain: Callable[..., Result], like: Tensor) -> Callable[..., Result]:
    """The kernels where `like` lives, or the reference, which like them computes in float32 under autocast."""
    if _library.loaded_for(like):
        return kernels
    return torch.autocast(like.device.type, enabled=False)(plain) if is_autocast(like) else plain


def adapt(model: Model, support: Entries, loop: InnerLoop) -> FastWeights:
    name = "adapt_all" if loop.adapt == "all" else "adapt"
    args = (*_inputs(model, support), *_loop(loop))
    user, bias, *items = call(name, differentiable(model, loop, support).values(), args)
    return FastWeights(user, bias, AdaptedItems(*items) if items else None)


def adapt_and_score(model: Model, batch: TaskBatch, loop: InnerLoop) -> tuple[FastWeights, Tensor]:
    assert batch.query is not None
    query = batch.query.items, batch.query.offsets
    user, bias, scores = ops.adapt_and_score(*_inputs(model, batch.support), *query, *_loop(loop))
    return FastWeights(user, bias), scores


def meta_step(
    model: Model, batch: TaskBatch, loop: InnerLoop, losses: dict[str, float], step_weights: Tensor | None
) -> MetaStep:
    args = (
        *_inputs(model, batch.support), *judged_query(batch), *_loop(loop),
        outer_text(losses), step_weights, WANT_ALL,
    )  # fmt: skip
    loss, *found, ids = call("meta_step", differentiable(model, loop, batch.support).values(), args)
    grads: dict[str, Tensor | SparseRows] = {
        name: SparseRows(ids, gradient) if name in ("item_table", "item_bias") else gradient
        for name, gradient in zip(WANT, found, strict=True) if gradient is not None
    }  # fmt: skip
    return MetaStep(loss, grads)


def outer_text(losses: dict[str, float]) -> str:
    """Losses and their weights as the operators take them: "squared", "squared=0.5,absolute=0.5"."""
    return ",".join(name if weight == 1 else f"{name}={float(weight)!r}" for name, weight in losses.items())


def reptile_step(model: Model, support: Entries, task_weights: Tensor | None, loop: InnerLoop) -> MetaStep:
    args = (*_inputs(model, support), task_weights, *_loop(loop))
    loss, user, bias, rows, biases = call("reptile_step", (), args)
    grads: dict[str, Tensor | SparseRows] = {"user_init": user, "user_bias_init": bias}
    if rows is not None:
        grads["item_table"], grads["item_bias"] = SparseRows(support.items, rows), SparseRows(support.items, biases)
    return MetaStep(loss, grads)


def call(name: str, given: Iterable[Tensor | None], args: tuple[Any, ...]) -> Any:
    """What the operator of that name returns, without autograd where none of `given` asks for gradients."""
    op = getattr(ops, name).default
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in given):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def score_top_k(
    user: Tensor, user_bias: Tensor, item_table: Tensor, item_bias: Tensor, k: int, exclude: Entries | None
) -> TopK:
    excluded = (None, None) if exclude is None else (exclude.items, exclude.offsets)
    return TopK(*ops.score_top_k(user, user_bias, item_table, item_bias, k, *excluded, _tensor_cores_allowed()))


@constant
def _tensor_cores_allowed() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")  # set by either of PyTorch's ways


def coalesce_rows(gradient: SparseRows) -> SparseRows:
    return SparseRows(*ops.coalesce_rows(gradient.ids, gradient.rows))


def coalesce_rows_padded(gradient: SparseRows) -> tuple[SparseRows, Tensor]:
    ids, rows, count = ops.coalesce_rows_padded(gradient.ids, gradient.rows)
    return SparseRows(ids, rows), count


def judged_query(batch: TaskBatch) -> tuple[Tensor | None, ...]:
    """The query as it is judged, and the tasks' weights."""
    query = batch.query
    assert query is not None
    return (
        query.items, query.targets, query.offsets, query.weights, query.negative_rows, query.log_q, batch.weights,
    )  # fmt: skip


def _inputs(model: Model, support: Entries) -> tuple[Any, ...]:
    """What every operator begins with: user_init, user_bias_init, item_table, item_bias, offset and the support."""
    targets = model.item_bias.new_zeros(len(support)) if support.targets is None else support.targets
    return (
        model.user_init, model.user_bias_init, model.item_table, model.item_bias, model.offset,
        support.items, targets, support.offsets, support.weights, support.negative_rows, support.log_q,
        support.size_bound,
    )  # fmt: skip


def _loop(loop: InnerLoop) -> tuple[Any, ...]:
    steps = EXACT if loop.inner_steps == "exact" else loop.inner_steps
    return (
        loop.inner_lr, loop.preconditioner, loop.prior_pull, loop.momentum, loop.extra_count, steps,
        loop.loss, loop.first_order, loop.form, loop.adapt,
    )  # fmt: skip
