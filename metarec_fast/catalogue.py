"""Original ids, and the row numbers that they stand for."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metarec_fast._ids import SortedIntegers, as_column, faithful_array, find_ids, first_missing, is_integer, plain

if TYPE_CHECKING:
    from metarec_fast.data import Interactions


class Catalogue:
    """The original ids of rows, those of a model's items for instance, and their row numbers.

    Args:
        ids: Distinct ids, [N].
        num_rows: N.
        name: What errors call the ids.

    Raises:
        ValueError: There are more or fewer ids than rows, or one is missing (None, NaN) or comes twice.
    """

    ids: NDArray[Any]

    def __init__(self, ids: Any, num_rows: int, name: str = "item_ids") -> None:
        column = as_column(name, ids)
        if not isinstance(column, np.ndarray):
            column = faithful_array([id_.item() if isinstance(id_, np.generic) else id_ for id_ in column])
        self.ids = column
        if len(self.ids) != num_rows:
            raise ValueError(f"{name}: expected {num_rows}, one per row, got {len(self.ids)}")
        missing = first_missing(self.ids)
        if missing is not None:
            raise ValueError(f"{name}: an id is missing, got {plain(self.ids[missing])!r} at row {missing}")
        # Integers are found by bisection; anything else by a dictionary. Both are made once.
        self._integers = SortedIntegers(self.ids) if is_integer(self.ids) else None
        self._rows = {} if self._integers is not None else {id_: row for row, id_ in enumerate(self.ids.tolist())}
        distinct = len(self._rows) if self._integers is None else self._integers.num_distinct
        if distinct != num_rows:
            raise ValueError(
                f"{name}: each id must come once, got {distinct} different ones among {num_rows}; "
                f"{Counter(self.ids.tolist()).most_common(1)[0][0]!r} comes again"
            )

    def find(self, ids: Any, name: str = "items") -> NDArray[np.int64]:
        """Row numbers of original ids, −1 for those unknown."""
        column = as_column(name, ids)
        if len(column) == 0:
            return np.empty(0, np.int64)
        if self._integers is not None:
            array = column if isinstance(column, np.ndarray) else faithful_array(column)
            return self._integers.find(array) if is_integer(array) else find_ids(self.ids, array)
        wanted = column.tolist() if isinstance(column, np.ndarray) else column
        return np.fromiter((self._rows.get(id_, -1) for id_ in wanted), np.int64, len(column))

    def align(self, log: Interactions) -> Interactions:
        """The log in this catalogue's numbering; ratings of other items are left out, with one warning."""
        if log.item_ids is self.ids or np.array_equal(log.item_ids, self.ids):
            return log
        aligned, dropped = log.align_items(self.ids)
        if dropped:
            warnings.warn(f"{dropped} ratings of items that the learner does not know are ignored", stacklevel=4)
        return aligned
