"""Times one meta-gradient, ours beside torch.func: equality first, then interleaved runs, minimum and median."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from metarec_fast import Entries, TaskBatch
from metarec_fast import functional as F


class Workload:
    """The user side: T tasks of S = Q ratings, K inner steps, ids uniform over N items of width D."""

    def __init__(self, tasks: int, items: int, dim: int, size: int, steps: int) -> None:
        torch.manual_seed(0)
        self.shape, self.steps, self.inner_lr = (tasks, size), steps, 0.1
        self.table, self.bias, self.user = torch.randn(items, dim) * 0.1, torch.randn(items) * 0.1, torch.randn(dim)
        self.batch = TaskBatch(self._entries(tasks, items, size), self._entries(tasks, items, size))

    @staticmethod
    def _entries(tasks: int, items: int, size: int) -> Entries:
        offsets = torch.arange(tasks + 1) * size
        return Entries(torch.randint(items, (tasks * size,)), 1 + 4 * torch.rand(tasks * size), offsets)


def ours(work: Workload) -> Callable[[], list[Tensor]]:
    def step() -> list[Tensor]:
        result = F.meta_step(
            work.user, work.table, work.bias, work.batch, inner_lr=work.inner_lr, inner_steps=work.steps
        )
        return [result.grads["user_init"], result.grads["item_table"].rows, result.grads["item_bias"].rows]

    return step


def torch_func(work: Workload, compiled: bool = False) -> Callable[[], list[Tensor]]:
    """vmap of grad through the inner loop, on rows gathered beforehand: the same row gradients as ours."""
    support, query = work.batch.support, work.batch.query
    assert query is not None
    ids = [entries.items.view(work.shape) for entries in (support, query)]
    targets = [entries.targets.view(work.shape) for entries in (support, query)]

    def task_loss(user, bias, rows, biases, query_rows, query_biases, known, asked):
        def inner_loss(fast):
            return ((rows @ fast[0] + fast[1] + biases - known) ** 2).mean()

        fast = (user, bias)
        for _ in range(work.steps):
            slope = grad(inner_loss)(fast)
            fast = (fast[0] - work.inner_lr * slope[0], fast[1] - work.inner_lr * slope[1])
        return ((query_rows @ fast[0] + fast[1] + query_biases - asked) ** 2).mean()

    def loss(user, bias, *gathered):
        return vmap(task_loss, in_dims=(None, None, 0, 0, 0, 0, 0, 0))(user, bias, *gathered, *targets).mean()

    gradients = grad(loss, argnums=(0, 1, 2, 3, 4, 5))
    if compiled:
        gradients = torch.compile(gradients)

    def step() -> list[Tensor]:
        gathered = [part for each in ids for part in (work.table[each], work.bias[each])]
        user, _, rows, biases, query_rows, query_biases = gradients(work.user, torch.zeros(()), *gathered)
        dim = rows.shape[-1]
        return [
            user,
            torch.cat([rows.reshape(-1, dim), query_rows.reshape(-1, dim)]),
            torch.cat([biases.reshape(-1), query_biases.reshape(-1)]),
        ]

    return step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--compiled", action="store_true", help="torch.compile'd vmap(grad) too; compiles for a minute")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = Workload(tasks=256, items=100_000, dim=64, size=16, steps=5)
    peers = {"metarec_fast": ours(work), "torch.func eager": torch_func(work)}
    if options.compiled:
        peers["torch.func compiled"] = torch_func(work, compiled=True)

    expected = peers["metarec_fast"]()
    for name, step in peers.items():
        for actual, wanted in zip(step(), expected, strict=True):
            # Both sum about 4,000 float32 numbers, in different orders: √4000 · 2⁻²⁴ · 10 of the largest is ample.
            torch.testing.assert_close(actual, wanted, rtol=0, atol=4e-5 * float(wanted.abs().max()), msg=name)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(options.repeats):
        for name, step in peers.items():
            begin = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - begin))
    print(f"user side, T=256 N=100k D=64 S=Q=16 K=5, float32, {options.threads} threads, torch {torch.__version__}")
    fastest = min(times["metarec_fast"])
    for name, taken in times.items():
        print(f"{name:20s} min {min(taken):8.3f} ms   median {statistics.median(taken):8.3f} ms"
              f"   {min(taken) / fastest:5.1f}×")  # fmt: skip


if __name__ == "__main__":
    main()
