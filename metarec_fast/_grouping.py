"""Rows of a log in the order of users and times, a block of users at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarec_fast._ids import CHUNK, EncodedIds


class Rows(NamedTuple):
    """Rows of all users: those of user u are [offsets[u], offsets[u + 1])."""

    offsets: NDArray[np.int64]  # [U + 1]
    items: NDArray[np.int32]  # [n]
    ratings: NDArray[np.float32]  # [n]
    times: NDArray[Any] | None  # [n]


def group_by_user(user: EncodedIds, item: EncodedIds, ratings: NDArray[np.float32], times: NDArray[Any] | None) -> Rows:
    """Rows of a user together, oldest first, the last of equal items kept; a block of users at a time."""
    n, num_items = len(ratings), len(item.ids)
    sizes = np.bincount(user.codes, minlength=len(user.ids))
    bounds = offsets_of(sizes)
    out_items: NDArray[np.int32] = np.empty(n, np.int32)
    out_ratings: NDArray[np.float32] = np.empty(n, np.float32)
    out_times = None if times is None else np.empty(n, times.dtype)

    # A sixteenth of the rows at a time: little memory for temporaries, few passes over the rows.
    block = max(CHUNK, n // 16)
    first, end = 0, 0  # of users, and of rows written
    while first < len(user.ids):
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + block, side="right")) - 1)
        rows = _rows_of(user.codes, first, last)
        rows = rows[_oldest_first(user.codes[rows] - first, None if times is None else times[rows])]
        key = user.codes[rows].astype(np.int64) * num_items + item.codes[rows]
        replaced = _replaced(key)
        if replaced is not None:
            sizes -= np.bincount(user.codes[rows[replaced]], minlength=len(sizes))
            rows = rows[~replaced]
        begin, end = end, end + len(rows)
        out_items[begin:end] = item.codes[rows]
        out_ratings[begin:end] = ratings[rows]
        if out_times is not None and times is not None:
            out_times[begin:end] = times[rows]
        first = last

    if end < n:
        out_items, out_ratings = out_items[:end].copy(), out_ratings[:end].copy()
        out_times = None if out_times is None else out_times[:end].copy()
    return Rows(offsets_of(sizes), out_items, out_ratings, out_times)


def offsets_of(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each user's rows begin and the last one's end, [U + 1]."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _rows_of(codes: NDArray[np.int32], first: int, last: int) -> NDArray[np.int64]:
    """The rows whose code is in [first, last), ascending."""
    inside = codes >= first
    inside &= codes < last
    return np.flatnonzero(inside)


def _oldest_first(users: NDArray[np.int32], times: NDArray[Any] | None) -> NDArray[np.int64]:
    """The order of rows by user, then time, then as they are."""
    n = len(users)
    low = 0 if times is None else times.min()
    span = 1 if times is None else int(times.max()) - int(low) + 1
    shift = n.bit_length()
    if times is not None and (times.dtype.kind == "f" or (int(users.max()) + 1) * span << shift >= 1 << 63):
        order: NDArray[np.int64] = np.lexsort((times, users))
        return order
    # User, time and row in one number: numbers sort several times faster than positions by their keys.
    key = users.astype(np.int64)
    if times is not None:
        key *= span
        key += times - low
    key <<= shift
    key |= np.arange(n)
    key.sort()
    key &= (1 << shift) - 1
    return key


def _replaced(key: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """Which rows an equal key follows; None if there is no such row."""
    ordered = np.sort(key)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    replaced = np.zeros(len(key), bool)
    replaced[order[:-1][ordered[1:] == ordered[:-1]]] = True
    return replaced
