"""Full adaptation by hand: item rows and biases of the support adapt too, and are never formed.

After k steps the rows are E_k = X − Σ_{j<k} g_j u_jᵀ (g with the step size), of rank k beside X, and their gradient
Σ_{j≥k} h_j u_jᵀ − g_j λ_{j+1}ᵀ is so too. So a step costs four products with X and small ones with what came before.
Squared loss, second order; items are distinct inside a task, so that no query item has adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations.blocks import Peer, Step, gathered_step
from benchmarks.implementations.hand_adjoint import (
    batched_times,
    batched_transposed_times,
    for_blocks,
    outer,
    times,
    transposed_times,
)
from benchmarks.implementations.losses import derivative, loss, second_derivative
from benchmarks.workloads import Problem, Workload

History = list[tuple[Tensor, Tensor]]  # Σ_j left_j right_jᵀ, [T, S] and [T, D] each


def history_times(history: History, vector: Tensor) -> Tensor | float:
    """Σ_j left_j (right_j · vector), [T, S]."""
    return sum((left * (right * vector).sum(-1, keepdim=True) for left, right in history), start=0.0)


def transposed_history_times(history: History, vector: Tensor) -> Tensor | float:
    """Σ_j right_j (left_j · vector), [T, D]."""
    return sum((right * (left * vector).sum(-1, keepdim=True) for left, right in history), start=0.0)


def adapted(work: Workload, fused: bool) -> Callable[..., Any]:
    """The inner loop: (user, user_bias, X, b, y, w) → (u_K, c_K, [(g_k, u_k)], curvatures, b_K)."""
    product, transposed = (times, transposed_times) if fused else (batched_times, batched_transposed_times)

    def run(user: Tensor, user_bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any) -> Any:
        u, c = user.expand(X.shape[0], -1), user_bias.expand(X.shape[0])
        steps: History = []
        curvatures = []
        for _ in range(work.steps):
            scores = product(X, u) + b + c.unsqueeze(-1) - history_times(steps, u)
            g = derivative(work.loss, scores, y) * (work.inner_lr * w)
            curvatures.append(second_derivative(work.loss, scores) * (-work.inner_lr * w))
            after = u - transposed(X, g) + transposed_history_times(steps, g)
            steps.append((g, u))
            u, c, b = after, c - g.sum(-1), b - g
        return u, c, steps, curvatures, b

    return run


def gradient_function(work: Workload, fused: bool) -> Callable[..., tuple]:
    """(user, user_bias, X, b, y, w, Xq, bq, yq, wq) → loss and the gradients of user, user bias, X, b, Xq, bq."""
    product, transposed = (times, transposed_times) if fused else (batched_times, batched_transposed_times)
    adapt = adapted(work, fused)

    def gradients(user: Tensor, user_bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any, *query: Any) -> tuple:
        Xq, bq, yq, wq = query
        u, c, steps, curvatures, _ = adapt(user, user_bias, X, b, y, w)
        share = wq / y.shape[0]
        scores = product(Xq, u) + bq + c.unsqueeze(-1)
        gq = derivative(work.loss, scores, yq) * share
        grad_u, grad_c, grad_b = transposed(Xq, gq), gq.sum(-1), torch.zeros_like(b)

        later: History = []  # of the gradient of the rows
        for k in reversed(range(work.steps)):
            g, at = steps[k]
            slope = product(X, grad_u) - history_times(steps[:k], grad_u) + history_times(later, at)
            h = (slope + grad_b + grad_c.unsqueeze(-1)) * curvatures[k]
            before = grad_u + transposed(X, h) - transposed_history_times(steps[:k], h)
            before = before - transposed_history_times(later, g)
            later += [(h, at), (-g, grad_u)]
            grad_u, grad_c, grad_b = before, grad_c + h.sum(-1), grad_b + h
        if fused:
            grad_X = sum(outer(left, right) for left, right in later)
        else:
            lefts, rights = zip(*later, strict=True)
            grad_X = torch.bmm(torch.stack(lefts, -1), torch.stack(rights, -2))
        value = (loss(work.loss, scores, yq) * share).sum()
        return value, grad_u.sum(0), grad_c.sum(), grad_X, grad_b, outer(gq, u), gq

    return gradients


def _prepare(compiled: bool) -> Callable[[Problem], Step]:
    def prepare(problem: Problem) -> Step:
        function = gradient_function(problem.workload, fused=compiled)
        if compiled:
            function = torch.compile(function, dynamic=False)
        return gathered_step(problem, for_blocks(problem.workload, function))

    return prepare


def _supports(work: Workload) -> bool:
    return work.kind == "gradient" and work.adapt == "all" and work.loss == "squared" and not work.first_order


PEERS = (
    Peer("hand adjoint", _prepare(False), lambda work: "quick" if _supports(work) else None),
    Peer(
        "hand adjoint, compiled",
        _prepare(True),
        lambda work: "normal" if _supports(work) and work.steps <= 8 else None,
        compiles=True,
    ),
)
