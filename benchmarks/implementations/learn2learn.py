"""learn2learn (Arnold et al. 2020): a loop over users, each a `clone` of its MAML wrapper."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from benchmarks.implementations.optional import missing_package
from benchmarks.implementations.python_loop import Adapt, loop_peer
from benchmarks.workloads import Workload


def _adapt(work: Workload) -> Adapt:
    from learn2learn.algorithms import MAML

    def adapt(model: nn.Module, inner: Callable[[nn.Module], Tensor], outer: Callable[[nn.Module], Tensor]) -> Tensor:
        fast = MAML(model, lr=work.inner_lr, first_order=work.first_order).clone()
        for _ in range(work.steps):
            fast.adapt(inner(fast))
        return outer(fast)

    return adapt


# Its last release, 0.2.0, ships C sources that Python 3.11 and newer cannot compile.
PEERS = (
    loop_peer("learn2learn", _adapt, missing_package("learn2learn", "pip install learn2learn, up to Python 3.10")),
)
