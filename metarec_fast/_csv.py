"""Columns of text files. The plain reader defines the result; Polars, where it is installed and finds nothing unusual,
gives the same one several times faster."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from metarec_fast._ids import EncodedIds, encode_ids, sort_codes

_ROWS = 1 << 16  # rows of text in memory at a time; each takes some 500 bytes
_SAMPLE = 100  # rows from which to guess the kind of a column
_INTEGER_CHARACTERS = frozenset("+-0123456789")


class Field(NamedTuple):
    """A wanted column of a text file."""

    role: str  # user, item, rating or time
    position: int
    name: str  # in the header, or the position where there is none


def locate(file: Path, wanted: dict[str, str | int | None], sep: str, header: bool) -> list[Field]:
    """Finds each wanted column, given by name or position, by the first line of the file."""
    with _open(file) as text:
        _, names = next(_rows(file, text, sep), (0, None))
    if names is None:
        raise ValueError(f"{file}: the file is empty, expected {'a header and ' if header else ''}one rating a line")
    fields = []
    for role, column in wanted.items():
        if column is None:
            continue
        if isinstance(column, int):
            if not 0 <= column < len(names):
                raise ValueError(f"{role}: {file} has no column {column}; its columns are 0 to {len(names) - 1}")
            position = column
        elif not header:
            raise TypeError(f"{role}: expected the position of a column, as there is no header, got {column!r}")
        elif column in names:
            position = names.index(column)
        else:
            listed = ", ".join(repr(name) for name in names)
            raise ValueError(f"{role}: {file} has no column {column!r}; its columns are {listed}")
        fields.append(Field(role, position, names[position] if header else str(position)))
    return fields


def read_plainly(file: Path, fields: list[Field], sep: str, header: bool) -> dict[str, Any]:
    """The columns by role: ids int64 or encoded strings, ratings float32, times int64 or float64."""
    as_text: set[str] = set()
    while True:
        columns = {field.role: _new_column(field.role, field.role in as_text) for field in fields}
        try:
            _fill(file, fields, columns, sep, header)
        except _NotIntegers as found:
            as_text.add(found.args[0])  # once more from the start: 007 was read as 7
        else:
            return {role: column.finish() for role, column in columns.items()}


def read_with_polars(
    polars: ModuleType, file: Path, fields: list[Field], sep: str, header: bool
) -> dict[str, Any] | None:
    """What `read_plainly` gives, or None where that has to decide: another layout, or something is broken."""
    doubled = len(sep) == 2 and sep[0] == sep[1]  # a::b is a, nothing and b, separated by :
    if len(sep) > 1 and not doubled:
        return None
    layout = {
        "has_header": header,
        "separator": sep[0],
        "quote_char": None if doubled else '"',
        "infer_schema_length": 1,
    }
    with _open(file) as text:
        rows = [row for _, row in islice(_rows(file, text, sep), _SAMPLE)]
    width = len(rows[0])
    try:
        names = polars.read_csv(file, n_rows=1, **layout).columns
    except polars.exceptions.PolarsError:
        return None
    step = 2 if doubled else 1
    if len(names) != step * (width - 1) + 1:
        return None

    # The last column makes Polars notice a row with too many fields; between a and b in a::b there must be nothing.
    gaps = names[1::2] if doubled else []
    others = dict.fromkeys([*gaps, names[-1]], polars.String)
    column_of = {field.role: names[step * field.position] for field in fields}
    if len(set(column_of.values())) < len(column_of):
        return None  # one column in two roles
    guess = {field.role: _guess(polars, field, rows[header:]) for field in fields}
    text_only = {role: polars.Float64 if role == "rating" else polars.String for role in guess}
    frame = None
    for kinds in (guess, text_only):
        schema = others | {column_of[role]: kind for role, kind in kinds.items()}
        try:
            frame = polars.read_csv(file, columns=list(schema), schema_overrides=schema, **layout)
            break
        except polars.exceptions.PolarsError:
            continue
    if frame is None or frame.height == 0 or any(frame[gap].null_count() < frame.height for gap in gaps):
        return None
    columns = {role: _from_polars(polars, role, frame[name]) for role, name in column_of.items()}
    return None if any(column is None for column in columns.values()) else columns


def encode_polars(polars: ModuleType, strings: Any) -> EncodedIds:
    """Ids of a Polars column of strings without nulls; no Python object is made for each row."""
    distinct = strings.unique().sort()
    codes = strings.cast(polars.Enum(distinct)).to_physical().to_numpy().astype(np.int32)
    return EncodedIds(codes, encode_ids("ids", distinct.to_list()).ids)


def _open(file: Path) -> TextIO:
    return open(file, encoding="utf-8-sig", newline="")


def _rows(file: Path, text: TextIO, sep: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the line on which each row ends, and its fields; blank lines are left out."""
    line = 0
    try:
        if len(sep) == 1:
            reader = csv.reader(text, delimiter=sep, strict=True)
            for row in reader:
                line = reader.line_num
                if row:
                    yield line, row
        else:
            for line, string in enumerate(text, start=1):
                if string.strip():
                    yield line, string.rstrip("\r\n").split(sep)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text, got other bytes not far after line {line}") from error
    except csv.Error as error:
        raise ValueError(f"{file}:{line + 1}: expected fields separated by {sep!r}: {error}") from error


