"""Random problems for the tests of the operators: ragged, with repeated items and empty tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarec_fast import _ops, reference
from metarec_fast._arguments import InnerLoop, Model, differentiable
from metarec_fast.results import SparseRows
from metarec_fast.tasks import Entries, TaskBatch

RAGGED = (3, 0, 1, 13, 40, 5)
DEVICE = "cpu"  # where problems are; conftest.py sets it to what `pytest --device` says


@contextmanager
def less_precise_products() -> Iterator[None]:
    """What lets a GPU take its tensor cores for products of float32."""
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(asked)


@dataclass
class Draw:
    """Random tensors of one dtype from one seed, the same numbers on every device."""

    seed: int = 0
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.generator = torch.Generator("cpu").manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, generator=self.generator, device="cpu").to(DEVICE)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=self.dtype, generator=self.generator, device="cpu").to(DEVICE)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """In low … high − 1."""
        return torch.randint(low, high, shape, generator=self.generator, device="cpu").to(DEVICE)

    def permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator, device="cpu").to(DEVICE)

    def model(self, num_items: int = 60, dim: int = 7, num_tasks: int | None = None) -> Model:
        """Rows of length about one, so that inner steps of 0.1 are stable; one start per task if `num_tasks`."""
        start = (dim,) if num_tasks is None else (num_tasks, dim)
        bias = () if num_tasks is None else (num_tasks,)
        table = self.normal(num_items, dim) / dim**0.5
        return Model(self.normal(*start), self.normal(*bias), table, self.normal(num_items), self.normal())

    def entries(
        self,
        sizes: tuple[int, ...],
        num_items: int = 60,
        *,
        weights: bool = False,
        negatives: int = 0,
        log_q: bool = False,
    ) -> Entries:
        """Few items for many entries, so that tasks repeat items and share them; targets in [0, 1]."""
        count = sum(sizes)
        items = self.integers(0, num_items, count)
        offsets = torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
        targets, entry_weights = self.uniform(count), self.uniform(count) + 0.5 if weights else None
        if not negatives:
            return Entries(items, targets, offsets, entry_weights)
        others = self.integers(0, num_items, count, negatives)
        chances = -3 * self.uniform(count, 1 + negatives) if log_q else None
        return Entries(items, None, offsets, entry_weights, others, chances)

    def batch(
        self,
        support: tuple[int, ...] = RAGGED,
        query: tuple[int, ...] | None = None,
        num_items: int = 60,
        *,
        weights: bool = False,
        negatives: int = 0,
        log_q: bool = False,
    ) -> TaskBatch:
        query = tuple((4, 2, 0, 7, 1)[t % 5] for t in range(len(support))) if query is None else query
        task_weights = self.uniform(len(support)) if weights else None
        kind = {"weights": weights, "negatives": negatives, "log_q": log_q}
        return TaskBatch(
            self.entries(support, num_items, **kind), self.entries(query, num_items, **kind), weights=task_weights
        )

    def loop(
        self, steps: int = 5, *, dim: int = 7, num_tasks: int | None = None, learned: bool = False, **settings: object
    ) -> InnerLoop:
        """`learned` sets every argument there is, per step and per task where that is possible."""
        if not learned:
            return replace(InnerLoop(0.1 * self.uniform(), steps), **settings)
        pull = self.uniform() if num_tasks is None else self.uniform(num_tasks)
        return replace(
            InnerLoop(
                0.1 * self.uniform(steps),
                steps,
                preconditioner=self.uniform(dim + 1) + 0.5,
                prior_pull=pull + 0.1,
                momentum=0.3 * self.uniform(steps),
                extra_count=2.5,
            ),
            **settings,
        )


def tracked(model: Model, batch: TaskBatch, loop: InnerLoop) -> tuple[dict[str, Tensor], Model, TaskBatch, InnerLoop]:
    """The same problem on fresh leaves that require gradients, and these leaves by name."""
    values = differentiable(model, loop, batch.support)
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items() if value is not None}
    tracked_support = batch.support.with_weights(leaves.get("support_weights"))
    return (
        leaves,
        Model(*(leaves[name] for name in ("user_init", "user_bias_init", "item_table", "item_bias", "offset"))),
        TaskBatch(tracked_support, batch.query, weights=batch.weights),
        replace(
            loop,
            inner_lr=leaves["inner_lr"],
            **{name: leaves.get(name) for name in ("preconditioner", "prior_pull", "momentum")},
        ),
    )


def relative_error(actual: Tensor | SparseRows, expected: Tensor | SparseRows) -> float:
    """max |difference| / max |expected|; entry by entry for rows."""
    if isinstance(actual, SparseRows) and isinstance(expected, SparseRows):
        assert torch.equal(actual.ids, expected.ids)
        actual, expected = actual.rows, expected.rows
    assert isinstance(actual, Tensor)
    assert isinstance(expected, Tensor)
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    largest = float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    return difference if largest == 0 else difference / largest


def compare_with_reference(model, batch, loop, losses, step_weights=None, *, unmoved=()):
    """meta_step's kernels against the reference: the loss and every gradient to 1e-10, and those `unmoved` zero.

    Rows are compared entry by entry; where items adapt, whose gradients the reference sums by id, as dense tables.
    """
    actual = _ops.meta_step(model, batch, loop, losses, step_weights)
    expected = reference.meta_step(model, batch, loop, losses, step_weights)
    assert relative_error(actual.loss, expected.loss) < 1e-10
    assert actual.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():
        pair = [actual.grads[name], gradient]
        if loop.adapt == "all":
            pair = [each.to_dense(len(model.item_bias)) if isinstance(each, SparseRows) else each for each in pair]
        if name in unmoved:
            assert pair[0].abs().max() < 1e-14
        else:
            assert relative_error(*pair) < 1e-10, name
