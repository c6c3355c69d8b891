"""Columns of features: what kind they are of, which of their values count, and their values as numbers.

category   one of some values                        a number for each value, 0 or 1
bag        any of some values, such as genres        a number for each value, 0 or 1/√(size of the bag)
number     age, year, price                          one number, of mean 0 and variance 1, at most ±4
vector     embedding of a text or an image           as many numbers, each of them so
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("category", "bag", "number", "vector")
_MOST_CODES = 50  # whole numbers with no more different values than that are codes, not quantities
_LARGEST = 4.0  # standard deviations at which numbers are cut off
_ROUNDING = 1e-12  # of the largest number: a smaller deviation is none
_EPOCH = datetime.date(1970, 1, 1).toordinal()


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


def describe_columns(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The columns as JSON takes them."""
    return [asdict(column) for column in columns]


def columns_from(described: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """The columns that `describe_columns` wrote down."""
    return tuple(
        Column(str(c["name"]), str(c["kind"]), tuple(c["values"]), tuple(c["mean"]), tuple(c["deviation"]))
        for c in described
    )


def learn_column(name: str, values: Sequence[Any], kind: str | None, min_count: int, max_values: int) -> Column:
    """Finds out what kind a column is of, unless told, and learns its values or its scale; None in it is missing.

    Raises:
        TypeError, ValueError: The values are of no kind, or not of the kind that was asked for.
    """
    there = [value for value in values if value is not None]
    kind = kind or _kind_of(name, there)
    if kind in ("category", "bag"):
        counts = _count(name, there, kind)
        frequent = [value for value, count in counts.most_common(max_values) if count >= min_count]
        return Column(name, kind, tuple(sorted(frequent, key=lambda value: (str(type(value)), value))))
    if not there:
        return Column(name, kind)
    rows = _as_rows(name, there)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, deviation = rows.mean(0), rows.std(0)
    if not np.isfinite(deviation).all():
        raise ValueError(f"{name}: expected numbers of finite variance, got {rows.flat[np.abs(rows).argmax()]}")
    varies = deviation > _ROUNDING * np.abs(rows).max(0)
    return Column(name, kind, (), tuple(mean.tolist()), tuple(np.where(varies, deviation, 1).tolist()))


def sparse_values(column: Column, values: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in `column.values` of the values of each row that count, row by row [n], and how many, [R]."""
    place = {value: position for position, value in enumerate(column.values)}
    if column.kind == "category":
        _check_values(column.name, values)
        found = np.fromiter((place.get(value, -1) for value in values), np.int64, len(values))
        return found[found >= 0], (found >= 0).astype(np.int64)
    bags, number = _distinct_bags(column.name, values)
    places = [[place[value] for value in bag if value in place] for bag in bags]
    sizes = np.fromiter(map(len, places), np.int64, len(places))
    flat = np.fromiter((position for bag in places for position in bag), np.int64, int(sizes.sum()))
    begins, sizes = (sizes.cumsum() - sizes)[number], sizes[number]  # of the rows
    within = np.arange(int(sizes.sum())) - np.repeat(sizes.cumsum() - sizes, sizes)
    return flat[np.repeat(begins, sizes) + within], sizes


def dense_values(column: Column, values: Sequence[Any]) -> NDArray[np.float32]:
    """The values of each row, standardised, 0 where they are missing, [R, size]."""
    result = np.zeros((len(values), column.size), np.float32)
    there = [row for row, value in enumerate(values) if value is not None]
    if there and column.size:
        rows = _as_rows(column.name, [values[row] for row in there])
        if rows.shape[1] != column.size:
            raise ValueError(f"{column.name}: expected vectors of {column.size} numbers, got {rows.shape[1]}")
        standard = (rows - np.array(column.mean)) / np.array(column.deviation)
        result[there] = standard.clip(-_LARGEST, _LARGEST)
    return result


def as_learned(column: Column, values: Sequence[Any]) -> list[Any]:
    """Values of further rows as the table has them: in a text file the code 25 is a string beside "18-24", and a whole
    number where it is alone."""
    if not column.is_sparse:
        return list(values)
    there, by_text = set(column.values), {_text(value): value for value in column.values}

    def learned(value: Any) -> Any:
        if isinstance(value, list):
            return [learned(part) for part in value]
        if not isinstance(value, (str, int, float)) or value in there:
            return value
        return by_text.get(_text(value), value)

    return [learned(value) for value in values]


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _kind_of(name: str, values: Sequence[Any]) -> str:
    kinds = set(map(type, values))
    if not kinds or kinds <= {str, bool}:
        return "category"
    if kinds == {np.ndarray}:  # of floats
        return "vector" if len(set(map(len, values))) == 1 else "bag"
    if kinds == {list}:
        parts = {type(part) for row in values for part in row}
        lengths = set(map(len, values))
        return "vector" if float in parts and parts <= {int, float} and len(lengths) == 1 else "bag"
    if kinds <= {int, float, bool}:
        distinct = set(values)
        whole = len(distinct) <= _MOST_CODES and all(float(value).is_integer() for value in distinct)
        return "category" if whole else "number"
    if all(issubclass(kind, datetime.date) for kind in kinds):
        return "number"
    if kinds <= {str, int, bool}:
        return "category"
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(f"{name}: expected strings, numbers, dates or lists of them throughout, got {found}")


def _count(name: str, values: Sequence[Any], kind: str) -> Counter[Any]:
    """How many rows have each value."""
    if kind == "category":
        _check_values(name, values)
        return Counter(values)
    counts: Counter[Any] = Counter()
    bags, number = _distinct_bags(name, values)
    for bag, count in zip(bags, np.bincount(number, minlength=len(bags)).tolist(), strict=True):
        for value in bag:
            counts[value] += count
    return counts


def _distinct_bags(name: str, values: Sequence[Any]) -> tuple[list[list[Any]], NDArray[np.int64]]:
    """The bags that occur, each value in them once, and the number of each row's bag, [R]."""
    values = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
    bags = [tuple(value) if type(value) is list else () if value is None else (value,) for value in values]
    try:
        numbers = {bag: number for number, bag in enumerate(dict.fromkeys(bags))}
    except TypeError:  # something in them is not hashable
        numbers = {}
    _check_values(name, [part for bag in numbers or bags for part in bag])
    number = np.fromiter(map(numbers.__getitem__, bags), np.int64, len(bags))
    return [[value for value in dict.fromkeys(bag) if value == value] for bag in numbers], number


def _check_values(name: str, values: Sequence[Any]) -> None:
    """Raises unless they can be values of a category or a bag, which are written down as JSON."""
    for kind in set(map(type, values)):
        if not issubclass(kind, (str, int, float, type(None))):
            value = next(value for value in values if type(value) is kind)
            raise TypeError(
                f"{name}: expected strings, numbers or truth values in a category or bag, got {kind.__name__} {value!r}"
            )


def _as_rows(name: str, values: Sequence[Any]) -> NDArray[np.float64]:
    """Numbers [R, 1] or vectors [R, width] that are there, at least one row."""
    kinds = set(map(type, values))
    if not (kinds <= {int, float, bool} or (kinds == {np.ndarray} and len(set(map(len, values))) == 1)):
        values = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
        values = [value if isinstance(value, list) else [value] for value in values]
        lengths = sorted(set(map(len, values)))
        if len(lengths) > 1:
            raise ValueError(f"{name}: expected vectors of one length, got {', '.join(map(str, lengths))}")
        parts = {type(part) for vector in values for part in vector}
        if not parts <= {int, float, bool}:
            values = [[_as_number(name, part) for part in vector] for vector in values]
    try:
        rows = np.array(values, np.float64)
    except OverflowError:
        raise ValueError(f"{name}: expected numbers that fit float64, got a larger one") from None
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: expected finite numbers, got {rows[~np.isfinite(rows)][0]}")
    return rows if rows.ndim == 2 else rows[:, None]


def _as_number(name: str, value: Any) -> float:
    """A number as it is; a time as days since 1970."""
    if isinstance(value, datetime.datetime):
        return value.replace(tzinfo=value.tzinfo or datetime.timezone.utc).timestamp() / 86400
    if isinstance(value, datetime.date):
        return float(value.toordinal() - _EPOCH)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected numbers, got {value!r}") from None
