"""Turns what users pass to the functional layer into tensors that fit, or says by name what does not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from metarec_fast.tasks import Entries, TaskBatch, check_not_negative

Number = float | Tensor

INNER_LOSSES = ("squared", "logistic", "bpr", "softmax")
OUTER_LOSSES = ("squared", "logistic", "absolute", "bpr", "softmax")
PAIRWISE = frozenset(("bpr", "softmax"))
"""Losses that compare an entry's item with its negatives; the others compare its score with its target."""
DTYPES = (torch.float32, torch.float64)
TABLE_DTYPES = (*DTYPES, torch.bfloat16)
"""Of an item table that is read only. A bfloat16 one is just stored so: arithmetic and all else are float32."""


@dataclass
class Model:
    """The meta-parameters of the dot-product recommender: p_i = m + b_i + c + u·e_i."""

    user_init: Tensor  # u at the start, [D] or [T, D]
    user_bias_init: Tensor  # c at the start, scalar or [T]
    item_table: Tensor  # e, [N, D]
    item_bias: Tensor  # b, [N]
    offset: Tensor  # m, scalar


@dataclass
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


Start = tuple[Tensor, Number | None, Tensor, Tensor, Number]
"""user_init, user_bias_init, item_table, item_bias and offset, as users say them."""

Settings = tuple[
    Number, int | Literal["exact"], Tensor | None, Number, float, Number | None, str, bool, str
]  # fmt: skip
"""inner_lr, inner_steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order and adapt, likewise."""

WANT = {
    "user_init": 1,
    "user_bias_init": 1,
    "item_table": 2,
    "item_bias": 2,
    "offset": 1,
    "inner_lr": 4,
    "preconditioner": 8,
    "prior_pull": 16,
    "momentum": 32,
    "support_weights": 64,
}
"""The bit that says that a meta-gradient is wanted, in the order in which the operators return them; the same numbers
stand in csrc/inner_loop.h."""
WANT_ALL = sum(set(WANT.values()))
"""Of what is not given there is no gradient, wanted or not."""


def differentiable(model: Model, loop: InnerLoop, support: Entries) -> dict[str, Tensor | None]:
    """What meta-gradients are taken of, by argument name, in the order of `WANT`."""
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


def check_differentiation(model: Model, loop: InnerLoop, batch: TaskBatch, step_weights: Tensor | None = None) -> None:
    """Raises where a derivative would be missing without a word: of data, and in forward mode of anything."""
    if not torch.compiler.is_compiling():
        check_gradients_of(differentiable(model, loop, batch.support), batch, {"step_weights": step_weights})


def check_gradients_of(
    values: Mapping[str, Tensor | None], batch: TaskBatch, more_data: Mapping[str, Tensor | None]
) -> None:
    """Raises where a derivative would be missing: of the batch's data and `more_data`, in forward mode of `values`."""
    if torch.compiler.is_compiling():
        return
    forward = getattr(forward_ad, "_current_level", -1) >= 0
    if not forward and not torch.is_grad_enabled():
        return
    support, query = batch.support, batch.query
    data = {
        "support.targets": support.targets,
        "support.log_q": support.log_q,
        "batch.weights": batch.weights,
        **more_data,
    }
    if query is not None:
        data |= {"query.targets": query.targets, "query.weights": query.weights, "query.log_q": query.log_q}
    for name, value in data.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name}: no gradient is taken of it, but it requires one; detach() it")
    if forward:
        for name, value in {**data, **values}.items():
            if value is not None and forward_ad.unpack_dual(value).tangent is not None:
                raise NotImplementedError(f"{name}: derivatives in forward mode are not available")


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
        raise ValueError(f"item_table: expected a tensor [N, D], got {describe(item_table)}")
    num_items, dim = item_table.shape
    if item_table.dtype == torch.float16 and is_autocast(item_table):
        item_table = item_table.float()
    if item_table.dtype not in TABLE_DTYPES:
        raise TypeError(f"item_table: expected dtype float32, float64 or bfloat16, got {item_table.dtype}")
    like = item_table if item_table.dtype != torch.bfloat16 else item_table.new_empty(0, dtype=torch.float32)
    bias = 0.0 if user_bias_init is None else user_bias_init
    return Model(
        fitting_tensor("user_init", user_init, like, ((dim,), (num_tasks, dim)), "[D] or [T, D]"),
        fitting_tensor("user_bias_init", bias, like, ((), (num_tasks,)), "a scalar or [T]"),
        item_table,
        fitting_tensor("item_bias", item_bias, like, ((num_items,),), "[N]"),
        fitting_tensor("offset", offset, like, ((),), "a scalar"),
    )


