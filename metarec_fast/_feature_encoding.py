"""Tables of features as matrices, given what was learned of their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from metarec_fast._feature_columns import Column, dense_values, sparse_values
from metarec_fast.feature_matrix import FeatureMatrix


def encode_rows(
    columns: Sequence[Column], table: Mapping[str, Sequence[Any]], num_rows: int, like: FeatureMatrix | None
) -> FeatureMatrix:
    """The matrix of a table [R, F], with means of its own or those of another one.

    Args:
        table: The values of each column, plain ones, `num_rows` of them.

    Raises:
        ValueError, TypeError: A column has another length, or a value is not of the column's kind.
    """
    for column in columns:
        if len(table[column.name]) != num_rows:
            raise ValueError(f"{column.name}: expected {num_rows} rows, one per id, got {len(table[column.name])}")
    sparse = [column for column in columns if column.is_sparse and column.size]
    dense = [dense_values(column, table[column.name]) for column in columns if not column.is_sparse]

    values, rows, weights, first = [], [], [], 0
    for column in sparse:
        found, sizes = sparse_values(column, table[column.name])
        values.append(found + first)
        rows.append(np.repeat(np.arange(num_rows), sizes))
        weights.append(1 / np.sqrt(np.repeat(sizes, sizes)))
        first += column.size
    order = np.argsort(_joined(rows, np.int64), kind="stable")
    value, weight = _joined(values, np.int64)[order], _joined(weights, np.float32)[order]
    offsets = np.concatenate([[0], np.bincount(_joined(rows, np.int64), minlength=num_rows).cumsum()])
    known = np.empty((num_rows, len(sparse)), np.float32)
    for place, column in enumerate(sparse):
        known[:, place] = np.fromiter((value is not None for value in table[column.name]), bool, num_rows)

    column_of = np.repeat(np.arange(len(sparse)), [column.size for column in sparse]).astype(np.int64)
    if like is None:
        totals = np.bincount(value, weight, first)
        means = torch.from_numpy((totals / np.maximum(known.sum(0), 1)[column_of]).astype(np.float32))
    else:
        means = like.means
    return FeatureMatrix(
        torch.from_numpy(value), torch.from_numpy(weight), torch.from_numpy(offsets.astype(np.int64)),
        torch.from_numpy(known),
        torch.from_numpy(np.concatenate(dense, 1)) if dense else torch.zeros(num_rows, 0),
        torch.from_numpy(column_of), means,
    )  # fmt: skip


def _joined(parts: Sequence[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate([*parts, np.empty(0, kind)]).astype(kind)
