"""What happens in `fit` around the gradient of a batch: learning rates, the optimisers' steps, the mean of the losses.

With small batches this is a good part of the time, since what it needs has left the processor's caches by then. So
nothing is done of which nobody knows: no profiler is told if there is none, and no message written that is not read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_WARM_UP = 50  # steps, or a tenth of all if that is less
_FINAL_RATE = 0.02  # of the outer learning rate, at the end of its decay

# What PyTorch has inside, as far as it is still there in a later version.
_inside = sys.modules[Optimizer.__module__]
_profiler_enabled: Callable[[], bool] = getattr(torch._C._autograd, "_profiler_enabled", lambda: True)
_wrap_step: Callable[..., Any] = getattr(Optimizer, "profile_hook_step", lambda step: step)
_TELLS_PROFILER = getattr(_wrap_step(lambda: None), "__code__", object())
"""The code of what it wraps the `step` of every class of optimisers in."""


class OuterSteps:
    """Steps of optimisers whose rates warm up and then decay, linearly both.

    Args:
        optimizers: Their rates are the highest ones.
        total: How many steps there are going to be.

    Attributes:
        done: Steps done.
    """

    def __init__(self, optimizers: Sequence[Optimizer], total: int) -> None:
        self.optimizers, self.total, self.done = optimizers, total, 0
        self.rates = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]

    def begin(self) -> None:
        """Forgets the gradients of the step before, and sets the rates."""
        factor = self._factor()
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            _forget_gradients(optimizer)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def end(self) -> None:
        """Moves the parameters along the gradients that they have by now."""
        for optimizer in self.optimizers:
            _step(optimizer)
        self.done += 1

    def _factor(self) -> float:
        warm_up = min(_WARM_UP, max(self.total // 10, 1))
        return min(1.0, (self.done + 1) / warm_up) * max(1 - self.done / self.total, _FINAL_RATE)


class Losses:
    """The mean loss of an epoch's tasks so far. A GPU's losses are read one step late, so that Python need not wait.

    Args:
        explain: What a loss that is no number means, in the step of that number.
    """

    def __init__(self, explain: Callable[[int], str]) -> None:
        self._explain = explain
        self._total, self._count = 0.0, 0
        self._unread: tuple[Tensor, int, int, Any] | None = None  # with the torch.cuda.Event of its arrival

    @property
    def mean(self) -> float:
        return self._total / max(self._count, 1)

    def add(self, loss: Tensor, num_tasks: int, step: int) -> None:
        """Raises FloatingPointError unless it is finite, now or when the next one is added."""
        if loss.device.type != "cuda":
            return self._read(loss, num_tasks, step)
        loss, event = loss.to("cpu", non_blocking=True), torch.cuda.current_stream(loss.device).record_event()
        self.read_all()
        self._unread = loss, num_tasks, step, event

    def read_all(self) -> None:
        if self._unread is not None:
            (loss, num_tasks, step, event), self._unread = self._unread, None
            event.synchronize()
            self._read(loss, num_tasks, step)

    def _read(self, loss: Tensor, num_tasks: int, step: int) -> None:
        value = float(loss)
        if not math.isfinite(value):
            raise FloatingPointError(f"the outer loss became {value} {self._explain(step)}")
        self._total, self._count = self._total + value * num_tasks, self._count + num_tasks


def _forget_gradients(optimizer: Optimizer) -> None:
    """As its `zero_grad`, which also tells a profiler of it."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        return optimizer.zero_grad()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _step(optimizer: Optimizer) -> None:
    """As its `step`, of which a profiler and hooks are told only if there are any."""
    step = getattr(optimizer.step, "__func__", None)
    known = getattr(step, "__code__", None) is _TELLS_PROFILER and "step" not in vars(optimizer)
    if step is None or not known or _profiler_enabled() or _has_hooks(optimizer):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)


def _has_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody listens to its steps, or, where PyTorch does not say, might."""
    places = (
        (optimizer, "_optimizer_step_pre_hooks"), (optimizer, "_optimizer_step_post_hooks"),
        (_inside, "_global_optimizer_pre_hooks"), (_inside, "_global_optimizer_post_hooks"),
    )  # fmt: skip
    return any(getattr(owner, hooks, True) for owner, hooks in places)
