"""The adjoint of the inner loop written by hand in batched tensor operations: the peer to beat.

User side, squared and BPR losses, second and first order, in two forms that give the same numbers:

    direct   u in D-space, each step two products with the rows [S, D]; the adjoint runs the steps backwards
    Gram     G = X Xᵀ once, then each step costs S²; the adjoint in the same space

`torch.compile` fuses the steps of the direct form, written as products and sums, best; eager, the Gram form needs the
fewest passes over the rows. Gathering the rows stays outside what is compiled: inside, they are gathered again for
every fused loop that needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations.blocks import Blocks, Gradients, Peer, Step, gathered_step
from benchmarks.implementations.losses import derivative, loss, second_derivative
from benchmarks.workloads import Problem, Workload

MOST_FUSED_STEPS = 8  # more of them in one fused loop make the compiler slow, and the code no faster


def times(rows: Tensor, vector: Tensor) -> Tensor:
    """[T, S, D] · [T, D] → [T, S], as a sum that a compiler fuses with what is before and after."""
    return (rows * vector.unsqueeze(-2)).sum(-1)


def transposed_times(rows: Tensor, vector: Tensor) -> Tensor:
    """[T, S, D]ᵀ · [T, S] → [T, D]."""
    return (rows * vector.unsqueeze(-1)).sum(-2)


def batched_times(rows: Tensor, vector: Tensor) -> Tensor:
    """The same as `times`, by the batched product of the BLAS: best without a compiler."""
    return torch.bmm(rows, vector.unsqueeze(-1)).squeeze(-1)


def batched_transposed_times(rows: Tensor, vector: Tensor) -> Tensor:
    return torch.bmm(vector.unsqueeze(-2), rows).squeeze(-2)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """[T, S], [T, D] → [T, S, D]."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def gradient_function(work: Workload, form: str, fused: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(user, user_bias, X, b, y, w, Xq, bq, yq, wq) → loss and the gradients of user, user bias, X, b, Xq, bq.

    X is [T, S, D] (for BPR the differences of two rows, for which the user bias does not count), w is 1/S.
    """
    product, transposed = (times, transposed_times) if fused else (batched_times, batched_transposed_times)
    lr, steps, name, moves = work.inner_lr, work.steps, work.loss, work.loss != "bpr"

    def query_side(user: Tensor, bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any) -> tuple[Tensor, ...]:
        """Loss, then the gradients of the adapted user vectors and biases, of the query's rows and biases."""
        share = w / y.shape[0]
        scores = product(X, user) + b + (bias.unsqueeze(-1) if moves else 0)
        g = derivative(name, scores, y) * share
        return (loss(name, scores, y) * share).sum(), transposed(X, g), g.sum(-1), outer(g, user), g

    def direct(user: Tensor, user_bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any, *query: Any) -> tuple:
        u, c = user.expand(X.shape[0], -1), user_bias.expand(X.shape[0])
        users, slopes, curvatures = [], [], []
        for _ in range(steps):
            scores = product(X, u) + b + (c.unsqueeze(-1) if moves else 0)
            g = derivative(name, scores, y) * (lr * w)
            users.append(u)
            slopes.append(g)
            curvatures.append(second_derivative(name, scores) * (-lr * w))
            u, c = u - transposed(X, g), c - g.sum(-1)

        value, grad_u, grad_c, grad_Xq, grad_bq = query_side(u, c, *query)
        if work.first_order:
            return value, grad_u.sum(0), grad_c.sum() if moves else grad_c.new_zeros(()), None, None, grad_Xq, grad_bq
        lefts, rights, grad_b = [], [], 0
        for k in reversed(range(steps)):
            h = (product(X, grad_u) + (grad_c.unsqueeze(-1) if moves else 0)) * curvatures[k]
            lefts += [h, -slopes[k]]
            rights += [users[k], grad_u]
            grad_b = grad_b + h
            grad_u, grad_c = grad_u + transposed(X, h), grad_c + h.sum(-1)
        if fused and steps <= MOST_FUSED_STEPS:
            grad_X = sum(outer(left, right) for left, right in zip(lefts, rights, strict=True))
        else:
            grad_X = torch.bmm(torch.stack(lefts, -1), torch.stack(rights, -2))
        grad_bias = grad_c.sum() if moves else grad_c.new_zeros(())
        return value, grad_u.sum(0), grad_bias, grad_X, grad_b, grad_Xq, grad_bq

    def gram(user: Tensor, user_bias: Tensor, X: Tensor, b: Tensor, y: Tensor, w: Any, *query: Any) -> tuple:
        G = torch.bmm(X, X.transpose(1, 2))
        if moves:
            G.add_(1)
        first = X @ user + b + (user_bias if moves else 0)
        scores, a = first, torch.zeros_like(first)
        coefficients, curvatures = [], []
        for k in range(steps):
            if k:
                scores = first + product(G, a)
            coefficients.append(a)
            curvatures.append(second_derivative(name, scores) * (-lr * w))
            a = a - derivative(name, scores, y) * (lr * w)

        u, c = user + transposed(X, a), user_bias + a.sum(-1)
        value, grad_u, grad_c, grad_Xq, grad_bq = query_side(u, c, *query)
        if work.first_order:
            return value, grad_u.sum(0), grad_c.sum() if moves else grad_c.new_zeros(()), None, None, grad_Xq, grad_bq
        grad_a = product(X, grad_u) + (grad_c.unsqueeze(-1) if moves else 0)
        hs = []
        for k in reversed(range(steps)):
            h = grad_a * curvatures[k]
            hs.append(h)
            if k:
                grad_a = grad_a + product(G, h)
        grad_b = sum(hs[1:], hs[0])
        grad_X = torch.addcmul(outer(a, grad_u), grad_b.unsqueeze(-1), user)
        if steps > 1:  # a_0 is 0
            grad_G = torch.bmm(torch.stack(hs[:-1], -1), torch.stack(coefficients[:0:-1], -2))
            grad_X = grad_X.baddbmm_(grad_G + grad_G.transpose(1, 2), X)
        grad_user = grad_u.sum(0) + X.reshape(-1, X.shape[-1]).T @ grad_b.reshape(-1)
        grad_bias = grad_c.sum() + grad_b.sum() if moves else grad_c.new_zeros(())
        return value, grad_user, grad_bias, grad_X, grad_b, grad_Xq, grad_bq

    return direct if form == "direct" else gram


