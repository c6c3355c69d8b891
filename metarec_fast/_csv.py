"""Columns of text files, in little more memory than the columns themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec_fast._ids import EncodedIds, encode_ids, number_in_turn, sort_codes
from metarec_fast._text_tables import Field, Layout, Table, read_tables


def read_columns(layout: Layout) -> dict[str, Any]:
    """The columns by role: ids encoded, from integers or strings; ratings float32; times int64 or float64."""
    as_text: set[str] = set()
    while True:
        columns = [(field, _new_column(field.role, field.role in as_text)) for field in layout.fields]
        try:
            _fill(layout, columns)
        except _NotIntegers as found:
            as_text.add(found.args[0])  # once more from the start: 007 was read as 7
        else:
            return {field.role: column.finish() for field, column in columns}


def _fill(layout: Layout, columns: list[tuple[Field, _Column]]) -> None:
    num_rows = 0
    with open(layout.file, "rb") as stream:
        for table in read_tables(layout, stream):
            num_rows += len(table)
            for field, column in columns:
                try:
                    column.add(table, field.position)
                except _Broken as broken:
                    row, expected = broken.args
                    value = table.strings(field.position)[row]
                    raise ValueError(
                        f"{layout.file}:{table.line(row)}: expected {expected} in column {field.name}, got {value!r}"
                    ) from None
    if num_rows == 0:
        raise ValueError(f"{layout.file}: expected at least one row below the header, got none")


class _Broken(Exception):
    """Arguments: the first bad row of a table, and what was expected."""


class _NotIntegers(Exception):
    """Argument: the role of a column of ids that are not all whole numbers."""


class _Column:
    """Collects the values of a column in one array, which grows."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.values: NDArray[Any] = np.empty(0, np.int32)
        self.size = 0

    def add(self, table: Table, position: int) -> None:
        raise NotImplementedError

    def finish(self) -> Any:
        return self.values[: self.size]

    def _append(self, part: NDArray[Any]) -> None:
        size = self.size + len(part)
        dtype = np.result_type(self.values, part) if self.size else part.dtype
        if size > len(self.values) or dtype != self.values.dtype:
            grown = np.empty(max(size, len(self.values) * 3 // 2), dtype)  # unused, it takes no memory yet
            grown[: self.size] = self.values[: self.size]
            self.values = grown
        self.values[self.size : size] = part
        self.size = size


class _IntegerIds(_Column):
    def add(self, table: Table, position: int) -> None:
        numbers = table.integers(position)
        if numbers is None:
            _check_present(table.strings(position))
            raise _NotIntegers(self.role)
        small = numbers.astype(np.int32)
        self._append(small if (small == numbers).all() else numbers)

    def finish(self) -> EncodedIds:
        codes, ids = encode_ids(self.role, super().finish())
        return EncodedIds(codes, ids.astype(np.int64))


class _TextIds(_Column):
    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.first_seen: dict[str, int] = {}

    def add(self, table: Table, position: int) -> None:
        values = table.strings(position)
        _check_present(values)
        self._append(number_in_turn(self.first_seen, values))

    def finish(self) -> EncodedIds:
        return sort_codes(super().finish(), list(self.first_seen))


class _Ratings(_Column):
    def add(self, table: Table, position: int) -> None:
        with np.errstate(over="ignore"):  # beyond float32: becomes infinite, and is refused as such
            self._append(_finite(table.reals(position).astype(np.float32)))


class _Times(_Column):
    """int64 where all are whole numbers, else float64."""

    def add(self, table: Table, position: int) -> None:
        numbers = table.integers(position)
        self._append(_finite(table.reals(position)) if numbers is None else numbers)


def _new_column(role: str, as_text: bool) -> _Column:
    if role in ("user", "item"):
        return _TextIds(role) if as_text else _IntegerIds(role)
    return _Ratings(role) if role == "rating" else _Times(role)


def _check_present(values: list[str]) -> None:
    if "" in values:
        raise _Broken(values.index(""), "an id")


def _finite(numbers: NDArray[Any]) -> NDArray[Any]:
    finite = np.isfinite(numbers)
    if not finite.all():
        raise _Broken(int(np.argmin(finite)), "a finite number")
    return numbers
