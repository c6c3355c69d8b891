"""A whole training step: sample a batch of tasks, meta-gradient, Adam on the touched rows of the item table.

Everybody samples with our `TaskSampler`, in the step (for a GPU two batches ahead), and moves the user's start by plain
SGD, which costs nothing. They differ in the gradient, and in who updates the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

import metarec_fast as mf
from benchmarks.implementations import hand_adjoint
from benchmarks.implementations.blocks import Blocks, Outputs, Peer, Step
from benchmarks.workloads import Problem, Workload
from metarec_fast import functional as F

OUTER_LR = 1e-3
RATINGS_PER_USER = 40


@cache
def log_of(num_items: int, num_tasks: int) -> mf.Interactions:
    """Users with 40 ratings each, so that all items are rated equally often; at least four batches of users."""
    users_of_all = num_items // RATINGS_PER_USER
    rounds = max(1, -(-4 * num_tasks // users_of_all))
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(num_items)[: users_of_all * RATINGS_PER_USER] for _ in range(rounds)])
    users = np.repeat(np.arange(users_of_all * rounds), RATINGS_PER_USER)
    return mf.Interactions.from_arrays(users, items, 1 + 4 * rng.random(len(items), dtype=np.float32))


def _batches(work: Workload, device: torch.device) -> Iterator[mf.TaskBatch]:
    assert isinstance(work.support, int)
    log, prefetch = log_of(work.num_items, work.num_tasks), 0 if device.type == "cpu" else 2
    sampler = mf.TaskSampler(
        log, work.support, work.query, work.num_tasks, drop_last=True, prefetch=prefetch, device=device
    )
    while True:
        yield from sampler


def _prepare(
    gradient: Callable[[Problem], Callable[[mf.TaskBatch, Tensor, Tensor, Tensor], tuple[Tensor, ...]]],
    optimizer: type[torch.optim.Optimizer],
) -> Callable[[Problem], Step]:
    """`gradient(problem)` gives loss, user, ids [n], rows [n, D] and biases [n] of a batch."""

    def prepare(problem: Problem) -> Step:
        user, table, bias = problem.user.clone(), problem.item_table.clone(), problem.item_bias.clone()
        for parameter in (table, bias):
            parameter.requires_grad_()
        adam, gradients = optimizer([table, bias], lr=OUTER_LR), gradient(problem)
        batches = _batches(problem.workload, problem.device)

        def step() -> Outputs:
            loss, grad_user, ids, rows, biases = gradients(next(batches), user, table.detach(), bias.detach())
            table.grad = torch.sparse_coo_tensor(ids[None], rows, table.shape, check_invariants=False)
            bias.grad = torch.sparse_coo_tensor(ids[None], biases, bias.shape, check_invariants=False)
            adam.step()
            user.sub_(grad_user, alpha=OUTER_LR)
            return {"loss": loss, "user": user, "learned": table.detach()}

        return step

    return prepare


def _ours(problem: Problem) -> Callable[..., tuple[Tensor, ...]]:
    work = problem.workload

    def gradients(batch: mf.TaskBatch, user: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        result = F.meta_step(
            user, table, bias, batch, user_bias_init=problem.user_bias, inner_lr=work.inner_lr, inner_steps=work.steps
        )
        rows, biases = result.grads["item_table"], result.grads["item_bias"]
        return result.loss, result.grads["user_init"], rows.ids, rows.rows, biases.rows

    return gradients


def _adjoint(form: str, compiled: bool) -> Callable[[Problem], Callable[..., tuple[Tensor, ...]]]:
    def of(problem: Problem) -> Callable[..., tuple[Tensor, ...]]:
        work = problem.workload
        function = hand_adjoint.make(work, form, compiled)
        assert isinstance(work.support, int)
        support, query = work.support, work.query

        def gradients(batch: mf.TaskBatch, user: Tensor, table: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            blocks = Blocks.of(batch, support, query)
            loss, grad_user, _, rows, biases = function(user, problem.user_bias, *blocks.gather(table, bias), blocks)
            ids = torch.cat(blocks.flat_ids)
            return (
                loss,
                grad_user,
                ids,
                torch.cat([each.reshape(-1, work.dim) for each in rows]),
                torch.cat([each.reshape(-1) for each in biases]),
            )

        return gradients

    return of


def _effort(work: Workload) -> str | None:
    return "quick" if work.kind == "train" else None


PEERS = (
    Peer("metarec_fast", _prepare(_ours, mf.SparseAdam), _effort),
    Peer("metarec_fast, torch.optim.SparseAdam", _prepare(_ours, torch.optim.SparseAdam), _effort),
    Peer(
        "hand adjoint, torch.optim.SparseAdam",
        _prepare(_adjoint("gram", False), torch.optim.SparseAdam),
        _effort,
    ),
    Peer(
        "hand adjoint, compiled, torch.optim.SparseAdam",
        _prepare(_adjoint("direct", True), torch.optim.SparseAdam),
        lambda work: "normal" if work.kind == "train" else None,
        compiles=True,
    ),
)
