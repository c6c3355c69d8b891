"""The usual call of an operator, whose arguments nobody looks at but the operator itself.

To look at every argument, so that whatever is wrong is said by its name, takes longer than a small batch does, and on
the CPU the operators refuse by themselves what does not fit. So where nothing is out of the ordinary they are called
at once, and arguments are looked at one by one only if they refuse. What they would not refuse is looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from metarec_fast import _library
from metarec_fast._arguments import PAIRWISE, InnerLoop, Model, Number, Settings, kept_scalar
from metarec_fast.tasks import Entries, TaskBatch

Result = TypeVar("Result")

_PLAIN = (Tensor, Parameter)


def attempt(
    run: Callable[[Model, InnerLoop], Result],
    start: tuple[Tensor, Number | None, Tensor, Tensor, Number],
    support: Entries,
    settings: Settings,
    judged: TaskBatch | None = None,
    losses: Iterable[str] = (),
) -> Result | None:
    """What an operator gives, or None where anything has to be looked at more closely.

    Args:
        run: Calls the operator.
        start: user_init, user_bias_init, item_table, item_bias and offset.
        support: The entries to adapt on.
        settings: How tasks are to adapt.
        judged: The batch whose query is judged.
        losses: By which.
    """
    if torch.compiler.is_compiling() or not _library.cpu.loaded or getattr(forward_ad, "_current_level", 0) >= 0:
        return None
    try:
        taken = _take(start, support, settings)
        if taken is None or not (judged is None or _is_judged_by(judged, losses, taken[0].item_bias)):
            return None
        return run(*taken)
    except Exception:  # whoever looks closely finds out what it is, and says it by name
        return None


def _take(
    start: tuple[Tensor, Number | None, Tensor, Tensor, Number], support: Entries, settings: Settings
) -> tuple[Model, InnerLoop] | None:
    user_init, user_bias_init, item_table, item_bias, offset = start
    inner_lr, steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt = settings
    if not (type(item_table) in _PLAIN and type(item_bias) in _PLAIN and item_table.is_cpu):
        return None
    if not (_has_just_what(support, item_bias, (loss,)) and (type(steps) is int or steps == "exact")):
        return None
    if not (momentum is None or isinstance(momentum, Tensor)):
        return None
    pull = prior_pull if isinstance(prior_pull, Tensor) else None
    if pull is None and prior_pull != 0:
        return None
    dtype = item_bias.dtype
    bias = kept_scalar(0.0 if user_bias_init is None else user_bias_init, dtype)
    model = Model(user_init, bias, item_table, item_bias, kept_scalar(offset, dtype))
    rate = kept_scalar(inner_lr, dtype)
    return model, InnerLoop(rate, steps, preconditioner, pull, momentum, extra_count, loss, first_order, adapt)


def _is_judged_by(batch: TaskBatch, losses: Iterable[str], item_bias: Tensor) -> bool:
    """Whether the batch's query has just what the losses look at, and its weights are as they should be."""
    query = batch.query
    if query is None or not _has_just_what(query, item_bias, losses):
        return False
    if query.weights is not None and query.weights.requires_grad:
        return False
    weights = batch.weights
    return weights is None or (weights.dtype is item_bias.dtype and not weights.requires_grad)


def _has_just_what(entries: Entries, item_bias: Tensor, losses: Iterable[str]) -> bool:
    """Whether entries have just what the losses look at, of known items, of everyone's dtype, without gradients."""
    if type(entries) is not Entries or entries.log_q is not None or entries.max_item >= len(item_bias):
        return False
    targets, weights = entries.targets, entries.weights
    for loss in losses:
        pairwise = loss in PAIRWISE
        if pairwise == (entries.negatives is None) or (targets is None and not pairwise):
            return False
    if weights is not None and weights.dtype is not item_bias.dtype:
        return False
    return targets is None or (targets.dtype is item_bias.dtype and not targets.requires_grad)
