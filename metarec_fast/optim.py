"""Optimisers for embeddings with sparse gradients: a step costs what the batch touches, not what the catalogue holds.

Repeated ids of a gradient are summed and the update applied row by row, in one pass over the memory, with the same bits
for any number of threads. Rows without a gradient, and their moments, stay as they are ("lazy" updates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from metarec_fast import _library, _ops, functional, reference
from metarec_fast._arguments import DTYPES
from metarec_fast._known_gradients import sparse_tensor
from metarec_fast.results import SparseRows

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_HUGE = 1 << 22  # bytes from which a table is worth huge pages


class _Part(NamedTuple):
    """One parameter, what the rule keeps of it, and its gradient."""

    table: Tensor  # [N, …]
    state: dict[str, Any]
    gradient: SparseRows


class _SparseOptimizer(Optimizer):
    """Walks over the parameters and their rows; a subclass says what it keeps of each, and what happens to them."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step on the parameters that have a gradient.

        Args:
            closure: Computes the loss anew, with its gradients, and returns it.

        Raises:
            TypeError: A gradient is dense, or sparse in more than its first dimension.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows = [self._rows_of(group) for group in self.param_groups]
        for group, gradients in zip(self.param_groups, rows, strict=True):
            together: dict[Any, list[_Part]] = {}  # parts whose gradients have the same ids
            for parameter, gradient in gradients:
                part = _Part(parameter.detach(), self.state[parameter], gradient)
                if not part.state:
                    part.state.update(self._start(part.table, group))
                ids = gradient.ids.data_ptr(), gradient.ids.numel(), gradient.ids.stride(0)
                key = ids, part.table.dtype, part.state.get("step"), _can_run(part.table, gradient.rows)
                together.setdefault(key, []).append(part)
                torch.autograd.graph.increment_version(parameter)
            for (*_, can_run), parts in together.items():
                self._update(parts, group, can_run)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Mapping[str, Any]) -> None:
        """Raises unless the settings of a group make sense."""
        _check_positive(lr=group["lr"])

    def _start(self, table: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        return {}

    def _update(self, parts: Sequence[_Part], group: Mapping[str, Any], can_run: bool) -> None:
        """One step on parameters that share ids, with the kernels or without."""
        raise NotImplementedError

    def _rows_of(self, group: Mapping[str, Any]) -> list[tuple[Tensor, SparseRows]]:
        """The parameters of a group that have a gradient, and its rows."""
        found = []
        for place, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
                raise TypeError(f"{self._name_of(place, group)}: {self._refusal(gradient)}")
            found.append((parameter, SparseRows(gradient._indices()[0], gradient._values())))
        return found

    def _name_of(self, place: int, group: Mapping[str, Any]) -> str:
        if "param_names" in group:
            return str(group["param_names"][place])
        number = next(n for n, each in enumerate(self.param_groups) if each is group)
        return f"param_groups[{number}]['params'][{place}]"

    def _refusal(self, gradient: Tensor) -> str:
        found = "a dense one" if gradient.layout is torch.strided else f"layout {gradient.layout}"
        if gradient.layout is torch.sparse_coo:
            found = f"{gradient.sparse_dim()} sparse dimensions"
        return (
            f"{type(self).__name__} expects a gradient sparse in its first dimension, as nn.Embedding(sparse=True) "
            f"gives, got {found}"
        )


class SparseAdam(_SparseOptimizer):
    """Adam on the rows that have a gradient (Kingma & Ba 2015, algorithm 1, lazily), as `torch.optim.SparseAdam`.

        m ← β1 m + (1 − β1) g,   v ← β2 v + (1 − β2) g²,   p ← p − lr √(1 − β2ᵗ)/(1 − β1ᵗ) · m / (√v + ε)

    with t the steps of the parameter, not of the row. Its `state_dict` is that of `torch.optim.SparseAdam`.

    Args:
        params: Parameters, named or not, or groups of them.
        lr: Learning rate, > 0.
        betas: Decay β1, β2 of the moments, in [0, 1).
        eps: ε > 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    def _check(self, group: Mapping[str, Any]) -> None:
        _check_positive(lr=group["lr"], eps=group["eps"])
        betas = group["betas"]
        if len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas}")
        for place, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{place}]: must be in [0, 1), got {beta}")

    def _start(self, table: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"step": 0, "exp_avg": _new_state(table), "exp_avg_sq": _new_state(table)}

    def _update(self, parts: Sequence[_Part], group: Mapping[str, Any], can_run: bool) -> None:
        (beta1, beta2), step = group["betas"], int(parts[0].state["step"]) + 1
        numbers = {"lr": float(group["lr"]), "beta1": beta1, "beta2": beta2, "eps": group["eps"], "step": step}
        states = [[part.state[name] for part in parts] for name in ("exp_avg", "exp_avg_sq")]
        _run("sparse_adam", parts, states, numbers, can_run)
        for part in parts:
            part.state["step"] = step


class SparseAdagrad(_SparseOptimizer):
    """Adagrad on the rows that have a gradient (Duchi et al. 2011, diagonal), as `torch.optim.Adagrad` on sparse ones.

        s ← s + g²,   p ← p − lr g / (√s + ε)

    Args:
        params: Parameters, named or not, or groups of them.
        lr: Learning rate, > 0.
        initial_accumulator_value: Where s starts, ≥ 0.
        eps: ε > 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, params: Parameters, lr: float = 1e-2, initial_accumulator_value: float = 0.0, eps: float = 1e-10
    ) -> None:
        super().__init__(params, {"lr": lr, "initial_accumulator_value": initial_accumulator_value, "eps": eps})

    def _check(self, group: Mapping[str, Any]) -> None:
        _check_positive(lr=group["lr"], eps=group["eps"])
        start = group["initial_accumulator_value"]
        if not 0 <= start < math.inf:
            raise ValueError(f"initial_accumulator_value: must be ≥ 0 and finite, got {start}")

    def _start(self, table: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"sum": _new_state(table, group["initial_accumulator_value"])}

    def _update(self, parts: Sequence[_Part], group: Mapping[str, Any], can_run: bool) -> None:
        numbers = {"lr": float(group["lr"]), "eps": group["eps"]}
        _run("sparse_adagrad", parts, [[part.state["sum"] for part in parts]], numbers, can_run)


