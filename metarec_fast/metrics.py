"""How good predictions are: errors of ratings, nDCG within a user's query set, ranks in the whole catalogue.

Every function gives one number per task, NaN where a task does not count (nothing to predict, nothing relevant), and
`summarize` turns them into the figures that are reported. Entries with equal scores count as ranked in random order,
and what is computed is the exact expected value over these orders: so a constant predictor gets the chance level, no
order of items favours anyone, and no seed is involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast._ragged import pad, sum_by_task, unpad
from metarec_fast.tasks import Entries

_ANY = (-float("inf"), float("inf"))


def rating_errors(scores: Tensor, query: Entries, rating_range: tuple[float, float] = _ANY) -> dict[str, Tensor]:
    """Mean squared error `mse` and mean absolute error `mae_user` of each task, [T].

    Args:
        scores: Predicted ratings of the query entries, [n].
        query: The entries with their true ratings.
        rating_range: Lowest and highest rating; predictions are clipped to it. By default they are not.
    """
    errors = scores.double().clamp(*rating_range) - _targets(query)
    tasks, sizes = query.task_ids(), query.sizes()
    return {
        "mse": sum_by_task(errors.square(), tasks, query.num_tasks) / sizes,
        "mae_user": sum_by_task(errors.abs(), tasks, query.num_tasks) / sizes,
    }


def query_ndcg(scores: Tensor, query: Entries, k: Sequence[int]) -> dict[str, Tensor]:
    """`ndcg@k` and `ndcg_linear@k` of each task, its query entries ranked by score (Järvelin and Kekäläinen 2002).

    The gain of an entry is 2^r − 1, or r for the linear form, and 0 where that is negative; its discount at rank j is
    1/log2(j + 1). A task whose gains are all 0 does not count. One query entry alone always gets 1.

    Args:
        scores: What the query entries are ranked by, [n], higher first.
        query: The entries with their true ratings.
        k: Lengths of the ranked list.
    """
    targets, tasks = _targets(query), query.task_ids()
    by_score, by_target = (_places_within_tasks(values, query.offsets) for values in (scores.double(), targets))

    # nDCG does not change when all gains of a task are divided by 2^(its highest rating), and then 2^r cannot overflow.
    highest = pad(targets, query.offsets, -torch.inf).amax(1) if len(query) else targets.new_zeros(query.num_tasks)
    exponential = torch.exp2(targets - highest[tasks]) - torch.exp2(-highest[tasks])
    results = {}
    for name, gains in (("ndcg", exponential), ("ndcg_linear", targets)):
        for length in k:
            dcg, ideal = (
                sum_by_task(gains.clamp(min=0) * expected_discount(places, length), tasks, query.num_tasks)
                for places in (by_score, by_target)
            )
            results[f"{name}@{length}"] = dcg / ideal
    return results


class CatalogueRanks:
    """Ranks of the relevant items of each task among all items but those of its support set.

    Relevant are the query items: all of them, or those rated `relevant_from` or better. Tasks without one do not count.

    Args:
        scores: Scores of every item for every task, [T, N], finite.
        support: The entries whose items are left out.
        query: The entries whose items are to be found.
        relevant_from: The lowest rating of a relevant item; None makes every query item relevant.
    """

    def __init__(self, scores: Tensor, support: Entries, query: Entries, relevant_from: float | None = None) -> None:
        self.num_tasks, self.num_items = scores.shape
        seen = torch.zeros(scores.shape, dtype=torch.bool)
        seen[support.task_ids(), support.items] = True
        relevant = torch.zeros_like(seen)
        chosen = is_relevant(query, relevant_from)
        relevant[query.task_ids()[chosen], query.items[chosen]] = True
        relevant &= ~seen

        self.scores = scores.masked_fill(seen, -torch.inf)  # [T, N]
        self.ascending = self.scores.sort(1).values  # [T, N]
        self.counts = relevant.sum(1)  # [T], relevant items
        self.tasks = relevant.nonzero()[:, 0]  # [r]
        offsets = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        values = pad(self.scores[relevant], offsets, torch.inf)
        self.places = Places(*(unpad(part, offsets) for part in _places(self.ascending, values)))  # of the relevant [r]

    def metrics(self, k: Sequence[int]) -> dict[str, Tensor]:
        """`catalogue_ndcg@k`, `catalogue_hr@k`, `catalogue_recall@k` and `catalogue_mrr` of each task, [T].

        With binary relevance: hr is 1 if one relevant item is among the first k, recall the share of the relevant items
        that are, nDCG is relative to a list that begins with the relevant ones, mrr is 1/(rank of the first).
        """
        results = {}
        for length in k:
            ideal = _cumulative_discounts(length)[self.counts.clamp(max=length)]
            results[f"catalogue_ndcg@{length}"] = self._sum(expected_discount(self.places, length)) / ideal
        for length in k:
            results[f"catalogue_hr@{length}"] = torch.where(self.counts > 0, self._hit_probability(length), torch.nan)
        for length in k:
            found = self._sum(probability_in_first(self.places, length))
            results[f"catalogue_recall@{length}"] = found / self.counts
        results["catalogue_mrr"] = self._reciprocal_rank()
        return results

    def missed(self, k: int, missed: Tensor | None = None) -> Tensor:
        """The probability with which each item is in no task's first k, [N]; 0 or 1 where no scores tie.

        1 − its mean is `coverage@k`.

        Args:
            k: Length of the ranked lists.
            missed: The same for batches before this one, which the result then includes.
        """
        counted = self.counts > 0
        scores, ascending = self.scores[counted], self.ascending[counted]
        last = ascending[:, max(self.num_items - k, 0), None]  # [T, 1], the lowest score within the first k
        share = probability_in_first(_places(ascending, last), k)
        included = torch.where(scores == last, share, (scores > last).double())
        excluded = 1 - included.masked_fill(scores == -torch.inf, 0)
        missed = torch.ones(self.num_items, dtype=torch.float64) if missed is None else missed
        return torch.cat([missed[None], excluded]).cumprod(0)[-1]  # task by task, so batching changes no bit

    def _sum(self, values: Tensor) -> Tensor:
        return sum_by_task(values, self.tasks, self.num_tasks)

    def _hit_probability(self, k: int) -> Tensor:
        """Certain if a relevant item is surely among the first k; else up to the ties across the end of the list."""
        above, tied = self.places
        sure = self._sum((above + tied <= k).double()) > 0
        across = (above < k) & (above + tied > k)
        relevant = self._sum(across.double())  # [T], relevant items in the group of ties, of which there is one at most
        group = torch.zeros(self.num_tasks, dtype=torch.float64)
        group[self.tasks[across]] = tied[across].double()
        slots = torch.zeros_like(group)
        slots[self.tasks[across]] = (k - above[across]).double()

        # None of them in the slots: C(group − relevant, slots) / C(group, slots).
        others = group - relevant
        miss = _log_choose(others, torch.minimum(slots, others)) - _log_choose(group, slots)
        return torch.where(sure, 1.0, torch.where(others >= slots, 1 - miss.exp(), 1.0))

    def _reciprocal_rank(self) -> Tensor:
        """Expected 1/(above + J), J the first place of `relevant` items among `tied` ones in random order."""
        above = torch.full((self.num_tasks,), self.num_items).scatter_reduce(0, self.tasks, self.places.above, "amin")
        best = self.places.above == above[self.tasks]
        relevant = self._sum(best.double())
        tied = torch.ones_like(above)
        tied[self.tasks[best]] = self.places.tied[best]
        result = torch.where(self.counts > 0, 1 / (above + 1).double(), torch.nan)

        unsure = (tied > relevant).nonzero()[:, 0]
        if len(unsure):
            above, tied, relevant = (values[unsure, None].double() for values in (above, tied, relevant))
            place = torch.arange(
                1, int((tied - relevant).max()) + 2, dtype=torch.float64
            )  # J = 1 … tied − relevant + 1
            left = tied - place + 1
            stop = (relevant / left).clamp(0, 1)  # P(J = j | J ≥ j)
            reach = (1 - stop).cumprod(1).roll(1, 1)
            reach[:, 0] = 1  # P(J ≥ j)
            # A running sum goes place by place, so that padding for a longer row changes no bit.
            result[unsure] = (stop * reach / (above + place)).masked_fill(left < relevant, 0).cumsum(1)[:, -1]
        return result


def summarize(per_task: Mapping[str, NDArray[np.float64]], sizes: NDArray[np.int64]) -> dict[str, float]:
    """The figures of a report from those of each task: the mean over tasks that count, over entries for rmse and mae.

    Args:
        per_task: What `rating_errors`, `query_ndcg` and `CatalogueRanks.metrics` give, [T] each, NaN where a task does
            not count. A metric for which no task counts is left out.
        sizes: Query entries of each task, [T].
    """
    results = {}
    for name, values in per_task.items():
        counted = ~np.isnan(values)
        if not counted.any():
            continue
        if name == "mse":
            results["rmse"] = float(np.sqrt(np.average(values[counted], weights=sizes[counted])))
        else:
            if name == "mae_user":
                results["mae"] = float(np.average(values[counted], weights=sizes[counted]))
            results[name] = float(values[counted].mean())
    return results


def average_draws(
    draws: Sequence[Mapping[str, NDArray[np.float64]]], sizes: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """Metrics of each task, [T], as means over draws of its support: over all their entries for `mse` and `mae_user`.

    Args:
        draws: What `summarize` takes, for each of D draws. Where a task does not count in some of them, the others do.
        sizes: Query entries of each task in each draw, [D, T].
    """
    results = {}
    for name in draws[0]:
        values = np.stack([draw[name] for draw in draws])  # [D, T]
        weights = np.where(np.isnan(values), 0.0, sizes if name in ("mse", "mae_user") else 1.0)
        with np.errstate(invalid="ignore"):  # 0/0 is NaN: does not count
            results[name] = (np.nan_to_num(values) * (weights / weights.sum(0))).sum(0)
    return results


def standard_deviations(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The sample standard deviation of each figure over those runs that have it, of which there must be two."""
    values = {name: [run[name] for run in runs if name in run] for name in {name: None for run in runs for name in run}}
    return {name: float(np.std(row, ddof=1)) for name, row in values.items() if len(row) > 1}


