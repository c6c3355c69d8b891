"""What commands read: ratings, tables of users and items with their features and titles, and ids as they are typed."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from metarec_fast import _feature_files, readers
from metarec_fast.data import Interactions
from metarec_fast.features import Features
from metarec_fast.learner import Learner
from metarec_fast.prepared import SUFFIX, read_prepared

_TITLE = "title"


def add_ratings(add: Any, default: str | None, description: str = "ratings") -> None:
    """Adds the options that say where ratings and titles are."""
    add("--ratings", default=default, help=f"{description}; CSV, Parquet, MovieLens file or folder, or from `prepare`")
    add("--items", type=Path, help="table of the items, with titles, and in `train` features: CSV, Parquet, MovieLens")
    for name, meaning in (("user", "users"), ("item", "items"), ("rating", "ratings")):
        add(f"--{name}-column", default=name, help=f"column of the {meaning} in CSV and Parquet")
    add("--time-column", help="column of the times (default: there is none)")
    add("--title-column", help="column of the titles in --items (default: title, if there is one)")


def add_users(add: Any, description: str) -> None:
    """Adds the option that says where features of users are."""
    add("--users", type=Path, help=f"table of features of users, {description}: CSV, Parquet, MovieLens")


def read_ratings(options: argparse.Namespace, ratings: str | Path, option: str = "--ratings") -> Interactions:
    """The log, with the titles of --items if there are any."""
    path = Path(ratings)
    if not path.exists():
        hint = "; `metarec-fast prepare` makes it" if str(path) == f"ratings{SUFFIX}" else ""
        raise FileNotFoundError(f"{option}: there is no {path}{hint}")
    log = _read_log(options, path)
    titles = read_titles(options, log.item_ids)
    return replace(log, item_titles=titles) if titles else log


def read_titles(options: argparse.Namespace, item_ids: Any) -> dict[Any, str]:
    """Titles by original id from the table --items, of the items that have one; empty without the option."""
    if options.items is None:
        return {}
    path = _existing("--items", options.items)
    if _feature_files.is_movielens(path):
        named = {str(item): title for item, title in (readers.movielens_titles(path) or {}).items()}
    else:
        table, id_column = _read_table(path, options.item_column, bag_sep=None)
        column = options.title_column or _TITLE
        if column not in table:
            if options.title_column is None:
                return {}
            found = ", ".join(map(repr, table))
            raise ValueError(f"--title-column: {path} has no column {column!r}; its columns are {found}")
        named = {
            str(item): str(title)
            for item, title in zip(table[id_column], table[column], strict=True)
            if title is not None
        }
    return {item: named[str(item)] for item in item_ids.tolist() if named.get(str(item))}


def read_features(path: Path | None, option: str, id_column: str, leave_out: str | None = None) -> Features | None:
    """Features from the table that an option names; None without the option."""
    if path is None:
        return None
    table, id_column = _table_of_features(path, option, id_column)
    columns = [name for name in table if name not in (id_column, leave_out)]
    return Features.from_frame(table, id=id_column, columns=columns)


def extend_features(features: Features, path: Path, option: str, id_column: str) -> Features:
    """The table of features with the rows of a further file."""
    table, id_column = _table_of_features(path, option, id_column)
    return features.extended(table, id=id_column)


def read_item_features(options: argparse.Namespace) -> Features | None:
    """Features of items from the table --items, all columns but the titles; None where there are no others."""
    features = read_features(options.items, "--items", options.item_column, options.title_column or _TITLE)
    return features if features is not None and features.width else None


def with_unrated_items(log: Interactions, features: Features) -> Interactions:
    """The log with the items behind its own of which only features are known, so that they can be recommended.

    Not where features and ratings have no item in common: then their ids are of different kinds.
    """
    found = log.item_index(features.ids)
    unrated = features.ids[found < 0].tolist() if (found >= 0).any() else []
    return log.align_items([*log.item_ids.tolist(), *unrated])[0] if unrated else log


def _table_of_features(path: Path, option: str, id_column: str) -> tuple[dict[str, Any], str]:
    path = _existing(option, path)
    if _feature_files.is_movielens(path):
        return _feature_files.read_movielens(path), "id"
    return _read_table(path, id_column, bag_sep="|")


def _read_table(path: Path, id_column: str, bag_sep: str | None) -> tuple[dict[str, Any], str]:
    """The columns by name, and the name of that of the ids: as in the ratings, or else `id`."""
    frame = _feature_files.read_parquet(path) if path.suffix == ".parquet" else None
    names = _feature_files.csv_header(path) if frame is None else frame.columns
    if id_column not in names and "id" in names:
        id_column = "id"
    if frame is None:
        return _feature_files.read_csv(path, ",", id_column, bag_sep), id_column
    if id_column not in names:
        raise ValueError(f"id: {path} has no column {id_column!r}; its columns are {', '.join(map(repr, names))}")
    return {name: frame[name] for name in names}, id_column


def _existing(option: str, path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{option}: there is no {path}")
    return path


def _read_log(options: argparse.Namespace, path: Path) -> Interactions:
    columns = {name: getattr(options, f"{name}_column") for name in ("user", "item", "rating", "time")}
    if path.suffix == SUFFIX:
        return read_prepared(path)
    if path.suffix == ".parquet":
        return Interactions.from_parquet(path, **columns)
    if path.is_dir() or path.name in ("ratings.dat", "u.data") or _is_movielens_csv(path):
        return Interactions.from_movielens(path)
    return Interactions.from_csv(path, **columns)


def _is_movielens_csv(path: Path) -> bool:
    if path.name != "ratings.csv":
        return False
    with path.open("rb") as file:
        return file.readline().startswith(b"userId,movieId")


def parse_rated(rated: str, learner: Learner) -> tuple[list[Any], list[float]]:
    if learner.item_ids is None:
        raise ValueError("--learner: expected one that knows the ids of its items, this one was saved without them")
    items, ratings = [], []
    for pair in filter(None, (part.strip() for part in rated.split(","))):
        item, _, rating = pair.rpartition(":")
        try:
            items.append(as_id(item, learner.item_ids))
            ratings.append(float(rating))
        except (ValueError, OverflowError):
            kind = "a whole number" if learner.item_ids.dtype.kind in "iu" else "an id"
            raise ValueError(f'--rated: expected "item:rating,item:rating", each item {kind}, got {pair!r}') from None
    return items, ratings


def ratings_of(user: str, log: Interactions, path: Path) -> tuple[Any, Any]:
    try:
        index = int(log.user_index([as_id(user, log.user_ids)])[0])
    except (ValueError, OverflowError):
        index = -1
    if index < 0:
        raise ValueError(f"--user: there is no user {user!r} in {path}")
    rows = log.rows(index)
    return log.item_ids[log.items[rows]], log.ratings[rows]


def as_id(text: str, ids: Any) -> Any:
    """An id from the command line, of the kind that the others are."""
    if not text:
        raise ValueError("an id is missing")
    return int(text) if ids.dtype.kind in "iu" else text
