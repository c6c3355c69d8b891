"""Original ids (integers, strings, anything hashable) ↔ positions 0 … N−1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20  # rows at a time, so that temporaries stay small beside the columns themselves
_INT64_MAX = np.iinfo(np.int64).max


class EncodedIds(NamedTuple):
    """A column of ids as positions in the list of its distinct values."""

    codes: NDArray[np.int32]  # [n]
    ids: NDArray[Any]  # [N], ascending where the ids can be sorted, else as they first appear


def encode_ids(name: str, values: Any) -> EncodedIds:
    """Maps a column of ids to 0 … N−1. The mapping does not depend on the order of rows where ids can be sorted.

    Args:
        name: What errors call the column.
        values: An array, list, or pandas or Polars column; or ids that are encoded already.

    Raises:
        TypeError: An id is not hashable, or `values` is no column.
        ValueError: An id is missing (None, NaN, null); the row is named.
    """
    if isinstance(values, EncodedIds):
        return values
    column = as_column(name, values)
    if isinstance(column, np.ndarray) and column.dtype.kind in "iu":
        return _encode_integers(column)
    return _encode_hashables(name, column)


def as_column(name: str, values: Any) -> NDArray[Any] | Sequence[Any]:
    """The same column, without a copy where it is a NumPy array inside; lists and tuples as they are."""
    if isinstance(values, (list, tuple)):
        return values
    if isinstance(values, (str, bytes, set, frozenset, dict)):
        raise TypeError(f"{name}: expected an array, list or column, got {type(values).__name__}")
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.ndim != 1:
            raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
        return array
    if isinstance(values, Sequence) or hasattr(values, "__iter__"):
        return list(values)
    raise TypeError(f"{name}: expected an array, list or column, got {type(values).__name__}")


def faithful_array(values: Sequence[Any]) -> NDArray[Any]:
    """An array whose elements equal the values: of numbers or strings where that loses nothing, else of objects."""
    kinds = {type(value) for value in values}
    if len(kinds) == 1 and issubclass(next(iter(kinds)), (bool, int, float, str, bytes, np.number)):
        array = np.array(values)
        if array.tolist() == list(values):
            return array
    array = np.empty(len(values), object)
    for position, value in enumerate(values):
        array[position] = value
    return array


def plain(value: Any) -> Any:
    """A value as Python writes it, for messages: 7 rather than np.int64(7)."""
    return value.item() if isinstance(value, np.generic) else value


def first_missing(ids: NDArray[Any]) -> int | None:
    """The first position of None, NaN or NaT."""
    if ids.dtype.kind not in "fOM":
        return None
    return next((position for position, value in enumerate(ids.tolist()) if _is_missing(value)), None)


def find_ids(catalogue: NDArray[Any], ids: Any) -> NDArray[np.int64]:
    """The position of each of `ids` in `catalogue`, −1 where it is not there."""
    column = as_column("ids", ids)
    wanted = column if isinstance(column, np.ndarray) else faithful_array(column)
    if is_integer(catalogue) and is_integer(wanted):
        return SortedIntegers(catalogue).find(wanted)
    positions = {value: position for position, value in enumerate(catalogue.tolist())}
    return np.fromiter((positions.get(value, -1) for value in wanted.tolist()), np.int64, len(wanted))


def chunks(n: int) -> Iterator[slice]:
    """Slices that cover n rows."""
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def is_integer(array: NDArray[Any]) -> bool:
    # uint64 beside int64 would be compared as float64, which merges neighbours beyond 2^53.
    return array.dtype.kind in "iu" and array.dtype != np.uint64


class SortedIntegers:
    """Integers [N], in order for bisection."""

    def __init__(self, catalogue: NDArray[Any]) -> None:
        self._order = None if bool((catalogue[1:] > catalogue[:-1]).all()) else np.argsort(catalogue, kind="stable")
        self._values = catalogue if self._order is None else catalogue[self._order]

    @property
    def num_distinct(self) -> int:
        return min(len(self._values), 1) + int((self._values[1:] != self._values[:-1]).sum())

    def find(self, wanted: NDArray[Any]) -> NDArray[np.int64]:
        """The position of each of `wanted`, −1 where it is not there."""
        if len(self._values) == 0:
            return np.full(len(wanted), -1, np.int64)
        place = np.minimum(np.searchsorted(self._values, wanted), len(self._values) - 1)
        position = place if self._order is None else self._order[place]
        return np.where(self._values[place] == wanted, position, -1)


def _encode_integers(values: NDArray[Any]) -> EncodedIds:
    n = len(values)
    codes = np.empty(n, np.int32)
    if n == 0:
        return EncodedIds(codes, values.copy())
    low, high = int(values.min()), int(values.max())
    if high - low < 2 * n + CHUNK and high <= _INT64_MAX:
        # Dense enough for a table over the range of ids, which costs less than a sort.
        seen = np.zeros(high - low + 1, bool)
        for rows in chunks(n):
            seen[values[rows].astype(np.int64) - low] = True
        ids = (np.flatnonzero(seen) + low).astype(values.dtype)
        code_of = np.cumsum(seen, dtype=np.int32)
        code_of -= 1
        for rows in chunks(n):
            codes[rows] = code_of[values[rows].astype(np.int64) - low]
    else:
        ids = np.unique(values)
        for rows in chunks(n):
            codes[rows] = np.searchsorted(ids, values[rows])
    return EncodedIds(codes, ids)


def _encode_hashables(name: str, column: NDArray[Any] | Sequence[Any]) -> EncodedIds:
    n = len(column)
    first_seen: dict[Any, int] = {}
    codes = np.empty(n, np.int32)
    for rows in chunks(n):
        part = column[rows]
        values = part.tolist() if isinstance(part, np.ndarray) else part
        try:
            codes[rows] = number_in_turn(first_seen, values)
        except TypeError:
            _raise_unhashable(name, values, rows.start)
            raise
    if any(_is_missing(value) for value in first_seen):
        row = next(row for row, value in enumerate(column) if _is_missing(value))
        raise ValueError(f"{name}: an id is missing, got {plain(column[row])!r} at row {row}")

    return sort_codes(codes, list(first_seen))


def number_in_turn(first_seen: dict[Any, int], values: Sequence[Any]) -> NDArray[np.int32]:
    """The number of each value in `first_seen`, where new values get the next numbers."""
    for value in dict.fromkeys(values):
        first_seen.setdefault(value, len(first_seen))
    return np.fromiter(map(first_seen.__getitem__, values), np.int32, len(values))


def sort_codes(codes: NDArray[np.int32], values: list[Any]) -> EncodedIds:
    """Renumbers, in place, codes into distinct values as codes into the sorted ones, if they can be sorted."""
    try:
        order = sorted(range(len(values)), key=values.__getitem__)
    except TypeError:  # ids of several kinds, which have no common order
        return EncodedIds(codes, faithful_array(values))
    code_of = np.empty(len(values), np.int32)
    code_of[order] = np.arange(len(values), dtype=np.int32)
    for rows in chunks(len(codes)):
        codes[rows] = code_of[codes[rows]]
    return EncodedIds(codes, faithful_array([values[position] for position in order]))


def _raise_unhashable(name: str, values: Sequence[Any], start: int) -> None:
    for position, value in enumerate(values):
        try:
            hash(value)
        except TypeError:
            kind = type(value).__name__
            raise TypeError(f"{name}: ids must be hashable, got a {kind} at row {start + position}") from None


def _is_missing(value: Any) -> bool:
    """None, NaN, NaT and pandas.NA, whose comparison with itself has no truth value."""
    try:
        return value is None or bool(value != value)
    except TypeError:
        return True