class SparseSGD(_SparseOptimizer):
    """p ← p − lr g on the rows that have a gradient, as `torch.optim.SGD` without momentum.

    On a GPU, `allow_atomics` lets it do so without summing rows of equal ids before, in any order.

    Args:
        params: Parameters, named or not, or groups of them.
        lr: Learning rate, > 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, params: Parameters, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def _update(self, parts: Sequence[_Part], group: Mapping[str, Any], can_run: bool) -> None:
        _run("sparse_sgd", parts, [], {"lr": float(group["lr"])}, can_run)


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients so that the Euclidean norm of them together is at most `max_norm`.

    As `torch.nn.utils.clip_grad_norm_`, which refuses sparse gradients: these are coalesced first, since the norm of
    a gradient is not that of its uncoalesced rows.

    Returns:
        The norm before, a scalar.
    """
    values = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout is torch.sparse_coo:
            gradient = parameter.grad = _coalesced(gradient)
            gradient = gradient._values()
        values.append(gradient)
    norm = get_total_norm(values)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm


def _coalesced(gradient: Tensor) -> Tensor:
    if gradient.is_coalesced():
        return gradient
    rows = gradient._values()
    if gradient.sparse_dim() != 1 or rows.dtype not in DTYPES:
        return gradient.coalesce()
    flat = SparseRows(gradient._indices()[0], rows if rows.dim() == 1 else rows.flatten(1))
    return sparse_tensor(functional.coalesce_rows(flat), gradient.shape, is_coalesced=True)


def _new_state(table: Tensor, value: float = 0.0) -> Tensor:
    """A table of the same shape; where it is large, both in huge pages, which scattered rows are found in faster."""
    state = torch.full_like(table, value)
    if table.device.type == "cpu" and _can_run(table, state) and table.nbytes >= _HUGE:
        _ops.ops.use_huge_pages(table)
        _ops.ops.use_huge_pages(state)
    return state


def _can_run(table: Tensor, rows: Tensor) -> bool:
    """Whether the kernels can change this table in place."""
    return (
        table.dtype in DTYPES
        and table.dtype == rows.dtype
        and table.dim() <= 2
        and table.is_contiguous()
        and _library.loaded_for(table)
    )


def _run(name: str, parts: Sequence[_Part], states: list[list[Tensor]], numbers: dict[str, Any], can_run: bool) -> None:
    """Applies an operator to all parts at once, or its reference to one after the other."""
    if can_run:
        tables, rows = [part.table for part in parts], [part.gradient.rows for part in parts]
        getattr(_ops.ops, name)(tables, *states, parts[0].gradient.ids, rows, *numbers.values())
        return
    for part, *kept in zip(parts, *states, strict=True):
        getattr(reference, name)(part.table, *kept, part.gradient, **numbers)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: must be > 0 and finite, got {value}")


__all__ = ["SparseAdagrad", "SparseAdam", "SparseSGD", "clip_grad_norm_"]
