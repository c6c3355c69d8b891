"""Several things known of one user, each with a head of its own: logs of them as one log.

Of H heads and N items, number h · N + i is item i as head h sees it, and (name of h, id of i) its original id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metarec_fast._ids import encode_ids, faithful_array, find_ids
from metarec_fast.data import Interactions

HEAD_LOSSES = ("squared", "logistic")


@dataclass(frozen=True)
class Head:
    """What is predicted, and how much it counts.

    Args:
        loss: "squared" for ratings, "logistic" for targets in [0, 1] such as clicks.
        weight: α ≥ 0, of the head's loss in the inner loop; with 0, users do not adapt on it.
        outer_weight: Of its loss in the outer loop, ≥ 0; None is the weight. With 0 it only tells about users.

    Raises:
        ValueError: The loss is unknown, or a weight is negative or not finite.
    """

    loss: str = "squared"
    weight: float = 1.0
    outer_weight: float | None = None

    def __post_init__(self) -> None:
        if self.loss not in HEAD_LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(HEAD_LOSSES)}, got {self.loss!r}")
        for name in ("weight", "outer_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: must be finite and ≥ 0, got {value!r}")

    @property
    def query_weight(self) -> float:
        """Of its loss in the outer loop."""
        return self.weight if self.outer_weight is None else self.outer_weight


def join_heads(logs: Mapping[str, Interactions]) -> Interactions:
    """One log of all heads, for learners on a `MultiTaskRecommender`: its users are those of any log, and its items all
    pairs (head, item), of every item of any log.

        log = mf.join_heads({"rating": ratings, "click": clicks})
        model = mf.MultiTaskRecommender(log.num_items // 2, 16, {"rating": mf.Head(), "click": mf.Head("logistic")})

    Args:
        logs: By the names of the heads, in the order of the model's. Users and items are matched by original ids.

    Returns:
        The log; with times, if all of them have times.

    Raises:
        ValueError: There is no log, or none has a rating.
        TypeError: A log is none.
    """
    if not logs:
        raise ValueError("logs: expected at least one, by the name of its head, got none")
    for name, log in logs.items():
        if not isinstance(log, Interactions):
            raise TypeError(f"logs[{name!r}]: expected Interactions, got {type(log).__name__}")
    item_ids = encode_ids("items", _joined([log.item_ids for log in logs.values()])).ids
    users = _joined([np.repeat(log.user_ids, log.sizes()) for log in logs.values()])
    if len(users) == 0:
        raise ValueError("logs: expected at least one rating, got none")
    rows = [
        head * len(item_ids) + find_ids(item_ids, log.item_ids)[log.items] for head, log in enumerate(logs.values())
    ]
    times = [log.times for log in logs.values()]
    joined = Interactions.from_arrays(
        users,
        np.concatenate(rows),
        np.concatenate([log.ratings for log in logs.values()]),
        None if any(each is None for each in times) else np.concatenate(times),  # type: ignore[arg-type]
    )
    joined, _ = joined.align_items(np.arange(len(logs) * len(item_ids)))
    titles: dict[Any, str] = {}
    for log in logs.values():
        titles |= log.item_titles or {}
    return replace(joined, item_ids=pair_ids(logs, item_ids), item_titles=titles or None)


def pair_ids(heads: Mapping[str, Any], item_ids: NDArray[Any]) -> NDArray[Any]:
    """All pairs (head, item), the items of the first head first, [H N]."""
    pairs = np.empty(len(heads) * len(item_ids), object)
    pairs[:] = [(head, item) for head in heads for item in item_ids.tolist()]
    return pairs


def _joined(columns: list[NDArray[Any]]) -> NDArray[Any]:
    """One column below the other; of ids of several kinds, each stays what it is."""
    if len({column.dtype.kind for column in columns}) == 1:
        return np.concatenate(columns)
    return faithful_array([value for column in columns for value in column.tolist()])
