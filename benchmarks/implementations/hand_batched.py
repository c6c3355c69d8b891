"""All tasks at once: the inner gradient written out with einsum, the outer one left to autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.implementations.blocks import Blocks, Gradients, Peer, Step, gathered_step
from benchmarks.implementations.losses import derivative, loss
from benchmarks.workloads import Problem, Workload


def make(work: Workload) -> Gradients:
    pairs, everything = work.loss == "bpr", work.adapt == "all"

    def scores(users: Tensor, user_biases: Tensor, rows: Tensor, biases: Tensor) -> Tensor:
        products = torch.einsum("tsd,td->ts", rows, users) + biases
        return products if pairs else products + user_biases[:, None]

    def mean_loss(user: Tensor, user_bias: Tensor, rows: list[Tensor], biases: list[Tensor], blocks: Blocks) -> Tensor:
        known, asked = blocks.support, blocks.query
        assert asked is not None
        count = len(rows) // 2
        X, b = (rows[0] - rows[1], biases[0] - biases[1]) if pairs else (rows[0], biases[0])
        Xq, bq = (rows[2] - rows[3], biases[2] - biases[3]) if pairs else (rows[count], biases[count])

        users, user_biases = user.expand(X.shape[0], -1), user_bias.expand(X.shape[0])
        for _ in range(work.steps):
            g = derivative(work.loss, scores(users, user_biases, X, b), known.targets) * known.weights
            if work.first_order:
                g = g.detach()
            slope = torch.einsum("tsd,ts->td", X.detach() if work.first_order else X, g)
            if everything:
                X, b = X - work.inner_lr * torch.einsum("ts,td->tsd", g, users), b - work.inner_lr * g
            users, user_biases = users - work.inner_lr * slope, user_biases - work.inner_lr * g.sum(1)
        after = scores(users, user_biases, Xq, bq)
        return (loss(work.loss, after, asked.targets) * asked.weights).sum() / X.shape[0]

    def gradients(user: Tensor, user_bias: Tensor, rows: list[Tensor], biases: list[Tensor], blocks: Blocks) -> tuple:
        leaves = [each.detach().requires_grad_() for each in (user, user_bias, *rows, *biases)]
        count = len(rows)
        value = mean_loss(leaves[0], leaves[1], leaves[2 : 2 + count], leaves[2 + count :], blocks)
        # BPR does not depend on the user bias; first order not on the support rows.
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        user_bias_grad = torch.zeros_like(user_bias) if grads[1] is None else grads[1]
        return value.detach(), grads[0], user_bias_grad, grads[2 : 2 + count], grads[2 + count :]

    return gradients


def _prepare(problem: Problem) -> Step:
    return gathered_step(problem, make(problem.workload))


def _effort(work: Workload) -> str | None:
    return "quick" if work.kind == "gradient" else None


PEERS = (Peer("hand-batched autograd", _prepare, _effort),)
