"""Ranks among a few items drawn at random, as many papers report: to compare with these alone, for they are biased.

They need not even order two predictors as ranks in the whole catalogue do (Krichene and Rendle 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import _random
from metarec_fast._ids import plain
from metarec_fast._ragged import sum_by_task
from metarec_fast.data import Interactions
from metarec_fast.metrics import Places, expected_discount, is_relevant, probability_in_first
from metarec_fast.tasks import Entries


def draw_unrated(logs: Sequence[Interactions], users: NDArray[np.int64], count: int, key: int) -> Tensor:
    """Different items that each user has rated in none of the logs, [T, count]: those whose hash is smallest.

    Args:
        logs: Of the same users at the same positions.
        users: Positions of the users, [T].
        count: How many for each.
        key: Which draw.

    Raises:
        ValueError: A user has not so many unrated items.
    """
    drawn = np.empty((len(users), count), np.int64)
    for row, user in enumerate(users.tolist()):
        unrated = np.setdiff1d(
            np.arange(logs[0].num_items), np.concatenate([log.items[log.rows(user)] for log in logs])
        )
        if len(unrated) < count:
            raise ValueError(
                f"sampled_negatives: there must be as many items that user {plain(logs[0].user_ids[user])!r} has not "
                f"rated, got {count}, there are {len(unrated)}"
            )
        hashes = _random.at(_random.at(key, user), unrated)
        drawn[row] = unrated[np.argsort(hashes, kind="stable")[:count]]
    return torch.from_numpy(drawn)


def sampled_ranks(
    scores: Tensor, query: Entries, negatives: Tensor, k: Sequence[int], relevant_from: float | None = None
) -> dict[str, Tensor]:
    """`sampled_ndcg@k` and `sampled_hr@k` of each task, means over its relevant query items, [T].

    Each relevant item is ranked among itself and the negatives of its task: hr is 1 if it is among the first k, nDCG is
    1/log2(rank + 1) then. Equal scores count as ranked in random order.

    Args:
        scores: Scores of every item for every task, [T, N].
        query: The entries whose items are to be found.
        negatives: Items that are not relevant, [T, M].
        k: Lengths of the ranked lists.
        relevant_from: The lowest rating of a relevant item; None makes every query item relevant.
    """
    chosen = is_relevant(query, relevant_from)
    tasks = query.task_ids()[chosen]
    own = scores[tasks, query.items[chosen], None]  # [r, 1]
    others = scores.gather(1, negatives)[tasks]  # [r, M]
    places = Places((others > own).sum(1), 1 + (others == own).sum(1))
    counts = sum_by_task(torch.ones(len(tasks), dtype=torch.float64), tasks, query.num_tasks)
    return {
        f"sampled_{name}@{length}": sum_by_task(measure(places, length), tasks, query.num_tasks) / counts
        for name, measure in (("ndcg", expected_discount), ("hr", probability_in_first))
        for length in k
    }
