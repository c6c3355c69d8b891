"""Reptile: move the start towards where tasks end up,  φ_0 ← φ_0 + ε mean_t(φ_K,t − φ_0)  (Nichol et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from metarec_fast import functional
from metarec_fast._arguments import PAIRWISE
from metarec_fast._known_gradients import KnownGradients
from metarec_fast.functional import Steps
from metarec_fast.learners import Learner, mean_task_loss
from metarec_fast.models import DotRecommender
from metarec_fast.optim import SparseSGD
from metarec_fast.results import FastWeights
from metarec_fast.tasks import Entries, TaskBatch


class Reptile(Learner):
    """Moves the start towards what the tasks adapt to, every adapted parameter by the mean of its moves.

    Calling it returns the support loss after adaptation; `backward` deposits φ_0 − mean_t φ_K,t as the gradient of φ_0,
    so that SGD with rate ε is Reptile. An item's vector and bias move by the mean over the tasks whose support holds
    it. Needs no query; where there is one it is not looked at. The offset does not adapt and gets gradient 0.

    Args:
        model: The meta-parameters.
        inner_lr: Step size of the inner loop.
        inner_steps: K, how many steps.
        adapt: "all": user and items adapt; "user": the user vector and bias alone, and items stay as they are.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """

    name = "reptile"
    default_outer_lr = 0.5  # ε

    def __init__(
        self, model: DotRecommender, *, inner_lr: float = 0.1, inner_steps: Steps = 5, adapt: str = "all"
    ) -> None:
        if model.loss in PAIRWISE:
            raise ValueError(f"model: Reptile adapts on a loss of single scores, got loss={model.loss!r}")
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=True, adapt=adapt, outer_loss=None
        )
        for name in ("first_order", "outer_loss"):
            del self.hyperparameters[name]
        self._check()

    def forward(self, batch: TaskBatch) -> Tensor:
        """The mean over tasks of their support loss after adaptation, a scalar.

        Raises:
            ValueError: The support has no targets.
            IndexError: An item id lies outside the model's table.
        """
        batch = self._prepare(batch, query=None)
        unique, local = batch.localize()
        rows, biases = self.model.lookup(unique)
        start = (self.model.user_init, self.model.user_bias_init, rows, biases, self.model.offset)
        with torch.no_grad():
            fast = functional.adapt(start[0], rows, biases, local.support, **self._settings(local.support))
            scores = self.model.offset + _support_scores(fast, local.support, rows, biases)
            loss = mean_task_loss(self.outer_loss, scores, local.support, local.weights)
            moves = _mean_moves(fast, local, *start[:4])
        gradients = (*moves, torch.zeros_like(self.model.offset))
        result: Tensor = KnownGradients.apply("Reptile", loss, gradients, *start)
        return result

    def default_optimizers(self, outer_lr: float | None = None) -> list[Optimizer]:
        """SGD with rate ε = `outer_lr`, `optim.SparseSGD` for embeddings with sparse gradients."""
        dense, sparse = self._split_groups(outer_lr)
        return [SGD(dense), SparseSGD(sparse)] if sparse else [SGD(dense)]


def _support_scores(fast: FastWeights, support: Entries, rows: Tensor, biases: Tensor) -> Tensor:
    """Scores [n] of the support entries after adaptation, less the offset."""
    tasks = support.task_ids()
    if fast.items is None:
        rows, biases = rows[support.items], biases[support.items]
    else:
        rows, biases = fast.items.rows, fast.items.biases
    return biases + fast.bias[tasks] + (fast.user[tasks] * rows).sum(1)


def _mean_moves(
    fast: FastWeights, batch: TaskBatch, user: Tensor, bias: Tensor, rows: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """φ_0 − mean φ_K of user vector [D], user bias, item rows [U, D] and item biases [U]."""
    weights = torch.ones_like(fast.bias) if batch.weights is None else batch.weights  # [T]
    tiny = torch.finfo(rows.dtype).tiny
    share = weights / weights.sum().clamp(min=tiny)
    move_user, move_bias = share @ (user - fast.user), share @ (bias - fast.bias)
    if fast.items is None:
        return move_user, move_bias, torch.zeros_like(rows), torch.zeros_like(biases)

    support = batch.support
    tasks, items = support.task_ids(), support.items
    # An item that a task holds several times still counts as one of its parameters.
    _, place, repeats = torch.unique(tasks * rows.shape[0] + items, return_inverse=True, return_counts=True)
    count = weights[tasks] / repeats[place]  # [n]
    total = torch.zeros_like(biases).index_add(0, items, count).clamp(min=tiny)  # [U]
    share = count / total[items]
    move_rows = torch.zeros_like(rows).index_add(0, items, share[:, None] * (rows[items] - fast.items.rows))
    move_biases = torch.zeros_like(biases).index_add(0, items, share * (biases[items] - fast.items.biases))
    return move_user, move_bias, move_rows, move_biases
