"""Ours."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import metarec_fast as mf
from benchmarks.implementations.blocks import Outputs, Peer, Step
from benchmarks.workloads import Problem, Workload
from metarec_fast import functional as F


def prepare(problem: Problem) -> Step:
    kinds = {"gradient": _meta_step, "dense": _dense(F.sum_rows), "reptile": _reptile, "mlp": _mlp_meta_step}
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


def _dense(sum_rows: Callable[[mf.SparseRows, int], Tensor]) -> Callable[[Problem], Step]:
    """The same, its rows of items summed into whole tables, as `backward` does where gradients are to be dense."""

    def prepare(problem: Problem) -> Step:
        gradient, num_items = _meta_step(problem), problem.workload.num_items

        def step() -> Outputs:
            outputs = gradient()
            return {**outputs, **{name: sum_rows(outputs[name][0], num_items) for name in ("item_table", "item_bias")}}

        return step

    return prepare


def _by_atomics(gradient: mf.SparseRows, num_items: int) -> Tensor:
    with mf.allow_atomics():
        return F.sum_rows(gradient, num_items)


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
    return "quick" if work.kind in ("gradient", "dense", "reptile", "mlp") else None


def _effort_of_dense(work: Workload) -> str | None:
    return "quick" if work.kind == "dense" else None


PEERS = (
    Peer("metarec_fast", prepare, effort),
    Peer("metarec_fast, atomics", _dense(_by_atomics), _effort_of_dense),
    Peer("index_add_ on our rows", _dense(mf.SparseRows.to_dense), _effort_of_dense),
)
