"""higher (Grefenstette et al. 2019): a loop over users, each in an `innerloop_ctx` with a differentiable SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.implementations.optional import missing_package
from benchmarks.implementations.python_loop import Adapt, loop_peer
from benchmarks.workloads import Workload


def _adapt(work: Workload) -> Adapt:
    import higher

    def adapt(model: nn.Module, inner: Callable[[nn.Module], Tensor], outer: Callable[[nn.Module], Tensor]) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=work.inner_lr)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fast, steps):
            for _ in range(work.steps):
                steps.step(inner(fast))
            return outer(fast)

    return adapt


# Without higher gradients its fast weights are cut off from the start, so there is no first order.
PEERS = (loop_peer("higher", _adapt, missing_package("higher"), first_order=False),)
