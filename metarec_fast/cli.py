"""The command `metarec-fast`: prepare, train, evaluate, recommend, bench, doctor."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import metarec_fast as mf
from metarec_fast import comparison
from metarec_fast._judging import Predictor
from metarec_fast.baselines import fit_baselines
from metarec_fast.cli_inputs import (
    add_ratings,
    add_users,
    as_id,
    extend_features,
    parse_rated,
    ratings_of,
    read_features,
    read_item_features,
    read_ratings,
    read_titles,
    with_unrated_items,
)
from metarec_fast.doctor import diagnose
from metarec_fast.evaluation import check_draws
from metarec_fast.prepared import SUFFIX, write_prepared
from metarec_fast.sampler import size_range

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "run.py"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 where `doctor` finds the fast path missing, 2 for bad input."""
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"metarec-fast: {message}", file=sys.stderr)
        try:
            return int(options.run(options) or 0)
        except (ValueError, TypeError, KeyError, IndexError, ImportError, OSError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            print(f"metarec-fast: {text}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("metarec-fast: interrupted", file=sys.stderr)
            return 130


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="metarec-fast", description=mf.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"metarec-fast {mf.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], description: str) -> Any:
        added = commands.add_parser(
            name, help=description, description=description, formatter_class=_Help, allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added.add_argument

    add = command("prepare", _prepare, "Reads and checks ratings, says what is in them, writes a file quick to read.")
    add_ratings(add, "ratings.csv")
    add("--out", type=Path, default=Path(f"ratings{SUFFIX}"), help="the file to write")

    add = command("train", _train, "Meta-trains on some users, judges on others beside baselines, saves the learner.")
    add_ratings(add, f"ratings{SUFFIX}")
    add_users(add, "to learn from too")
    add("--algorithm", choices=list(comparison.ALGORITHMS), default="maml-r", help="what to train")
    add("--dim", type=int, default=16, help="width of user and item vectors")
    add("--epochs", type=int, help="at most this many passes over the users (default: 30, for maml-r 10 to 30)")
    add("--valid", type=float, default=0.1, help="share of the users to validate on")
    add("--test", type=float, default=0.2, help="share of the users to judge on")
    add("--out", type=Path, default=Path("runs/train"), help="folder for the results")
    add("--resume", action="store_true", help="go on from the checkpoint, or with --tune from the study, in --out")
    add("--tune", type=int, help="train so many times with other rates and steps, keep the best (default: train once)")
    _add_protocol(add)

    add = command("evaluate", _evaluate, "Judges a saved learner on users that it has not seen.")
    _add_learner(add)
    add_ratings(add, None, "ratings to judge on (default: the test users that `train` left beside the learner)")
    add_users(add, "of those not in the table that the learner was trained with")
    add("--train", help="ratings to fit baselines on (default: the training users beside the learner, if there)")
    add("--out", type=Path, help="JSON file for the figures (default: none is written)")
    add("--report", type=Path, help="HTML page for the figures and the cold-start curve (default: none is written)")
    _add_protocol(add)

    add = command("recommend", _recommend, "Recommends to somebody new from a few ratings: item, score and title.")
    _add_learner(add)
    add("--rated", default="", help='what is known of him or her, "item:rating,item:rating"')
    add("--user", help="or: the id of a user in --ratings (default: nobody)")
    add_ratings(add, None, "ratings to look the user up in (default: the test users beside the learner)")
    add("--k", type=int, default=10, help="how many items")

    add = command(
        "bench", _bench, "Times every workload beside other implementations, after checking that they are equal."
    )
    add("--threads", type=int, default=2, help="threads of everybody")
    add("--workload", help="names of workloads, separated by commas (default: all)")
    add("--quick", action="store_true", help="smaller sizes and few compiled peers: within 2 minutes")
    add("--all", action="store_true", help="also what compiles for minutes, and tables beyond 2 GB")
    add("--out", default="runs/bench", help="folder of JSON, Markdown and charts")

    command("doctor", _doctor, "Says which compiled parts are active, and why others are not.")
    return parser


def _add_learner(add: Any) -> None:
    add("--learner", type=Path, default=Path("runs/train/learner"), help="folder of a saved learner")


def _add_protocol(add: Any) -> None:
    add("--support", type=int, default=10, help="ratings known of a user who is judged; the others are predicted")
    add("--order", choices=["random", "time"], default="random", help="which are known: any, or the earliest")
    add("--draws", type=int, default=1, help="how often the known ones are drawn; figures are means, with their spread")
    add("--seed", type=int, default=0, help="of everything random")


def _judge(
    learner: mf.Learner, log: mf.Interactions, options: argparse.Namespace, baselines: Mapping[str, Predictor] | None
) -> mf.Report:
    return mf.evaluate(
        learner, log, support=options.support, order=options.order, draws=options.draws, seed=options.seed,
        baselines=baselines,
    )  # fmt: skip


def _prepare(options: argparse.Namespace) -> None:
    log = read_ratings(options, options.ratings)
    write_prepared(log, options.out)
    sizes = log.sizes()
    print(f"{len(log):,} ratings from {log.ratings.min():g} to {log.ratings.max():g}, mean {log.ratings.mean():.3f}")
    print(f"{log.num_users:,} users, {sizes.min()} to {sizes.max()} ratings each; {log.num_items:,} items")
    print(f"{log.num_duplicates:,} earlier ratings of the same user and item left out")
    print(f"times: {'none' if log.times is None else 'there'}; titles: {len(log.item_titles or ()):,}")
    print(f"written to {options.out}")


def _train(options: argparse.Namespace) -> None:
    size_range("--support", options.support, 0)  # now, not when all is trained
    check_draws(options.draws, options.order)
    log = read_ratings(options, options.ratings)
    user_features = read_features(options.users, "--users", options.user_column)
    item_features = read_item_features(options)
    if item_features is not None:
        log = with_unrated_items(log, item_features)
    split = mf.split_users(log, options.valid, options.test, options.seed)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_prepared(split.train, out / "train.npz")
    write_prepared(split.test, out / "test.npz")
    if options.tune is None:
        kept = {"checkpoint": out / "checkpoint", "resume": options.resume}
    else:
        kept = {"tune": options.tune, "study": out / "study.jsonl"}
        if not options.resume:
            kept["study"].unlink(missing_ok=True)
    learner, history = comparison.train(
        options.algorithm, split, dim=options.dim, epochs=options.epochs, seed=options.seed, **kept,
        progress=sys.stderr.isatty(), user_features=user_features, item_features=item_features,
    )  # fmt: skip
    if history.trials and not sys.stderr.isatty():  # else it was shown with the progress
        print(history.trials_table(), end="\n\n")
    learner.save(out / "learner")
    history.to_json(out / "history.json")
    try:
        comparison.plot_learning_curves({options.algorithm: history}, out / "learning_curve.png")
    except ImportError as error:
        print(f"metarec-fast: no learning_curve.png: {error}", file=sys.stderr)
    if split.test.num_users:
        baselines = fit_baselines(split.train, seed=options.seed)
        report = _judge(learner, split.test, options, baselines)
        comparison.write_json(out / "report.json", [report])
        _write_page(out / "report.html", report, learner, split.test, options, baselines, history)
        print(report)
    print(f"\n{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def _evaluate(options: argparse.Namespace) -> None:
    learner = mf.load(options.learner)
    _add_newcomers(learner, options)
    log = learner.catalogue.align(read_ratings(options, options.ratings or options.learner.parent / "test.npz"))
    beside = options.learner.parent / "train.npz"
    train = options.train or (beside if beside.exists() else None)
    baselines = None
    if train is not None:
        baselines = fit_baselines(learner.catalogue.align(read_ratings(options, train, "--train")), seed=options.seed)
    report = _judge(learner, log, options, baselines)
    if options.out is not None:
        report.to_json(options.out)
    if options.report is not None:
        _write_page(options.report, report, learner, log, options, baselines)
    print(report)


def _add_newcomers(learner: mf.Learner, options: argparse.Namespace) -> None:
    """Adds the features of --users to the learner's."""
    if options.users is None:
        return
    encoder = getattr(learner.model, "user_encoder", None)  # towers have none
    if encoder is None:
        raise ValueError("--users: the learner was trained without features of users")
    encoder.features = extend_features(encoder.features, options.users, "--users", options.user_column)


def _write_page(
    path: Path,
    report: mf.Report,
    learner: mf.Learner,
    log: mf.Interactions,
    options: argparse.Namespace,
    baselines: Mapping[str, Predictor] | None,
    history: mf.History | None = None,
) -> None:
    """The report as HTML, with a cold-start curve where users have enough ratings for one."""
    metric = "rmse" if "rmse" in report.results[learner.name] else "ndcg@10"
    curve = None
    try:
        curve = mf.cold_start_curve(
            learner, log, metric=metric, baselines=baselines, seed=options.seed, order=options.order
        )
    except ValueError as error:
        print(f"metarec-fast: no cold-start curve: {error}", file=sys.stderr)
    report.to_html(path, history=history, curve=curve)


def _recommend(options: argparse.Namespace) -> None:
    learner = mf.load(options.learner)
    path = Path(options.ratings or options.learner.parent / "test.npz")
    log = read_ratings(options, path) if options.ratings or options.user or path.exists() else None
    if options.user is None:
        items, ratings = parse_rated(options.rated, learner)
    elif options.rated:
        raise ValueError("--rated and --user: expected one of them, got both")
    else:
        assert log is not None
        items, ratings = ratings_of(options.user, log, path)
    titles = read_titles(options, learner.item_ids) or (log.item_titles if log is not None else None) or {}
    user = None if options.user is None else as_id(options.user, log.user_ids)  # type: ignore[union-attr]
    for item, score in zip(*learner.adapt(items, ratings, user=user).recommend(k=options.k), strict=True):
        print("\t".join([str(item), f"{score:.3f}", *([titles[item]] if item in titles else [])]))


def _bench(options: argparse.Namespace) -> None:
    if not BENCHMARK.is_file():
        raise FileNotFoundError(f"bench: there is no {BENCHMARK}; it comes with the source tree, not with the wheel")
    root = str(BENCHMARK.parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("metarec_fast_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["--threads", str(options.threads), "--out", options.out]
    arguments += ["--workload", options.workload] if options.workload else []
    arguments += [f"--{name}" for name in ("quick", "all") if getattr(options, name)]
    module.main(arguments)


def _doctor(options: argparse.Namespace) -> int:
    lines, fast = diagnose()
    print("\n".join(lines))
    return 0 if fast else 1


if __name__ == "__main__":
    sys.exit(main())
