"""Turns what users pass to the functional layer into tensors that fit, or says by name what does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metarec_fast.tasks import Entries, TaskBatch

Number = float | Tensor

INNER_LOSSES = ("squared", "logistic")
OUTER_LOSSES = ("squared", "logistic", "absolute")
DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Model:
    """The meta-parameters of the dot-product recommender: p_i = m + b_i + c + u·e_i."""

    user_init: Tensor  # u at the start, [D] or [T, D]
    user_bias_init: Tensor  # c at the start, scalar or [T]
    item_table: Tensor  # e, [N, D]
    item_bias: Tensor  # b, [N]
    offset: Tensor  # m, scalar


@dataclass(frozen=True)
class InnerLoop:
    """How a task adapts:  φ ← φ − s_k A ∘ [∇L_S(φ) + ρ (φ − φ_0)] + β_k (φ − φ_before),  k = 0 … K−1."""

    inner_lr: Tensor  # s, scalar or [K]
    inner_steps: int | Literal["exact"]  # K
    preconditioner: Tensor | None = None  # A, [D + 1]
    prior_pull: Tensor | None = None  # ρ, scalar or [T]
    momentum: Tensor | None = None  # β, scalar or [K]
    extra_count: float = 0.0  # n0
    loss: str = "squared"
    first_order: bool = False
    adapt: str = "user"  # or "all"
    form: str = "auto"  # of the computation: "gram", "direct" or "normal"; the numbers are the same


def differentiable(model: Model, loop: InnerLoop, support: Entries) -> dict[str, Tensor | None]:
    """What meta-gradients are taken of, by argument name, in the order in which the operators return them."""
    return {
        "user_init": model.user_init,
        "user_bias_init": model.user_bias_init,
        "item_table": model.item_table,
        "item_bias": model.item_bias,
        "offset": model.offset,
        "inner_lr": loop.inner_lr,
        "preconditioner": loop.preconditioner,
        "prior_pull": loop.prior_pull,
        "momentum": loop.momentum,
        "support_weights": support.weights,
    }


def check_model(
    user_init: Tensor,
    user_bias_init: Number | None,
    item_table: Tensor,
    item_bias: Tensor,
    offset: Number,
    num_tasks: int,
) -> Model:
    """The five meta-parameters as tensors of one dtype and device."""
    if not isinstance(item_table, Tensor) or item_table.dim() != 2:
        raise ValueError(f"item_table: expected a tensor [N, D], got {_describe(item_table)}")
    if item_table.dtype not in DTYPES:
        raise TypeError(f"item_table: expected dtype float32 or float64, got {item_table.dtype}")
    num_items, dim = item_table.shape
    user_init = _tensor("user_init", user_init, item_table, ((dim,), (num_tasks, dim)), "[D] or [T, D]")
    item_bias = _tensor("item_bias", item_bias, item_table, ((num_items,),), "[N]")
    bias = 0.0 if user_bias_init is None else user_bias_init
    return Model(
        user_init,
        _tensor("user_bias_init", bias, item_table, ((), (num_tasks,)), "a scalar or [T]"),
        item_table,
        item_bias,
        _tensor("offset", offset, item_table, ((),), "a scalar"),
    )


def check_inner_loop(
    model: Model,
    num_tasks: int,
    *,
    inner_lr: Number,
    inner_steps: int | Literal["exact"],
    preconditioner: Tensor | None,
    prior_pull: Number,
    extra_count: float,
    momentum: Number | None,
    loss: str,
    first_order: bool,
    adapt: str,
) -> InnerLoop:
    """The inner loop's settings, each of a shape and value that makes sense, and allowed beside the others."""
    table = model.item_table
    if inner_steps != "exact" and (isinstance(inner_steps, bool) or not isinstance(inner_steps, int)):
        raise TypeError(f"inner_steps: expected an int or 'exact', got {inner_steps!r}")
    if isinstance(inner_steps, int) and inner_steps < 0:
        raise ValueError(f"inner_steps: must be ≥ 0, got {inner_steps}")
    if loss not in INNER_LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(INNER_LOSSES)}, got {loss!r}")
    if adapt not in ("user", "all"):
        raise ValueError(f"adapt: expected 'user' or 'all', got {adapt!r}")
    if not extra_count >= 0:
        raise ValueError(f"extra_count: must be ≥ 0, got {extra_count}")
    pulled = isinstance(prior_pull, Tensor) or prior_pull != 0
    if not isinstance(prior_pull, Tensor) and not prior_pull >= 0:
        raise ValueError(f"prior_pull: must be ≥ 0, got {prior_pull}")
    if inner_steps == "exact":
        _refuse(
            "inner_steps='exact'",
            {
                f"loss={loss!r} (only squared)": loss != "squared",
                "prior_pull=0": not pulled,
                "momentum": momentum is not None,
                "first_order": first_order,
                "adapt='all'": adapt == "all",
            },
        )
    if adapt == "all":
        _refuse(
            "adapt='all'",
            {"preconditioner": preconditioner is not None, "prior_pull": pulled, "momentum": momentum is not None},
        )
    per_step: tuple[tuple[int, ...], ...] = ((),) if inner_steps == "exact" else ((), (inner_steps,))
    return InnerLoop(
        inner_lr=_tensor("inner_lr", inner_lr, table, per_step, "a scalar or [K]"),
        inner_steps=inner_steps,
        preconditioner=None
        if preconditioner is None
        else _tensor("preconditioner", preconditioner, table, ((table.shape[1] + 1,),), "[D + 1]"),
        prior_pull=_tensor("prior_pull", prior_pull, table, ((), (num_tasks,)), "a scalar or [T]") if pulled else None,
        momentum=None if momentum is None else _tensor("momentum", momentum, table, per_step, "a scalar or [K]"),
        extra_count=float(extra_count),
        loss=loss,
        first_order=bool(first_order),
        adapt=adapt,
    )