def check_inner_loop(model: Model, num_tasks: int, given: Settings) -> InnerLoop:
    """The inner loop's settings, each of a shape and value that makes sense, and allowed beside the others."""
    inner_lr, inner_steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt = given
    like, dim = model.item_bias, model.item_table.shape[1]
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
            {
                "preconditioner": preconditioner is not None,
                "prior_pull": pulled,
                "momentum": momentum is not None,
                f"loss={loss!r} (only pointwise ones)": loss in PAIRWISE,
            },
        )
    per_step: tuple[tuple[int, ...], ...] = ((),) if inner_steps == "exact" else ((), (inner_steps,))
    return InnerLoop(
        inner_lr=fitting_tensor("inner_lr", inner_lr, like, per_step, "a scalar or [K]"),
        inner_steps=inner_steps,
        preconditioner=None
        if preconditioner is None
        else fitting_tensor("preconditioner", preconditioner, like, ((dim + 1,),), "[D + 1]"),
        prior_pull=fitting_tensor("prior_pull", prior_pull, like, ((), (num_tasks,)), "a scalar or [T]")
        if pulled
        else None,
        momentum=None if momentum is None else fitting_tensor("momentum", momentum, like, per_step, "a scalar or [K]"),
        extra_count=float(extra_count),
        loss=loss,
        first_order=bool(first_order),
        adapt=adapt,
    )


def check_entries(name: str, entries: Entries, num_items: int, like: Tensor, losses: Collection[str] = ()) -> Entries:
    """Entries of so many items, on the device of `like`, their values of its dtype, with what `losses` look at."""
    if not isinstance(entries, Entries):
        raise TypeError(f"{name}: expected Entries, got {type(entries).__name__}")
    if entries.items.device != like.device:
        raise ValueError(f"{name}.items: expected to be on {like.device}, like item_table, got {entries.items.device}")
    if entries.max_item >= num_items:
        for part, ids in (("items", entries.items), ("negatives", entries.negatives)):
            outside = None if ids is None else (ids.reshape(-1) >= num_items).nonzero()
            if ids is not None and outside is not None and len(outside):
                position = int(outside[0])
                raise IndexError(
                    f"{name}.{part}: ids must be in [0, {num_items}), "
                    f"got {int(ids.reshape(-1)[position])} at position {position}"
                )
    _check_parts(name, entries, losses)
    values = entries.targets, entries.weights, entries.log_q
    fits = all(value is None or value.dtype == like.dtype for value in values)
    return entries if fits else entries.to(like.device, like.dtype)


def _check_parts(name: str, entries: Entries, losses: Collection[str]) -> None:
    """Raises unless the entries have what the losses look at, and nothing that none of them does."""
    pointwise = next((loss for loss in losses if loss not in PAIRWISE), None)
    pairwise = next((loss for loss in losses if loss in PAIRWISE), None)
    if pointwise and entries.targets is None:
        raise ValueError(f"{name}.targets: expected a tensor [n], got None")
    if pairwise and entries.negatives is None:
        raise ValueError(f"{name}.negatives: the loss {pairwise!r} compares with them, got None")
    if pointwise and not pairwise and entries.negatives is not None:
        raise ValueError(f"{name}.negatives: the pointwise loss {pointwise!r} has no use for them")
    if losses and "softmax" not in losses and entries.log_q is not None:
        raise ValueError(f"{name}.log_q: only the loss 'softmax' has a use for it, got {' and '.join(losses)}")


def check_batch(batch: TaskBatch, item_bias: Tensor, loss: str, outer_losses: Collection[str]) -> TaskBatch:
    """A batch with a query, both parts checked against the items and what their losses look at."""
    if not isinstance(batch, TaskBatch):
        raise TypeError(f"batch: expected a TaskBatch, got {type(batch).__name__}")
    if batch.query is None:
        raise ValueError("batch.query: expected Entries, got None")
    num_items = item_bias.shape[0]
    support = check_entries("support", batch.support, num_items, item_bias, (loss,))
    query = check_entries("query", batch.query, num_items, item_bias, outer_losses)
    weights = None if batch.weights is None else batch.weights.to(item_bias)
    if support is batch.support and query is batch.query and weights is batch.weights:
        return batch
    return TaskBatch.unchecked(support, query, batch.users, weights)


