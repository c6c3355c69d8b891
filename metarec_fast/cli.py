"""The command `metarec-fast`: prepare, train, evaluate, recommend, doctor."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import metarec_fast as mf
from metarec_fast import _library, comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 where `doctor` finds the fast path missing, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except (ValueError, TypeError, KeyError, IndexError, ImportError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"metarec-fast: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metarec-fast: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metarec-fast", description=mf.__doc__)
    parser.add_argument("--version", action="version", version=mf.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=description, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(run=run)
        return added

    def add(to: argparse.ArgumentParser, *names: str) -> None:
        known: dict[str, dict[str, Any]] = {
            "--ratings": {"default": "ratings.csv", "help": "CSV, Parquet, or a MovieLens file or folder"},
            "--user": {"default": "user", "help": "column of the users, for CSV and Parquet"},
            "--item": {"default": "item", "help": "column of the items"},
            "--rating": {"default": "rating", "help": "column of the ratings"},
            "--time": {"default": None, "help": "column of the times, if there is one"},
            "--learner": {"type": Path, "default": Path("runs/train/learner"), "help": "folder of a saved learner"},
            "--support": {"type": int, "default": 10, "help": "ratings known of a user who is judged"},
            "--seed": {"type": int, "default": 0, "help": "of everything random"},
        }
        for name in names:
            to.add_argument(name, **known[name])

    columns = ("--ratings", "--user", "--item", "--rating", "--time")
    add(command("prepare", _prepare, "Reads ratings, says what is in them or what is wrong."), *columns)

    train = command("train", _train, "Meta-trains on some users, judges on others, saves the learner.")
    add(train, *columns, "--support", "--seed")
    train.add_argument("--algorithm", choices=list(comparison.ALGORITHMS), default="maml-r", help="what to train")
    train.add_argument("--dim", type=int, default=16, help="width of user and item vectors")
    train.add_argument("--epochs", type=int, default=30, help="at most this many passes over the users")
    train.add_argument("--valid", type=float, default=0.1, help="share of the users to validate on")
    train.add_argument("--test", type=float, default=0.2, help="share of the users to judge on")
    train.add_argument("--out", type=Path, default=Path("runs/train"), help="folder for the results")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")

    evaluate = command("evaluate", _evaluate, "Judges a saved learner on ratings of users that it has not seen.")
    add(evaluate, *columns, "--learner", "--support", "--seed")
    evaluate.add_argument("--train", default=None, help="ratings to fit the baselines on, same columns; none without")

    recommend = command("recommend", _recommend, "Recommends to somebody new, from a few ratings.")
    add(recommend, "--learner")
    recommend.add_argument("--rated", default="", help='what is known, as "item:rating,item:rating"')
    recommend.add_argument("--k", type=int, default=10, help="how many items")

    command("doctor", _doctor, "Says which compiled parts are active, and why others are not.")
    return parser


def _read(options: argparse.Namespace, role: str = "ratings") -> mf.Interactions:
    path = Path(getattr(options, role))
    if not path.exists():
        raise FileNotFoundError(f"--{role}: there is no {path}")
    columns = {"user": options.user, "item": options.item, "rating": options.rating, "time": options.time}
    if path.suffix == ".parquet":
        return mf.Interactions.from_parquet(path, **columns)
    if path.is_dir() or path.name in ("ratings.dat", "u.data"):
        return mf.Interactions.from_movielens(path)
    if path.name == "ratings.csv" and path.open(encoding="utf-8").readline().startswith("userId,movieId"):
        return mf.Interactions.from_movielens(path)
    return mf.Interactions.from_csv(path, **columns)


def _prepare(options: argparse.Namespace) -> None:
    log = _read(options)
    sizes = log.offsets[1:] - log.offsets[:-1]
    print(f"{len(log):,} ratings from {log.ratings.min():g} to {log.ratings.max():g}, mean {log.ratings.mean():.3f}")
    print(f"{log.num_users:,} users, {sizes.min()} to {sizes.max()} ratings each; {log.num_items:,} items")
    print(f"{log.num_duplicates:,} older ratings of the same user and item left out")
    print("times: " + ("none" if log.times is None else "there"))


def _train(options: argparse.Namespace) -> None:
    split = mf.split_users(_read(options), valid=options.valid, test=options.test, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    learner, history = comparison.train(
        options.algorithm, split, dim=options.dim, epochs=options.epochs, seed=options.seed,
        checkpoint=options.out / "checkpoint", resume=options.resume, progress=sys.stderr.isatty(),
    )  # fmt: skip
    learner.save(options.out / "learner")
    history.to_json(options.out / "history.json")
    report = comparison.judge({options.algorithm: learner}, split, options.support, options.seed)
    comparison.write_json(options.out / "report.json", [report])
    print(report)
    print(f"\n{options.out}: learner, checkpoint, history.json, report.json")


def _evaluate(options: argparse.Namespace) -> None:
    learner = mf.load(options.learner)
    train = None if options.train is None else _read(options, "train")
    print(mf.evaluate(learner, _read(options), support=options.support, seed=options.seed, baselines=train))


def _recommend(options: argparse.Namespace) -> None:
    learner = mf.load(options.learner)
    assert learner.item_ids is not None
    kind = learner.item_ids.dtype.type
    items, ratings = [], []
    for pair in filter(None, options.rated.split(",")):
        item, separator, rating = pair.rpartition(":")
        try:
            items.append(kind(item))
            ratings.append(float(rating))
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(f'--rated: expected "item:rating,item:rating", got {pair!r}')
    for item, score in zip(*learner.adapt(items, ratings).recommend(k=options.k), strict=True):
        print(f"{item}\t{score:.3f}")


def _doctor(options: argparse.Namespace) -> int:
    try:
        from metarec_fast import _tasks  # noqa: F401

        tasks = _library.Library("_tasks", True)
    except ImportError as error:
        tasks = _library.Library("_tasks", False, f"it does not load: {error}")
    print(f"metarec_fast {mf.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}")
    print(f"C++ compiler: {shutil.which('c++') or 'none'}; nvcc: {shutil.which('nvcc') or 'none'}")
    purposes = {"_C": "operators on the CPU", "_C_cuda": "operators on the GPU", "_tasks": "task sampler"}
    for library in (_library.cpu, _library.cuda, tasks):
        state = "active" if library.loaded else f"missing: {library.reason}"
        print(f"{library.name:8s} {purposes[library.name]:22s} {state}")
    fast = _library.cpu.loaded and tasks.loaded
    print("The fast path is active." if fast else "The slow path is active: build with `pip install .`")
    return 0 if fast else 1


if __name__ == "__main__":
    sys.exit(main())
