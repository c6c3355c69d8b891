"""One user of a module after adaptation; takes and gives original item ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast.module_tasks import ModuleTasks
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learner import Learner


class AdaptedModule:
    """A user with the module's parameters as they became on his ratings; `learner.adapt` makes it.

    Attributes:
        parameters: Those that adapted, by name.
        seen: Row numbers of the items adapted on, int64 [S].
    """

    def __init__(self, learner: Learner, support: Entries, features: Mapping[str, Any] | None, user: Any) -> None:
        assert isinstance(learner.tasks, ModuleTasks)
        self.seen: Tensor = support.items
        self._learner, self._tasks = learner, learner.tasks
        users = self._tasks.model.user_row(features, user)
        fast = learner.fast_parameters(TaskBatch(support), users)
        self.parameters = {name: value[0] for name, value in fast.items()}
        self._user = None if users is None else users[0]

    @torch.no_grad()
    def predict(self, items: Any) -> NDArray[Any]:
        """The scores [n] of items by original id; an item that the learner does not know gets the mean of all."""
        rows = self._learner.catalogue.find(items)
        found = torch.from_numpy(np.maximum(rows, 0)).to(self.seen.device)
        scores = self._tasks.score(self.parameters, found, self._user)
        if (rows < 0).any():
            scores = torch.where(torch.from_numpy(rows < 0).to(scores.device), self._all().mean(), scores)
        result: NDArray[Any] = scores.cpu().numpy()
        return result

    @torch.no_grad()
    def recommend(self, k: int = 10, exclude_seen: bool = True) -> tuple[NDArray[Any], NDArray[Any]]:
        """The k best items and their scores, best first: original ids [k] and scores [k].

        Args:
            k: How many, 1 … N.
            exclude_seen: Leave out the items adapted on. Where fewer than k are left, fewer are returned.

        Raises:
            ValueError: k is below 1 or above the number of items.
        """
        return best_items(self._all(), self._learner.catalogue.ids, k, self.seen if exclude_seen else self.seen[:0])

    def _all(self) -> Tensor:
        return self._tasks.score(self.parameters, torch.arange(self._tasks.model.num_items), self._user)

    def __repr__(self) -> str:
        return f"AdaptedModule({len(self.parameters)} parameters, seen={len(self.seen)})"


def best_items(scores: Tensor, ids: NDArray[Any], k: int, seen: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """The ids [k] and scores [k] of the k best of all items, best first, given their scores [N], which are written to,
    and row numbers to leave out; fewer where fewer are left.

    Raises:
        ValueError: k is below 1 or above N.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"k: must be in [1, {len(scores)}], got {k}")
    scores[seen] = -torch.inf
    best = scores.topk(min(k, len(scores) - len(seen.unique())))
    return ids[best.indices.cpu().numpy()], best.values.cpu().numpy()
