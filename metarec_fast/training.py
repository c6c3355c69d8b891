"""`fit`: meta-train on the tasks of some users, judge on others by adapting to them, keep the best weights."""

from __future__ import annotations

import math
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from metarec_fast import tuning
from metarec_fast._arguments import PAIRWISE
from metarec_fast._outer_steps import Losses, OuterSteps
from metarec_fast.checkpoint import replace_file
from metarec_fast.features import fingerprint
from metarec_fast.freezing import factors_of
from metarec_fast.history import Epoch, History
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.optim import clip_grad_norm_
from metarec_fast.reference import pointwise_loss
from metarec_fast.sampler import Size, TaskSampler

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.learner import Learner
    from metarec_fast.tasks import TaskBatch

CHECKPOINT = "training.pt"
_METRICS = {"squared": "rmse", "logistic": "log_loss"}  # what validation by these losses is called; else as the loss


def fit(
    learner: Learner,
    train: Interactions,
    valid: Interactions | None = None,
    *,
    support: Size = (3, 90),
    query: Size = "rest",
    order: Literal["random", "time"] = "random",
    negatives: int | None = None,
    epochs: int | None = None,
    patience: int | None = 3,
    batch_size: int | None = None,
    outer_lr: float | None = None,
    seed: int = 0,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    clip: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    tensorboard: str | os.PathLike[str] | None = None,
    tune: int | None = None,
    study: str | os.PathLike[str] | None = None,
) -> History:
    """Meta-trains the learner: initialises it from the log unless it is initialised, runs epochs of outer steps with
    a learning rate that warms up and decays linearly, and validates after each by adapting to held-out users.

    With `valid`, training stops after `patience` epochs in a row without a better figure, and the best weights, which
    may be those of the start, are restored. The same arguments give the same bits, whatever the number of threads.
    Ctrl-C raises KeyboardInterrupt as ever, the best weights so far in place. A further `fit` trains on from there.

    Args:
        train: Ratings of the users to learn from. Logs are mapped by original item ids; ratings of items that the
            learner does not know are ignored, with one warning. The first log that a learner sees sets `item_ids`.
        valid: Ratings of other users. None for no validation: all epochs are run, the last weights stay.
        support, query: Entries of a task, drawn anew each epoch: a number, (low, high), or "rest".
        order: "random", or "time" for the oldest ratings as support.
        negatives: Items that a user did not choose, for each that he chose; by default the learner's `num_negatives`
            where its losses compare with them ("bpr", "softmax"), else none.
        epochs: At most this many passes over the training users; by default 30, or what the learner needs.
        patience: None never stops early.
        batch_size: Tasks a step; by default a sixteenth of the training users, between 16 and
            `learner.largest_batch`.
        outer_lr: Learning rate of the outer loop; by default the learner's `default_outer_lr`.
        seed: Of initialisation and sampling.
        optimizer: Your own (one, or several that share the parameters) instead of `learner.default_optimizers`; its
            learning rates are warmed up and decayed too.
        clip: Largest norm of the whole gradient, sparse ones coalesced.
        checkpoint: Directory for a file that is replaced after each epoch, and from which training can go on.
        resume: Go on from the checkpoint, if there is one, as if never interrupted, bit for bit.
        progress: Show a bar with the training loss and the validation figure.
        tensorboard: Directory for TensorBoard event files (needs the extra `tensorboard`).
        tune: Train so many times, with hyperparameters searched around those that the learner has: `outer_lr` unless
            it is given, `inner_lr`, `inner_steps`, and MAML-R's `momentum` and `extra_count`. The learner, which must
            be new, becomes the one with the best validation figure; a table of the trials is printed with `progress`
            (needs the extra `tune`).
        study: File that keeps the trials. If it is there, only those that are missing up to `tune` are run.

    Returns:
        The training loss, the validation figure (RMSE; for other losses than the squared one, that loss; where items
        are compared, the outer loss), the rate and the seconds of each epoch; `trials` if it tuned.

    Raises:
        ValueError: An argument does not fit, or the checkpoint to resume was made with others; the message names it.
        FloatingPointError: The loss became infinite or NaN: the inner loop diverges. On a GPU this is noticed one step
            late.
        ImportError: TensorBoard or Optuna is asked for and not installed.
    """
    _check_arguments(epochs, patience, batch_size, clip, optimizer, outer_lr)
    if resume and checkpoint is None:
        raise ValueError("resume: needs checkpoint, the directory to resume from")
    if tune is not None:
        tuning.check_tuning(learner, tune, valid, {"checkpoint": checkpoint, "optimizer": optimizer})
    elif study is not None:
        raise ValueError("study: needs tune, the number of trials")
    if learner.item_ids is None:
        learner.model.check_log(train)
        learner.item_ids = train.item_ids
    users = learner.model.feature_tables().get("user")
    if users is not None:
        users.warn_if_unknown("user_features", train.user_ids)
    train = learner.catalogue.align(train)
    valid = None if valid is None else learner.catalogue.align(valid)
    learner.model.check_log(train)
    if tune is not None:
        same: dict[str, Any] = {
            "support": support, "query": query, "order": order, "negatives": negatives, "epochs": epochs,
            "patience": patience, "batch_size": batch_size, "seed": seed, "clip": clip,
        }  # fmt: skip

        def fit_trial(trial: Learner, number: int, outer_lr: float | None) -> History:
            events = None if tensorboard is None else Path(tensorboard) / f"trial-{number}"
            return fit(trial, train, valid, **same, outer_lr=outer_lr, progress=False, tensorboard=events)

        settings = {**same, "outer_lr": outer_lr, **_describe(learner, train, valid)}
        return tuning.tune(
            learner, fit_trial, budget=tune, outer_lr=outer_lr, seed=seed, study=study, progress=progress,
            settings={name: repr(value) for name, value in settings.items()},
        )  # fmt: skip
    writer = None if tensorboard is None else _summary_writer(tensorboard)
    if batch_size is None:
        batch_size = min(learner.largest_batch, max(16, train.num_users // 16))
    if negatives is None:
        compares = any(loss in PAIRWISE for loss in (learner.model.loss, *learner.outer_loss))
        negatives = learner.num_negatives if compares else 0
    tasks: dict[str, Any] = {
        "support": support, "query": query, "order": order, "negatives": negatives, "batch_size": batch_size,
        "seed": seed,
    }  # fmt: skip
    device = learner.model.offset.device
    train_tasks = TaskSampler(train, **tasks, device=device)
    if epochs is None:
        epochs = learner.default_epochs(len(train_tasks))
    valid_tasks = None if valid is None else TaskSampler(valid, **tasks, shuffle=False, device=device)
    learner.rating_range = float(train.ratings.min()), float(train.ratings.max())

    if optimizer is None:
        optimizers = learner.default_optimizers(outer_lr)
    else:
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    path = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
    training = _Training(learner, optimizers, train_tasks, valid_tasks, epochs, clip)
    settings = {"epochs": epochs, "patience": patience, "clip": clip, **tasks, **training.describe(train, valid)}

    try:
        if resume and path is not None and path.exists():
            training.restore(path, settings)
        else:
            if not bool(learner.model.initialized):
                learner.initialize(train, seed=seed)
            training.judge(train_loss=None, since=time.perf_counter())
        with tqdm(
            total=epochs * len(train_tasks), initial=training.steps.done, desc=type(learner).__name__, unit="batch",
            disable=not progress, dynamic_ncols=True,
        ) as bar:  # fmt: skip
            while True:
                if path is not None:
                    training.save(path, settings)
                if writer is not None:
                    _write(writer, training.history)
                if training.is_over(epochs, patience):
                    break
                training.run_epoch(bar)
    finally:
        training.restore_best()
        if writer is not None:
            writer.close()
    return training.history


class _Training:
    """Everything that changes while training, so that a checkpoint can hold it."""

    def __init__(
        self,
        learner: Learner,
        optimizers: list[Optimizer],
        train: TaskSampler,
        valid: TaskSampler | None,
        epochs: int,
        clip: float | None,
    ) -> None:
        self.learner, self.train, self.valid, self.clip = learner, train, valid, clip
        self.steps = OuterSteps(optimizers, epochs * len(train))
        self.history = History(_METRICS.get(_judge(learner), _judge(learner)))
        self.best: dict[str, Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history.epochs) - 1

    def is_over(self, epochs: int, patience: int | None) -> bool:
        best = self.history.best_epoch
        if best is not None and patience is not None and self.epoch - best >= patience:
            self.history.stopped_early = self.epoch < epochs
            return True
        return self.epoch >= epochs

    def run_epoch(self, bar: Any) -> None:
        since = time.perf_counter()
        losses = Losses(self._explain_loss)
        self.learner.train()
        self.train.set_epoch(self.epoch)
        for batch in self.train:
            self.outer_step(batch, losses)
            if bar.update():  # it was drawn, which it is now and then
                self._show(bar, losses.mean)
        losses.read_all()
        self.judge(losses.mean, since)
        self._show(bar, losses.mean)

    def _show(self, bar: Any, loss: float) -> None:
        """Training loss and latest validation figure behind the bar."""
        valid = self.history.epochs[-1].valid
        shown = {"loss": loss} if valid is None else {"loss": loss, self.history.metric: valid}
        bar.set_postfix({name: f"{figure:.4f}" for name, figure in shown.items()}, refresh=False)

    def outer_step(self, batch: TaskBatch, losses: Losses) -> None:
        self.steps.begin()
        losses.add(self.learner.backward(batch), batch.num_tasks, self.steps.done + 1)
        if self.clip is not None:
            clip_grad_norm_(self.learner.parameters(), self.clip)
        self.steps.end()

    def _explain_loss(self, step: int) -> str:
        return (
            f"in epoch {self.epoch + 1}, step {step}: the inner loop diverges, inner_lr={self.learner.inner_lr} is "
            "likely too large for these ratings (or outer_lr is)"
        )

    def judge(self, train_loss: float | None, since: float) -> None:
        """Validates, and writes down the epoch that ended."""
        figure = None if self.valid is None else _validate(self.learner, self.valid)
        if figure is not None and (self.history.best is None or figure < self.history.best):
            self.best = {name: value.clone() for name, value in self.learner.state_dict().items()}
        rate = self.steps.optimizers[0].param_groups[0]["lr"]
        self.history.epochs.append(
            Epoch(len(self.history.epochs), train_loss, figure, float(rate), time.perf_counter() - since)
        )

    def restore_best(self) -> None:
        if self.best is not None:
            self.learner.load_state_dict(self.best)

    def describe(self, train: Interactions, valid: Interactions | None) -> dict[str, Any]:
        """What must be the same for a run to be continued."""
        return {
            **_describe(self.learner, train, valid),
            "optimizer": repr([type(optimizer).__name__ for optimizer in self.steps.optimizers]),
            "outer_lr": repr(self.steps.rates),
        }

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": {name: repr(value) for name, value in settings.items()},
            "learner": self.learner.state_dict(),
            "best": self.best,
            "optimizers": [optimizer.state_dict() for optimizer in self.steps.optimizers],
            "step": self.steps.done,
            "epochs": [vars(epoch) for epoch in self.history.epochs],
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }
        replace_file(path, lambda temporary: torch.save(state, temporary))

    def restore(self, path: Path, settings: dict[str, Any]) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever unpickling a broken file may raise
            raise ValueError(f"{path}: not a training checkpoint: {error}") from error
        for name, value in settings.items():
            saved = state["settings"].get(name)
            if saved != repr(value):
                raise ValueError(f"{name}: the checkpoint {path} was made with {saved}, got {value!r}")
        self.learner.load_state_dict(state["learner"])
        for optimizer, saved in zip(self.steps.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        device = self.learner.model.offset.device
        self.best = state["best"] and {name: value.to(device) for name, value in state["best"].items()}
        self.steps.done = state["step"]
        self.history.epochs = [Epoch(**epoch) for epoch in state["epochs"]]
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            for number, random in enumerate(state["random_cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(random, number)


def _judge(learner: Learner) -> str:
    """The loss by which validation judges: the model's, that is what its scores mean; but the outer loss where the
    two are of different kinds, or several, and one of them compares items, and where heads have weights."""
    if isinstance(learner.model, MultiTaskRecommender):
        return "outer_loss"
    inner: str = learner.model.loss
    outer = [name for name, share in learner.outer_loss.items() if share]
    if inner not in PAIRWISE and not any(loss in PAIRWISE for loss in outer):
        return inner
    return outer[0] if len(outer) == 1 else "outer_loss"


@torch.no_grad()
def _validate(learner: Learner, tasks: TaskSampler) -> float:
    """Error of the query scores, over all query entries of the tasks, which are the same every time; for losses that
    compare items, the mean over tasks."""
    learner.eval()
    tasks.set_epoch(0)
    loss = _judge(learner)
    total, count = torch.zeros((), dtype=torch.float64, device=learner.model.offset.device), 0
    for batch in tasks:
        if loss in PAIRWISE or loss == "outer_loss":
            total, count = total + learner(batch).double() * batch.num_tasks, count + batch.num_tasks
            continue
        assert batch.query is not None
        assert batch.query.targets is not None
        scores = learner.predict(batch).double()
        if batch.query.negatives is not None:
            scores = scores[:, 0]
        targets = batch.query.targets.double()
        if loss == "squared" and learner.rating_range is not None:
            scores = scores.clamp(*learner.rating_range)
        total, count = total + pointwise_loss(loss, scores, targets).sum(), count + len(targets)
    mean = float(total) / max(count, 1)
    return math.sqrt(mean) if loss == "squared" else mean


def _check_arguments(
    epochs: int | None,
    patience: int | None,
    batch_size: int | None,
    clip: float | None,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    outer_lr: float | None,
) -> None:
    for name, value in (("epochs", epochs), ("patience", patience), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}: expected an int, got {value!r}")
        if value is not None and value < (0 if name == "epochs" else 1):
            raise ValueError(f"{name}: must be ≥ {0 if name == 'epochs' else 1}, got {value}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: must be > 0, got {clip}")
    if optimizer is not None and outer_lr is not None:
        raise ValueError("outer_lr: the optimizer given has its own learning rate")


def _describe(learner: Learner, train: Interactions, valid: Interactions | None) -> dict[str, Any]:
    """Who learns, and from whom."""
    tables = {"user": None, "item": None, **learner.model.feature_tables()}
    return {
        "learner": type(learner).__name__,
        "hyperparameters": repr(learner.hyperparameters),
        "model": repr(learner.model.hyperparameters),
        **{f"{name}_features": tables[name] and fingerprint(tables[name]) for name in ("user", "item")},
        "lr_factors": factors_of(learner),
        "train": _fingerprint(train),
        "valid": None if valid is None else _fingerprint(valid),
    }


def _fingerprint(log: Interactions) -> str:
    parts = (log.offsets, log.items, log.ratings)
    return f"{len(log)} ratings of {log.num_users} users, " + "-".join(
        f"{zlib.crc32(part.tobytes()):08x}" for part in parts
    )


def _summary_writer(directory: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "writing TensorBoard event files needs tensorboard: pip install 'metarec-fast[tensorboard]'"
        ) from error
    return SummaryWriter(str(directory))


def _write(writer: Any, history: History) -> None:
    epoch = history.epochs[-1]
    figures = {"train/loss": epoch.train_loss, f"valid/{history.metric}": epoch.valid, "outer_lr": epoch.outer_lr}
    for name, value in figures.items():
        if value is not None:
            writer.add_scalar(name, value, epoch.number)
