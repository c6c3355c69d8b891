"""Calls the compiled operators, whose arguments are positional, and names what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from metarec_fast import _library
from metarec_fast._arguments import OUTER_LOSSES, InnerLoop, Model, differentiable, is_autocast
from metarec_fast.results import AdaptedItems, FastWeights, MetaStep, SparseRows, TopK
from metarec_fast.tasks import Entries, TaskBatch

if _library.cpu.loaded:
    from metarec_fast import _autograd

Result = TypeVar("Result")

ops = torch.ops.metarec_fast

_ITEMS = ("item_table", "item_bias")
EXACT = -1
"""`inner_steps` of the operators for the closed form."""


def either(kernels: Callable[..., Result], plain: Callable[..., Result], like: Tensor) -> Callable[..., Result]:
    """The kernels where `like` lives, or the reference, which like them computes in float32 under autocast."""
    if _library.loaded_for(like):
        return kernels
    return torch.autocast(like.device.type, enabled=False)(plain) if is_autocast(like) else plain


def adapt(model: Model, support: Entries, loop: InnerLoop) -> FastWeights:
    if loop.adapt == "all":
        user, bias, rows, biases = ops.adapt_all(*_inputs(model, support), *_loop(loop))
        return FastWeights(user, bias, AdaptedItems(rows, biases))
    return FastWeights(*ops.adapt(*_inputs(model, support), *_loop(loop)))


def adapt_and_score(model: Model, batch: TaskBatch, loop: InnerLoop) -> tuple[FastWeights, Tensor]:
    assert batch.query is not None
    query = batch.query.items, batch.query.offsets
    user, bias, scores = ops.adapt_and_score(*_inputs(model, batch.support), *query, *_loop(loop))
    return FastWeights(user, bias), scores


def meta_step(
    model: Model, batch: TaskBatch, loop: InnerLoop, losses: dict[str, float], step_weights: Tensor | None
) -> MetaStep:
    query = batch.query
    assert query is not None
    given = differentiable(model, loop, batch.support)
    wanted = 0
    for name, value in given.items():
        if value is not None:
            wanted |= _autograd.WANT[name]
    loss, *gradients, ids = call(
        ops.meta_step.default, given.values(),
        *_inputs(model, batch.support), *_query(batch), *_loop(loop),
        *[losses.get(name, 0.0) for name in OUTER_LOSSES], step_weights, wanted,
    )  # fmt: skip
    grads: dict[str, Tensor | SparseRows] = {}
    for name, gradient in zip(given, gradients, strict=True):
        if gradient is not None:
            grads[name] = SparseRows(ids, gradient) if name in _ITEMS else gradient
    return MetaStep(loss, grads)


def reptile_step(model: Model, support: Entries, task_weights: Tensor | None, loop: InnerLoop) -> MetaStep:
    loss, user, bias, rows, biases = call(
        ops.reptile_step.default, (), *_inputs(model, support), task_weights, *_loop(loop)
    )
    grads: dict[str, Tensor | SparseRows] = {"user_init": user, "user_bias_init": bias}
    if loop.adapt == "all":
        grads["item_table"], grads["item_bias"] = SparseRows(support.items, rows), SparseRows(support.items, biases)
    return MetaStep(loss, grads)


def call(op: Any, given: Iterable[Tensor | None], *args: Any) -> Any:
    """The same as op(*args), without the detour through Python's autograd where none of `given` asks for gradients."""
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled():
        for value in given:
            if value is not None and value.requires_grad:
                return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def score_top_k(
    user: Tensor, user_bias: Tensor, item_table: Tensor, item_bias: Tensor, k: int, exclude: Entries | None
) -> TopK:
    excluded = (None, None) if exclude is None else (exclude.items, exclude.offsets)
    return TopK(*ops.score_top_k(user, user_bias, item_table, item_bias, k, *excluded, _tensor_cores_allowed()))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compiled anew where this has changed
def _tensor_cores_allowed() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")  # set by either of PyTorch's ways


def coalesce_rows(gradient: SparseRows) -> SparseRows:
    return SparseRows(*ops.coalesce_rows(gradient.ids, gradient.rows))


def coalesce_rows_padded(gradient: SparseRows) -> tuple[SparseRows, Tensor]:
    ids, rows, count = ops.coalesce_rows_padded(gradient.ids, gradient.rows)
    return SparseRows(ids, rows), count


def _inputs(model: Model, support: Entries) -> tuple[Any, ...]:
    targets = model.item_bias.new_zeros(len(support)) if support.targets is None else support.targets
    return (
        model.user_init, model.user_bias_init, model.item_table, model.item_bias, model.offset,
        support.items, targets, support.offsets, support.weights, support.negative_rows, support.log_q,
        support.size_bound,
    )  # fmt: skip


def _query(batch: TaskBatch) -> tuple[Tensor | None, ...]:
    """The query as it is judged, and the tasks' weights."""
    query = batch.query
    assert query is not None
    return (
        query.items, query.targets, query.offsets, query.weights, query.negative_rows, query.log_q, batch.weights,
    )  # fmt: skip


def _loop(loop: InnerLoop) -> tuple[Any, ...]:
    steps = EXACT if loop.inner_steps == "exact" else loop.inner_steps
    return (
        loop.inner_lr, loop.preconditioner, loop.prior_pull, loop.momentum, loop.extra_count, steps,
        loop.loss, loop.first_order, loop.form, loop.adapt,
    )  # fmt: skip
