"""What is known of users or of items beside ratings: age and occupation, genres and year, vectors of texts."""

from __future__ import annotations

import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import _feature_files
from metarec_fast._columns import as_int
from metarec_fast._feature_columns import KINDS, Column, as_learned, describe_columns, learn_column
from metarec_fast._feature_encoding import encode_rows
from metarec_fast._feature_values import is_categorical, plain_values
from metarec_fast.catalogue import Catalogue
from metarec_fast.feature_matrix import FeatureMatrix, below, beside

_MIN_COUNT = 5
_FEW_ROWS = 100


@dataclass(frozen=True, eq=False, repr=False)
class Features:
    """Features of users or items, by their original ids. Made by `from_frame`, `from_csv`, `from_parquet` or
    `from_movielens`; given to `DotRecommender(user_features=..., item_features=...)`.

    The types of a column's values decide what it is, unless `kinds` does:

        strings, truth values, whole numbers of at most 50 values    "category"
        other numbers, dates, times                                  "number"
        lists, tuples, sets                                          "bag"
        lists of floats, all of one length; arrays [R, width]        "vector"

    A column that pandas calls a category is one. A value may be missing (None, NaN, ""): then the row counts as average
    in that column. Values of a category or bag that few rows have say nothing and are left out, so that titles and
    postcodes do no harm.
    """

    catalogue: Catalogue  # the original ids of the rows, [R]
    columns: tuple[Column, ...]
    matrix: FeatureMatrix  # [R, F]

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        id: str = "id",
        columns: Sequence[str] | None = None,
        kinds: Mapping[str, str] | None = None,
        min_count: int | None = None,
        max_values: int = 1000,
    ) -> Features:
        """Features from the columns of a pandas or Polars frame, or of a dict of columns.

        Args:
            frame: Anything with `columns` (or `keys()`) and `frame[name]`.
            id: The column of the original ids, each once.
            columns: Those to take; by default all others.
            kinds: "category", "bag", "number" or "vector" for columns that are something else than they look.
            min_count: Rows that a value of a category or bag must have to count; by default 5, in tables of less than
                100 rows 1.
            max_values: The most values of a column that count, the most frequent ones.

        Raises:
            ValueError: A column is missing (those that are there are listed) or comes twice, an id is missing or comes
                twice, lengths differ, a number is not finite.
            TypeError: The values of a column are of no kind; it is named.
        """
        names = _names_of(frame)
        if isinstance(columns, str):
            raise TypeError(f"columns: expected several names, got the string {columns!r}")
        _check_names("id", [id], names)
        _check_names("columns", columns or (), names)
        _check_names("kinds", kinds or (), names)
        for name, kind in (kinds or {}).items():
            if kind not in KINDS:
                raise ValueError(f"kinds[{name!r}]: expected one of {', '.join(KINDS)}, got {kind!r}")
        ids = frame[id]
        catalogue = Catalogue(ids, len(ids), name=id)
        if min_count is None:
            min_count = _MIN_COUNT if len(ids) >= _FEW_ROWS else 1
        for name, value in (("min_count", min_count), ("max_values", max_values)):
            if as_int(name, value) < 1:
                raise ValueError(f"{name}: must be ≥ 1, got {value}")
        wanted = [name for name in dict.fromkeys(names if columns is None else columns) if name != id]
        kinds = {name: "category" for name in wanted if is_categorical(frame[name])} | dict(kinds or {})
        table = {name: plain_values(name, frame[name]) for name in wanted}
        learned = tuple(
            learn_column(name, values, kinds.get(name), min_count, max_values) for name, values in table.items()
        )
        return cls(catalogue, learned, encode_rows(learned, table, len(ids), None))

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        id: str = "id",
        columns: Sequence[str] | None = None,
        kinds: Mapping[str, str] | None = None,
        sep: str = ",",
        bag_sep: str | None = "|",
        min_count: int | None = None,
        max_values: int = 1000,
    ) -> Features:
        """Features from a text file (UTF-8) whose first line names the columns.

        Ids become integers if all are whole numbers, else they stay strings. A column of numbers holds numbers; one in
        which `bag_sep` occurs holds bags ("Action|Comedy"); an empty field is missing.

        Args:
            path: The file.
            sep: What separates fields, which may be quoted with \".
            bag_sep: What separates the values of a bag; None if there are no bags.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is empty, or a line has another number of fields: file and line are named. Else as
                `from_frame`.
        """
        table = _feature_files.read_csv(path, sep, id, bag_sep)
        return cls.from_frame(table, id=id, columns=columns, kinds=kinds, min_count=min_count, max_values=max_values)

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str],
        *,
        id: str = "id",
        columns: Sequence[str] | None = None,
        kinds: Mapping[str, str] | None = None,
        min_count: int | None = None,
        max_values: int = 1000,
    ) -> Features:
        """Features from a Parquet file.

        Raises:
            ImportError: Polars (the extra `data`) is not installed.
            FileNotFoundError: There is no such file.
            ValueError: It is no Parquet file. Else as `from_frame`.
        """
        frame = _feature_files.read_parquet(path)
        return cls.from_frame(frame, id=id, columns=columns, kinds=kinds, min_count=min_count, max_values=max_values)

    @classmethod
    def from_movielens(cls, path: str | os.PathLike[str]) -> Features:
        """Features of the users or films of a MovieLens data set as GroupLens distributes it, unpacked.

        Args:
            path: `u.user` or `u.item` (100K), `users.dat` or `movies.dat` (1M, 10M), `movies.csv` (latest, 20M, 25M,
                32M). A film's year comes from its title.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is none of these, or a line is broken.
        """
        return cls.from_frame(_feature_files.read_movielens(path))

    @property
    def ids(self) -> NDArray[Any]:
        """Original ids of the rows, [R]."""
        return self.catalogue.ids

    @property
    def width(self) -> int:
        """F, how many numbers a row becomes."""
        return self.matrix.width

    def find(self, ids: Any) -> Tensor:
        """Positions of original ids, int64 [n], −1 for those of whom nothing is known."""
        return torch.from_numpy(self.catalogue.find(ids, "ids"))

    def warn_if_unknown(self, name: str, ids: Any) -> None:
        """Warns if nothing is known of any of the ids, which then are of another kind, say strings and integers."""
        if len(ids) and bool((self.find(ids) < 0).all()):
            expected, found = (values[:1].tolist()[0] if len(values) else None for values in (self.ids, ids))
            warnings.warn(
                f"{name}: none of the {len(ids)} ids is in the table, which has ids such as {expected!r}; "
                f"they are such as {found!r}",
                stacklevel=4,
            )

    def encode(self, features: Mapping[str, Any]) -> FeatureMatrix:
        """The matrix of one further row, [1, F], from its values by column; columns that are left out are missing.

        Raises:
            ValueError: There is no such column; those that are there are listed.
            TypeError: A value is not of its column's kind, or `features` is no mapping.
        """
        if not isinstance(features, Mapping):
            raise TypeError(f"features: expected values by column, got {type(features).__name__}")
        names = [column.name for column in self.columns]
        for name in features:
            if name not in names:
                raise ValueError(
                    f"features: there is no column {name!r}; the columns are {', '.join(map(repr, names))}"
                )
        return self._encode_further({name: [value] for name, value in features.items()}, 1)

    def extended(self, frame: Any, *, id: str = "id") -> Features:
        """The table with further rows from the same columns, their values and scales as learned before; a row whose id
        is there already takes its place. Columns that the frame does not have are missing.

            learner.model.user_encoder.features = features.extended(newcomers)

        Raises:
            ValueError: There is no column of ids, an id is missing or comes twice in the frame, or lengths differ.
            TypeError: A value is not of its column's kind.
        """
        names = _names_of(frame)
        _check_names("id", [id], names)
        count = len(frame[id])
        further = Catalogue(frame[id], count, name=id)
        there = [column.name for column in self.columns if column.name in names]
        rows = self._encode_further({name: frame[name] for name in there}, count)
        ids = list(dict.fromkeys([*self.ids.tolist(), *further.ids.tolist()]))
        both = below(self.matrix, rows)
        old, new = self.find(ids), torch.from_numpy(further.find(ids))
        return replace(
            self, catalogue=Catalogue(ids, len(ids)), matrix=both.select(torch.where(new >= 0, new + len(self), old))
        )

    def join(self, other: Features) -> Features:
        """Both tables side by side, joined by id: what a table does not have is missing.

        Raises:
            ValueError: Both have a column of the same name.
        """
        twice = {column.name for column in self.columns} & {column.name for column in other.columns}
        if twice:
            raise ValueError(f"other: columns of both tables need other names, got {', '.join(sorted(twice))} in both")
        further = [position for position, found in enumerate(self.catalogue.find(other.ids)) if found < 0]
        ids = [*self.ids.tolist(), *(other.ids[position] for position in further)]
        catalogue = Catalogue(ids, len(ids))
        matrix = beside(*(table.matrix.select(table.find(ids)) for table in (self, other)))
        return replace(self, catalogue=catalogue, columns=self.columns + other.columns, matrix=matrix)

    def has_columns_of(self, other: Features) -> bool:
        """Whether a row of the one table means what it means in the other: same columns, values, scales and means."""
        return describe_columns(self.columns) == describe_columns(other.columns) and torch.equal(
            self.matrix.means, other.matrix.means
        )

    def _encode_further(self, table: Mapping[str, Any], num_rows: int) -> FeatureMatrix:
        """The matrix of further rows; columns that are not in the table are missing."""
        values = {
            column.name: as_learned(column, plain_values(column.name, table[column.name]))
            if column.name in table
            else [None] * num_rows
            for column in self.columns
        }
        return encode_rows(self.columns, values, num_rows, self.matrix)

    def __deepcopy__(self, memo: Any) -> Features:
        return self  # nothing of it changes

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        used = ", ".join(column.describe() for column in self.columns if column.size)
        left_out = ", ".join(column.name for column in self.columns if not column.size)
        return f"Features({len(self)} rows; {used or 'no columns'}{'; left out: ' if left_out else ''}{left_out})"


def fingerprint(features: Features) -> str:
    """What tells tables apart: how large one is, and a checksum of its ids, columns and numbers."""
    check = zlib.crc32(repr((features.ids.tolist(), describe_columns(features.columns))).encode())
    for part in vars(features.matrix).values():
        check = zlib.crc32(part.numpy(), check)
    return f"{len(features)} rows of {features.width} numbers, {check:08x}"


def _names_of(frame: Any) -> list[Any]:
    """The names of the columns of a frame, or of a dict of columns."""
    if not hasattr(frame, "columns") and not hasattr(frame, "keys"):
        raise TypeError(f"frame: expected a pandas or Polars frame or a dict of columns, got {type(frame).__name__}")
    names = list(frame.columns if hasattr(frame, "columns") else frame.keys())
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"frame: each column must come once, {', '.join(map(repr, twice))} comes more often")
    return names


def _check_names(argument: str, wanted: Iterable[Any], names: Sequence[Any]) -> None:
    for name in wanted:
        if name not in names:
            listed = ", ".join(map(repr, names))
            raise ValueError(f"{argument}: the frame has no column {name!r}; its columns are {listed}")
