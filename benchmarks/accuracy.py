"""How good are learners for users never seen before, beside simple methods? `python -m benchmarks.accuracy --help`

    split the users → train with defaults on some → adapt to ten ratings of each of the others, predict the rest

All predictors of a split get the same tasks; what is compared is the difference split by split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import metarec_fast as mf
from benchmarks import environment, synthetic
from metarec_fast import comparison
from metarec_fast.baselines import fit_baselines
from metarec_fast.cli_inputs import add_ratings, add_users, read_features, read_item_features, read_ratings

METRICS = ("rmse", "mae", "mae_user", "ndcg@3", "ndcg@10", "catalogue_ndcg@10")
WITHOUT = "maml-r"
Variant = Callable[[int, int], mf.Learner]  # of the number of items and the width


class Tables(NamedTuple):
    """What is known beside ratings."""

    users: mf.Features | None
    items: mf.Features | None


NOTHING = Tables(None, None)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"environment": environment.describe(options.threads)}
    print("\n".join(f"{key}: {value}" for key, value in result["environment"].items()))
    if options.synthetic:
        result["synthetic"] = synthetic.judge(options.threads)
    else:
        log = mf.load_movielens_small() if options.ratings is None else read_ratings(options, options.ratings)
        tables = Tables(read_features(options.users, "--users", options.user_column), read_item_features(options))
        print(f"{log}\nusers: {tables.users}\nitems: {tables.items}")
        result["new_users"] = judge_new_users(log, tables, options)
        if tables.items is not None:
            result["new_items"] = judge_new_items(log, tables, options)
    (options.out / "accuracy.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def variants(tables: Tables, quick: bool) -> dict[str, Variant]:
    """Learners with their defaults, by the name that the table gives them."""
    shown = {WITHOUT: on_dot(mf.MAMLR)}
    if tables != NOTHING:
        shown["maml-r, features"] = on_dot(mf.MAMLR, tables)
    if not quick:
        shown["maml-r, exact"] = on_dot(lambda model: mf.MAMLR(model, inner_steps="exact"))
        shown["maml-r, first order"] = on_dot(lambda model: mf.MAMLR(model, first_order=True))
        shown |= {name: on_dot(kind) for name, kind in comparison.ALGORITHMS.items() if name != WITHOUT}
        shown["maml, tower, features"] = lambda num_items, dim: mf.MAML(
            mf.MLPRecommender(num_items, dim, user_features=tables.users, item_features=tables.items)
        )
    return shown


def on_dot(kind: Callable[[mf.DotRecommender], mf.Learner], tables: Tables = NOTHING) -> Variant:
    """A learner on the dot-product model that sees these features."""
    return lambda num_items, dim: kind(
        mf.DotRecommender(num_items, dim, user_features=tables.users, item_features=tables.items)
    )


def judge_new_users(log: mf.Interactions, tables: Tables, options: argparse.Namespace) -> dict[str, Any]:
    """Users known and users never seen, by chance; ratings of the latter known and predicted."""
    reports = []
    seconds: dict[str, float] = {}
    for seed in range(options.splits):
        split = mf.split_users(log, valid=0.1, test=0.2, seed=seed)
        judged: dict[str, Any] = {}
        for name, variant in variants(tables, options.quick).items():
            begin = time.perf_counter()
            judged[name] = _fit(variant, split.train, split.valid, options.dim, options.order, seed)
            seconds[name] = seconds.get(name, 0.0) + (time.perf_counter() - begin) / options.splits
        judged |= fit_baselines(split.train, seed=seed)
        known = {"support": options.support, "order": options.order}
        reports.append(mf.evaluate(None, split.test, **known, seed=seed, k=(3, 10), baselines=judged))
    summary = comparison.summarize_seeds(reports)
    print(f"\nUsers never seen, {options.support} ratings known; mean ± deviation over {options.splits} splits\n")
    print(comparison.format_table(summary.results, METRICS, spread=summary.spread, chance=summary.chance))
    print(f"\nrmse and ndcg@10 less those of {options.baseline}, mean ± deviation of the paired differences")
    paired = {metric: comparison.differences(reports, options.baseline, metric) for metric in ("rmse", "ndcg@10")}
    for name in summary.results:
        shown = [f"{d[name].mean:+.4f} ±{d[name].spread:.4f}" if name in d else "–" for d in paired.values()]
        print(f"  {name:20}  " + "  ".join(f"{text:>16}" for text in shown))
    print("\nseconds to train: " + ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items()))
    return {**summary._asdict(), "differences": paired, "seconds": seconds}


def judge_new_items(log: mf.Interactions, tables: Tables, options: argparse.Namespace) -> dict[str, Any]:
    """A fifth of the items has no rating in training: with and without their features, known and new users."""
    figures: dict[str, dict[str, list[float]]] = {}
    for seed in range(options.splits):
        split = mf.split_quadrants(log, valid=0.1, test=0.2, items=0.2, seed=seed)
        learners = {
            name: _fit(on_dot(mf.MAMLR, seen), split.train, split.valid, options.dim, options.order, seed)
            for name, seen in ((WITHOUT, NOTHING), ("maml-r, item features", Tables(None, tables.items)))
        }
        bias = fit_baselines(split.train, ("bias",), seed=seed)
        for quadrant in ("item-cold", "both-cold"):
            known, queries = split.quadrants[quadrant]
            report = mf.evaluate(
                None, queries, support=options.support, support_from=known, seed=seed, k=(3, 10), catalogue=False,
                baselines={**learners, **bias},
            )  # fmt: skip
            for name, row in (*report.results.items(), ("chance", report.chance)):
                for metric in ("rmse", "ndcg@3"):
                    if metric in row:
                        figures.setdefault(name, {}).setdefault(f"{metric}, {quadrant}", []).append(row[metric])
    means = {name: {metric: sum(v) / len(v) for metric, v in row.items()} for name, row in figures.items()}
    print(
        f"\nItems never rated in training, {options.support} ratings of others known; mean of {options.splits} splits\n"
    )
    print(comparison.format_table(means, means[WITHOUT]))
    return {"results": means, "seeds": figures}


def _fit(
    variant: Variant, train: mf.Interactions, valid: mf.Interactions, dim: int, order: str, seed: int
) -> mf.Learner:
    torch.manual_seed(seed)
    learner = variant(train.num_items, dim)
    learner.fit(train, valid, order=order, seed=seed, progress=False)
    return learner


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_ratings(parser.add_argument, None, "ratings (default: the MovieLens sample of the extra `demo`)")
    add_users(parser.add_argument, "for the learners that see features")
    parser.add_argument(
        "--synthetic", action="store_true", help="one million ratings from a known factor model instead"
    )
    parser.add_argument("--baseline", default="ppca-fold-in", help="what to compare with (default: ppca-fold-in)")
    parser.add_argument("--splits", type=int, default=3, help="of users (default: 3)")
    parser.add_argument("--support", type=int, default=10, help="ratings known (default: 10)")
    parser.add_argument("--order", choices=("random", "time"), default="random", help="which ones (default: random)")
    parser.add_argument("--dim", type=int, default=16, help="width of vectors (default: 16)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--quick", action="store_true", help="maml-r and the baselines only")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of accuracy.json")
    return parser


if __name__ == "__main__":
    main()
