"""What happened in training, epoch by epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from metarec_fast.report import align


@dataclass(frozen=True)
class Epoch:
    """One pass over the training users. Number 0 is the start, before any training."""

    number: int
    train_loss: float | None  # mean outer loss over tasks; None for number 0
    valid: float | None  # the validation figure; None without validation users
    outer_lr: float  # of the first parameter group, at the end of the epoch
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A training with other hyperparameters, by `fit(tune=...)`. Number 0 has those that the learner came with."""

    number: int
    hyperparameters: dict[str, float]  # what was searched
    valid: float | None  # the best validation figure; None where the loss became infinite or NaN
    epochs: int | None  # None there too


@dataclass
class History:
    """The epochs of one `fit`.

    Attributes:
        metric: What the validation figure is, lower is better: "rmse"; "log_loss" for the logistic loss; "bpr" or
            "softmax", the loss itself.
        epochs: In order, number 0 first.
        stopped_early: Whether patience ran out before the last epoch.
        trials: Where `fit` tuned, all that was tried; the epochs are those of the best trial.
    """

    metric: str
    epochs: list[Epoch] = field(default_factory=list)
    stopped_early: bool = False
    trials: list[Trial] = field(default_factory=list)

    @property
    def best_epoch(self) -> int | None:
        """The number of the epoch with the best validation figure, the first of equals; None without validation."""
        judged = [epoch for epoch in self.epochs if epoch.valid is not None]
        return min(judged, key=lambda epoch: epoch.valid or 0.0).number if judged else None

    @property
    def best(self) -> float | None:
        """The best validation figure."""
        return min((epoch.valid for epoch in self.epochs if epoch.valid is not None), default=None)

    @property
    def seconds(self) -> float:
        """Time spent in all epochs, validation included."""
        return sum(epoch.seconds for epoch in self.epochs)

    def trials_table(self) -> str:
        """The trials as text: a row for each, the best marked by a star; empty where `fit` did not tune."""
        if not self.trials:
            return ""
        names, best = list(self.trials[0].hyperparameters), best_trial(self.trials)
        rows = [["trial", f"{self.metric} ", *names, "epochs"]]
        for trial in self.trials:
            figure = "–" if trial.valid is None else f"{trial.valid:.4f}"
            values = (f"{trial.hyperparameters[name]:.3g}" for name in names)
            epochs = "–" if trial.epochs is None else str(trial.epochs)
            rows.append([str(trial.number), figure + ("*" if trial is best else " "), *values, epochs])
        return "\n".join(align(rows)[0])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The history as JSON text, written to a file too if `path` is given."""
        content = {"metric": self.metric, "best_epoch": self.best_epoch, "stopped_early": self.stopped_early}
        epochs, trials = ([asdict(each) for each in part] for part in (self.epochs, self.trials))
        text = json.dumps({**content, "epochs": epochs, **({"trials": trials} if trials else {})}, indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """The first of those with the best validation figure; None if none has one."""
    judged = [trial for trial in trials if trial.valid is not None]
    return min(judged, key=lambda trial: trial.valid or 0.0, default=None)
