"""Tables of features from files: text with named columns, Parquet, and the users and films of MovieLens."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from metarec_fast._feature_values import parse_text
from metarec_fast.readers import existing_file, polars_or_none

Table = dict[str, list[Any]]

_GENRES_OF_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_NO_GENRES = "(no genres listed)"


def read_csv(path: str | os.PathLike[str], sep: str, id_column: str, bag_sep: str | None) -> Table:
    """The columns by name, numbers and bags where they are such; ids as in a log of ratings."""
    table = _read_text(path, sep, id_column)
    return {name: values if name == id_column else parse_text(values, bag_sep) for name, values in table.items()}


def _read_text(path: str | os.PathLike[str], sep: str, id_column: str) -> Table:
    """The columns by name, as strings but for ids that are all whole numbers."""
    file = existing_file(path)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter=sep)
        try:
            names = next(lines, [])
            rows = _checked(file, lines, len(names))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected text in UTF-8: {error}") from None
        except csv.Error as error:
            raise ValueError(f"{file}:{lines.line_num}: {error}") from None
    if not names:
        raise ValueError(f"{file}: the file is empty, expected a header and a row for each id")
    if id_column not in names:
        raise ValueError(f"id: {file} has no column {id_column!r}; its columns are {', '.join(map(repr, names))}")
    table: Table = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    table[id_column] = _ids(table[id_column])
    return table


def read_parquet(path: str | os.PathLike[str]) -> Any:
    polars = polars_or_none()
    if polars is None:
        raise ImportError("reading Parquet needs Polars: pip install 'metarec-fast[data]'")
    file = existing_file(path)
    try:
        return polars.read_parquet(file)
    except polars.exceptions.PolarsError as error:
        raise ValueError(f"{file}: expected a Parquet file: {error}") from None


def is_movielens(path: Path) -> bool:
    """Whether the name is that of a MovieLens table of users or films, and for movies.csv its header too."""
    if path.name == "movies.csv":
        with path.open("rb") as stream:
            return stream.readline().startswith(b"movieId,title")
    return path.name in ("u.user", "u.item", "users.dat", "movies.dat")


def read_movielens(path: str | os.PathLike[str]) -> Table:
    """The columns by name, the ids in `id`."""
    file = existing_file(path)
    if file.name == "movies.csv":
        table = _read_text(file, ",", "movieId")
        return _films(table["movieId"], table["title"], [text.split("|") for text in table["genres"]])
    if file.name == "u.user":
        rows = _fields(file, "|", 5)
        return _users(rows, [int(row[1]) for row in rows], [row[2] for row in rows], [row[3] for row in rows])
    if file.name == "users.dat":
        rows = _fields(file, "::", 5)
        return _users(rows, [row[2] for row in rows], [row[1] for row in rows], [row[3] for row in rows])
    if file.name == "u.item":
        rows = _fields(file, "|", 5 + len(_GENRES_OF_100K))
        genres = [[g for g, flag in zip(_GENRES_OF_100K, row[5:], strict=True) if flag == "1"] for row in rows]
        return _films(_ids([row[0] for row in rows]), [row[1] for row in rows], genres)
    if file.name == "movies.dat":
        rows = _fields(file, "::", 3)
        return _films(_ids([row[0] for row in rows]), [row[1] for row in rows], [row[2].split("|") for row in rows])
    names = "u.user, u.item, users.dat, movies.dat, movies.csv"
    raise ValueError(f"{file}: expected the name of a MovieLens table of users or films, {names}")


def _users(rows: list[list[str]], age: list[Any], gender: list[str], occupation: list[str]) -> Table:
    return {
        "id": _ids([row[0] for row in rows]), "age": age, "gender": gender, "occupation": occupation,
        "zip_code": [row[4] for row in rows],
    }  # fmt: skip


def _films(ids: list[Any], titles: list[str], genres: list[list[str]]) -> Table:
    years = [_YEAR.search(title) for title in titles]
    return {
        "id": ids,
        "year": [None if year is None else int(year[1]) for year in years],
        "genres": [[genre for genre in row if genre and genre != _NO_GENRES] for row in genres],
    }


def _fields(file: Path, sep: str, width: int) -> list[list[str]]:
    """The fields of a text file without header, of UTF-8 or Latin-1."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return _checked(file, (line.split(sep) for line in text.splitlines()), width)


def _checked(file: Path, rows: Iterable[Sequence[str]], width: int) -> list[list[str]]:
    kept = []
    for number, row in enumerate(rows, 1):
        if row and list(row) != [""]:
            if len(row) != width:
                raise ValueError(f"{file}: expected {width} fields in row {number}, got {len(row)}")
            kept.append(list(row))
    return kept


def _ids(texts: list[str]) -> list[Any]:
    """Integers if all are whole numbers, as in a log of ratings, else the strings as they stand."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        return list(texts)
