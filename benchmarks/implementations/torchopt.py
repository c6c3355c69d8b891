"""TorchOpt (Ren et al. 2023): a loop over users with its functional differentiable SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.implementations.optional import missing_package
from benchmarks.implementations.python_loop import Adapt, loop_peer
from benchmarks.workloads import Workload


def _adapt(work: Workload) -> Adapt:
    import torchopt

    optimizer = torchopt.sgd(lr=work.inner_lr)

    def adapt(model: nn.Module, inner: Callable[[nn.Module], Tensor], outer: Callable[[nn.Module], Tensor]) -> Tensor:
        names = [name for name, _ in model.named_parameters()]
        fast = tuple(model.parameters())

        def called(values: tuple[Tensor, ...]) -> Callable[..., Tensor]:
            return lambda *inputs: torch.func.functional_call(model, dict(zip(names, values, strict=True)), inputs)

        state = optimizer.init(fast)
        for _ in range(work.steps):
            slopes = torch.autograd.grad(inner(called(fast)), fast, create_graph=not work.first_order)
            updates, state = optimizer.update(slopes, state, params=fast, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        return outer(called(fast))

    return adapt


PEERS = (loop_peer("TorchOpt", _adapt, missing_package("torchopt")),)
