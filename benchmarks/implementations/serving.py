"""Serving: adapt one new user to the closed-form solution, then the ten best of all items, those rated left out.

(λ I + (X Xᵀ + 1)) a = y − p0,   u = u_0 + Xᵀ a,   c = c_0 + Σ a,   λ = ρ S / 2
"""

from __future__ import annotations

import torch

from benchmarks.implementations.blocks import Outputs, Peer, Step
from benchmarks.workloads import Problem, Workload
from metarec_fast import functional as F

K_BEST = 10


def ours(problem: Problem) -> Step:
    support = problem.batch.support

    def step() -> Outputs:
        fast = F.adapt(
            problem.user,
            problem.item_table,
            problem.item_bias,
            support,
            user_bias_init=problem.user_bias,
            inner_steps="exact",
            prior_pull=problem.workload.prior_pull,
        )
        best = F.score_top_k(fast.user, fast.bias, problem.item_table, problem.item_bias, K_BEST, exclude=support)
        return {"items": best.items[0], "scores": best.scores[0]}

    return step


def with_torch(problem: Problem) -> Step:
    """Gather, solve, one product with the table, top k."""
    support, ridge = problem.batch.support, problem.workload.prior_pull * len(problem.batch.support) / 2
    assert support.targets is not None
    targets = support.targets

    @torch.no_grad()
    def step() -> Outputs:
        X = problem.item_table.index_select(0, support.items)  # [S, D]
        system = torch.addmm(X.new_ones(()), X, X.T)
        system.diagonal().add_(ridge)
        residual = targets - problem.item_bias.index_select(0, support.items) - X @ problem.user - problem.user_bias
        a = torch.linalg.solve(system, residual)
        user, bias = torch.addmv(problem.user, X.T, a), problem.user_bias + a.sum()
        scores = torch.addmv(problem.item_bias, problem.item_table, user)  # [N]
        scores[support.items] = float("-inf")
        best = scores.topk(K_BEST)
        return {"items": best.indices, "scores": best.values + bias}

    return step


def _effort(work: Workload) -> str | None:
    return "quick" if work.kind == "serve" else None


PEERS = (Peer("metarec_fast", ours, _effort), Peer("torch: solve, matmul, topk", with_torch, _effort))
