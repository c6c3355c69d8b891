"""Values as frames and text files have them, as Python's own, None where one is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

_POSTCODE = re.compile(r"[+-]?0\d")  # or a telephone number, which would lose its zeros as a number
_NOTHING = ("na", "n/a", "nan", "null", "none", r"\n")  # what other programs write into columns of numbers


class PlainList(list[Any]):
    """A column that has been looked through already."""


def plain_values(name: str, column: Any) -> PlainList:
    """A column of a frame, or of anything that can be iterated over.

    Raises:
        TypeError: It is no column.
    """
    if isinstance(column, PlainList):
        return column
    if getattr(getattr(column, "dtype", None), "kind", "") == "M":
        column = np.asarray(column, "datetime64[us]")
    if hasattr(column, "detach"):
        column = column.detach().cpu()  # a tensor; NumPy has no bfloat16
        column = column.double().numpy() if column.is_floating_point() else column.numpy()
    if _is_matrix(column):
        return PlainList(map(_plain_vector, column))
    if hasattr(column, "to_list"):
        values = column.to_list()  # pandas, Polars
    elif hasattr(column, "tolist"):
        values = _of_array(column)
    elif isinstance(column, Iterable) and not isinstance(column, (str, bytes, Mapping)):
        values = list(column)
    else:
        raise TypeError(f"{name}: expected a column of values, got {type(column).__name__}")
    if not isinstance(values, list):
        raise TypeError(f"{name}: expected a column of values, got a single one, {values!r}")
    kinds = set(map(type, values))
    if kinds <= {str, int, bool, type(None)}:
        return PlainList([value if value != "" else None for value in values] if str in kinds else values)
    if kinds <= {float, int, bool, type(None)}:
        return PlainList(value if value == value else None for value in values)
    plain = PlainList(map(_plain, values))
    kinds = set(map(type, plain))
    if np.ndarray in kinds and not kinds <= {np.ndarray, type(None)}:
        return PlainList(value.tolist() if isinstance(value, np.ndarray) else value for value in plain)
    return plain


def parse_text(values: Sequence[str], bag_sep: str | None) -> PlainList:
    """A column of a text file: whole numbers, numbers, bags if `bag_sep` is in any, else strings; "" is missing."""
    distinct = {value: value.strip() for value in dict.fromkeys(values)}
    there = [value for value in dict.fromkeys(distinct.values()) if value]
    parse = _parser(there, bag_sep)
    parsed = {value: parse(stripped) if stripped else None for value, stripped in distinct.items()}
    return PlainList(map(parsed.__getitem__, values))


def _parser(there: Sequence[str], bag_sep: str | None) -> Callable[[str], Any]:
    """What becomes of a column's texts, given those that are not empty."""
    numbers = [value for value in there if value.lower() not in _NOTHING]
    if numbers and not any(_POSTCODE.match(value) or "_" in value for value in numbers):
        for number in (int, float):
            try:
                known = {value: number(value) for value in numbers}
            except ValueError:
                continue
            return known.get
    if bag_sep is not None and any(bag_sep in value for value in there):
        return lambda value: [part.strip() for part in value.split(bag_sep) if part.strip()]
    return lambda value: value


def _is_matrix(column: Any) -> bool:
    """Whether it is rows of floats, which need not become lists."""
    return isinstance(column, np.ndarray) and column.dtype.kind == "f" and column.ndim == 2


def _plain_vector(vector: Any) -> Any:
    """Floats as they are; None where all are missing."""
    return None if len(vector) and vector[0] != vector[0] and np.isnan(vector).all() else vector


def _of_array(array: Any) -> Any:
    """The elements of an array or tensor; nanoseconds, which Python's times do not have, would become integers."""
    return array.astype("datetime64[us]").tolist() if getattr(array.dtype, "kind", "") == "M" else array.tolist()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "f":
        return _plain_vector(value)
    if hasattr(value, "tolist"):
        value = _of_array(value)
    if hasattr(value, "to_list"):
        value = value.to_list()
    if isinstance(value, (list, tuple)):
        return _plain_parts(value)
    if isinstance(value, (set, frozenset)):
        return _plain_parts(sorted(value, key=str))
    try:
        missing = value is None or value == "" or bool(value != value)
    except TypeError:  # pandas.NA, whose comparison has no truth value
        missing = True
    return None if missing else float(value) if isinstance(value, Decimal) else value


def _plain_parts(parts: Sequence[Any]) -> list[Any] | None:
    """A bag without what is missing in it; a vector keeps its length. None where nothing but missing is in it."""
    kinds = set(map(type, parts))
    if kinds == {float} and parts[0] == parts[0]:  # the most usual vector
        return list(parts)
    if kinds == {str} and "" not in parts:  # the most usual bag
        return list(parts)
    plain = [_plain(part) for part in parts]
    there = [part for part in plain if part is not None]
    if parts and not there:
        return None
    if any(type(part) is float for part in there):
        return [math.nan if part is None else part for part in plain]
    return there


def is_categorical(column: Any) -> bool:
    """Whether a frame says of a column that its values are categories."""
    return str(getattr(column, "dtype", "")) == "category"
