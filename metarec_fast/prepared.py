"""Ratings that were read and checked once, in one compact file (NumPy's .npz) that is read in no time."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from metarec_fast.checkpoint import replace_file
from metarec_fast.data import Interactions

SUFFIX = ".npz"
FORMAT_VERSION = 1


def write_prepared(log: Interactions, path: str | os.PathLike[str]) -> None:
    """Writes a log; `read_prepared` gives the same one back. A file that is there already is replaced at once.

    Raises:
        ValueError: The name of the file does not end in .npz.
        TypeError: An id is neither a number nor a string.
    """
    file = Path(path)
    if file.suffix != SUFFIX:
        raise ValueError(f"{file}: expected a name that ends in {SUFFIX}")
    arrays = {
        "format_version": np.array(FORMAT_VERSION),
        "offsets": log.offsets,
        "items": log.items,
        "ratings": log.ratings,
        "user_ids": _plain("user_ids", log.user_ids),
        "item_ids": _plain("item_ids", log.item_ids),
        "num_duplicates": np.array(log.num_duplicates),
    }
    if log.times is not None:
        arrays["times"] = log.times
    if log.item_titles is not None:
        known = [item for item in log.item_ids.tolist() if item in log.item_titles]
        arrays["titled_ids"] = np.array(known, arrays["item_ids"].dtype)
        arrays["titles"] = np.array([log.item_titles[item] for item in known], np.str_)

    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda temporary: _save(temporary, arrays))


def read_prepared(path: str | os.PathLike[str]) -> Interactions:
    """Reads a log that `write_prepared` wrote, without running any code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another file, or broken, or of a newer format.
    """
    file = Path(path)
    try:
        with np.load(file, allow_pickle=False) as loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        version = int(arrays["format_version"])
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version}")
        titles = None
        if "titles" in arrays:
            titles = dict(zip(arrays["titled_ids"].tolist(), arrays["titles"].tolist(), strict=True))
        return Interactions(
            arrays["offsets"], arrays["items"], arrays["ratings"], arrays.get("times"), arrays["user_ids"],
            arrays["item_ids"], titles, int(arrays["num_duplicates"]),
        )  # fmt: skip
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected what `metarec-fast prepare` writes: {error}") from None


def _plain(name: str, ids: NDArray[Any]) -> NDArray[Any]:
    """The ids in an array that needs no pickling."""
    if ids.dtype.kind != "O":
        return ids
    strange = next((value for value in ids.tolist() if not isinstance(value, str)), None)
    if strange is not None:
        raise TypeError(f"{name}: only numbers or only strings can be saved, got {type(strange).__name__} {strange!r}")
    return np.array(ids.tolist(), np.str_)


def _save(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    file: BinaryIO
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
