"""Known or new users × known or new items: dividing a log into the four, and judging a learner in each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarec_fast import _random
from metarec_fast._columns import as_count
from metarec_fast._ids import plain
from metarec_fast._judging import Predictor
from metarec_fast.baselines import fit_baselines
from metarec_fast.data import Interactions, UserSplit, split_users
from metarec_fast.evaluation import evaluate, item_ids_of
from metarec_fast.report import Report, align, check_metrics, format_deviation, known_metrics

QUADRANTS = ("warm", "user-cold", "item-cold", "both-cold")


class Quadrant(NamedTuple):
    """Ratings to adapt on and ratings to predict, of the same users."""

    support: Interactions
    query: Interactions


@dataclass(frozen=True, eq=False)
class QuadrantSplit:
    """A log for training, one for validation, and four to judge on, with one numbering of items.

    A support holds known items only; a query known ones (`warm`, `user-cold`) or new ones (`item-cold`, `both-cold`).

    Attributes:
        train: Ratings of known users for known items.
        valid: Ratings of other users for known items.
        quadrants: By name: "warm" and "item-cold" are of the users of `train`, whose support is what `train` has of
            them; "user-cold" and "both-cold" are of users who are neither in `train` nor in `valid`.
        new_items: Positions of the new items, int64 [k].

    Raises:
        ValueError: Something of what is to be predicted is known in training or in a support.
    """

    train: Interactions
    valid: Interactions
    quadrants: Mapping[str, Quadrant]
    new_items: NDArray[np.int64]

    def __post_init__(self) -> None:
        if set(self.quadrants) != set(QUADRANTS):
            raise ValueError(f"quadrants: expected {', '.join(QUADRANTS)}, got {', '.join(self.quadrants) or 'none'}")
        for name in ("user-cold", "both-cold"):
            UserSplit(self.train, self.valid, self.quadrants[name].support)  # refuses users who are in two of them
        for name, log in (("train", self.train), ("valid", self.valid)):
            self._check_items(name, log, new=False)
        for name, (support, query) in self.quadrants.items():
            if not np.array_equal(support.user_ids, query.user_ids):
                raise ValueError(f"{name}: expected the same users in support and query")
            self._check_items(f"the support of {name}", support, new=False)
            self._check_items(f"the query of {name}", query, new=name in ("item-cold", "both-cold"))
            _check_apart(name, support, query, "support")
            if name in ("warm", "item-cold"):
                self._check_known_users(name, support, query)

    def _check_items(self, name: str, log: Interactions, new: bool) -> None:
        if not np.array_equal(log.item_ids, self.train.item_ids):
            raise ValueError(f"{name}: its items are numbered differently from those of train")
        wrong = np.flatnonzero(np.isin(log.items, self.new_items) != new)
        if wrong.size:
            item = plain(log.item_ids[log.items[wrong[0]]])
            raise ValueError(f"{name}: expected {'new' if new else 'known'} items only, got {item!r}")

    def _check_known_users(self, name: str, support: Interactions, query: Interactions) -> None:
        places = self.train.user_index(query.user_ids)
        if (places < 0).any():
            raise ValueError(f"{name}: user {plain(query.user_ids[places.argmin()])!r} is not in train")
        train = self.train.select_users(places)
        _check_apart(name, train, query, "train")
        if not np.isin(support.item_keys(), train.item_keys()).all():
            raise ValueError(f"{name}: its support has a rating that is not in train")


def split_quadrants(
    log: Interactions,
    valid: float = 0.1,
    test: float = 0.2,
    items: float = 0.2,
    order: Literal["random", "time"] = "random",
    seed: int = 0,
) -> QuadrantSplit:
    """Divides a log into known and new users, known and new items.

    Users are divided as by `split_users`; the new ones are those to test on. Ratings of known items are divided too,
    known users' and new users' alike: of each user, a share as large as that of the new users is held out to be
    predicted, and at least one rating is not.

    Args:
        log: The log to divide.
        valid, test: How many users to validate on, and how many are new, as in `split_users`.
        items: How many of the items that somebody rated are new: a fraction in (0, 1), or a whole number (an int).
        order: "random", or "time": new are the items whose first rating is latest, and what is held out of a user are
            the latest ratings.
        seed: Which division. The same seed gives the same on every machine.

    Returns:
        The split; users in ascending order, item numbers as in `log`.

    Raises:
        ValueError: A number is out of range, no user or item is new, none is known, or order="time" and the log has
            no times.
        TypeError: A number is neither int nor float.
    """
    if order not in ("random", "time"):
        raise ValueError(f'order: expected "random" or "time", got {order!r}')
    if order == "time" and log.times is None:
        raise ValueError('order: "time" needs a log with times, this one has none')
    users = split_users(log, valid, test, seed)
    if users.test.num_users == 0:
        raise ValueError(f"test: expected at least one new user, got {test}")
    new_items = _new_items(log, items, order, seed)

    is_new = np.zeros(log.num_items, bool)
    is_new[new_items] = True
    share = users.test.num_users / log.num_users
    held_out = _held_out(log, ~is_new[log.items], share, order, seed)
    new, kept, predicted = (
        log.select_rows(rows) for rows in (is_new[log.items], ~is_new[log.items] & ~held_out, held_out)
    )

    quadrants = {}
    for names, part in ((("warm", "item-cold"), users.train), (("user-cold", "both-cold"), users.test)):
        chosen = log.user_index(part.user_ids)
        support = kept.select_users(chosen)
        for name, query in zip(names, (predicted, new), strict=True):
            quadrants[name] = Quadrant(support, query.select_users(chosen))
    valid_log = users.valid.select_rows(~is_new[users.valid.items])
    return QuadrantSplit(quadrants["warm"].support, valid_log, {name: quadrants[name] for name in QUADRANTS}, new_items)


class QuadrantReports(dict[str, Report]):
    """Reports by quadrant. Printing them gives a table."""

    def table(self, metrics: Sequence[str] | None = None) -> str:
        """For each metric a row for each predictor and a column for each quadrant; – where it means nothing.

        Args:
            metrics: By default rmse, and nDCG within the query set for the longest list.

        Raises:
            ValueError: There is no such metric.
        """
        check_metrics(metrics or (), known_metrics(self.values()))
        first = next(iter(self.values()))
        blocks = []
        for metric in metrics or ("rmse", f"ndcg@{max(first.settings['k'])}"):
            rows = [[metric, *self]]
            for name in (*first.results, "chance"):
                cells = [_cell(report, name, metric) for report in self.values()]
                if name != "chance" or set(cells) != {"–"}:
                    rows.append([name, *cells])
            blocks.append("\n".join(map(str.rstrip, align(rows)[0])))
        judged = (
            f"{name} {len(report.user_ids)} users, {report.query_sizes.sum()} ratings" for name, report in self.items()
        )
        return "\n\n".join([*blocks, "To predict: " + "; ".join(judged)])

    def __str__(self) -> str:
        return self.table()


def evaluate_quadrants(
    learner: Predictor | None,
    split: QuadrantSplit,
    baselines: Mapping[str, Predictor] | None = None,
    seed: int = 0,
    **settings: Any,
) -> QuadrantReports:
    """Judges a learner in all four quadrants.

    Args:
        learner: What is to be judged, trained on `split.train`; None to see the baselines alone.
        split: Made by `split_quadrants`.
        baselines: Fitted predictors by name; None fits all baselines on `split.train`.
        seed: Of the baselines, and of which ratings are drawn.
        settings: What else `evaluate` takes: `support`, `query`, `order`, `draws`, ...

    Returns:
        A report for each quadrant, by name.

    Raises:
        ValueError: A quadrant has no user with ratings in support and query, or as `evaluate`.
    """
    if baselines is None:
        train, _ = split.train.align_items(item_ids_of(learner, split.train))
        baselines = fit_baselines(train, seed=seed)
    reports = QuadrantReports()
    for name, (support, query) in split.quadrants.items():
        reports[name] = evaluate(learner, query, support_from=support, baselines=baselines, seed=seed, **settings)
    return reports


def _cell(report: Report, name: str, metric: str) -> str:
    figure = report.results.get(name, report.chance).get(metric)
    if figure is None:
        return "–"
    return f"{figure:.4f}" + (format_deviation(report.spread.get(name, {}).get(metric)) if report.spread else "")


def _new_items(log: Interactions, items: Any, order: str, seed: int) -> NDArray[np.int64]:
    """Positions of the new items, ascending."""
    rated = np.unique(log.items).astype(np.int64)
    count = as_count("items", items, len(rated), "items")
    if not 0 < count < len(rated):
        raise ValueError(
            f"items: expected some of the {len(rated)} items that are rated to be new, not all, got {count}"
        )
    if order == "time":
        assert log.times is not None
        first = np.full(log.num_items, log.times.max())
        np.minimum.at(first, log.items, log.times)
        newest = np.argsort(first[rated], kind="stable")
    else:
        newest = np.argsort(_random.at(_random.key_of(seed, _random.ITEMS), rated), kind="stable")
    return np.sort(rated[newest[-count:]])


def _held_out(log: Interactions, among: NDArray[np.bool_], share: float, order: str, seed: int) -> NDArray[np.bool_]:
    """Which ratings, [n], are held out: of those `among` which each user has, a share, rounded, never the last one."""
    rows = np.flatnonzero(among)
    users = np.repeat(np.arange(log.num_users), log.sizes())[rows]
    if order == "random":
        keys = _random.at(_random.at(_random.key_of(seed, _random.HELD_OUT), users), log.items[rows])
        rows = rows[np.lexsort((keys, users))]
    sizes = np.bincount(users, minlength=log.num_users)
    held = np.minimum(np.rint(share * sizes).astype(np.int64), np.maximum(sizes - 1, 0))
    ends = np.repeat(np.cumsum(sizes), sizes)  # of the user's rows, for each row
    result = np.zeros(len(log), bool)
    result[rows[np.arange(len(rows)) >= ends - np.repeat(held, sizes)]] = True
    return result


def _check_apart(name: str, known: Interactions, query: Interactions, where: str) -> None:
    """No rating of the query is known; the users of both are the same, in the same order."""
    twice = np.intersect1d(known.item_keys(), query.item_keys())
    if len(twice):
        user, item = divmod(int(twice[0]), query.num_items)
        ids = plain(query.user_ids[user]), plain(query.item_ids[item])
        raise ValueError(f"{name}: user {ids[0]!r} has item {ids[1]!r} both in the query and in {where}")
