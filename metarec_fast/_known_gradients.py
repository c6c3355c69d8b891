"""Losses whose gradients are known already, as autograd sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metarec_fast.results import SparseRows


class Once(torch.autograd.Function):
    """Gradients that can be computed but not differentiated: silent zeros would be wrong."""

    @staticmethod
    def forward(ctx: Any, name: str, compute: Callable[..., tuple[Any, ...]], *inputs: Any) -> tuple[Any, ...]:
        ctx.name = name
        return compute(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} cannot be differentiated twice")


def backward(loss: Tensor) -> None:
    """As `loss.backward()`, whose factor 1 is known as such: nobody could look at it on a GPU without waiting."""
    one = torch.ones_like(loss)
    setattr(one, _IS_ONE, True)
    loss.backward(one)


def is_known_one(factor: Tensor) -> bool:
    """Whether it comes from `backward`, so that nothing need be multiplied by it."""
    return bool(getattr(factor, _IS_ONE, False))


_IS_ONE = "_metarec_fast_is_one"


class KnownGradients(torch.autograd.Function):
    """The same loss, with the given gradients: `apply(name, loss, gradients, *inputs)`, one gradient per input.

    A gradient is a tensor like its input, or the SparseRows of a table, which arrive as an uncoalesced sparse tensor
    without a copy. Rows are given away: the caller must not use them, and a second `backward` cannot have them again.
    """

    @staticmethod
    def forward(ctx: Any, name: str, loss: Tensor, gradients: Sequence[Tensor | SparseRows], *inputs: Tensor) -> Tensor:
        ctx.name, ctx.gradients = name, list(gradients)
        ctx.save_for_backward(*inputs)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]

        def scale(grad_loss: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
            # On the CPU looking at the number costs nothing; elsewhere it would wait for the device, or break a graph.
            looks = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
            one = is_known_one(grad_loss) or (looks and float(grad_loss) == 1)
            factor = None if one else grad_loss
            return tuple(
                _scaled(ctx, place, factor, value.shape) if needed[place] else None
                for place, value in enumerate(inputs)
            )

        no_name, no_loss, no_gradients = None, None, None
        if torch.is_grad_enabled():  # somebody wants to differentiate what we return
            return no_name, no_loss, no_gradients, *Once.apply(ctx.name, scale, grad_loss, *ctx.saved_tensors)
        return no_name, no_loss, no_gradients, *scale(grad_loss, *ctx.saved_tensors)


def sparse_tensor(gradient: SparseRows, shape: torch.Size, *, is_coalesced: bool = False) -> Tensor:
    """The rows as a sparse tensor of a table's shape [N, …], sharing their memory."""
    rows = gradient.rows
    if rows.shape[1:] != shape[1:]:
        rows = rows.reshape(-1, *shape[1:])
    return torch.sparse_coo_tensor(gradient.ids[None], rows, shape, check_invariants=False, is_coalesced=is_coalesced)


def _scaled(ctx: Any, place: int, factor: Tensor | None, shape: torch.Size) -> Tensor:
    """The gradient of an input, times the factor; None stands for 1."""
    gradient = ctx.gradients[place]
    if isinstance(gradient, Tensor):
        return gradient.clone() if factor is None else factor * gradient
    if gradient is None:
        raise RuntimeError(f"{ctx.name}: an earlier backward has given the rows of this loss away; compute it again")
    ctx.gradients[place] = None
    if factor is not None:
        gradient.rows.mul_(factor)
    return sparse_tensor(gradient, shape)
