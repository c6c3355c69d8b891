"""Optimisers for embeddings with sparse gradients: a step costs what the batch touches, not what the catalogue holds.

Repeated ids of a gradient are summed and the update applied row by row, in one pass over the memory, with the same bits
for any number of threads. Rows without a gradient, and their moments, stay as they are ("lazy" updates).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from metarec_fast import _library, functional, reference
from metarec_fast._arguments import DTYPES
from metarec_fast._known_gradients import sparse_tensor
from metarec_fast.results import SparseRows

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

_HUGE = 1 << 22  # bytes from which a table is worth huge pages


class _SparseOptimizer(Optimizer):
    """Walks over the parameters and their rows; a subclass says in `_update` what happens to them."""

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
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                rows = self._rows_of(parameter, number, place)
                self._update(parameter.detach(), rows, self.state[parameter], group)
                torch.autograd.graph.increment_version(parameter)
        return loss

    def _update(self, table: Tensor, gradient: SparseRows, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _rows_of(self, parameter: Tensor, number: int, place: int) -> SparseRows:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
            names = self.param_groups[number].get("param_names")
            name = f"param_groups[{number}]['params'][{place}]" if names is None else names[place]
            found = "a dense one" if gradient.layout is torch.strided else f"layout {gradient.layout}"
            if gradient.layout is torch.sparse_coo:
                found = f"{gradient.sparse_dim()} sparse dimensions"
            raise TypeError(
                f"{name}: {type(self).__name__} expects a gradient sparse in its first dimension, as "
                f"nn.Embedding(sparse=True) gives, got {found}"
            )
        return SparseRows(gradient._indices()[0], gradient._values())


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
        _check_positive(lr=lr, eps=eps)
        for place, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{place}]: must be in [0, 1), got {beta}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})

    def _update(self, table: Tensor, gradient: SparseRows, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        if not state:
            state["step"], state["exp_avg"], state["exp_avg_sq"] = 0, _new_state(table), _new_state(table)
        state["step"] += 1
        (beta1, beta2), lr, eps = group["betas"], float(group["lr"]), group["eps"]
        tables = (table, state["exp_avg"], state["exp_avg_sq"])
        if _can_run(*tables):
            torch.ops.metarec_fast.sparse_adam(*tables, *gradient, lr, beta1, beta2, eps, int(state["step"]))
        else:
            reference.sparse_adam(*tables, gradient, lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=int(state["step"]))


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
        _check_positive(lr=lr, eps=eps)
        if not 0 <= initial_accumulator_value < math.inf:
            raise ValueError(f"initial_accumulator_value: must be ≥ 0 and finite, got {initial_accumulator_value}")
        super().__init__(params, {"lr": lr, "initial_accumulator_value": initial_accumulator_value, "eps": eps})

    def _update(self, table: Tensor, gradient: SparseRows, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        if not state:
            state["sum"] = _new_state(table, group["initial_accumulator_value"])
        lr, eps = float(group["lr"]), group["eps"]
        if _can_run(table, state["sum"]):
            torch.ops.metarec_fast.sparse_adagrad(table, state["sum"], *gradient, lr, eps)
        else:
            reference.sparse_adagrad(table, state["sum"], gradient, lr=lr, eps=eps)


class SparseSGD(_SparseOptimizer):
    """p ← p − lr g on the rows that have a gradient, as `torch.optim.SGD` without momentum.

    Args:
        params: Parameters, named or not, or groups of them.
        lr: Learning rate, > 0.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, params: Parameters, lr: float = 1e-3) -> None:
        _check_positive(lr=lr)
        super().__init__(params, {"lr": lr})

    def _update(self, table: Tensor, gradient: SparseRows, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        lr = float(group["lr"])
        if _can_run(table):
            torch.ops.metarec_fast.sparse_sgd(table, *gradient, lr)
        else:
            reference.sparse_sgd(table, gradient, lr=lr)


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
    flat = SparseRows(gradient._indices()[0], rows.reshape(rows.shape[0], -1))
    return sparse_tensor(functional.coalesce_rows(flat), gradient.shape, is_coalesced=True)


def _new_state(table: Tensor, value: float = 0.0) -> Tensor:
    """A table of the same shape; where it is large, both in huge pages, which scattered rows are found in faster."""
    state = torch.empty_like(table)
    if _can_run(table, state) and table.nbytes >= _HUGE:
        torch.ops.metarec_fast.use_huge_pages(table)
        torch.ops.metarec_fast.use_huge_pages(state)
    return state.fill_(value)


def _can_run(*tables: Tensor) -> bool:
    """Whether the kernels can change these tables in place."""
    return _library.cpu.loaded and all(
        table.device.type == "cpu" and table.dtype in DTYPES and table.dim() <= 2 and table.is_contiguous()
        for table in tables
    )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: must be > 0 and finite, got {value}")


__all__ = ["SparseAdagrad", "SparseAdam", "SparseSGD", "clip_grad_norm_"]
