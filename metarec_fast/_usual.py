"""The usual call of an operator, whose arguments nobody looks at but the operator itself.

To look at every argument, so that whatever is wrong is said by its name, takes longer than a small batch does, and on
the CPU the operators refuse by themselves what does not fit. So where nothing is out of the ordinary they are called
at once, and arguments are looked at one by one only if they refuse. What they would not refuse is looked at here.

All of this runs between two batches, when what it needs has left the processor's nearest caches: here a microsecond is
won by every call that is not made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from metarec_fast import _library, _ops
from metarec_fast._arguments import PAIRWISE, WANT_ALL, Settings, Start, check_outer_loss, kept_scalar
from metarec_fast.results import FastWeights, MetaStep
from metarec_fast.tasks import Entries, TaskBatch

Result = TypeVar("Result")

_PLAIN = (Tensor, Parameter)


class Unusual(Exception):
    """An argument has to be looked at more closely."""


def attempt(call: Callable[..., Result], *args: Any) -> Result | None:
    """What one of the calls below gives, or None where arguments have to be looked at more closely."""
    if torch.compiler.is_compiling() or not _library.cpu.loaded or getattr(forward_ad, "_current_level", 0) >= 0:
        return None
    try:
        return call(*args)
    except Exception:  # whoever looks closely finds out what it is, and says it by name
        return None


def adapt(start: Start, settings: Settings, support: Entries) -> FastWeights:
    model, loop = _take(start, settings, support)
    name = "adapt_all" if settings[-1] == "all" else "adapt"
    return _ops.adapted(_run(name, model, loop, support, (*_ops.inputs(model, support), *loop)))


def meta_step(start: Start, settings: Settings, batch: TaskBatch, outer_loss: str | Mapping[str, float]) -> MetaStep:
    support, query = batch.support, batch.query
    model, loop = _take(start, settings, support)
    item_bias = model[3]
    if query is None:
        raise Unusual
    key = outer_loss if type(outer_loss) is str else _items(outer_loss)
    text, kind = _outer_losses.get(key) or _outer(key, outer_loss)
    _look_at(query, kind, item_bias)
    for weights in (query.weights, batch.weights):
        if weights is not None and (weights.dtype is not item_bias.dtype or weights.requires_grad):
            raise Unusual
    args = (
        *_ops.inputs(model, support), *_ops.judged_query(batch), *loop, text, None,
        WANT_ALL,
    )  # fmt: skip
    return _ops.stepped(_run("meta_step", model, loop, support, args))


def reptile_step(start: Start, settings: Settings, support: Entries) -> MetaStep:
    model, loop = _take(start, settings, support)
    args = (*_ops.inputs(model, support), None, *loop)
    return _ops.moved(_ops.call_eagerly("reptile_step", (), args), support)


def _run(name: str, model: tuple[Tensor, ...], loop: tuple[Any, ...], support: Entries, args: tuple[Any, ...]) -> Any:
    return _ops.call_eagerly(name, (*model, *loop[:4], support.weights), args)


def _take(start: Start, settings: Settings, support: Entries) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The meta-parameters and the inner loop as the operators take them."""
    user_init, user_bias_init, item_table, item_bias, offset = start
    steps, loss = settings[1], settings[6]
    if not (type(item_table) in _PLAIN and type(item_bias) in _PLAIN and item_table.is_cpu):
        raise Unusual
    if type(steps) not in (int, str):  # True and 1.0 would be found where 1 is kept
        raise Unusual
    _look_at(support, loss, item_bias)
    dtype = item_bias.dtype
    if support.weights is not None and support.weights.dtype is not dtype:
        raise Unusual
    bias = kept_scalar(0.0 if user_bias_init is None else user_bias_init, dtype)
    model = user_init, bias, item_table, item_bias, kept_scalar(offset, dtype)
    return model, _loops.get((settings, dtype)) or _loop(settings, dtype)


_loops: dict[tuple[Settings, torch.dtype], tuple[Any, ...]] = {}
_MOST_LOOPS = 1000


def _loop(settings: Settings, dtype: torch.dtype) -> tuple[Any, ...]:
    """The inner loop as the operators take it, which is kept unless there are tensors in it."""
    inner_lr, steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt = settings
    if not (isinstance(steps, int) or steps == "exact") or type(extra_count) not in (int, float):
        raise Unusual
    if not (momentum is None or isinstance(momentum, Tensor)):
        raise Unusual
    pull = prior_pull if isinstance(prior_pull, Tensor) else None
    if pull is None and prior_pull != 0:
        raise Unusual
    count = _ops.EXACT if steps == "exact" else steps
    rate = kept_scalar(inner_lr, dtype)
    loop = (
        rate, preconditioner, pull, momentum, float(extra_count), count, loss,
        bool(first_order), "auto", adapt,
    )  # fmt: skip
    if type(rate) is Tensor and not any(isinstance(setting, Tensor) for setting in settings):  # and no fake one
        if len(_loops) >= _MOST_LOOPS:
            _loops.clear()
        _loops[settings, dtype] = loop
    return loop


_outer_losses: dict[Any, tuple[str, str]] = {}


def _items(outer_loss: Any) -> tuple[tuple[str, float], ...]:
    """What tells a mixture of losses from others."""
    if type(outer_loss) is not dict:
        raise Unusual
    return tuple(outer_loss.items())


def _outer(key: Any, outer_loss: str | Mapping[str, float]) -> tuple[str, str]:
    """Outer losses as the operator takes them, which is kept, and one of them that looks at the same of a query."""
    losses = check_outer_loss(outer_loss)
    numbers = all(type(weight) in (int, float) for weight in losses.values())
    if not numbers or len({name in PAIRWISE for name in losses}) != 1:
        raise Unusual
    if len(_outer_losses) >= _MOST_LOOPS:
        _outer_losses.clear()
    _outer_losses[key] = kept = _ops.outer_text(losses), next(iter(losses))
    return kept


def _look_at(entries: Entries, loss: str, item_bias: Tensor) -> None:
    """Raises unless entries have just what the loss looks at, of known items, of everyone's dtype."""
    targets = entries.targets
    if type(entries) is not Entries or entries.log_q is not None or entries.max_item >= item_bias.numel():
        raise Unusual
    if (entries.negatives is None) == (loss in PAIRWISE):
        raise Unusual
    if targets is None:
        if loss not in PAIRWISE:
            raise Unusual
    elif targets.dtype is not item_bias.dtype or targets.requires_grad:
        raise Unusual
