"""Towers for exercise.py: every shape, loss and rate that the kernels of an MLP tower know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from problems import Draw
from towers import draw_loop, draw_tower, leaves_of

from metarec_fast import _mlp_ops
from metarec_fast._mlp_arguments import Tower, TowerLoop
from metarec_fast.tasks import TaskBatch

MIXTURE = {"squared": 0.5, "logistic": 0.25, "absolute": 0.25}


def adapting_towers(dtype: torch.dtype, dim: int, sizes: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Supports of more than twice an input's width have a first layer of their own; for narrow rows there is one."""
    for name, tower, batch, loop in _problems(dtype, dim, sizes):
        outer = {loop.loss: 1.0} if batch.support.negatives is not None else MIXTURE
        yield f"mlp_meta_step, {name}", lambda t=tower, b=batch, l=loop, o=outer: _mlp_ops.meta_step(t, b, l, o)
        yield f"mlp_adapt_and_score, {name}", lambda t=tower, b=batch, l=loop: differentiated(t, b, l)


def _problems(
    dtype: torch.dtype, dim: int, sizes: tuple[int, ...]
) -> Iterator[tuple[str, Tower, TaskBatch, TowerLoop]]:
    draw = Draw(dim, dtype)

    def tower(hidden: tuple[int, ...] = (9, 5), num_tasks: int = len(sizes), **settings: Any) -> Tower:
        return draw_tower(draw, hidden, dim=dim, num_tasks=num_tasks, **settings)

    def loop(steps: int = 2, **settings: Any) -> TowerLoop:
        slow = {"inner_lr": (0.01 + 0.02 * draw.uniform(steps)) / dim**0.5}  # so that nothing grows
        return draw_loop(draw, steps, **{**slow, **settings})

    query = tuple((3, 0, 2, 7, 4)[t % 5] for t in range(len(sizes)))
    yield "plain", tower(), draw.batch(sizes, query), loop()
    if len(sizes) == 3:
        return
    yield "gelu", tower(activation="gelu"), draw.batch(sizes, weights=True), loop(loss="logistic")
    yield "first order", tower(), draw.batch(sizes), loop(first_order=True)
    yield "one layer", tower(()), draw.batch(sizes), loop(inner_lr=0.01 * draw.uniform())
    yield "several tiles", tower((70, 33), user_width=0), draw.batch(sizes, (4, 35, 0, 7, 1, 0)), loop(1)
    rates = {"inner_lr": 0.01 * draw.uniform(2, 6)}
    yield "rates of tensors", tower(activation="gelu"), draw.batch(sizes), loop(**rates)
    for loss in ("bpr", "softmax"):
        pairs = draw.batch(sizes, negatives=2, log_q=loss == "softmax", weights=True)
        yield loss, replace(tower(), item_bias=draw.normal(60)), pairs, loop(loss=loss)
    yield "no step", tower(), draw.batch(sizes), loop(0)
    yield "many tasks", tower(num_tasks=16), draw.batch(sizes[:2] * 8), loop()


def differentiated(tower: Tower, batch: TaskBatch, loop: TowerLoop) -> list[torch.Tensor]:
    """The scores, and gradients of a sum of them with random factors."""
    leaves, tower, loop = leaves_of(tower, loop)
    scores = _mlp_ops.adapt_and_score(tower, batch, loop)
    factors = Draw(99, scores.dtype).normal(*scores.shape)
    gradients = torch.autograd.grad(scores, leaves, factors, allow_unused=True, materialize_grads=True)
    return [scores.detach(), *gradients]
