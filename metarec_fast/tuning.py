"""`fit(tune=budget)`: tries other rates and steps around those of the learner, and keeps what validates best.

    trial 0   the learner as it came
    trial k   what a tree-structured Parzen estimator (Bergstra et al. 2011) proposes after trials 0 … k − 1

Every trial starts from the same weights and has a seed of its own, so that a study that is continued goes on as if it
had never ended.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from metarec_fast import freezing
from metarec_fast._columns import as_int
from metarec_fast.history import History, Trial, best_trial

if TYPE_CHECKING:
    from metarec_fast.learner import Learner

_FACTOR = 10.0  # how far from where they stand rates and counts are searched, in both directions
_MOST_MOMENTUM = 0.9
_NAME = "metarec_fast"

FitTrial = Callable[["Learner", int, float | None], History]
"""Trains a copy of the learner, given the trial's number and the outer learning rate (None: the default)."""


def check_tuning(learner: Learner, budget: Any, valid: Any, others: Mapping[str, Any]) -> None:
    """Raises unless `fit` can tune; `others` are arguments that do not go with it, by name."""
    if as_int("tune", budget) < 1:
        raise ValueError(f"tune: must be ≥ 1, got {budget}")
    if valid is None:
        raise ValueError("valid: tuning needs ratings of other users to judge by, got None")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: does not go with tune, whose trials train copies of the learner")
    if bool(learner.model.initialized):
        raise ValueError("tune: expected a new learner, since every trial trains from the start; this one is trained")


