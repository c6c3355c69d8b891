"""Ours."""

from __future__ import annotations

from benchmarks.implementations.blocks import Outputs, Peer, Step
from benchmarks.workloads import Problem, Workload
from metarec_fast import functional as F


def prepare(problem: Problem) -> Step:
    kinds = {"gradient": _meta_step, "reptile": _reptile, "mlp": _mlp_meta_step}
    return kinds[problem.workload.kind](problem)


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
    work = problem.workload

    def step() -> Outputs:
        result = F.reptile_step(
            problem.user,
            problem.item_table,
            problem.item_bias,
            problem.batch.support,
            user_bias_init=problem.user_bias,
            inner_lr=work.inner_lr,
            inner_steps=work.steps,
            loss=work.loss,
            adapt=work.adapt,
        )
        items = {name: [rows] for name, rows in result.grads.items() if name.startswith("item")}
        return {"loss": result.loss, **result.grads, **items}

    return step


def _mlp_meta_step(problem: Problem) -> Step:
    work, tower = problem.workload, problem.tower
    assert tower is not None

    def step() -> Outputs:
        result = F.mlp_meta_step(
            tower.user_part, problem.item_table, tower.layers, problem.batch, inner_lr=work.inner_lr,
            inner_steps=work.steps,
        )  # fmt: skip
        layers = (part for layer in result.grads["layers"] for part in layer)
        return {
            "loss": result.loss,
            "user_part": result.grads["user_part"],
            "item_table": [result.grads["item_table"]],
            **{f"layers[{i}]": part for i, part in enumerate(layers)},
        }

    return step


def effort(work: Workload) -> str | None:
    return "quick" if work.kind in ("gradient", "reptile", "mlp") else None


PEERS = (Peer("metarec_fast", prepare, effort),)
