"""Tables of features from files: text with named columns, Parquet, and the users and films of MovieLens."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
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
_ROWS = 512  # at a time; more of them do not stay in the cache


def read_csv(path: str | os.PathLike[str], sep: str, id_column: str, bag_sep: str | None) -> Table:
    """The columns by name, numbers and bags where they are such; ids as in a log of ratings."""
    table = _read_text(path, sep, id_column)
    return {name: values if name == id_column else parse_text(values, bag_sep) for name, values in table.items()}


def csv_header(path: str | os.PathLike[str], sep: str = ",") -> list[str]:
    """The names in the first line of a text file."""
    with open(existing_file(path), encoding="utf-8-sig", errors="replace", newline="") as stream:
        return [name.strip() for name in next(csv.reader(stream, delimiter=sep), [])]


def _read_text(path: str | os.PathLike[str], sep: str, id_column: str) -> Table:
    """The columns by name, as strings but for ids that are all whole numbers; without those that have no name, as the
    numbers of the rows that pandas writes."""
    if not isinstance(sep, str) or len(sep) != 1:
        raise ValueError(f"sep: expected one character, got {sep!r}")
    file = existing_file(path)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter=sep)
        try:
            names = [name.strip() for name in next(lines, [])]
            _check_header(file, names, sep, id_column)
            columns = _read_columns(file, lines, len(names), names.index(id_column))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: expected text in UTF-8: {error}") from None
        except csv.Error as error:
            raise ValueError(f"{file}:{lines.line_num}: {error}") from None
    table: Table = {name: column for name, column in zip(names, columns, strict=True) if name}
    table[id_column] = _ids(table[id_column])
    return table


def _check_header(file: Path, names: Sequence[str], sep: str, id_column: str) -> None:
    if not names:
        raise ValueError(f"{file}: the file is empty, expected a header and a row for each id")
    if id_column not in names:
        if len(names) == 1 and any(other in names[0] for other in ";\t|,"):
            raise ValueError(f"{file}: expected fields separated by {sep!r}, got the header {names[0]!r}")
        listed = ", ".join(map(repr, names))
        raise ValueError(f"id: {file} has no column {id_column!r}; its columns are {listed}")
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise ValueError(f"{file}: each column must come once, {', '.join(map(repr, twice))} comes more often")


def _read_columns(file: Path, lines: Any, width: int, id_place: int) -> list[list[str]]:
    """The fields of all rows, column by column; equal ones are kept once, but for ids."""
    columns: list[list[str]] = [[] for _ in range(width)]
    kept: list[dict[str, str]] = [{} for _ in range(width)]
    rows = _checked_rows(file, lines, width, id_place)
    while block := list(islice(rows, _ROWS)):
        for place, fields in enumerate(zip(*block, strict=True)):
            columns[place].extend(fields if place == id_place else map(kept[place].setdefault, fields, fields))
    return columns


def _checked_rows(file: Path, lines: Any, width: int, id_place: int) -> Iterator[list[str]]:
    """Rows with an id and as many fields as the header has; lines without anything are left out."""
    line = lines.line_num + 1
    for row in lines:
        if len(row) == width and row[id_place]:
            yield row
        elif any(row):
            expected = "an id" if len(row) == width else f"{width} fields"
            raise ValueError(f"{file}:{line}: expected {expected}, got {'none' if len(row) == width else len(row)}")
        line = lines.line_num + 1  # where the next row begins: fields in quotes may have several lines


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
        if not {"title", "genres"} <= set(table):
            raise ValueError(f"{file}: expected the columns movieId, title, genres, got {', '.join(table)}")
        return _films(table["movieId"], table["title"], [text.split("|") for text in table["genres"]])
    if file.name == "u.user":
        rows = _fields(file, "|", 5)
        return _users(
            rows, parse_text([row[1] for row in rows], None), [row[2] for row in rows], [row[3] for row in rows]
        )
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
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: some Latin-1 letters are line ends elsewhere
        row = line.rstrip("\r").split(sep)
        if row != [""]:
            if len(row) != width:
                raise ValueError(f"{file}:{number}: expected {width} fields separated by {sep!r}, got {len(row)}")
            rows.append(row)
    return rows


def _ids(texts: list[str]) -> list[Any]:
    """Integers if all are whole numbers, as in a log of ratings, else the strings as they stand."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        return list(texts)
