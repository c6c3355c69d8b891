"""Columns of numbers, and whole numbers, from outside: checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec_fast._ids import as_column, plain


def as_ratings(values: Any) -> NDArray[np.float32]:
    given = _numbers("ratings", values)
    if given.dtype.kind == "M":
        raise TypeError("ratings: expected numbers, got datetimes")
    with np.errstate(over="ignore"):  # beyond float32: becomes infinite, and is refused as such
        ratings: NDArray[np.float32] = given.astype(np.float32, copy=False)
    _check_finite("ratings", ratings, given)
    return ratings


def as_times(values: Any) -> NDArray[Any]:
    given = _numbers("times", values)
    if given.dtype.kind == "M":
        missing = np.flatnonzero(np.isnat(given))
        if missing.size:
            raise ValueError(f"times: a time is missing at row {missing[0]}")
        return given.astype("datetime64[us]").astype(np.int64)
    if given.dtype.kind in "biu":
        return given.astype(np.int64, copy=False)
    times = given.astype(np.float64, copy=False)
    _check_finite("times", times, given)
    return times


def as_int(name: str, value: Any) -> int:
    """The value of an argument that must be a whole number.

    Raises:
        TypeError: It is of another type.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    return int(value)


def as_count(name: str, share: Any, total: int, of: str = "users") -> int:
    """How many of `total` an argument asks for: a fraction of them (a float), at least one if above 0; or a number.

    Raises:
        ValueError: The fraction is not in [0, 1), or the number is negative.
        TypeError: It is neither.
    """
    if isinstance(share, (float, np.floating)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}: a fraction of the {of} must be in [0, 1), got {share}")
        return max(round(share * total), 1) if share > 0 else 0
    count = as_int(name, share)
    if count < 0:
        raise ValueError(f"{name}: a number of {of} must be ≥ 0, got {count}")
    return count


def _numbers(name: str, values: Any) -> NDArray[Any]:
    array = np.asarray(as_column(name, values))
    if array.dtype.kind == "O" and len(array) and all(isinstance(value, (int, float, type(None))) for value in array):
        array = array.astype(np.float64)  # numbers and None
    if array.dtype.kind not in "biufM" and len(array):
        raise TypeError(f"{name}: expected numbers, got {array.dtype} such as {plain(array[0])!r}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected one dimension, got shape {array.shape}")
    return array


def _check_finite(name: str, values: NDArray[Any], given: NDArray[Any]) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"{name}: must be finite, got {given[row]} at row {row}")
