"""What the MLP operators are given, checked by name: a tower, its inner loop, and a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarec_fast._arguments import (
    DTYPES,
    INNER_LOSSES,
    Number,
    check_batch,
    check_gradients_of,
    describe,
    fitting_tensor,
    is_autocast,
)
from metarec_fast.tasks import TaskBatch

Layers = Sequence[tuple[Tensor, Tensor]]

ACTIVATIONS = ("relu", "gelu")


@dataclass
class Tower:
    """p_i = β_i + W_L h_{L−1} + b_L,  h_l = σ(W_l h_{l−1} + b_l),  h_0 = [user part; item row]."""

    user_part: Tensor  # [T, Du]
    item_table: Tensor  # [N, D]
    layers: list[tuple[Tensor, Tensor]]  # W_l [n_l, n_{l−1}], b_l [n_l], l = 1 … L
    activation: str
    item_bias: Tensor | None = None  # β [N], a constant; none is 0

    @property
    def widths(self) -> list[int]:
        """n_0 … n_L."""
        return [self.layers[0][0].shape[1], *(weight.shape[0] for weight, _ in self.layers)]


@dataclass
class TowerLoop:
    """φ ← φ − s_k ∇L_S(φ),  k = 0 … K−1,  of all weights and biases of the tower."""

    inner_lr: Tensor  # s, scalar, [K], or [1, P] or [K, P] for the P = 2L tensors W_1, b_1, …, W_L, b_L
    inner_steps: int  # K
    loss: str = "squared"
    first_order: bool = False


def check_tower(
    user_part: Tensor,
    item_table: Tensor,
    layers: Layers,
    activation: str,
    item_bias: Tensor | None,
    batch: TaskBatch,
) -> Tower:
    if not isinstance(batch, TaskBatch):
        raise TypeError(f"batch: expected TaskBatch, got {type(batch).__name__}")
    if not isinstance(item_table, Tensor) or item_table.dim() != 2:
        raise ValueError(f"item_table: expected a tensor [N, D], got {describe(item_table)}")
    if item_table.shape[1] == 0:
        raise ValueError(f"item_table: expected D ≥ 1, got {describe(item_table)}")
    if item_table.dtype in (torch.float16, torch.bfloat16) and is_autocast(item_table):
        item_table = item_table.float()
    if item_table.dtype not in DTYPES:
        raise TypeError(f"item_table: expected dtype float32 or float64, got {item_table.dtype}")
    if not isinstance(user_part, Tensor) or user_part.dim() != 2 or user_part.shape[0] != batch.num_tasks:
        raise ValueError(f"user_part: expected a tensor [T, Du] with T = {batch.num_tasks}, got {describe(user_part)}")
    user_part = fitting_tensor("user_part", user_part, item_table, (tuple(user_part.shape),), "[T, Du]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(f"layers: expected a list of (weight, bias), at least one, got {layers!r:.60}")
    width, checked = user_part.shape[1] + item_table.shape[1], []
    for place, layer in enumerate(layers):
        name = f"layers[{place}]"
        if not isinstance(layer, (list, tuple)) or len(layer) != 2:
            raise ValueError(f"{name}: expected (weight, bias), got {describe(layer)}")
        weight, bias = layer
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != width:
            known = "Du + D" if place == 0 else "the width of the layer before"
            raise ValueError(f"{name} weight: expected [out, in] with in = {width}, {known}, got {describe(weight)}")
        width = weight.shape[0]
        if width == 0 or (place == len(layers) - 1 and width != 1):
            raise ValueError(f"{name} weight: expected out {'> 0' if width == 0 else '= 1, the score'}, got {width}")
        checked.append(
            (
                fitting_tensor(f"{name} weight", weight, item_table, (tuple(weight.shape),), "[out, in]"),
                fitting_tensor(f"{name} bias", bias, item_table, ((width,),), "[out]"),
            )
        )
    if item_bias is not None:
        item_bias = fitting_tensor("item_bias", item_bias, item_table, ((item_table.shape[0],),), "[N]")
    return Tower(user_part, item_table, checked, activation, item_bias)


def check_tower_loop(tower: Tower, inner_lr: Number, inner_steps: int, loss: str, first_order: bool) -> TowerLoop:
    if isinstance(inner_steps, bool) or not isinstance(inner_steps, int):
        raise TypeError(f"inner_steps: expected an int, got {inner_steps!r}")
    if inner_steps < 0:
        raise ValueError(f"inner_steps: must be ≥ 0, got {inner_steps}")
    if loss not in INNER_LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(INNER_LOSSES)}, got {loss!r}")
    tensors = 2 * len(tower.layers)
    shapes = (), (inner_steps,), (1, tensors), (inner_steps, tensors)
    rates = fitting_tensor("inner_lr", inner_lr, tower.item_table, shapes, "a scalar, [K], [1, P] or [K, P]")
    return TowerLoop(rates, inner_steps, loss, bool(first_order))


def check_tower_batch(tower: Tower, batch: TaskBatch, loss: str, outer: Sequence[str]) -> TaskBatch:
    return check_batch(batch, tower.item_table[:, :1].squeeze(1), loss, outer)


def check_tower_differentiation(tower: Tower, loop: TowerLoop, batch: TaskBatch) -> None:
    parameters = {
        f"layers[{place}] {part}": value
        for place, layer in enumerate(tower.layers)
        for part, value in zip(("weight", "bias"), layer, strict=True)
    }
    check_gradients_of(
        {"user_part": tower.user_part, "item_table": tower.item_table, "inner_lr": loop.inner_lr, **parameters},
        batch,
        {"support.weights": batch.support.weights, "item_bias": tower.item_bias},
    )
