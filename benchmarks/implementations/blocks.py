"""What all peers share: tasks side by side in rectangles [T, S], their rows gathered, their gradients named as ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.workloads import Problem, Workload
from metarec_fast import Entries, SparseRows, TaskBatch

# A tensor, or the gradient rows of a table, in as many blocks as the implementation has them.
Outputs = Mapping[str, Tensor | Sequence[SparseRows]]
Step = Callable[[], Outputs]


@dataclass(frozen=True)
class Rectangle:
    """Entries as rectangles; a task that is shorter than the longest is padded with item 0 at weight 0."""

    items: Tensor  # [T, S]
    negatives: Tensor | None  # [T, S]
    targets: Tensor  # [T, S]
    weights: Tensor | float  # 1/S; [T, S] where sizes differ

    @staticmethod
    def of(entries: Entries, width: int | None = None) -> Rectangle:
        """Views where all tasks have `width` entries; None looks at the sizes and pads if they differ."""
        assert entries.targets is not None
        if width is None and int(entries.sizes().min()) == entries.max_size:
            width = entries.max_size
        if width is not None:
            shape = (entries.num_tasks, width)
            negatives = None if entries.negatives is None else entries.negatives.view(shape)
            return Rectangle(entries.items.view(shape), negatives, entries.targets.view(shape), 1 / width)

        sizes = entries.sizes()
        kept = torch.arange(entries.max_size, device=sizes.device) < sizes[:, None]  # [T, S]

        def pad(values: Tensor) -> Tensor:
            return values.new_zeros(kept.shape).masked_scatter_(kept, values)

        negatives = None if entries.negatives is None else pad(entries.negatives)
        return Rectangle(pad(entries.items), negatives, pad(entries.targets), kept / sizes.to(entries.targets)[:, None])


@dataclass(frozen=True)
class Blocks:
    """The item ids of a batch in the order of our gradient rows, and what the losses need."""

    support: Rectangle
    query: Rectangle | None

    @staticmethod
    def of(batch: TaskBatch, support: int | None = None, query: int | None = None) -> Blocks:
        return Blocks(
            Rectangle.of(batch.support, support), None if batch.query is None else Rectangle.of(batch.query, query)
        )

    @cached_property
    def ids(self) -> list[Tensor]:
        """[support items, support negatives, query items, query negatives], each [T, ·]; those that there are."""
        parts = [
            part for side in (self.support, self.query) if side is not None for part in (side.items, side.negatives)
        ]
        return [part for part in parts if part is not None]

    @cached_property
    def flat_ids(self) -> list[Tensor]:
        return [each.view(-1) for each in self.ids]

    def gather(self, item_table: Tensor, item_bias: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Rows [T, ·, D] and biases [T, ·] of each block. `index_select` is torch's fastest gather."""
        dim, shapes = item_table.shape[1], [each.shape for each in self.ids]
        rows = [
            item_table.index_select(0, ids).view(*shape, dim) for ids, shape in zip(self.flat_ids, shapes, strict=True)
        ]
        return rows, [
            item_bias.index_select(0, ids).view(shape) for ids, shape in zip(self.flat_ids, shapes, strict=True)
        ]

    def named(
        self,
        loss: Tensor,
        user: Tensor,
        user_bias: Tensor,
        rows: Sequence[Tensor | None],
        biases: Sequence[Tensor | None],
    ) -> Outputs:
        """Gradients under our names; blocks without a gradient are None."""
        return {
            "loss": loss,
            "user_init": user,
            "user_bias_init": user_bias,
            "item_table": [
                SparseRows(ids, row.flatten(0, 1))
                for ids, row in zip(self.flat_ids, rows, strict=True)
                if row is not None
            ],
            "item_bias": [
                SparseRows(ids, bias.flatten())
                for ids, bias in zip(self.flat_ids, biases, strict=True)
                if bias is not None
            ],
        }


# (user, user_bias, rows, biases, blocks) → loss, gradients of the user vector, the user bias, rows and biases
Gradients = Callable[[Tensor, Tensor, list[Tensor], list[Tensor], Blocks], tuple]


def gathered_step(problem: Problem, gradients: Gradients) -> Step:
    """One call: gather, as ours does, then the gradients. The rectangles are made beforehand, for free."""
    blocks = Blocks.of(problem.batch)

    def step() -> Outputs:
        rows, biases = blocks.gather(problem.item_table, problem.item_bias)
        return blocks.named(*gradients(problem.user, problem.user_bias, rows, biases, blocks))

    return step


@dataclass(frozen=True)
class Peer:
    """An implementation to compare with.

    `effort` says which runs take it on a workload: "quick" all, "normal" those without `--quick`, "all" only `--all`,
    None where the implementation cannot do it.
    """

    name: str
    prepare: Callable[[Problem], Step]
    effort: Callable[[Workload], str | None]
    missing: Callable[[], str | None] = lambda: None
    compiles: bool = False