def _fill(file: Path, fields: list[Field], columns: dict[str, _Column], sep: str, header: bool) -> None:
    needed = 1 + max(field.position for field in fields)
    num_rows = 0
    with _open(file) as text:
        rows = _rows(file, text, sep)
        width = len(next(rows)[1]) if header else 0
        while part := list(islice(rows, _ROWS)):
            lines = [line for line, _ in part]
            width = width or len(part[0][1])
            sizes = [len(row) for _, row in part]
            if min(sizes) < needed or max(sizes) > width:
                where = next(i for i, size in enumerate(sizes) if size < needed or size > width)
                raise ValueError(
                    f"{file}:{lines[where]}: expected {width} fields separated by {sep!r}, got {sizes[where]}"
                )
            for field in fields:
                values = [row[field.position] for _, row in part]
                try:
                    columns[field.role].add(values)
                except _Broken as broken:
                    where, expected = broken.args
                    raise ValueError(
                        f"{file}:{lines[where]}: expected {expected} in column {field.name}, got {values[where]!r}"
                    ) from None
            num_rows += len(part)
    if num_rows == 0:
        raise ValueError(f"{file}: expected at least one row below the header, got none")


class _Broken(Exception):
    """Arguments: the position of the first bad value among those added, and what was expected."""


class _NotIntegers(Exception):
    """Argument: the role of a column of ids that are not all whole numbers."""


class _Column:
    """Collects the values of a column."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.parts: list[NDArray[Any]] = []

    def add(self, values: list[str]) -> None:
        raise NotImplementedError

    def finish(self) -> Any:
        joined = np.concatenate(self.parts)
        self.parts = []
        return joined


class _IntegerIds(_Column):
    def add(self, values: list[str]) -> None:
        _check_present(values)
        numbers = _integers(values)
        if numbers is None:
            raise _NotIntegers(self.role)
        self.parts.append(numbers)


class _TextIds(_Column):
    def __init__(self, role: str) -> None:
        super().__init__(role)
        self.first_seen: dict[str, int] = {}

    def add(self, values: list[str]) -> None:
        _check_present(values)
        codes = [self.first_seen.setdefault(value, len(self.first_seen)) for value in values]
        self.parts.append(np.array(codes, np.int32))

    def finish(self) -> EncodedIds:
        return sort_codes(super().finish(), list(self.first_seen))


class _Numbers(_Column):
    """float32, or, for times, int64 where all are whole and else float64."""

    def add(self, values: list[str]) -> None:
        numbers = _integers(values) if self.role == "time" else None
        self.parts.append(
            _reals(values, np.float32 if self.role == "rating" else np.float64) if numbers is None else numbers
        )


def _new_column(role: str, as_text: bool) -> _Column:
    if role in ("rating", "time"):
        return _Numbers(role)
    return _TextIds(role) if as_text else _IntegerIds(role)


def _check_present(values: list[str]) -> None:
    if "" in values:
        raise _Broken(values.index(""), "an id")


def _integers(values: Sequence[str]) -> NDArray[np.int64] | None:
    """The values as integers; None unless all are whole numbers of 64 bits in plain digits."""
    if not _INTEGER_CHARACTERS.issuperset("".join(values)):
        return None
    try:
        return np.fromiter(map(int, values), np.int64, len(values))
    except (ValueError, OverflowError):
        return None


def _reals(values: list[str], dtype: Any) -> NDArray[Any]:
    try:
        numbers = np.fromiter(map(float, values), np.float64, len(values))
    except ValueError:
        raise _Broken(next(i for i, value in enumerate(values) if not _is_real(value)), "a finite number") from None
    with np.errstate(over="ignore"):
        numbers = numbers.astype(dtype, copy=False)
    finite = np.isfinite(numbers)
    if not finite.all():
        raise _Broken(int(np.argmin(finite)), "a finite number")
    return numbers


def _is_real(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _guess(polars: ModuleType, field: Field, sample: list[list[str]]) -> Any:
    if field.role == "rating":
        return polars.Float64
    whole = _integers([row[field.position] for row in sample if len(row) > field.position]) is not None
    return polars.Int64 if whole else polars.Float64 if field.role == "time" else polars.String


def _from_polars(polars: ModuleType, role: str, column: Any) -> Any:
    """A column as `read_plainly` would give it; None where a value is missing or not finite."""
    if column.dtype == polars.String:
        if column.null_count() or (column == "").any():
            return None
        numbers = column.cast(polars.Int64, strict=False)
        whole = column.str.contains(r"^[+-]?[0-9]+$").all() and numbers.null_count() == 0
        if not whole and role != "time":
            return encode_polars(polars, column)
        column = numbers if whole else column.cast(polars.Float64, strict=False)
    if column.null_count():
        return None
    values = column.to_numpy()
    if role == "rating":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    return values if np.isfinite(values).all() else None
