"""Judges predictors on users never seen before: adapt on some of a user's ratings, predict the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from metarec_fast._columns import as_int
from metarec_fast._judged_tasks import JudgedTasks
from metarec_fast._judging import Chance, Judge, Predictor, evaluation_mode
from metarec_fast.baselines import fit_baselines
from metarec_fast.data import Interactions
from metarec_fast.report import Report
from metarec_fast.sampler import Size

_LARGEST_SCORES = 1 << 26  # numbers in the scores of a batch for the whole catalogue: 256 MiB


def evaluate(
    learner: Predictor | None,
    log: Interactions,
    support: Size = 10,
    query: Size = "rest",
    order: Literal["random", "time"] = "random",
    seed: int = 0,
    k: int | Sequence[int] | None = None,
    baselines: Interactions | Mapping[str, Predictor] | None = None,
    catalogue: bool = True,
    batch_size: int = 256,
    *,
    relevant_from: float | None = None,
    draws: int = 1,
    support_from: Interactions | None = None,
    protocol: Literal["metarec"] | None = None,
    sampled_negatives: int | None = None,
) -> Report:
    """Adapts to some ratings of each user in the log and judges the predictions of others, beside baselines.

    All predictors get the same tasks, in the numbering of the learner's items: ratings of items that it does not know
    are left out, with one warning. `metarec_fast.metrics` says how the figures are computed. rmse and mae are means
    over ratings, the other figures means over users; users without anything to predict do not count. Neither
    `batch_size` nor the presence of other predictors changes a figure.

    Args:
        learner: What is to be judged; None to see the baselines alone.
        log: Ratings of users that were not in training.
        support, query, order, seed: Which ratings of a user to adapt on and which to predict, as in `TaskSampler`.
        k: Lengths of the ranked lists, (1, 5, 10) unless given. A list longer than the catalogue is the whole of it.
        baselines: The training log, on which all baselines are fitted, or fitted predictors by name: baselines, or
            other learners to compare with.
        catalogue: Whether to rank the whole catalogue too.
        batch_size: Users at a time; fewer where scores of the catalogue would take too much memory.
        relevant_from: For the catalogue metrics, the lowest rating of an item worth finding; None takes every item
            that the user rated.
        draws: How many times the ratings to adapt on are drawn. The figures are means over all draws, and
            `Report.spread` says how far they differ from draw to draw.
        support_from: Ratings of the same users to adapt on, none of which is in `log`, all of whose ratings are then
            there to be predicted (`query` of them). A user counts who has ratings in both. Everything that is in
            `support_from` is left out where the catalogue is ranked, drawn or not.
        protocol: "metarec" for what papers after MeLU (Lee et al. 2019) report: errors, and nDCG within the query set
            for lists of 1, 3 and 5; no catalogue is ranked. The table tells so.
        sampled_negatives: M ≥ 1 for `sampled_ndcg@k` and `sampled_hr@k` too: each relevant item is ranked among itself
            and M items that the user has not rated, drawn by seed, user and draw. Such figures are biased (Krichene and
            Rendle 2020), and serve to compare with papers that report them.

    Returns:
        Figures by predictor and metric.

    Raises:
        ValueError: There is nothing to judge, item ids do not fit, no user has enough ratings, `draws` is above 1 with
            order="time", a rating is in `log` and in `support_from`, a user has fewer unrated items than are to be
            sampled, or a predictor gives scores of another shape or that are not finite.
    """
    draws = check_draws(draws, order)
    if protocol not in (None, "metarec"):
        raise ValueError(f'protocol: expected "metarec" or None, got {protocol!r}')
    lengths = _check_lengths(k if k is not None else (1, 5, 10) if protocol is None else (1, 3, 5))
    catalogue = catalogue and protocol is None
    if sampled_negatives is not None and as_int("sampled_negatives", sampled_negatives) < 1:
        raise ValueError(f"sampled_negatives: must be ≥ 1, got {sampled_negatives}")
    item_ids = item_ids_of(learner, baselines)
    train = baselines if isinstance(baselines, Interactions) else None
    aligned = align_logs({"log": log, "support_from": support_from, "baselines": train}, item_ids)
    known, train = aligned.get("support_from"), aligned.get("baselines")
    with torch.device("cpu"):  # where metrics and baselines are, whatever the default
        predictors = predictors_of(learner, baselines if train is None else train, item_ids, seed)
    rating_range = _rating_range(learner, predictors, train)
    if catalogue or sampled_negatives is not None:
        batch_size = min(batch_size, max(1, _LARGEST_SCORES // max(1, len(item_ids))))

    judges = {name: Judge(name, predictor, rating_range, relevant_from) for name, predictor in predictors.items()}
    chance = Judge("chance", Chance(item_ids), rating_range, relevant_from)
    tasks = JudgedTasks(aligned["log"], support, query, batch_size, order, seed, known)
    users: list[NDArray[np.int64]] = []
    sizes: list[NDArray[np.int64]] = []
    with torch.no_grad(), torch.device("cpu"), evaluation_mode(predictors.values()):
        for draw in range(draws):
            for judge in (*judges.values(), chance):
                judge.begin_draw()
            for batch, rated in tasks:
                assert batch.users is not None
                assert batch.query is not None
                negatives = tasks.draw_unrated(batch, sampled_negatives, draw)
                for judge in (*judges.values(), chance):
                    judge.add(batch, rated, negatives, lengths, catalogue)
                users.append(batch.users.numpy())
                sizes.append(batch.query.sizes().numpy())

    query_sizes = np.concatenate(sizes).reshape(draws, -1)  # [draws, U]
    return Report(
        results={name: judge.figures(query_sizes) for name, judge in judges.items()},
        chance=chance.figures(query_sizes),
        per_user={name: judge.per_user(query_sizes) for name, judge in judges.items()},
        user_ids=tasks.log.user_ids[np.concatenate(users)[: query_sizes.shape[1]]],
        query_sizes=query_sizes.sum(0),
        settings={
            "support": support, "query": query, "order": order, "seed": int(seed), "k": lengths,
            "relevant_from": relevant_from, "rating_range": rating_range, "users": query_sizes.shape[1],
            "ratings": int(query_sizes.sum()), "draws": draws,
            "support_from": known is not None, "protocol": protocol,
            "sampled_negatives": sampled_negatives,
        },
        spread={name: judge.spread(query_sizes) for name, judge in judges.items()} if draws > 1 else {},
    )  # fmt: skip


def check_draws(draws: int, order: str) -> int:
    draws = as_int("draws", draws)
    if draws < 1:
        raise ValueError(f"draws: must be ≥ 1, got {draws}")
    if draws > 1 and order == "time":
        raise ValueError(
            f'draws: order="time" gives the same tasks every time, so that only 1 makes sense, got {draws}'
        )
    return draws


def _check_lengths(k: int | Sequence[int]) -> list[int]:
    lengths = [k] if isinstance(k, int) else list(k)
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise ValueError(f"k: expected whole numbers ≥ 1, got {length!r}")
    if not lengths:
        raise ValueError("k: expected at least one list length, got none")
    return [int(length) for length in dict.fromkeys(lengths)]


def item_ids_of(learner: Predictor | None, baselines: Interactions | Mapping[str, Predictor] | None) -> NDArray[Any]:
    """The catalogue in which everything is numbered: the learner's, else that of the baselines."""
    if learner is not None:
        if learner.item_ids is None:
            raise ValueError("learner.item_ids: expected the original ids of its items, got None")
        return np.asarray(learner.item_ids)
    if isinstance(baselines, Interactions):
        return baselines.item_ids
    if not baselines:
        raise ValueError("learner: expected a learner, or None beside baselines, got neither")
    return np.asarray(next(iter(baselines.values())).item_ids)


