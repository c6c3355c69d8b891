"""Ours."""

from __future__ import annotations

from torch import Tensor, nn

import metarec_fast as mf
from benchmarks.implementations.blocks import Outputs, Peer, Step
from benchmarks.workloads import Problem, Workload
from metarec_fast import functional as F


def prepare(problem: Problem) -> Step:
    return _reptile(problem) if problem.workload.kind == "reptile" else _meta_step(problem)


def _meta_step(problem: Problem) -> Step:
    work = problem.workload

    def step() -> Outputs:
        result = F.meta_step(
            problem.user,
            problem.item_table,
            problem.item_bias,
            problem.batch,
            user_bias_init=problem.user_bias,
            inner_lr=work.inner_lr,
            inner_steps=work.steps,
            loss=work.loss,
            outer_loss=work.loss,
            adapt=work.adapt,
            first_order=work.first_order,
        )
        grads = result.grads
        return {
            "loss": result.loss,
            "user_init": grads["user_init"],
            "user_bias_init": grads["user_bias_init"],
            "item_table": [grads["item_table"]],
            "item_bias": [grads["item_bias"]],
        }

    return step


def _reptile(problem: Problem) -> Step:
    """Through the learner, as users do; after the first call the batch knows its distinct items, as sampled ones do."""
    work = problem.workload
    model = mf.DotRecommender(work.num_items, work.dim, sparse=True)
    model.item_embedding = nn.Embedding.from_pretrained(problem.item_table, freeze=False, sparse=True)
    model.item_bias = nn.Embedding.from_pretrained(problem.item_bias[:, None], freeze=False, sparse=True)
    model.user_init, model.user_bias_init = nn.Parameter(problem.user), nn.Parameter(problem.user_bias)
    learner = mf.Reptile(model, inner_lr=work.inner_lr, inner_steps=work.steps, adapt=work.adapt)

    def step() -> Outputs:
        learner.zero_grad()
        loss = learner(problem.batch)
        loss.backward()
        outputs: dict[str, Tensor | list[mf.SparseRows]] = {
            "loss": loss,
            "user_init": model.user_init.grad,
            "user_bias_init": model.user_bias_init.grad,
        }
        if work.adapt == "all":
            for name, embedding in (("item_table", model.item_embedding), ("item_bias", model.item_bias)):
                gradient = embedding.weight.grad
                rows = gradient._values() if name == "item_table" else gradient._values().squeeze(1)
                outputs[name] = [mf.SparseRows(gradient._indices()[0], rows)]
        return outputs

    return step


def effort(work: Workload) -> str | None:
    return "quick" if work.kind in ("gradient", "reptile") else None


PEERS = (Peer("metarec_fast", prepare, effort),)
