"""Ratings, and clicks on other items: two heads of one user, beside a learner on ratings alone.

Users who are judged have some ratings known and all their clicks; the other ratings are predicted. Once in a made-up
world where both come from the same user vectors, and once on MovieLens, where half of a user's films are rated and the
others count as clicks, beside as many films without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

import metarec_fast as mf

KNOWN = 5  # ratings known of a user who is judged


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many worlds, or divisions of users and films")
    parser.add_argument("--epochs", type=int, default=60, help="at most this many passes over the users")
    parser.add_argument("--users", type=int, default=500, help="users of the made-up world")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    worlds: dict[str, Callable[[int], mf.Interactions]] = {
        "a world where users rate and click by one taste": lambda seed: made_up(options.users, seed),
        "MovieLens": lambda seed: halves(load(), seed),
    }
    for title, log_of in worlds.items():
        errors: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            for name, error in compare(log_of(seed), seed, options.epochs).items():
                errors.setdefault(name, []).append(error)
        print(f"\n{title}: rmse of ratings, {KNOWN} of them known; less that of ratings alone")
        first = next(iter(errors.values()))
        for name, values in errors.items():
            line = f"{name:<28}{spread_of(np.array(values), '7.4f')}"
            print(line if values is first else f"{line}   {spread_of(np.subtract(values, first), '+.4f')}")


def load() -> mf.Interactions:
    return mf.load_movielens_small()


def made_up(num_users: int, seed: int) -> mf.Interactions:
    """40 items; 10 ratings of each user, 3 + u·e + noise, and 20 clicks with log-odds 3 u·e."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=(num_users, 2)) @ rng.normal(size=(2, 40))
    logs = {}
    for name, count in (("rating", 10), ("click", 20)):
        users = np.repeat(np.arange(num_users), count)
        items = np.concatenate([rng.choice(40, count, replace=False) for _ in range(num_users)])
        scores = taste[users, items]
        ratings = 3 + scores + 0.3 * rng.normal(size=len(scores))
        targets = ratings if name == "rating" else rng.random(len(scores)) < 1 / (1 + np.exp(-3 * scores))
        logs[name] = mf.Interactions.from_arrays(users, items, targets)
    return mf.join_heads(logs)


def halves(log: mf.Interactions, seed: int) -> mf.Interactions:
    """Half of the log as ratings, the other half as clicks, beside as many films that nobody clicked on."""
    rng = np.random.default_rng(seed)
    rated = rng.random(len(log)) < 0.5
    users, clicked = np.repeat(np.arange(log.num_users), log.sizes())[~rated], log.items[~rated]
    others = rng.integers(0, log.num_items, len(users))
    unseen = ~np.isin(users * log.num_items + others, log.item_keys())
    clicks = mf.Interactions.from_arrays(
        log.user_ids[np.concatenate([users, users[unseen]])],
        log.item_ids[np.concatenate([clicked, others[unseen]])],
        np.concatenate([np.ones(len(users)), np.zeros(int(unseen.sum()))]),
    )
    return mf.join_heads({"rating": log.select_rows(rated), "click": clicks})


def compare(log: mf.Interactions, seed: int, epochs: int) -> dict[str, float]:
    """The error of ratings, of learners that take clicks for nothing, for both, or for what they tell of a user."""
    split = mf.split_users(log, seed=seed)
    errors = {}
    for name, click in (
        ("ratings alone", mf.Head("logistic", weight=0.0)),
        ("two heads", mf.Head("logistic", weight=1.0)),
        ("clicks tell, not judged", mf.Head("logistic", weight=1.0, outer_weight=0.0)),
    ):
        torch.manual_seed(seed)
        model = mf.MultiTaskRecommender(log.num_items // 2, 8, {"rating": mf.Head(), "click": click})
        learner = mf.MetaSGD(model)
        learner.fit(split.train, split.valid, epochs=epochs, patience=10, progress=False)
        errors[name] = error_of(learner, split.test, seed, ["rating", "click"])
        if name == "two heads":
            errors["two heads, clicks alone"] = error_of(learner, split.test, seed, ["click"])
    return errors


def error_of(learner: mf.Learner, log: mf.Interactions, seed: int, adapt_on: list[str]) -> float:
    """The rmse of the same ratings, after adapting on what is known of some heads."""
    support = {"rating": KNOWN, "click": "rest"}
    reports = mf.evaluate_heads(learner, log, support, seed=seed, adapt_on=adapt_on)
    return reports["rating"].results[learner.name]["rmse"]


def spread_of(values: np.ndarray, style: str) -> str:
    """Mean ± sample standard deviation."""
    return f"{values.mean():{style}} ±{values.std(ddof=min(1, len(values) - 1)):.4f}"


if __name__ == "__main__":
    main()