def align_logs(logs: Mapping[str, Interactions | None], item_ids: NDArray[Any]) -> dict[str, Interactions]:
    """The logs that are there, by the names of their arguments, in the numbering of `item_ids`; one warning for all."""
    aligned, dropped = {}, []
    for name, log in logs.items():
        if log is None and name != "log":
            continue
        if not isinstance(log, Interactions):
            raise TypeError(f"{name}: expected Interactions, got {type(log).__name__}")
        aligned[name], count = (log, 0) if np.array_equal(log.item_ids, item_ids) else log.align_items(item_ids)
        dropped += [f"{count} ratings of {name}"] if count else []
    if dropped:
        warnings.warn(
            f"evaluate: {' and '.join(dropped)} are ignored, the learner does not know their items", stacklevel=3
        )
    return aligned


def predictors_of(
    learner: Predictor | None,
    baselines: Interactions | Mapping[str, Predictor] | None,
    item_ids: NDArray[Any],
    seed: int,
) -> dict[str, Predictor]:
    """Everything to be judged by name, the learner first."""
    predictors: dict[str, Predictor] = {}
    if learner is not None:
        name = getattr(learner, "name", None)
        predictors[name if isinstance(name, str) else type(learner).__name__.lower()] = learner
    if isinstance(baselines, Interactions):
        baselines = fit_baselines(baselines, seed=seed)
    for name, predictor in (baselines or {}).items():
        if name in predictors:
            raise ValueError(f"baselines: {name!r} is the name of the learner too")
        if not np.array_equal(predictor.item_ids, item_ids):
            raise ValueError(f"baselines[{name!r}].item_ids: expected the same ids, in the same order, as the others")
        predictors[name] = predictor
    return predictors


def _rating_range(
    learner: Predictor | None, predictors: Mapping[str, Predictor], train: Interactions | None
) -> tuple[float, float] | None:
    """The scale to which predictions are clipped: as the learner saw it, else the baselines; None if nobody knows."""
    own = getattr(learner, "rating_range", None)
    if own is None and train is not None and len(train):
        own = train.ratings.min(), train.ratings.max()
    others = (getattr(predictor, "rating_range", None) for predictor in predictors.values())
    found = own if own is not None else next((limits for limits in others if limits is not None), None)
    return None if found is None else (float(found[0]), float(found[1]))
