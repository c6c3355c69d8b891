"""Fake kernels, gradients and autocast of the operators of an MLP tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from metarec_fast import _autocast
from metarec_fast._autograd import refuse, register_gradients, restore, save
from metarec_fast._known_gradients import Once, is_known_one

ops = torch.ops.metarec_fast

USER_PART, ITEM_TABLE, PARAMETERS, SUPPORT_ITEMS, SUPPORT_NEGATIVES = 0, 1, 3, 5, 9
QUERY_ITEMS, QUERY_NEGATIVES = 12, 16  # the latter of mlp_meta_step
INNER_LR, META_STEP_INNER_LR = 14, 19  # of mlp_adapt_and_score, and behind the query that mlp_meta_step judges
FIRST_ORDER = 4  # behind inner_lr


def _gradients(args: tuple[Any, ...], inner_lr: int, query: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Fake gradients of user_part, parameters and inner_lr, item rows and their ids."""
    table, items = args[ITEM_TABLE], args[QUERY_ITEMS]
    support = () if args[inner_lr + FIRST_ORDER] else (SUPPORT_ITEMS, SUPPORT_NEGATIVES)
    count = sum(args[place].numel() for place in (*support, *query) if args[place] is not None)
    dense = (table.new_empty(args[place].shape) for place in (USER_PART, PARAMETERS, inner_lr))
    return *dense, table.new_empty((count, table.shape[1])), items.new_empty((count,))


def _fake_score(*args: Any) -> Tensor:
    result: Tensor = args[ITEM_TABLE].new_empty(args[QUERY_ITEMS].shape)
    return result


def _fake_score_backward(grad_scores: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _gradients(args, INNER_LR, (QUERY_ITEMS,))


def _fake_meta_step(*args: Any) -> tuple[Tensor, ...]:
    gradients = _gradients(args, META_STEP_INNER_LR, (QUERY_ITEMS, QUERY_NEGATIVES))
    return args[ITEM_TABLE].new_empty(()), *gradients


def _at_places(ctx: Any, inner_lr: int, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of user_part, item_table, parameters and inner_lr at their places; other arguments have none."""
    result: list[Any] = [None] * len(ctx.needs_input_grad)
    for place, gradient in zip((USER_PART, ITEM_TABLE, PARAMETERS, inner_lr), gradients, strict=True):
        result[place] = gradient
    return tuple(result)


def _score_backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
    args = restore(ctx)

    def undo(grad_scores: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        user_part, parameters, inner_lr, rows, ids = ops.mlp_adapt_and_score_backward(grad_scores, *args)
        needed = ctx.needs_input_grad[ITEM_TABLE]
        table = ops.sum_rows(ids, rows, args[ITEM_TABLE].shape[0]) if needed else rows
        return user_part, table, parameters, inner_lr

    inputs = (args[place] for place in (USER_PART, ITEM_TABLE, PARAMETERS, INNER_LR))
    return _at_places(ctx, INNER_LR, Once.apply("mlp_adapt_and_score", undo, grad_scores, *inputs))


def _meta_step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.num_rows = inputs[ITEM_TABLE].shape[0]
    tracked = (inputs[place] for place in (USER_PART, ITEM_TABLE, PARAMETERS, META_STEP_INNER_LR))
    ctx.save_for_backward(*gradients, *tracked)


def _meta_step_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    user_part, parameters, inner_lr, rows, ids, *inputs = ctx.saved_tensors
    needed, num_rows, one = ctx.needs_input_grad[ITEM_TABLE], ctx.num_rows, is_known_one(grad_loss)

    def scale(grad_loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        table = ops.sum_rows(ids, rows, num_rows) if needed else rows
        if needed and not one:
            table = table * grad_loss
        return user_part * grad_loss, table, parameters * grad_loss, inner_lr * grad_loss

    return _at_places(ctx, META_STEP_INNER_LR, Once.apply("mlp_meta_step", scale, grad_loss, *inputs))


def register(namespace: str) -> None:
    """Gives the operators of a namespace their fake kernels, gradients and what they do under autocast."""
    register_fake(f"{namespace}::mlp_adapt_and_score", _fake_score)
    register_fake(f"{namespace}::mlp_adapt_and_score_backward", _fake_score_backward)
    register_fake(f"{namespace}::mlp_meta_step", _fake_meta_step)
    register_gradients(namespace, "mlp_adapt_and_score", _score_backward, save)
    register_autograd(
        f"{namespace}::mlp_adapt_and_score_backward", refuse("mlp_adapt_and_score cannot be differentiated twice")
    )
    register_gradients(namespace, "mlp_meta_step", _meta_step_backward, _meta_step_setup)
    _autocast.register(namespace, ("mlp_adapt_and_score", "mlp_adapt_and_score_backward", "mlp_meta_step"))


register("metarec_fast")
