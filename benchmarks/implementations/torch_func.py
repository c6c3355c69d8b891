"""torch.func: grad of the mean of vmap of a task's loss after its inner loop; eager, and compiled on gathered rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.implementations.blocks import Blocks, Gradients, Peer, Step, gathered_step
from benchmarks.implementations.losses import loss
from benchmarks.workloads import Problem, Workload


def make(work: Workload, compiled: bool = False) -> Gradients:
    """The gradient of everything with respect to the user, its bias, and all rows and biases."""
    pairs = work.loss == "bpr"

    def scores(user: Tensor, bias: Tensor, rows: list[Tensor], biases: list[Tensor]) -> Tensor:
        if pairs:
            return (rows[0] - rows[1]) @ user + biases[0] - biases[1]
        return rows[0] @ user + biases[0] + bias

    def task_loss(user, bias, rows, biases, known, weights, asked, query_weights) -> Tensor:
        count = len(rows) // 2

        def inner_loss(fast: Any) -> Tensor:
            return (loss(work.loss, scores(*fast), known) * weights).sum()

        fast = (user, bias, rows[:count], biases[:count])
        for _ in range(work.steps):
            step = grad(inner_loss)(fast)
            fast = descend(fast, step) if work.adapt == "all" else (*descend(fast[:2], step[:2]), *fast[2:])
        return (loss(work.loss, scores(*fast[:2], rows[count:], biases[count:]), asked) * query_weights).sum()

    def descend(values: Any, slopes: Any) -> Any:
        if isinstance(values, Tensor):
            return values - work.inner_lr * slopes
        return type(values)(descend(value, slope) for value, slope in zip(values, slopes, strict=True))

    def mean_loss(user, bias, rows, biases, known, weights, asked, query_weights):
        dims = (None, None, 0, 0, 0, 0 if isinstance(weights, Tensor) else None, 0, None)
        losses = vmap(task_loss, in_dims=dims)(user, bias, rows, biases, known, weights, asked, query_weights)
        value = losses.mean()
        return value, value

    gradient = grad(mean_loss, argnums=(0, 1, 2, 3), has_aux=True)
    if compiled:
        gradient = torch.compile(gradient, dynamic=False)

    def gradients(user: Tensor, bias: Tensor, rows: list[Tensor], biases: list[Tensor], blocks: Blocks) -> tuple:
        known, asked = blocks.support, blocks.query
        assert asked is not None
        grads, value = gradient(user, bias, rows, biases, known.targets, known.weights, asked.targets, asked.weights)
        return value, *grads

    return gradients


def _prepare(compiled: bool) -> Callable[[Problem], Step]:
    return lambda problem: gathered_step(problem, make(problem.workload, compiled))


def supports(work: Workload) -> bool:
    """Not first order: `detach` inside a transform would also cut what the outer gradient needs."""
    return work.kind == "gradient" and not work.first_order


def _effort(work: Workload) -> str | None:
    if not supports(work):
        return None
    return "quick" if work.num_tasks <= 1024 and work.steps <= 10 else "normal"


def _effort_compiled(work: Workload) -> str | None:
    if not supports(work):
        return None
    return "normal" if work.steps <= 5 and work.group not in ("tasks", "items") else "all"


PEERS = (
    Peer("torch.func", _prepare(False), _effort),
    Peer("torch.func, compiled", _prepare(True), _effort_compiled, compiles=True),
)
