"""Meta-trains every algorithm on MovieLens, judges it beside the baselines, recommends to somebody new."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import metarec_fast as mf
from metarec_fast import comparison

KNOWN = 10  # ratings known of a user who is judged


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits into users to train and to judge on")
    parser.add_argument("--epochs", type=int, help="at most this many passes over the users; by default each its own")
    # Batches are so small here that a second thread gains little, and costs much where cores are shared.
    parser.add_argument("--threads", type=int, default=1, help="threads; results are the same for any number")
    parser.add_argument("--quick", action="store_true", help="one split and two epochs, for a first look")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.epochs = 1, 2
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()

    log = mf.load_movielens_small()
    print(f"{len(log):,} ratings of {log.num_users} users for {log.num_items} films")
    reports = []
    for seed in range(options.seeds):
        split = mf.split_users(log, valid=0.1, test=0.2, seed=seed)
        print(f"\nsplit {seed}: {split.train.num_users} users to learn from, {split.test.num_users} to be judged on")
        runs = {name: comparison.train(name, split, epochs=options.epochs, seed=seed) for name in comparison.ALGORITHMS}
        learners = {name: learner for name, (learner, _) in runs.items()}
        reports.append(comparison.judge(learners, split, support=KNOWN, seed=seed))
        if seed == 0:
            histories = {name: history for name, (_, history) in runs.items()}
            comparison.plot_learning_curves(histories, options.out / "learning_curves.png")
            learners["maml-r"].save(options.out / "checkpoint")
            newcomers = split.test

    summary = comparison.write_json(options.out / "report.json", reports)
    comparison.plot_comparison(summary.results, options.out / "comparison.png")
    splits = "one split" if options.seeds == 1 else f"mean ± standard deviation over {options.seeds} splits"
    print(f"\nTest users, {KNOWN} ratings known, the others predicted; {splits}\n")
    print(comparison.format_table(summary.results, spread=summary.spread, chance=summary.chance))
    against_fold_in(reports)
    recommend(mf.load(options.out / "checkpoint"), newcomers)
    print(f"\n{options.out}: report.json, learning_curves.png, comparison.png, checkpoint")
    print(f"{time.perf_counter() - begin:.0f} seconds")


def against_fold_in(reports: list[mf.Report]) -> None:
    """By how much MAML-R's error differs from that of the fold-in from which it starts, on the same users."""
    mean, spread = comparison.differences(reports, "vb-fold-in")["maml-r"]
    deviation = "" if len(reports) == 1 else f" ±{spread:.4f}"
    print(
        f"\nrmse of maml-r less that of vb-fold-in: {mean:+.4f}{deviation}; by a bootstrap over users, split by split"
    )
    for number, report in enumerate(reports):
        difference = report.compare("maml-r", "vb-fold-in")
        print(
            f"  split {number}: {difference.difference:+.4f}, 95% from {difference.low:+.4f} to {difference.high:+.4f}"
        )


def recommend(learner: mf.Learner, newcomers: mf.Interactions) -> None:
    """Ten titles for the first of the users, who were not in training, from the earliest of his or her ratings."""
    titles = newcomers.item_titles or {}
    rows = newcomers.rows(0)
    items = newcomers.item_ids[newcomers.items[rows]][:KNOWN]
    ratings = newcomers.ratings[rows][:KNOWN]
    print(f"\nUser {newcomers.user_ids[0]} was not in training and has rated, best first")
    for item, rating in sorted(zip(items, ratings, strict=True), key=lambda pair: -pair[1]):
        print(f"  {rating:.1f}   {titles.get(item, item)}")
    print("and may like (predicted ratings)")
    for item, score in zip(*learner.adapt(items, ratings).recommend(k=10), strict=True):
        print(f"  {score:.2f}  {titles.get(item, item)}")


if __name__ == "__main__":
    main()
