"""Learners on disk: `weights.safetensors` and `learner.json` in one directory, readable without running any code.

Where the model has features of users or items, their tables are in `features.safetensors`.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from metarec_fast._feature_columns import columns_from, describe_columns
from metarec_fast.catalogue import Catalogue
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.features import Features, fingerprint
from metarec_fast.freezing import factors_of, set_factors
from metarec_fast.heads import Head, pair_ids
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.models import DotRecommender
from metarec_fast.module_recommender import ModuleRecommender
from metarec_fast.multi_task import MultiTaskRecommender

if TYPE_CHECKING:
    from metarec_fast.learner import Learner

FORMAT_VERSION = 1
WEIGHTS, FEATURES, DESCRIPTION = "weights.safetensors", "features.safetensors", "learner.json"


def save(learner: Learner, directory: str | os.PathLike[str]) -> None:
    """Writes the learner to a directory, which is made if need be; `load` reads it.

    A file that is there already is replaced at once, never left half written.

    Raises:
        TypeError: An id is neither an integer nor a string.
    """
    folder = Path(directory)
    tables = learner.model.feature_tables()
    description = {
        "format_version": FORMAT_VERSION,
        "class": type(learner).__name__,
        "hyperparameters": learner.hyperparameters,
        "model": learner.model.hyperparameters,
        "module": isinstance(learner.model, ModuleRecommender),
        "dtype": str(learner.model.offset.dtype).removeprefix("torch."),
        "lr_factors": factors_of(learner),
        "rating_range": None if learner.rating_range is None else list(learner.rating_range),
        "item_ids": None if learner.item_ids is None else _pack_ids("item_ids", ids_to_save(learner)),
        "features": {
            name: {
                "ids": _pack_ids(f"{name} features", table.ids),
                "columns": describe_columns(table.columns),
                "fingerprint": fingerprint(table),
            }
            for name, table in tables.items()
        },
    }
    text = json.dumps(description, ensure_ascii=False, indent=1)

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in learner.state_dict().items()}
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path))
    if tables:
        matrices = {
            f"{name}.{part}": value for name, table in tables.items() for part, value in vars(table.matrix).items()
        }
        replace_file(folder / FEATURES, lambda path: save_file(matrices, path))
    replace_file(folder / DESCRIPTION, lambda path: path.write_text(text, encoding="utf-8"))


def load(directory: str | os.PathLike[str], *, module: nn.Module | None = None) -> Learner:
    """Reads a learner that `learner.save(directory)` wrote, on the CPU.

    Args:
        module: A module like the one whose weights were saved, where the learner's model was one: its code is not in
            the files. Its weights are replaced.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is broken, or of a newer format, or the files do not belong together; it is named.
    """
    import torch

    from metarec_fast.maml import FOMAML, MAML, MetaSGD
    from metarec_fast.maml_r import MAMLR
    from metarec_fast.reptile import Reptile

    folder = Path(directory)
    path = folder / DESCRIPTION
    classes = {cls.__name__: cls for cls in (MAML, FOMAML, Reptile, MetaSGD, MAMLR)}
    description = _read_json(path)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r}")
    tables = _read_features(folder, description.get("features", {}))
    try:
        cls = classes[description["class"]]
        dtype = getattr(torch, description["dtype"])
        model = _make_model(description["model"], bool(description.get("module")), tables, module).to(dtype)
        learner: Learner = cls(model, **description["hyperparameters"]).to(dtype)
        ids, limits = description["item_ids"], description["rating_range"]
        set_factors(learner, description.get("lr_factors", {}))
        if ids is not None:
            heads = learner.model.heads if isinstance(model, MultiTaskRecommender) else None
            learner.item_ids = _unpack_ids(ids) if heads is None else pair_ids(heads, _unpack_ids(ids))
        learner.rating_range = None if limits is None else (float(limits[0]), float(limits[1]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a saved learner: {type(error).__name__}: {error}") from error

    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file")
    try:
        learner.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{weights}: does not hold the weights of this learner: {error}") from error
    return learner


def ids_to_save(learner: Learner) -> NDArray[Any]:
    """The original ids of the learner's items; of several heads, which have the same, those of one."""
    ids: NDArray[Any] = learner.catalogue.ids
    return learner.model.ids_of_one_head(ids) if isinstance(learner.model, MultiTaskRecommender) else ids


def replace_file(path: Path, write: Any) -> None:
    """Lets `write` make a file beside `path`, and puts it there at once: a crash leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def make_model(
    learner: Learner, *, num_items: int, tables: dict[str, Any], module: nn.Module | None = None
) -> DotRecommender | ModuleRecommender:
    """A new model like the learner's, of another number of items and with these tables of features."""
    if module is None and isinstance(learner.model, ModuleRecommender) and "mlp" not in learner.model.hyperparameters:
        kind = type(learner.model.module).__name__
        raise ValueError(f"module: expected a {kind} for {num_items} items, which only you can make, got None")
    arguments = {**learner.model.hyperparameters, "num_items": num_items}
    if "mlp" in arguments:
        arguments["mlp"] = {**arguments["mlp"], "num_items": num_items}
    return _make_model(arguments, isinstance(learner.model, ModuleRecommender), tables, module)


def _make_model(
    arguments: dict[str, Any], is_module: bool, tables: dict[str, Any], module: nn.Module | None
) -> DotRecommender | ModuleRecommender:
    if "heads" in arguments:
        heads = {name: Head(**head) for name, head in arguments["heads"].items()}
        return MultiTaskRecommender(**{**arguments, "heads": heads}, **tables)
    if not is_module:
        return DotRecommender(**arguments, **tables)
    arguments = dict(arguments)
    mlp = arguments.pop("mlp", None)
    if mlp is not None:
        return ModuleRecommender(MLPRecommender(**mlp, **tables), **arguments)
    if module is None:
        raise ValueError("module: expected the nn.Module that this learner was saved with, got None")
    users = {name: table for name, table in tables.items() if name == "user_features"}  # of items it has its own
    return ModuleRecommender(module, **arguments, **users)


def _read_features(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The tables of features as arguments of the model."""
    if not described:
        return {}
    path = folder / FEATURES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        tensors = load_file(path)
        tables = {
            name: Features(
                Catalogue(_unpack_ids(table["ids"]), len(table["ids"]["values"]), name=f"{name} features"),
                columns_from(table["columns"]),
                FeatureMatrix(*(tensors[f"{name}.{part.name}"] for part in fields(FeatureMatrix))),
            )
            for name, table in described.items()
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not hold the features of this learner: {error}") from error
    for name, table in tables.items():
        expected, found = described[name].get("fingerprint"), fingerprint(table)
        if found != expected:
            raise ValueError(
                f"{path}: does not hold the {name} features of this learner: expected {expected}, got {found}"
            )
    return {f"{name}_features": table for name, table in tables.items()}


def _pack_ids(name: str, ids: NDArray[Any]) -> dict[str, Any]:
    values = ids.tolist()
    strange = next((value for value in values if isinstance(value, bool) or not isinstance(value, (int, str))), None)
    if strange is not None:
        raise TypeError(f"{name}: only integers and strings can be saved, got {type(strange).__name__} {strange!r}")
    return {"dtype": ids.dtype.str, "values": values}


def _unpack_ids(packed: dict[str, Any]) -> NDArray[Any]:
    dtype = np.dtype(packed["dtype"])
    ids = np.empty(len(packed["values"]), dtype)
    ids[:] = packed["values"]
    return ids