class Places(NamedTuple):
    """Where entries rank: behind `above` higher ones, somewhere among `tied` equal ones, itself one of them."""

    above: Tensor
    tied: Tensor


def _places(ascending: Tensor, values: Tensor) -> Places:
    """Places of values [T, M], each of which is in the row of its task in [T, N]."""
    values = values.contiguous()
    above = ascending.shape[1] - torch.searchsorted(ascending, values, right=True)
    return Places(above, ascending.shape[1] - torch.searchsorted(ascending, values) - above)


def _places_within_tasks(values: Tensor, offsets: Tensor) -> Places:
    """Places of values [n] among those of the same task."""
    padded = pad(values, offsets, -torch.inf)
    return Places(*(unpad(part, offsets) for part in _places(padded.sort(1).values, padded)))


def expected_discount(places: Places, k: int) -> Tensor:
    """Mean of 1/log2(rank + 1), 0 beyond rank k, over the ranks that an entry may have."""
    total = _cumulative_discounts(k)
    first, last = places.above.clamp(max=k), (places.above + places.tied).clamp(max=k)
    return (total[last] - total[first]) / places.tied


def probability_in_first(places: Places, k: int) -> Tensor:
    """The probability with which an entry has one of the first k ranks."""
    return ((k - places.above) / places.tied.double()).clamp(0, 1)


def _cumulative_discounts(k: int) -> Tensor:
    """Sum of the discounts of ranks 1 … j, for j from 0 to k."""
    return torch.cat([torch.zeros(1), (1 / torch.arange(2.0, k + 2, dtype=torch.float64).log2()).cumsum(0)])


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def is_relevant(query: Entries, relevant_from: float | None) -> Tensor:
    """Which query entries are to be found, [n]: all, or those rated so or better."""
    if relevant_from is None:
        return torch.ones(len(query), dtype=torch.bool)
    return _targets(query) >= relevant_from


def _targets(query: Entries) -> Tensor:
    if query.targets is None:
        raise ValueError("query.targets: expected what was observed, to compare predictions with it, got None")
    return query.targets.double()
