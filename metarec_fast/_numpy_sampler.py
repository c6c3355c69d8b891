"""The task sampler in NumPy: the specification of `csrc/tasks/sampler.h`, which gives the same batches bit for bit.

For user u with n ratings, of which s go to the support set and q to the query set:

    sizes    s = min(drawn, n − 1), q = min(drawn, n − s), or the rest;  without a query s = min(drawn, n);
             support "rest": q = min(drawn, n − 1), s = n − q
    rows     order "time": the support is the first s rows, the query the next q
             order "random": rows p after the partial Fisher–Yates shuffle p[j] ↔ p[j + below(bits_j, n − j)], j < s + q
             (where s + q = n, only for the part that was drawn: what is left is the other one); support first,
             but query first if the support is the rest
    negatives  items of the catalogue that u has not rated: the first of a sequence of draws that is none of u's; for
             a user who rated more than half of the catalogue, a draw among the ascending list of the others
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarec_fast._random import NEGATIVES, QUERY, ROWS, SUPPORT, at, below, key_of

Ints = NDArray[np.int64]
REST = -1  # as both ends of a range of sizes: everything that the other set leaves


class SampledEntries(NamedTuple):
    """Support or query entries of a batch, with ids into the catalogue and into the batch's distinct items."""

    offsets: Ints  # [T + 1]
    items: Ints  # [n]
    targets: NDArray[np.float32]  # [n]
    negatives: Ints | None  # [n, M]
    local_items: Ints  # [n]
    local_negatives: Ints | None  # [n, M]
    max_size: int
    max_item: int  # negatives included, −1 where there is nothing