def check_entries(name: str, entries: Entries, table: Tensor, *, targets: bool, loss: str | None = None) -> Entries:
    """Entries whose ids lie in the table and whose values have its dtype."""
    if not isinstance(entries, Entries):
        raise TypeError(f"{name}: expected Entries, got {type(entries).__name__}")
    if entries.items.device != table.device:
        raise ValueError(f"{name}.items: expected to be on {table.device}, like item_table, got {entries.items.device}")
    if entries.max_item >= table.shape[0]:
        for part, ids in (("items", entries.items), ("negatives", entries.negatives)):
            outside = None if ids is None else (ids.reshape(-1) >= table.shape[0]).nonzero()
            if ids is not None and outside is not None and len(outside):
                position = int(outside[0])
                raise IndexError(
                    f"{name}.{part}: ids must be in [0, {table.shape[0]}), "
                    f"got {int(ids.reshape(-1)[position])} at position {position}"
                )
    if targets and entries.targets is None:
        raise ValueError(f"{name}.targets: expected a tensor [n], got None")
    if targets and entries.negatives is not None:
        raise ValueError(f"{name}.negatives: the pointwise loss {loss!r} has no use for them")
    value = entries.targets if entries.targets is not None else entries.weights
    return entries if value is None or value.dtype == table.dtype else entries.to(table.device, table.dtype)


def check_batch(batch: TaskBatch, table: Tensor, loss: str, *, query_targets: bool) -> TaskBatch:
    """A batch with a query, both parts checked against the table."""
    if not isinstance(batch, TaskBatch):
        raise TypeError(f"batch: expected a TaskBatch, got {type(batch).__name__}")
    if batch.query is None:
        raise ValueError("batch.query: expected Entries, got None")
    support = check_entries("support", batch.support, table, targets=True, loss=loss)
    query = check_entries("query", batch.query, table, targets=query_targets, loss=loss)
    if support is batch.support and query is batch.query:
        return batch
    weights = None if batch.weights is None else batch.weights.to(table.dtype)
    return TaskBatch(support, query, batch.users, weights)


def check_outer_loss(outer_loss: str | Mapping[str, float]) -> dict[str, float]:
    """The weight of each outer loss, by name."""
    losses = {outer_loss: 1.0} if isinstance(outer_loss, str) else dict(outer_loss)
    for name, weight in losses.items():
        if name not in OUTER_LOSSES:
            raise ValueError(f"outer_loss: expected one of {', '.join(OUTER_LOSSES)}, got {name!r}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"outer_loss[{name!r}]: must be finite and ≥ 0, got {weight}")
    return losses


def check_step_weights(step_weights: Tensor | None, loop: InnerLoop, table: Tensor) -> Tensor | None:
    """κ [K + 1], for the multi-step outer loss."""
    if step_weights is None:
        return None
    if loop.inner_steps == "exact":
        raise ValueError("step_weights: 'exact' has no steps to weigh")
    return _tensor("step_weights", step_weights, table, ((loop.inner_steps + 1,),), "[K + 1]")


def _tensor(name: str, value: Number, like: Tensor, shapes: tuple[tuple[int, ...], ...], expected: str) -> Tensor:
    if isinstance(value, (int, float)):
        if () not in shapes:
            raise ValueError(f"{name}: expected a tensor {expected}, got {value!r}")
        return torch.full((), value, dtype=like.dtype, device=like.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(value).__name__}")
    if tuple(value.shape) not in shapes:
        sizes = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected} = {sizes}, got {tuple(value.shape)}")
    if value.dtype != like.dtype and value.is_floating_point() and torch.is_autocast_enabled(like.device.type):
        value = value.to(like.dtype)
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype}, like item_table, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected to be on {like.device}, like item_table, got {value.device}")
    return value


def _refuse(what: str, reasons: Mapping[str, bool]) -> None:
    for name, present in reasons.items():
        if present:
            raise ValueError(f"{what} cannot be combined with {name}")


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
