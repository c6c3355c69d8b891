"""Text files as tables of fields, a block of lines at a time, so that memory does not grow with the file.

A block in which every line has the same number of fields and nothing is quoted is taken apart by NumPy, without an
object for each field. Any other block goes through the standard library, where what is wrong is found and named.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 20  # bytes of text at a time, so that temporaries stay in the processor's cache
_ROWS = 1 << 15  # rows of strings at a time
_NEWLINE, _ZERO, _POINT = b"\n0."
_POWERS = np.array([float(10**k) for k in range(16)])  # exact, which pow() need not be
_INTEGER_CHARACTERS = frozenset("+-0123456789")

Ints = NDArray[np.int64]


class Field(NamedTuple):
    """A wanted column."""

    role: str  # user, item, rating or time
    position: int
    name: str  # in the header, or the position where there is none


@dataclass(frozen=True)
class Layout:
    """Where the wanted columns of a file are."""

    file: Path
    sep: str
    fields: list[Field]
    width: int  # fields of a line
    header_lines: int


def find_columns(file: Path, wanted: dict[str, str | int | None], sep: str, header: bool) -> Layout:
    """Finds each wanted column, given by name or position, by the first line of the file."""
    with open(file, "rb") as stream:
        line, names = next(_rows(file, _blocks(stream), 0, sep), (0, []))
    if not names:
        raise ValueError(f"{file}: the file is empty, expected {'a header and ' if header else ''}one rating a line")
    fields = []
    for role, column in wanted.items():
        if column is None:
            continue
        if isinstance(column, int):
            if not 0 <= column < len(names):
                raise ValueError(f"{role}: {file} has no column {column}; its columns are 0 to {len(names) - 1}")
            position = column
        elif not header:
            raise TypeError(f"{role}: expected the position of a column, as there is no header, got {column!r}")
        elif column in names:
            position = names.index(column)
        else:
            listed = ", ".join(repr(name) for name in names)
            raise ValueError(f"{role}: {file} has no column {column!r}; its columns are {listed}")
        fields.append(Field(role, position, repr(names[position]) if header else str(position)))
    return Layout(file, sep, fields, len(names), line if header else 0)


def read_tables(layout: Layout, stream: BinaryIO) -> Iterator[Table]:
    """The rows of the file below its header.

    Raises:
        ValueError: A row has too many fields, or too few for the wanted columns; quotes do not match; no UTF-8.
    """
    line = layout.header_lines  # lines before the block
    blocks = _blocks(stream, layout.header_lines)
    for block in blocks:
        if len(layout.sep) == 1 and b'"' in block:  # a quoted field may go on beyond the block
            yield from _string_tables(layout, chain([block], blocks), line)
            return
        grid = _split(layout, block, line)
        if grid is None:
            yield from _string_tables(layout, [block], line)
            line += block.count(b"\n")
        else:
            yield grid
            line += len(grid)


def _blocks(stream: BinaryIO, skip_lines: int = 0) -> Iterator[bytes]:
    """The file in pieces of whole lines, all of which end with \\n; the first lines left out."""
    stream.seek(3 if stream.read(3) == b"\xef\xbb\xbf" else 0)  # a byte order mark
    rest = b""
    while True:
        piece = stream.read(_BLOCK)
        end = piece.rfind(b"\n") + 1
        if piece and not end:
            rest += piece
            continue
        block, rest = rest + piece[:end], piece[end:]
        if not piece and block:
            block += b"\n"
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        while skip_lines and block:
            block, skip_lines = block[block.find(b"\n") + 1 :], skip_lines - 1
        if block:
            yield block
        if not piece:
            return


def _decode(file: Path, block: bytes, line: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        line += 1 + block.count(b"\n", 0, error.start)
        raise ValueError(f"{file}:{line}: expected UTF-8 text, got the byte 0x{block[error.start]:02x}") from None


def _rows(file: Path, blocks: Iterable[bytes], line: int, sep: str) -> Iterator[tuple[int, list[str]]]:
    """The number of the line on which each row ends, and its fields; blank lines are left out."""

    def lines() -> Iterator[str]:
        before = line
        for block in blocks:
            yield from io.StringIO(_decode(file, block, before), newline="\n")
            before += block.count(b"\n")

    if len(sep) > 1:
        for number, text in enumerate(lines(), start=line + 1):
            if text != "\n":
                yield number, text[:-1].split(sep)
        return
    reader = csv.reader(lines(), delimiter=sep, strict=True)
    try:
        for row in reader:
            if row:
                yield line + reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file}:{line + reader.line_num}: expected fields separated by {sep!r}: {error}") from None


class Table:
    """Some rows of a file."""

    def __len__(self) -> int:
        raise NotImplementedError

    def line(self, row: int) -> int:
        """Its number in the file, from 1."""
        raise NotImplementedError

    def strings(self, position: int) -> list[str]:
        """The column at a position."""
        raise NotImplementedError

    def integers(self, position: int) -> Ints | None:
        """The column as int64; None unless all are whole numbers in plain digits."""
        values = self.strings(position)
        if not _INTEGER_CHARACTERS.issuperset("".join(values)):
            return None
        try:
            return np.fromiter(map(int, values), np.int64, len(values))
        except (ValueError, OverflowError):
            return None

    def reals(self, position: int) -> NDArray[np.float64]:
        """The column as float64, NaN where it is no number."""
        values = self.strings(position)
        return np.fromiter(map(_real, values), np.float64, len(values))


class _Strings(Table):
    def __init__(self, rows: list[tuple[int, list[str]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def line(self, row: int) -> int:
        return self.rows[row][0]

    def strings(self, position: int) -> list[str]:
        return [row[position] for _, row in self.rows]


def _string_tables(layout: Layout, blocks: Iterable[bytes], line: int) -> Iterator[Table]:
    needed = 1 + max(field.position for field in layout.fields)
    rows = _rows(layout.file, blocks, line, layout.sep)
    while part := list(islice(rows, _ROWS)):
        for number, row in part:
            if not needed <= len(row) <= layout.width:
                raise ValueError(
                    f"{layout.file}:{number}: expected {layout.width} fields separated by {layout.sep!r}, "
                    f"got {len(row)}"
                )
        yield _Strings(part)


class _Grid(Table):
    """A block whose lines all have the same number of fields: [rows, fields], as positions in the text."""

    def __init__(self, block: bytes, begins: Ints, ends: Ints, sep: str, lines_before: int) -> None:
        self.block, self.begins, self.ends = block, begins, ends
        self.sep, self.lines_before = sep, lines_before
        self.cells: list[str] | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def line(self, row: int) -> int:
        return self.lines_before + 1 + row

    def strings(self, position: int) -> list[str]:
        if self.cells is None:
            self.cells = self.block.decode("utf-8").replace("\n", self.sep).split(self.sep)
        return self.cells[position : self.ends.size : self.ends.shape[1]]

    def integers(self, position: int) -> Ints | None:
        numbers = self._decimals(position, points=0)
        return super().integers(position) if numbers is None else numbers[0]

    def reals(self, position: int) -> NDArray[np.float64]:
        numbers = self._decimals(position, points=1)
        if numbers is None:
            return super().reals(position)
        # Both are whole numbers that float64 holds, so that the quotient is rounded once, as in float().
        quotient: NDArray[np.float64] = numbers[0] / _POWERS[numbers[1]]
        return quotient

    def _decimals(self, position: int, points: int) -> tuple[Ints, Ints] | None:
        """Digits with at most so many points among them: their value, and how many follow the point.

        None where there is anything else: a sign, an exponent, nothing, more than 15 digits.
        """
        end = self.ends[:, position]
        length = end - self.begins[:, position]
        shortest, longest = int(length.min()), int(length.max())
        if shortest == 0 or longest > 15 + points:
            return None
        content = np.frombuffer(self.block, np.uint8)
        value, decimals = np.zeros((2, len(self)), np.int64)
        pointed = np.zeros(len(self), bool)
        for k in range(longest):  # from the last character to the first
            character = content.take(end - (k + 1), mode="clip")
            digit = character - np.uint8(_ZERO)  # what is below "0" wraps around, to more than 9
            if k >= shortest:
                digit *= k < length
            if not points:
                power: int | Ints = 10**k
            else:
                is_point = character == _POINT
                if k >= shortest:
                    is_point &= k < length
                if (is_point & (pointed | (length == 1))).any():
                    return None
                decimals[is_point] = k
                digit[is_point] = 0
                power = np.where(pointed, 10 ** max(k - 1, 0), 10**k)
                pointed |= is_point
            if digit.max() > 9:
                return None
            value += digit.astype(np.int64) * power
        return value, decimals


def _split(layout: Layout, block: bytes, lines_before: int) -> _Grid | None:
    """The block as a grid, if its lines are all alike."""
    sep = layout.sep.encode()
    if len(sep) > 2 or (len(sep) == 2 and sep[:1] * 3 in block):  # in ::: it is not plain which two separate
        return None
    if not block.isascii():
        _decode(layout.file, block, lines_before)
    content = np.frombuffer(block, np.uint8)
    is_end = content == sep[0]
    if len(sep) == 2:
        is_end[:-1] &= content[1:] == sep[1]
        is_end[-1] = False
    is_end |= content == _NEWLINE
    all_ends = np.flatnonzero(is_end)
    if len(all_ends) % layout.width:
        return None
    ends = all_ends.reshape(-1, layout.width)
    is_newline = content[ends] == _NEWLINE
    if not is_newline[:, -1].all() or is_newline[:, :-1].any():
        return None
    begins = np.empty_like(ends)
    begins[:, 1:] = ends[:, :-1] + len(sep)
    begins[0, 0] = 0
    begins[1:, 0] = ends[:-1, -1] + 1
    return _Grid(block, begins, ends, layout.sep, lines_before)


def _real(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")