class Sampler:
    """Draws batches from a log: see the top of this file."""

    def __init__(
        self,
        offsets: Ints,
        items: NDArray[np.int32],
        ratings: NDArray[np.float32],
        num_items: int,
        support: tuple[int, int],
        query: tuple[int, int],
        by_time: bool,
        negatives: int,
    ) -> None:
        self.offsets, self.items, self.ratings, self.num_items = offsets, items, ratings, num_items
        self.support, self.query, self.by_time, self.negatives = support, query, by_time, negatives

    def sample(self, users: Ints, key: int) -> tuple[Ints, SampledEntries, SampledEntries | None]:
        """The batch of the given users under the key of an epoch: distinct items, support, query."""
        begin = self.offsets[users]
        n = self.offsets[users + 1] - begin
        s, q = self._sizes(users, n, key)
        support_rows, query_rows = self._rows(users, n, s, q, key)
        parts = [(s, np.repeat(begin, s) + support_rows)]
        if self.query != (0, 0):
            parts.append((q, np.repeat(begin, q) + query_rows))

        negatives: list[Ints | None] = [None, None]
        if self.negatives:
            drawn = self._negatives(users, n, s + q, key)
            task = np.repeat(np.arange(len(users)), s + q)
            in_support = np.arange(len(task)) - np.repeat(_starts(s + q), s + q) < s[task]
            negatives = [drawn[in_support], drawn[~in_support]]

        ids = [self.items[rows].astype(np.int64) for _, rows in parts]
        ids += [part.reshape(-1) for part in negatives[: len(parts)] if part is not None]
        unique, inverse = np.unique(np.concatenate(ids), return_inverse=True)
        local = np.split(inverse.astype(np.int64), np.cumsum([len(part) for part in ids])[:-1])

        entries = []
        for place, (sizes, rows) in enumerate(parts):
            others = negatives[place]
            local_others = None if others is None else local[len(parts) + place].reshape(others.shape)
            entries.append(
                SampledEntries(
                    offsets=np.append(_starts(sizes), len(rows)),
                    items=ids[place],
                    targets=self.ratings[rows],
                    negatives=others,
                    local_items=local[place],
                    local_negatives=local_others,
                    max_size=int(sizes.max(initial=0)),
                    max_item=_largest(ids[place], others),
                )
            )
        return unique, entries[0], entries[1] if len(entries) > 1 else None

    def _sizes(self, users: Ints, n: Ints, key: int) -> tuple[Ints, Ints]:
        def drawn(limits: tuple[int, int], purpose: int) -> Ints:
            return limits[0] + below(at(key_of(key, purpose), users), limits[1] - limits[0] + 1)

        if self.query == (0, 0):
            s = n if self.support[0] == REST else np.minimum(drawn(self.support, SUPPORT), n)
            return s, np.zeros_like(n)
        if self.support[0] == REST:
            q = np.minimum(drawn(self.query, QUERY), n - 1)
            return n - q, q
        s = np.minimum(drawn(self.support, SUPPORT), n - 1)
        return s, n - s if self.query[0] == REST else np.minimum(drawn(self.query, QUERY), n - s)

    def _rows(self, users: Ints, n: Ints, s: Ints, q: Ints, key: int) -> tuple[Ints, Ints]:
        """Rows of the support and of the query sets, counted from the user's first."""
        start = _starts(n)
        query_first = self.support[0] == REST and not self.by_time
        first = q if query_first else s
        shuffled: Ints = np.arange(n.sum()) - np.repeat(start, n)
        if not self.by_time:
            num_swaps = np.where(s + q == n, first, s + q)
            user_key = at(key_of(key, ROWS), users)
            for j in range(int(num_swaps.max(initial=0))):
                task = np.flatnonzero(num_swaps > j)
                here = start[task] + j
                there = here + below(at(user_key[task], j), n[task] - j)
                shuffled[here], shuffled[there] = shuffled[there], shuffled[here]

        def slices(begin: Ints, sizes: Ints) -> Ints:
            inside = np.arange(sizes.sum()) - np.repeat(_starts(sizes), sizes)
            rows: Ints = shuffled[np.repeat(begin, sizes) + inside]
            return rows

        return (slices(start + q, s), slices(start, q)) if query_first else (slices(start, s), slices(start + s, q))

    def _negatives(self, users: Ints, n: Ints, sizes: Ints, key: int) -> Ints:
        """M items per entry, [entries of all tasks, M]; within a task the support's entries come first."""
        width = self.negatives
        task = np.repeat(np.arange(len(users)), sizes * width)
        slot = np.arange(len(task)) - np.repeat(_starts(sizes * width), sizes * width)
        slot_key = at(at(key_of(key, NEGATIVES), users)[task], slot)
        drawn = np.empty(len(task), np.int64)

        rated = np.concatenate([self.items[self.offsets[u] : self.offsets[u + 1]] for u in users.tolist()])
        rated_key = np.sort(np.repeat(np.arange(len(users)), n) * self.num_items + rated)
        dense = 2 * n > self.num_items
        open_slots = np.flatnonzero(~dense[task])
        tries = 0
        while len(open_slots):
            item = below(at(slot_key[open_slots], tries), self.num_items)
            wanted = task[open_slots] * self.num_items + item
            place = np.minimum(np.searchsorted(rated_key, wanted), len(rated_key) - 1)
            accepted = rated_key[place] != wanted
            drawn[open_slots[accepted]] = item[accepted]
            open_slots = open_slots[~accepted]
            tries += 1
        for t in np.flatnonzero(dense & (sizes > 0)).tolist():
            unrated = np.setdiff1d(np.arange(self.num_items), self.items[self.offsets[users[t]] :][: n[t]])
            slots = np.flatnonzero(task == t)
            drawn[slots] = unrated[below(at(slot_key[slots], 0), len(unrated))]
        return drawn.reshape(-1, width)


def _starts(sizes: Ints) -> Ints:
    starts: Ints = np.cumsum(sizes) - sizes
    return starts


def _largest(items: Ints, negatives: Any) -> int:
    return max(int(items.max(initial=-1)), -1 if negatives is None else int(negatives.max(initial=-1)))
