"""What happened in training, epoch by epoch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Epoch:
    """One pass over the training users. Number 0 is the start, before any training."""

    number: int
    train_loss: float | None  # mean outer loss over tasks; None for number 0
    valid: float | None  # the validation figure; None without validation users
    outer_lr: float  # of the first parameter group, at the end of the epoch
    seconds: float


@dataclass
class History:
    """The epochs of one `fit`.

    Attributes:
        metric: What the validation figure is, lower is better: "rmse"; "log_loss" for the logistic loss; "bpr" or
            "softmax", the loss itself.
        epochs: In order, number 0 first.
        stopped_early: Whether patience ran out before the last epoch.
    """

    metric: str
    epochs: list[Epoch] = field(default_factory=list)
    stopped_early: bool = False

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

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The history as JSON text, written to a file too if `path` is given."""
        content = {"metric": self.metric, "best_epoch": self.best_epoch, "stopped_early": self.stopped_early}
        text = json.dumps({**content, "epochs": [asdict(epoch) for epoch in self.epochs]}, indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text