def tune(
    learner: Learner,
    fit_trial: FitTrial,
    *,
    budget: int,
    outer_lr: float | None,
    seed: int,
    study: str | os.PathLike[str] | None,
    settings: Mapping[str, str],
    progress: bool,
) -> History:
    """Runs trials until there are `budget` of them, those in the study included; the learner becomes the best one.

    Args:
        settings: What has to be the same for a study to be continued, by name.

    Returns:
        The history of the best trial, with all trials.

    Raises:
        FloatingPointError: The loss became infinite or NaN in every trial.
    """
    kept = _Study(study, settings, learner, outer_lr, seed)
    best: tuple[Learner, History] | None = None  # of the trials that ran here

    def run(number: int, values: Mapping[str, Any]) -> History:
        nonlocal best
        candidate = copy.deepcopy(learner)
        _rebuild(candidate, {name: value for name, value in values.items() if name != "outer_lr"})
        history = fit_trial(candidate, number, values.get("outer_lr", outer_lr))
        if history.best is not None and (best is None or best[1].best is None or history.best < best[1].best):
            best = candidate, history
        return history

    try:
        done = kept.trials()
        with tqdm(
            total=budget, initial=min(len(done), budget), desc=f"{type(learner).__name__}, trials", unit="trial",
            disable=not progress, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            while len(done) < budget:
                kept.run_next(run)
                done = kept.trials()
                bar.set_postfix({} if best is None else {"best": f"{best[1].best:.4f}"}, refresh=False)
                bar.update()
        winner = best_trial(done)
        if winner is None:
            raise FloatingPointError(f"tune: the loss became infinite or NaN in each of {len(done)} trials")
        if best is None or best[1].best != winner.valid:  # the winner ran before the study was continued
            run(winner.number, winner.hyperparameters)
    finally:
        if best is not None:
            _become(learner, best[0])
    assert best is not None
    best[1].trials = done
    if progress:
        print(best[1].trials_table())
    return best[1]


class _Study:
    """The trials, in an Optuna study: in memory, or in a journal on disk."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        settings: Mapping[str, str],
        learner: Learner,
        outer_lr: float | None,
        seed: int,
    ) -> None:
        self.optuna, self.seed = _optuna(), seed
        self.values, self.space = _search_space(self.optuna.distributions, learner, outer_lr)
        self.study = _open(self.optuna, path)
        known = self.study.user_attrs.get("settings")
        if known is None:
            self.study.set_user_attr("settings", dict(settings))
        for name, value in settings.items():
            if known is not None and known.get(name) != value:
                raise ValueError(f"{name}: the study {path} was made with {known.get(name)}, got {value}")

    def trials(self) -> list[Trial]:
        """Those that ended, in order; not those that were interrupted."""
        ended = (self.optuna.trial.TrialState.COMPLETE, self.optuna.trial.TrialState.PRUNED)
        found = self.study.get_trials(deepcopy=False, states=ended)
        return [
            Trial(number, dict(trial.params), trial.value, trial.user_attrs.get("epochs"))
            for number, trial in enumerate(found)
        ]

    def run_next(self, run: Callable[[int, Mapping[str, Any]], History]) -> None:
        states = self.optuna.trial.TrialState
        number = len(self.trials())
        random = np.random.SeedSequence([self.seed % 2**64, number]).generate_state(1)
        self.study.sampler = self.optuna.samplers.TPESampler(seed=int(random[0]))
        if number == 0:
            self.study.enqueue_trial(self.values)
        trial = self.study.ask(self.space)
        try:
            history = run(number, trial.params)
        except FloatingPointError:
            self.study.tell(trial, state=states.PRUNED)  # which the estimator takes as worse than any figure
        except BaseException:
            self.study.tell(trial, state=states.FAIL)
            raise
        else:
            trial.set_user_attr("epochs", len(history.epochs) - 1)
            if history.best is None or not math.isfinite(history.best):
                self.study.tell(trial, state=states.PRUNED)
            else:
                self.study.tell(trial, history.best)


def _search_space(
    distributions: Any, learner: Learner, outer_lr: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is searched: where it stands, and Optuna's distributions around that, by name.

    That is outer_lr unless it is given, and of the constructor's arguments those that matter.
    """
    arguments = learner.hyperparameters
    values: dict[str, Any] = {} if outer_lr is not None else {"outer_lr": learner.default_outer_lr}
    names: tuple[str, ...] = ()
    if isinstance(arguments["inner_steps"], int) and arguments["inner_steps"] > 0:
        rates_start_warm = arguments.get("warm_start") and arguments.get("learn_rates")
        names = ("inner_steps", "momentum") if rates_start_warm else ("inner_lr", "inner_steps", "momentum")
    values |= {name: arguments[name] for name in (*names, "extra_count") if arguments.get(name)}
    if not values:
        raise ValueError("tune: nothing is left to search, with outer_lr given and no inner steps that have a rate")

    def around(name: str, value: Any) -> Any:
        if name == "inner_steps":
            return distributions.IntDistribution(1, 2 * value)
        if name == "momentum":
            return distributions.FloatDistribution(0.0, max(_MOST_MOMENTUM, value))
        return distributions.FloatDistribution(value / _FACTOR, value * _FACTOR, log=True)

    return values, {name: around(name, value) for name, value in values.items()}


def _rebuild(learner: Learner, values: Mapping[str, Any]) -> None:
    """Makes the learner, in place and around the model that it has, what its constructor makes of other values."""
    ids, training = learner.item_ids, learner.training
    given, factors = learner._given, freezing.factors_of(learner)
    with torch.no_grad(), given.kept(learner):
        learner.__init__(learner.model, **{**learner.hyperparameters, **values})  # type: ignore[misc]
    learner._given = given
    freezing.set_factors(learner, factors)
    learner.item_ids = ids
    learner.train(training)


def _become(learner: Learner, trained: Learner) -> None:
    _rebuild(learner, trained.hyperparameters)
    learner.load_state_dict(trained.state_dict())
    learner.item_ids, learner.rating_range = trained.item_ids, trained.rating_range


def _open(optuna: Any, path: str | os.PathLike[str] | None) -> Any:
    """The study in the journal, a new one if there is none."""
    storage, verbosity = None, optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it tells that there is a new one
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
        return optuna.create_study(storage=storage, study_name=_NAME, load_if_exists=True)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"study: {path} is no journal of a study: {type(error).__name__}: {error}") from error
    finally:
        optuna.logging.set_verbosity(verbosity)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("tuning needs Optuna: pip install 'metarec-fast[tune]'") from error
    return optuna
