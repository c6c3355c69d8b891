"""Columns of features: what kind they are of, which of their values count, and their values as numbers.

category   one of some values                        a number for each value, 0 or 1
bag        any of some values, such as genres        a number for each value, 0 or 1/√(size of the bag)
number     age, year, price                          one number, of mean 0 and variance 1, at most ±4
vector     embedding of a text or an image           as many numbers, each of them so
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("category", "bag", "number", "vector")
_MOST_CODES = 50  # whole numbers with no more different values than that are codes, not quantities
_POSTCODE = re.compile(r"[+-]?0\d")  # or a telephone number, which would lose its zeros as a number
_LARGEST = 4.0  # standard deviations at which numbers are cut off


@dataclass(frozen=True, eq=False)
class Column:
    """How the values of one column become numbers: what was learned from the table."""

    name: str
    kind: str
    values: tuple[Any, ...] = ()  # of categories and bags, those that count
    mean: tuple[float, ...] = ()  # of numbers and vectors, [1] or [width]
    deviation: tuple[float, ...] = ()

    @property
    def is_sparse(self) -> bool:
        return self.kind in ("category", "bag")

    @property
    def size(self) -> int:
        """How many numbers a value becomes."""
        return len(self.values) if self.is_sparse else len(self.mean)

    def describe(self) -> str:
        if self.kind == "number":
            return f"{self.name}: number"
        return f"{self.name}: {self.kind} of {self.size}"


def learn_column(name: str, values: Sequence[Any], kind: str | None, min_count: int, max_values: int) -> Column:
    """Finds out what kind a column is of, unless told, and learns its values or its scale; None in it is missing.

    Raises:
        TypeError, ValueError: The values are of no kind, or not of the kind that was asked for.
    """
    there = [value for value in values if value is not None]
    kind = kind or _kind_of(name, there)
    if kind in ("category", "bag"):
        counts = Counter(there if kind == "category" else (v for bag in there for v in dict.fromkeys(_bag(bag))))
        frequent = [value for value, count in counts.most_common(max_values) if count >= min_count]
        return Column(name, kind, tuple(sorted(frequent, key=lambda value: (str(type(value)), value))))
    rows = _as_rows(name, there, kind)
    if not len(rows):
        return Column(name, kind)
    deviation = rows.std(0)
    return Column(name, kind, (), tuple(rows.mean(0).tolist()), tuple(np.where(deviation > 0, deviation, 1).tolist()))


def sparse_values(column: Column, values: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in `column.values` of the values of each row that count, row by row [n], and how many, [R]."""
    place = {value: position for position, value in enumerate(column.values)}
    if column.kind == "category":
        found = np.fromiter((place.get(value, -1) for value in values), np.int64, len(values))
        return found[found >= 0], (found >= 0).astype(np.int64)
    bags = [[place[v] for v in dict.fromkeys(_bag(value)) if v in place] for value in values]
    sizes = np.fromiter(map(len, bags), np.int64, len(bags))
    return np.fromiter((v for bag in bags for v in bag), np.int64, int(sizes.sum())), sizes


def dense_values(column: Column, values: Sequence[Any]) -> NDArray[np.float32]:
    """The values of each row, standardised, 0 where they are missing, [R, size]."""
    result = np.zeros((len(values), column.size), np.float32)
    there = [row for row, value in enumerate(values) if value is not None]
    if there and column.size:
        rows = _as_rows(column.name, [values[row] for row in there], column.kind)
        if rows.shape[1] != column.size:
            raise ValueError(f"{column.name}: expected vectors of {column.size} numbers, got {rows.shape[1]}")
        standard = (rows - np.array(column.mean)) / np.array(column.deviation)
        result[there] = standard.clip(-_LARGEST, _LARGEST)
    return result


def plain_values(name: str, column: Any) -> list[Any]:
    """A column of a frame as a list of Python's own values, None where one is missing."""
    if hasattr(column, "to_list"):
        column = column.to_list()  # pandas, Polars
    elif hasattr(column, "tolist"):
        column = column.tolist()  # NumPy, torch
    elif not isinstance(column, Iterable) or isinstance(column, (str, bytes, Mapping)):
        raise TypeError(f"{name}: expected a column of values, got {type(column).__name__}")
    return [_plain(value) for value in column]


def parse_text(values: Sequence[str], bag_sep: str | None) -> list[Any]:
    """A column of a text file: whole numbers, numbers, bags if `bag_sep` is in any, else strings; "" is missing."""
    stripped = [value.strip() or None for value in values]
    there = [value for value in stripped if value is not None]
    if not any(_POSTCODE.match(value) for value in there):
        for number in (int, float):
            try:
                return [None if value is None else number(value) for value in stripped]
            except ValueError:
                pass
    if bag_sep is not None and any(bag_sep in value for value in there):
        return [None if value is None else [part for part in value.split(bag_sep) if part] for value in stripped]
    return stripped


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if hasattr(value, "to_list"):
        value = value.to_list()
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value) if not isinstance(value, (set, frozenset)) else sorted(value, key=str)
    try:
        missing = value is None or value == "" or bool(value != value)
    except TypeError:  # pandas.NA, whose comparison has no truth value
        missing = True
    return None if missing else value


def _kind_of(name: str, values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values}
    if not kinds or kinds <= {str, bool}:
        return "category"
    if kinds == {list}:
        parts = {type(part) for row in values for part in row}
        lengths = {len(row) for row in values}
        return "vector" if float in parts and parts <= {int, float} and len(lengths) == 1 else "bag"
    if kinds <= {int, float, bool}:
        whole = all(float(value).is_integer() for value in values)
        return "category" if whole and len(set(values)) <= _MOST_CODES else "number"
    if all(issubclass(kind, datetime.date) for kind in kinds):
        return "number"
    if kinds <= {str, int, bool}:
        return "category"
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(f"{name}: expected strings, numbers, dates or lists of them, got {found}")


def _bag(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _as_rows(name: str, values: Sequence[Any], kind: str) -> NDArray[np.float64]:
    """Numbers [R, 1] or vectors [R, width] that are there."""
    vectors = [value if isinstance(value, list) else [value] for value in values]
    lengths = sorted({len(vector) for vector in vectors})
    if len(lengths) > 1:
        raise ValueError(f"{name}: expected vectors of one length, got {', '.join(map(str, lengths))}")
    try:
        rows = np.array([[_as_number(part) for part in vector] for vector in vectors]).reshape(len(vectors), -1)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {values[0]!r}") from None
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: expected finite numbers, got {rows[~np.isfinite(rows)][0]}")
    return rows


def _as_number(value: Any) -> float:
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=value.tzinfo or datetime.timezone.utc).timestamp() / 86400
    if isinstance(value, datetime.date):
        return float(value.toordinal())
    return float(value)