def with_negatives(batch: TaskBatch) -> TaskBatch:
    """The batch with each query entry followed by its negatives, if it has any."""
    query = batch.query
    if query is None or query.negative_rows is None:
        return batch
    items = torch.cat([query.items[:, None], query.negative_rows], dim=1)
    width = items.shape[1]
    flat = Entries.unchecked(
        items.reshape(-1), None, query.offsets * width, max_size=query.max_size * width, max_item=query.max_item
    )
    return batch.with_entries(batch.support, flat)


def check_outer_loss(outer_loss: str | Mapping[str, float]) -> dict[str, float]:
    """The weight of each outer loss, by name."""
    losses = {outer_loss: 1.0} if isinstance(outer_loss, str) else dict(outer_loss)
    for name, weight in losses.items():
        if name not in OUTER_LOSSES:
            raise ValueError(f"outer_loss: expected one of {', '.join(OUTER_LOSSES)}, got {name!r}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"outer_loss[{name!r}]: must be finite and ≥ 0, got {weight}")
    return losses


def check_task_weights(task_weights: Tensor | None, like: Tensor, num_tasks: int) -> Tensor | None:
    """ω ≥ 0 of each task, [T]."""
    if task_weights is None:
        return None
    weights = fitting_tensor("task_weights", task_weights, like, ((num_tasks,),), "[T]")
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere looking would wait
        check_not_negative("task_weights", weights)
    return weights


def check_step_weights(step_weights: Tensor | None, loop: InnerLoop, like: Tensor) -> Tensor | None:
    """κ [K + 1], for the multi-step outer loss."""
    if step_weights is None:
        return None
    if loop.inner_steps == "exact":
        raise ValueError("step_weights: 'exact' has no steps to weigh")
    return fitting_tensor("step_weights", step_weights, like, ((loop.inner_steps + 1,),), "[K + 1]")


def fitting_tensor(
    name: str, value: Number, like: Tensor, shapes: tuple[tuple[int, ...], ...], expected: str
) -> Tensor:
    if isinstance(value, (int, float)):
        if () not in shapes:
            raise ValueError(f"{name}: expected a tensor {expected}, got {value!r}")
        return _scalar(value, like)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {expected}, got {type(value).__name__}")
    if value.shape not in shapes:
        sizes = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: expected shape {expected} = {sizes}, got {tuple(value.shape)}")
    if value.dtype != like.dtype and value.is_floating_point() and is_autocast(like):
        value = value.to(like.dtype)
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected dtype {like.dtype}, like item_table (float32 beside a bfloat16 one), got {value.dtype}"
        )
    if value.device != like.device:
        raise ValueError(f"{name}: expected to be on {like.device}, like item_table, got {value.device}")
    return value


_scalars: dict[tuple[float, torch.dtype], Tensor] = {}
_MOST_SCALARS = 1000


def _scalar(value: float, like: Tensor) -> Tensor:
    """The number as a tensor."""
    if like.device.type != "cpu" or type(like) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return torch.full((), value, dtype=like.dtype, device=like.device)
    return kept_scalar(value, like.dtype)


def kept_scalar(value: Number, dtype: torch.dtype) -> Tensor:
    """The number as a tensor on the CPU. These are kept: nobody writes to them, and a call has several."""
    if isinstance(value, Tensor):
        return value
    scalar = _scalars.get((value, dtype))
    if scalar is None:
        if len(_scalars) >= _MOST_SCALARS:
            _scalars.clear()
        with torch.inference_mode(False):  # or later calls could not differentiate
            scalar = torch.full((), value, dtype=dtype, device="cpu")
        if type(scalar) is Tensor:  # no fake one, whose mode ends before the next call
            _scalars[value, dtype] = scalar
    return scalar


def is_autocast(like: Tensor) -> bool:
    """Whether tensors may come in the low precision that other operations have left them in."""
    return torch.amp.is_autocast_available(like.device.type) and torch.is_autocast_enabled(like.device.type)


def _refuse(what: str, reasons: Mapping[str, bool]) -> None:
    for name, present in reasons.items():
        if present:
            raise ValueError(f"{what} cannot be combined with {name}")


def describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
