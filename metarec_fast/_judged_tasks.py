"""The tasks on which predictors are judged: from one log, or the support from one and the query from another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from metarec_fast import _random
from metarec_fast._ids import plain
from metarec_fast._sampled_ranks import draw_unrated
from metarec_fast.data import Interactions
from metarec_fast.sampler import Size, TaskSampler, size_range
from metarec_fast.tasks import Entries, TaskBatch


class JudgedTasks:
    """Iterating it gives batches, and then moves on to the next draw; the users are the same in all, in one order.

    With a batch come the items of its users that need not be ranked: those of the support, or all of `known`.

    Args:
        log, support, query, batch_size, order, seed: As in `TaskSampler`.
        known: Where supports are drawn from, in the same numbering of items; the log then gives queries only.

    Attributes:
        log, known: The logs, with the users at the positions that batches name.

    Raises:
        ValueError: Nobody has ratings in both logs, or somebody has the same item in both.
    """

    def __init__(
        self,
        log: Interactions,
        support: Size,
        query: Size,
        batch_size: int,
        order: Literal["random", "time"],
        seed: int,
        known: Interactions | None = None,
    ) -> None:
        def sampler(log: Interactions, support: Size, query: Size | None) -> TaskSampler:
            return TaskSampler(log, support, query, batch_size, order, seed, shuffle=False)

        self.known = known
        if known is None:
            self.samplers = [sampler(log, support, query)]
        else:
            for name, size in (("support", support), ("query", query)):
                size_range(name, size, 1)
            log, self.known = _of_the_same_users(log, known)
            self.samplers = [sampler(self.known, support, None), sampler(log, query, None)]
        self.log = log

    def __iter__(self) -> Iterator[tuple[TaskBatch, Entries]]:
        if self.known is None:
            for batch in self.samplers[0]:
                yield batch, batch.support
            return
        for batch, predicted in zip(*self.samplers, strict=True):
            assert batch.users is not None
            rated = self.known.select_users(batch.users.numpy())
            items = Entries(torch.from_numpy(rated.items).long(), None, torch.from_numpy(rated.offsets))
            yield batch.with_entries(batch.support, predicted.support), items

    def draw_unrated(self, batch: TaskBatch, count: int | None, draw: int) -> Tensor | None:
        """Items that the users of a batch have rated nowhere, [T, count]; None for None."""
        if count is None:
            return None
        assert batch.users is not None
        logs = [self.log] if self.known is None else [self.log, self.known]
        key = _random.key_of(self.samplers[0].seed, draw, _random.UNRATED)
        return draw_unrated(logs, batch.users.numpy(), count, key)


def _of_the_same_users(log: Interactions, known: Interactions) -> tuple[Interactions, Interactions]:
    """Both logs for the users who have ratings in both, in the order of the first."""
    places = known.user_index(log.user_ids)
    users = np.flatnonzero((places >= 0) & (log.sizes() > 0))
    users = users[known.sizes()[places[users]] > 0]
    if len(users) == 0:
        raise ValueError(f"support_from: none of the {log.num_users} users of log has ratings in both")
    log, known = log.select_users(users), known.select_users(places[users])
    twice = np.intersect1d(log.item_keys(), known.item_keys())
    if len(twice):
        user, item = divmod(int(twice[0]), log.num_items)
        raise ValueError(
            f"support_from: user {plain(log.user_ids[user])!r} has item {plain(log.item_ids[item])!r} in log too, "
            "where it is to be predicted"
        )
    return log, known
