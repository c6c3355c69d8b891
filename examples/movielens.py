"""Meta-trains every algorithm on MovieLens, judges it beside the baselines, recommends to somebody new."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import metarec_fast as mf
from metarec_fast import comparison


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (runs/demo)")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits (3)")
    parser.add_argument("--epochs", type=int, default=30, help="at most this many (30)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()

    log = mf.load_movielens_small()
    print(f"{len(log):,} ratings of {log.num_users} users for {log.num_items} films")
    reports = []
    for seed in range(options.seeds):
        split = mf.split_users(log, valid=0.1, test=0.2, seed=seed)
        print(f"\nsplit {seed}: {split.train.num_users} users to learn from, {split.test.num_users} to be judged on")
        runs = {name: comparison.train(name, split, epochs=options.epochs, seed=seed) for name in comparison.ALGORITHMS}
        learners = {name: learner for name, (learner, _) in runs.items()}
        reports.append(comparison.judge(learners, split, seed=seed))
        if seed == 0:
            comparison.plot_learning_curves(
                {name: history for name, (_, history) in runs.items()}, options.out / "learning_curves.png"
            )
            learners["maml-r"].save(options.out / "checkpoint")
            newcomer = split.test

    results = comparison.write_json(options.out / "report.json", reports)
    comparison.plot_comparison(results, options.out / "comparison.png")
    print(f"\nTest users, 10 ratings known, the others predicted; mean of {options.seeds} splits\n")
    print(comparison.format_table(results))
    recommend(mf.load(options.out / "checkpoint"), newcomer)
    print(f"\n{options.out}: report.json, learning_curves.png, comparison.png, checkpoint")
    print(f"{time.perf_counter() - begin:.0f} seconds")


def recommend(learner: mf.Learner, test: mf.Interactions) -> None:
    """Ten titles for the first test user, who was not in training, from ten of his or her ratings."""
    titles = test.item_titles or {}
    rows = np.arange(test.offsets[0], test.offsets[1])[:10]
    known, ratings = test.item_ids[test.items[rows]], test.ratings[rows]
    print(f"\nUser {test.user_ids[0]} was not in training and has rated")
    for item, rating in sorted(zip(known, ratings, strict=True), key=lambda pair: -pair[1]):
        print(f"  {rating:3.1f}  {titles.get(item, item)}")
    print("and may like")
    for item, score in zip(*learner.adapt(known, ratings).recommend(k=10), strict=True):
        print(f"  {score:4.2f}  {titles.get(item, item)}")


if __name__ == "__main__":
    main()
