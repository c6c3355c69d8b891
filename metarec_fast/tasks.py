"""Ragged batches of few-shot tasks: what to adapt on (support) and what to predict (query)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metarec_fast._ids import as_column


class Entries:
    """Ratings of many tasks, one after the other: task t owns `items[offsets[t]:offsets[t + 1]]`.

    Checked once, when made, so that operators need not look at the values again. Looking at values on a GPU waits for
    it: make entries on the CPU, and move them.

    Args:
        items: Item ids, int64 [n], ≥ 0.
        targets: What was observed, float [n]; None where nothing was (entries to be scored only).
        offsets: Where each task begins and the last one ends, int64 [T + 1], from 0 to n, never decreasing.
        weights: How much each entry counts, float [n], > 0; None counts all alike.
        negatives: Items that were not chosen, int64 [n] or [n, M].
        log_q: Log-probability with which each candidate was drawn, float [n, 1 + M], the entry's own first.

    Raises:
        TypeError: An argument is no tensor, or has another dtype.
        ValueError: Shapes, devices, offsets or values do not fit.
        IndexError: An id is negative.
    """

    items: Tensor  # [n]
    targets: Tensor | None  # [n]
    offsets: Tensor  # [T + 1]
    weights: Tensor | None  # [n]
    negatives: Tensor | None  # [n] or [n, M]
    log_q: Tensor | None  # [n, 1 + M]
    max_size: int  # entries of the largest task
    size_bound: int  # at least max_size, of few different values, so that what is compiled for it serves most batches
    max_item: int  # at least the largest id, negatives included; −1 where there is none

    def __init__(
        self,
        items: Tensor,
        targets: Tensor | None,
        offsets: Tensor,
        weights: Tensor | None = None,
        negatives: Tensor | None = None,
        log_q: Tensor | None = None,
    ) -> None:
        self._set(items, targets, offsets, weights, negatives, log_q)
        self._bound(*_check_entries(self))

    def _set(
        self,
        items: Tensor,
        targets: Tensor | None,
        offsets: Tensor,
        weights: Tensor | None,
        negatives: Tensor | None,
        log_q: Tensor | None,
    ) -> None:
        self.items, self.targets, self.offsets = items, targets, offsets
        self.weights, self.negatives, self.log_q = weights, negatives, log_q

    def _bound(self, max_size: int, max_item: int) -> None:
        self.max_size, self.max_item = max_size, max_item
        self.size_bound = max(8, 1 << (max_size - 1).bit_length())  # a power of two

    @classmethod
    def unchecked(
        cls,
        items: Tensor,
        targets: Tensor | None,
        offsets: Tensor,
        weights: Tensor | None = None,
        negatives: Tensor | None = None,
        log_q: Tensor | None = None,
        *,
        max_size: int,
        max_item: int,
    ) -> Entries:
        """The same for a caller that guarantees what the constructor checks, as a sampler does."""
        entries = cls.__new__(cls)
        entries._set(items, targets, offsets, weights, negatives, log_q)
        entries._bound(max_size, max_item)
        return entries

    @property
    def num_tasks(self) -> int:
        return self.offsets.numel() - 1

    def __len__(self) -> int:
        return self.items.numel()

    @property
    def negative_rows(self) -> Tensor | None:
        """The negatives as int64 [n, M], whatever shape they were given in."""
        negatives = self.negatives
        return negatives if negatives is None or negatives.dim() == 2 else negatives[:, None]

    @property
    def candidates(self) -> int:
        """1 + M, of an entry: its item and its negatives."""
        rows = self.negative_rows
        return 1 if rows is None else 1 + rows.shape[1]

    def sizes(self) -> Tensor:
        """Entries of each task, int64 [T]."""
        return self.offsets.diff()

    def task_ids(self) -> Tensor:
        """The task that each entry belongs to, int64 [n]."""
        tasks = torch.arange(self.num_tasks, device=self.offsets.device)
        return tasks.repeat_interleave(self.sizes(), output_size=len(self))

    def with_items(self, items: Tensor, negatives: Tensor | None = None, *, max_item: int | None = None) -> Entries:
        """The same entries under other ids (rows of a block, say), which the caller guarantees to be ≥ 0.

        `max_item` is at least the largest of them, negatives included; None looks for it, and so waits for a GPU.
        """
        if max_item is None:
            max_item = max(_largest(items), _largest(negatives))
        return Entries.unchecked(
            items, self.targets, self.offsets, self.weights, negatives, self.log_q,
            max_size=self.max_size, max_item=max_item,
        )  # fmt: skip

    def with_weights(self, weights: Tensor | None) -> Entries:
        """The same entries with other weights [n], which the caller guarantees to be > 0."""
        return Entries.unchecked(
            self.items, self.targets, self.offsets, weights, self.negatives, self.log_q, max_size=self.max_size,
            max_item=self.max_item,
        )  # fmt: skip

    def without_negatives(self) -> Entries:
        """The same entries for a loss that compares with nothing."""
        return Entries.unchecked(
            self.items, self.targets, self.offsets, self.weights, max_size=self.max_size, max_item=self.max_item
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False) -> Entries:
        """A copy on `device`; targets, weights and log_q as `dtype` where it is given."""
        return self._map(_mover(device, dtype, non_blocking))

    def pin_memory(self) -> Entries:
        """A copy in page-locked memory, from which `to(device, non_blocking=True)` overlaps."""
        return self._map(Tensor.pin_memory)

    def _map(self, convert: Callable[[Tensor], Tensor]) -> Entries:
        optional = _optionally(convert)
        return Entries.unchecked(
            convert(self.items), optional(self.targets), convert(self.offsets), optional(self.weights),
            optional(self.negatives), optional(self.log_q), max_size=self.max_size, max_item=self.max_item,
        )  # fmt: skip

    def __repr__(self) -> str:
        parts = [f"tasks={self.num_tasks}", f"entries={len(self)}", f"max_size={self.max_size}"]
        parts += [name for name in ("targets", "weights", "negatives", "log_q") if getattr(self, name) is not None]
        return f"Entries({', '.join(parts)})"


class TaskBatch:
    """A batch of tasks: adapt each on its support entries, judge it on its query entries.

    Args:
        support: The entries to adapt on, T tasks (an empty one leaves its task at the start).
        query: The entries to predict, the same T tasks; None where a learner needs none.
        users: Which user each task is, int64 [T]; informative.
        weights: ω, how much each task counts in the outer loss, float [T], ≥ 0; None counts all alike.
        unique_items: The distinct item ids of the batch, int64 [U], ascending, if known in advance.
        local: The same batch with ids replaced by positions in `unique_items`, if known in advance.
        user_ids: Original ids of the users, [T], by which a model finds their features; None if it has none to find.

    Raises:
        TypeError: An argument has another type or dtype.
        ValueError: support and query differ in their number of tasks, or another size does not fit.
    """

    def __init__(
        self,
        support: Entries,
        query: Entries | None = None,
        users: Tensor | None = None,
        weights: Tensor | None = None,
        unique_items: Tensor | None = None,
        local: TaskBatch | None = None,
        user_ids: Any = None,
    ) -> None:
        self._set(support, query, users, weights, unique_items, local, user_ids)
        _check_batch(self)

    def _set(
        self,
        support: Entries,
        query: Entries | None,
        users: Tensor | None,
        weights: Tensor | None,
        unique_items: Tensor | None,
        local: TaskBatch | None,
        user_ids: Any,
    ) -> None:
        self.support, self.query, self.users, self.weights = support, query, users, weights
        self.user_ids = user_ids
        self._unique_items, self._local = unique_items, local

    @classmethod
    def unchecked(
        cls,
        support: Entries,
        query: Entries | None = None,
        users: Tensor | None = None,
        weights: Tensor | None = None,
        unique_items: Tensor | None = None,
        local: TaskBatch | None = None,
        user_ids: Any = None,
    ) -> TaskBatch:
        """The same for a caller that guarantees what the constructor checks: looking at weights waits for a GPU."""
        batch = cls.__new__(cls)
        batch._set(support, query, users, weights, unique_items, local, user_ids)
        return batch

    def with_entries(self, support: Entries, query: Entries | None) -> TaskBatch:
        """The same tasks with other entries, as many tasks of each."""
        return TaskBatch.unchecked(support, query, self.users, self.weights, user_ids=self.user_ids)

    @property
    def num_tasks(self) -> int:
        return self.support.num_tasks

    def localize(self) -> tuple[Tensor, TaskBatch]:
        """The distinct item ids [U] of the batch, ascending, and the batch with ids into them.

        What a table of embeddings is asked for: look up the U rows once, and let every entry point at its row. Found
        once, and kept when the batch moves; how many there are, a GPU has to be waited for.
        """
        if self._unique_items is None or self._local is None:
            self._unique_items, self._local = _localize(self)
        return self._unique_items, self._local

    def with_weights(self, weights: Tensor | None) -> TaskBatch:
        """The same batch with other task weights ω, [T], ≥ 0."""
        return TaskBatch(self.support, self.query, self.users, weights, self._unique_items, self._local, self.user_ids)

    def with_negatives_of(self, *, support: bool, query: bool) -> TaskBatch:
        """The same batch, of whose negatives only those of the parts named are left."""
        local = None if self._local is None else self._local.with_negatives_of(support=support, query=query)
        return TaskBatch.unchecked(
            self.support if support else self.support.without_negatives(),
            self.query if query or self.query is None else self.query.without_negatives(),
            self.users,
            self.weights,
            self._unique_items,
            local,
            self.user_ids,
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False) -> TaskBatch:
        """A copy on `device`; everything that is real-valued as `dtype` where it is given."""
        return self._map(_mover(device, dtype, non_blocking))

    def pin_memory(self) -> TaskBatch:
        """A copy in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, convert: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The batch with every tensor converted, each once: the local batch shares all but its ids."""
        converted: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in converted:
                converted[id(tensor)] = convert(tensor)
            return converted[id(tensor)]

        return self._map_once(once)

    def _map_once(self, convert: Callable[[Tensor], Tensor]) -> TaskBatch:
        optional = _optionally(convert)
        return TaskBatch.unchecked(
            self.support._map(convert),
            None if self.query is None else self.query._map(convert),
            optional(self.users),
            optional(self.weights),
            optional(self._unique_items),
            None if self._local is None else self._local._map_once(convert),
            self.user_ids,
        )

    def __repr__(self) -> str:
        return f"TaskBatch(tasks={self.num_tasks}, support={self.support!r}, query={self.query!r})"


def _mover(device: torch.device | str, dtype: torch.dtype | None, non_blocking: bool) -> Callable[[Tensor], Tensor]:
    """Moves a tensor to `device`, and to `dtype` if it is real-valued and one is given."""

    def move(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, kind, non_blocking=non_blocking)

    return move


def _optionally(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor | None], Tensor | None]:
    return lambda tensor: None if tensor is None else convert(tensor)


def _largest(ids: Tensor | None) -> int:
    return -1 if ids is None or ids.numel() == 0 else int(ids.max())


def _localize(batch: TaskBatch) -> tuple[Tensor, TaskBatch]:
    parts: list[Tensor] = []
    for entries in (batch.support, batch.query):
        if entries is not None:
            parts += [entries.items] + ([] if entries.negatives is None else [entries.negatives])
    unique, inverse = torch.unique(torch.cat([part.reshape(-1) for part in parts]), return_inverse=True)
    pieces = iter(inverse.split([part.numel() for part in parts]))

    def local(entries: Entries) -> Entries:
        items = next(pieces)
        negatives = None if entries.negatives is None else next(pieces).view_as(entries.negatives)
        return entries.with_items(items, negatives, max_item=len(unique) - 1)

    support = local(batch.support)
    query = None if batch.query is None else local(batch.query)
    return unique, batch.with_entries(support, query)


def _check_entries(entries: Entries) -> tuple[int, int]:
    """Raises if anything is amiss; returns the size of the largest task and the largest id."""
    items, offsets = entries.items, entries.offsets
    _check_tensor("items", items, (torch.int64,), "[n]", items, dims=(1,))
    _check_tensor("offsets", offsets, (torch.int64,), "[T + 1]", items, dims=(1,))
    n = items.numel()
    real = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for name, value, dtypes, dims in (
        ("targets", entries.targets, real, (1,)),
        ("weights", entries.weights, real, (1,)),
        ("negatives", entries.negatives, (torch.int64,), (1, 2)),
        ("log_q", entries.log_q, real, (2,)),
    ):
        if value is None:
            continue
        _check_tensor(name, value, dtypes, "[n]" if dims == (1,) else "[n, ...]", items, dims)
        if value.shape[0] != n:
            raise ValueError(f"{name}: expected {n} entries, one per item, got {value.shape[0]}")
        if value.dim() == 2 and value.shape[1] == 0:
            raise ValueError(f"{name}: expected at least one for each item, got shape {tuple(value.shape)}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            where = int((~value.isfinite().reshape(n, -1).all(1)).nonzero()[0])
            raise ValueError(f"{name}: values must be finite, got {value[where].tolist()} at position {where}")
    if entries.weights is not None and bool((entries.weights <= 0).any()):
        where = int((entries.weights <= 0).nonzero()[0])
        raise ValueError(f"weights: must be > 0, got {float(entries.weights[where])} at position {where}")
    if entries.log_q is not None:
        width = 1 + (0 if entries.negative_rows is None else entries.negative_rows.shape[1])
        if entries.negatives is None or (n and entries.log_q.shape[1] != width):
            raise ValueError(
                f"log_q: expected shape [n, 1 + M] beside negatives [n, M], got {tuple(entries.log_q.shape)}"
            )

    if offsets.numel() == 0:
        raise ValueError("offsets: expected shape [T + 1], so at least one number, got none")
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != n:
        raise ValueError(f"offsets: must run from 0 to {n}, the number of items, got {bounds[0]} to {bounds[-1]}")
    sizes = [end - begin for begin, end in pairwise(bounds)]
    if sizes and min(sizes) < 0:
        where = next(t for t, size in enumerate(sizes) if size < 0)
        raise ValueError(
            f"offsets: must not decrease, got {bounds[where]} then {bounds[where + 1]} at position {where}"
        )

    for name, ids in (("items", items), ("negatives", entries.negatives)):
        if ids is not None and ids.numel() and int(ids.min()) < 0:
            where = int((ids.reshape(-1) < 0).nonzero()[0])
            raise IndexError(f"{name}: ids must be ≥ 0, got {int(ids.reshape(-1)[where])} at position {where}")
    return max(sizes, default=0), max(_largest(items), _largest(entries.negatives))


def _check_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], shape: str, like: Tensor, dims: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    if isinstance(like, Tensor) and value.device != like.device:
        raise ValueError(f"{name}: expected to be on {like.device}, like items, got {value.device}")


def _check_batch(batch: TaskBatch) -> None:
    for name, entries in (("support", batch.support), ("query", batch.query)):
        if not isinstance(entries, Entries) and not (name == "query" and entries is None):
            raise TypeError(f"{name}: expected Entries, got {type(entries).__name__}")
    tasks = batch.support.num_tasks
    if batch.query is not None and batch.query.num_tasks != tasks:
        raise ValueError(f"query: expected {tasks} tasks, like support, got {batch.query.num_tasks}")
    if batch.user_ids is not None and len(as_column("user_ids", batch.user_ids)) != tasks:
        raise ValueError(f"user_ids: expected {tasks}, one per task, got {len(batch.user_ids)}")
    for name, value in (("users", batch.users), ("weights", batch.weights)):
        if value is not None and tuple(value.shape) != (tasks,):
            raise ValueError(f"{name}: expected shape [{tasks}], one per task, got {tuple(value.shape)}")
    if batch.weights is not None:
        check_not_negative("weights", batch.weights)


def check_not_negative(name: str, values: Tensor) -> None:
    """Raises unless all are finite and ≥ 0."""
    if not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"{name}: must be finite and ≥ 0")
