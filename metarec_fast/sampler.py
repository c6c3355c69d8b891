"""Batches of few-shot tasks from a log: a task is a user, whose ratings are divided into support and query."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import _numpy_sampler, _random
from metarec_fast._columns import as_int
from metarec_fast._ids import plain
from metarec_fast._numpy_sampler import REST, SampledEntries
from metarec_fast._transfer import Carrier, Sent
from metarec_fast.data import Interactions
from metarec_fast.tasks import Entries, TaskBatch

try:
    from metarec_fast import _tasks
except ImportError:  # not built: NumPy serves, with the same batches
    _tasks = None  # type: ignore[assignment, unused-ignore]

Size = int | tuple[int, int] | Literal["rest"]

_PREFETCH_FROM = 1 << 14  # entries of a batch: a millisecond's work, of which a thread takes over most


class TaskSampler:
    """Iterating it gives one epoch of batches, and then moves on to the next epoch.

    A user with n ratings, for whom sizes s and q are drawn, gives min(s, n − 1) of them to the support set and
    min(q, rest) to the query set, at least one. Users with fewer than two ratings are skipped (without a query: with
    none). The support comes first: a user with few ratings has a small query set, and with `support="rest"` it is the
    query set that comes first.

    A batch is a pure function of (seed, epoch, its index in the epoch): of no state, no thread count, no prefetching,
    and of neither implementation (`metarec_fast/_random.py` says how numbers are drawn). Batches carry `users`
    (positions in the log) and `user_ids`, and their distinct items and local ids are known in advance.

    Args:
        log: The interactions. Not copied, and not to be changed meanwhile.
        support: Ratings to adapt on: a number ≥ 0, a range (low, high) from which each user and epoch draws, both ends
            included, or "rest", all that the query leaves.
        query: Ratings to predict: a number ≥ 1, a range, "rest", or None (or 0) for batches without a query.
        batch_size: Users in a batch, ≥ 1.
        order: "random": the ratings are drawn at random. "time": the support are the user's earliest ratings and the
            query those right after (the log's order where it has no times).
        seed: Any int.
        negatives: M ≥ 0 items, which the user has not rated, for every entry: drawn uniformly, in `negatives` [n, M].
        shuffle: Whether users come in another random order every epoch, or ascending. Ratings are drawn by epoch
            either way.
        drop_last: Whether to leave out a last batch that is smaller than the others.
        backend: "c++", "numpy" (right, slower), or "auto": C++ if it is built.
        prefetch: Batches that a background thread computes ahead, ≥ 0. By default 2 if they go to a GPU or are large,
            and 0 if they are small: then the thread and its user wait for each other longer than a batch takes.
        device: Where batches are delivered. The background thread copies them to a GPU, from page-locked memory and on
            a stream of its own; they are ready for work on the stream that is current when they are taken.

    Attributes:
        epoch: The epoch that the next iteration gives; `set_epoch` changes it.
        num_tasks: Users that take part.
        num_skipped: Users that have too few ratings to take part.

    Raises:
        ValueError, TypeError: An argument is out of range; no user has enough ratings; negatives are wanted for a
            user who has rated the whole catalogue.
        ImportError: backend="c++" and it is not built.
    """

    def __init__(
        self,
        log: Interactions,
        support: Size = 10,
        query: Size | None = 10,
        batch_size: int = 256,
        order: Literal["random", "time"] = "random",
        seed: int = 0,
        negatives: int = 0,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        backend: Literal["auto", "c++", "numpy"] = "auto",
        prefetch: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not isinstance(log, Interactions):
            raise TypeError(f"log: expected Interactions, got {type(log).__name__}")
        self.log = log
        self.query_range = (0, 0) if query is None else size_range("query", query, 0)
        self.support_range = size_range("support", support, 0)
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.negatives = _at_least("negatives", negatives, 0)
        self.order, self.seed = order, as_int("seed", seed)
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = 0
        if order not in ("random", "time"):
            raise ValueError(f'order: expected "random" or "time", got {order!r}')
        _check_ranges(self.support_range, self.query_range)

        least = 1 if self.query_range == (0, 0) else 2
        sizes = log.sizes()
        self._users = np.flatnonzero(sizes >= least)  # [num_tasks], ascending
        self.num_tasks = len(self._users)
        self.num_skipped = log.num_users - self.num_tasks
        self._check_users(least, sizes)
        self.backend = _choose_backend(backend)
        self._sampler = _new_sampler(self)
        self._carrier = Carrier(torch.device(device))
        self.prefetch = self._default_prefetch() if prefetch is None else _at_least("prefetch", prefetch, 0)

    def __len__(self) -> int:
        """Batches of an epoch."""
        whole, part = divmod(self.num_tasks, self.batch_size)
        return whole if self.drop_last or part == 0 else whole + 1

    def __iter__(self) -> Iterator[TaskBatch]:
        return self._iterate(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration gives, ≥ 0."""
        self.epoch = _at_least("epoch", epoch, 0)

    def batch(self, index: int, epoch: int | None = None) -> TaskBatch:
        """The batch at an index of an epoch (default: the current one), without iterating.

        Raises:
            IndexError: There is no such batch.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: must be in [0, {len(self)}), got {index}")
        at_epoch = self.epoch if epoch is None else _at_least("epoch", epoch, 0)
        return self._carrier.receive(self._send(self._order(at_epoch), at_epoch, index))

    def _iterate(self, epoch: int) -> Iterator[TaskBatch]:
        order = self._order(epoch)
        if self.prefetch == 0:
            for index in range(len(self)):
                yield self._carrier.receive(self._send(order, epoch, index))
        else:
            # Leaving the block, by an exception or by a closed generator too, ends the thread.
            pool = ThreadPoolExecutor(1, thread_name_prefix="TaskSampler")
            try:
                ahead: deque[Future[Sent]] = deque()
                for index in range(len(self)):
                    ahead.append(pool.submit(self._send, order, epoch, index))
                    if len(ahead) > self.prefetch:
                        yield self._carrier.receive(ahead.popleft().result())
                while ahead:
                    yield self._carrier.receive(ahead.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)
        self.epoch = epoch + 1

    def _default_prefetch(self) -> int:
        of_each = len(self.log) / self.log.num_users
        highest = self.support_range[1], self.query_range[1]
        entries = self.batch_size * (of_each if REST in highest else min(of_each, sum(highest)))
        return 2 if entries >= _PREFETCH_FROM or self._carrier.device.type != "cpu" else 0

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The users of an epoch, in the order of their tasks."""
        if not self.shuffle:
            return self._users
        bits = _random.at(_random.key_of(self.seed, epoch, _random.ORDER), self._users)
        return self._users[np.argsort(bits, kind="stable")]

    def _send(self, order: NDArray[np.int64], epoch: int, index: int) -> Sent:
        return self._carrier.send(self._batch(order, epoch, index))

    def _batch(self, order: NDArray[np.int64], epoch: int, index: int) -> TaskBatch:
        users = order[index * self.batch_size : (index + 1) * self.batch_size]
        unique, support, query = self._sampler.sample(users, _random.key_of(self.seed, epoch))
        parts = SampledEntries(*support), None if query is None else SampledEntries(*query)
        return _task_batch(users, self.log.user_ids[users], unique, *parts)

    def _check_users(self, least: int, sizes: NDArray[np.int64]) -> None:
        if self.num_tasks == 0:
            raise ValueError(
                f"log: no user has the {least} ratings that a task needs; of {self.log.num_users} users "
                f"{int((sizes == 0).sum())} have none and {int((sizes == 1).sum())} have one"
            )
        if len(self) == 0:
            raise ValueError(
                f"batch_size: {self.num_tasks} users do not fill a batch of {self.batch_size}, and drop_last is set"
            )
        if self.negatives and int(sizes.max()) >= self.log.num_items:
            user = plain(self.log.user_ids[int(sizes.argmax())])
            raise ValueError(
                f"negatives: user {user!r} has rated all {self.log.num_items} items, so that none is left to draw"
            )

    def __repr__(self) -> str:
        return (
            f"TaskSampler(tasks={self.num_tasks}, batches={len(self)}, support={_shown(self.support_range)}, "
            f"query={_shown(self.query_range)}, order={self.order!r}, epoch={self.epoch}, backend={self.backend!r})"
        )


def _new_sampler(sampler: TaskSampler) -> Any:
    log = sampler.log
    implementation = _numpy_sampler if sampler.backend == "numpy" else _tasks
    return implementation.Sampler(
        np.ascontiguousarray(log.offsets), np.ascontiguousarray(log.items), np.ascontiguousarray(log.ratings),
        log.num_items, sampler.support_range, sampler.query_range, sampler.order == "time", sampler.negatives,
    )  # fmt: skip


def _choose_backend(backend: str) -> str:
    if backend not in ("auto", "c++", "numpy"):
        raise ValueError(f'backend: expected "auto", "c++" or "numpy", got {backend!r}')
    if backend == "c++" and _tasks is None:
        raise ImportError('backend="c++" needs the compiled module metarec_fast._tasks, which is not built')
    return ("numpy" if _tasks is None else "c++") if backend == "auto" else backend


def _task_batch(
    users: NDArray[np.int64],
    user_ids: NDArray[Any],
    unique: NDArray[np.int64],
    support: SampledEntries,
    query: SampledEntries | None,
) -> TaskBatch:
    user_tensor = torch.from_numpy(users.copy())  # the order of the epoch is not the batch's to share
    support_entries, local_support = _entries(support, len(unique))
    query_entries, local_query = (None, None) if query is None else _entries(query, len(unique))
    local = TaskBatch.unchecked(local_support, local_query, user_tensor)
    return TaskBatch.unchecked(
        support_entries, query_entries, user_tensor, None, torch.from_numpy(unique), local, user_ids
    )


def _entries(sampled: SampledEntries, num_unique: int) -> tuple[Entries, Entries]:
    """The entries with ids into the catalogue, and with ids into the distinct items; all else is shared."""

    def tensor(array: NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array)

    targets, offsets = torch.from_numpy(sampled.targets), torch.from_numpy(sampled.offsets)
    return tuple(
        Entries.unchecked(
            torch.from_numpy(items), targets, offsets, None, tensor(negatives), None,
            max_size=sampled.max_size, max_item=max_item,
        )
        for items, negatives, max_item in (
            (sampled.items, sampled.negatives, sampled.max_item),
            (sampled.local_items, sampled.local_negatives, num_unique - 1),
        )
    )  # type: ignore[return-value]  # fmt: skip


def _at_least(name: str, value: Any, least: int) -> int:
    number = as_int(name, value)
    if number < least:
        raise ValueError(f"{name}: must be ≥ {least}, got {number}")
    return number


def size_range(name: str, size: Any, least: int) -> tuple[int, int]:
    """The smallest and the largest number of ratings that a size allows, `REST` twice for "rest"; checked."""
    if isinstance(size, str):
        if size != "rest":
            raise ValueError(f'{name}: expected a number, (low, high) or "rest", got {size!r}')
        return REST, REST
    if isinstance(size, (tuple, list)):
        if len(size) != 2:
            raise ValueError(f"{name}: expected two numbers (low, high), got {size!r}")
        low, high = (_at_least(name, end, least) for end in size)
        if low > high:
            raise ValueError(f"{name}: low must not exceed high, got {size!r}")
        return low, high
    number = _at_least(name, size, least)
    return number, number


def _check_ranges(support: tuple[int, int], query: tuple[int, int]) -> None:
    if support[0] == query[0] == REST:
        raise ValueError('support and query: only one of them can be "rest"')
    if query[0] == 0 and query[1] > 0:
        raise ValueError(f"query: a range must begin at 1 or more, got {query}")
    if query == (0, 0) and support[0] == 0:
        raise ValueError("support: must be ≥ 1 without a query, got 0")
    for name, (_, high) in (("support", support), ("query", query)):
        if high >= 1 << 31:
            raise ValueError(f"{name}: must be below 2³¹, got {high}")


def _shown(limits: tuple[int, int]) -> str:
    return '"rest"' if limits[0] == REST else str(limits[0]) if limits[0] == limits[1] else str(limits)