def pairs_function(inner: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The same for BPR, given both rows of every pair."""

    def gradients(user: Tensor, user_bias: Tensor, X: Any, b: Any, y: Tensor, w: Any, Xq: Any, bq: Any, *query: Any):
        value, grad_user, grad_bias, *grads = inner(
            user, user_bias, X[0] - X[1], b[0] - b[1], y, w, Xq[0] - Xq[1], bq[0] - bq[1], *query
        )
        return value, grad_user, grad_bias, *(part if part is None else (part, -part) for part in grads)

    return gradients


def for_blocks(work: Workload, function: Callable[..., tuple]) -> Gradients:
    """The function on rows and biases in blocks, those of BPR two by two."""

    @torch.no_grad()
    def gradients(user: Tensor, user_bias: Tensor, rows: list[Tensor], biases: list[Tensor], blocks: Blocks) -> tuple:
        known, asked = blocks.support, blocks.query
        assert asked is not None
        if work.loss == "bpr":
            X, b, Xq, bq = rows[:2], biases[:2], rows[2:], biases[2:]
        else:
            (X, Xq), (b, bq) = rows, biases
        value, grad_user, grad_bias, *grads = function(
            user, user_bias, X, b, known.targets, known.weights, Xq, bq, asked.targets, asked.weights
        )
        if work.loss == "bpr":
            grads = [(None, None) if pair is None else pair for pair in grads]
            return value, grad_user, grad_bias, [*grads[0], *grads[2]], [*grads[1], *grads[3]]
        return value, grad_user, grad_bias, grads[::2], grads[1::2]

    return gradients


def make(work: Workload, form: str, compiled: bool) -> Gradients:
    function = gradient_function(work, form, fused=compiled)
    if work.loss == "bpr":
        function = pairs_function(function)
    return for_blocks(work, torch.compile(function, dynamic=False) if compiled else function)


def _prepare(form: str, compiled: bool) -> Callable[[Problem], Step]:
    return lambda problem: gathered_step(problem, make(problem.workload, form, compiled))


def _supports(work: Workload) -> bool:
    return work.kind == "gradient" and work.adapt == "user"


def _effort(work: Workload) -> str | None:
    return "quick" if _supports(work) else None


def _effort_direct(work: Workload) -> str | None:
    if not _supports(work) or work.steps > MOST_FUSED_STEPS:
        return None  # the Gram form costs almost nothing a step, and compiles faster
    return "quick" if work.name == "user" else "normal"


def _effort_gram(work: Workload) -> str | None:
    if not _supports(work):
        return None
    return "normal" if work.steps <= 10 else "all"


PEERS = (
    Peer("hand adjoint", _prepare("gram", False), _effort),
    Peer("hand adjoint, direct form, compiled", _prepare("direct", True), _effort_direct, compiles=True),
    Peer("hand adjoint, Gram form, compiled", _prepare("gram", True), _effort_gram, compiles=True),
)
