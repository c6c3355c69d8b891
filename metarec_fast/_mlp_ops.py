"""Calls the compiled operators of an MLP tower, which take its parameters as one vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarec_fast import _library
from metarec_fast._mlp_arguments import Tower, TowerLoop
from metarec_fast._ops import call, outer_text
from metarec_fast.results import SparseRows, TowerMetaStep
from metarec_fast.tasks import Entries, TaskBatch

if _library.cpu.loaded:
    from metarec_fast import _mlp_autograd  # noqa: F401

ops = torch.ops.metarec_fast


def adapt_and_score(tower: Tower, batch: TaskBatch, loop: TowerLoop) -> Tensor:
    assert batch.query is not None
    inputs = _inputs(tower, batch.support)
    result: Tensor = ops.mlp_adapt_and_score(*inputs, batch.query.items, batch.query.offsets, *_loop(tower, loop))
    return result


def meta_step(tower: Tower, batch: TaskBatch, loop: TowerLoop, losses: dict[str, float]) -> TowerMetaStep:
    query = batch.query
    assert query is not None
    inputs = _inputs(tower, batch.support)
    args = (
        *inputs,
        query.items, query.offsets, query.targets, query.weights, query.negative_rows, query.log_q, batch.weights,
        *_loop(tower, loop), outer_text(losses),
    )  # fmt: skip
    results = call("mlp_meta_step", (*inputs[:4], loop.inner_lr), args)
    loss, user_part, parameters, inner_lr, rows, ids = results
    layers, first = [], 0
    for weight, bias in tower.layers:
        middle, last = first + weight.numel(), first + weight.numel() + bias.numel()
        layers.append((parameters[first:middle].view(weight.shape), parameters[middle:last]))
        first = last
    grads = {"user_part": user_part, "item_table": SparseRows(ids, rows), "layers": layers, "inner_lr": inner_lr}
    return TowerMetaStep(loss, grads)


def _inputs(tower: Tower, support: Entries) -> tuple[Any, ...]:
    parameters = torch.cat([part.reshape(-1) for layer in tower.layers for part in layer])
    return (
        tower.user_part, tower.item_table, tower.item_bias, parameters, tower.widths, support.items, support.offsets,
        support.targets, support.weights, support.negative_rows, support.log_q, support.size_bound,
    )  # fmt: skip


def _loop(tower: Tower, loop: TowerLoop) -> tuple[Any, ...]:
    return loop.inner_lr, loop.inner_steps, tower.activation, loop.loss, loop.first_order
