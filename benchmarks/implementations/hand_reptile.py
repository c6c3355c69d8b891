"""Reptile by hand in batched tensor operations: where tasks end up less where they started, averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations.blocks import Blocks, Outputs, Peer, Step
from benchmarks.implementations.hand_adjoint import (
    batched_times,
    batched_transposed_times,
    outer,
    times,
    transposed_times,
)
from benchmarks.implementations.hand_adjoint_full import adapted, history_times
from benchmarks.implementations.losses import derivative, loss
from benchmarks.workloads import Problem, Workload


def user_function(work: Workload, fused: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(user, user_bias, X, b, y, w) → support loss after adaptation, moves of user and user bias."""
    product, transposed = (times, transposed_times) if fused else (batched_times, batched_transposed_times)

    def moves(user: Tensor, user_bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any) -> tuple[Tensor, ...]:
        u, c = user.expand(X.shape[0], -1), user_bias.expand(X.shape[0])
        for _ in range(work.steps):
            g = derivative(work.loss, product(X, u) + b + c.unsqueeze(-1), y) * (work.inner_lr * w)
            u, c = u - transposed(X, g), c - g.sum(-1)
        value = (loss(work.loss, product(X, u) + b + c.unsqueeze(-1), y) * (w / X.shape[0])).sum()
        return value, user - u.mean(0), user_bias - c.mean()

    return moves


def all_function(work: Workload, fused: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(user, user_bias, X, b, y, w, share) → the same and the moves of rows and biases, `share` [T, S] of each."""
    product = times if fused else batched_times
    adapt = adapted(work, fused)

    def moves(user: Tensor, user_bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any, share: Tensor) -> Any:
        u, c, steps, _, b_after = adapt(user, user_bias, X, b, y, w)
        scores = product(X, u) + b_after + c.unsqueeze(-1) - history_times(steps, u)
        value = (loss(work.loss, scores, y) * (w / X.shape[0])).sum()
        if fused:
            rows = sum(outer(g * share, at) for g, at in steps)
        else:
            lefts, rights = zip(*steps, strict=True)
            rows = torch.bmm(torch.stack(lefts, -1) * share.unsqueeze(-1), torch.stack(rights, -2))
        return value, user - u.mean(0), user_bias - c.mean(), rows, (b - b_after) * share

    return moves


def _prepare(compiled: bool) -> Callable[[Problem], Step]:
    def prepare(problem: Problem) -> Step:
        work, blocks = problem.workload, Blocks.of(problem.batch)
        known = blocks.support
        function = (user_function if work.adapt == "user" else all_function)(work, fused=compiled)
        if compiled:
            function = torch.compile(function, dynamic=False)
        # An item moves by the mean over the tasks that hold it; how many they are is known beforehand, for free.
        _, place, counts = torch.unique(known.items, return_inverse=True, return_counts=True)
        share = (1 / counts.to(problem.user))[place]

        @torch.no_grad()
        def step() -> Outputs:
            (X,), (b,) = blocks.gather(problem.item_table, problem.item_bias)
            fixed = (problem.user, problem.user_bias, X, b, known.targets, known.weights)
            if work.adapt == "user":
                loss_, user, user_bias = function(*fixed)
                return {"loss": loss_, "user_init": user, "user_bias_init": user_bias}
            return blocks.named(*(part if i < 3 else [part] for i, part in enumerate(function(*fixed, share))))

        return step

    return prepare


def _effort(work: Workload) -> str | None:
    return "quick" if work.kind == "reptile" else None


PEERS = (
    Peer("hand-written", _prepare(False), _effort),
    Peer(
        "hand-written, compiled",
        _prepare(True),
        lambda work: "normal" if work.kind == "reptile" else None,
        compiles=True,
    ),
)
