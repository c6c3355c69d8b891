"""Reptile: move the start towards where tasks end up,  φ_0 ← φ_0 + ε mean_t(φ_K,t − φ_0)  (Nichol et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from metarec_fast._arguments import PAIRWISE
from metarec_fast.dot_tasks import DotTasks
from metarec_fast.functional import Steps
from metarec_fast.learner import Learner
from metarec_fast.models import DotRecommender
from metarec_fast.optim import SparseSGD
from metarec_fast.tasks import TaskBatch


class Reptile(Learner):
    """Moves the start towards what the tasks adapt to, every adapted parameter by the mean of its moves.

    Calling it returns the support loss after adaptation; `backward` deposits φ_0 − mean_t φ_K,t as the gradient of φ_0,
    so that SGD with rate ε is Reptile. An item's vector and bias move by the mean over the tasks whose support holds
    it, the weights of item features by the mean over these items, of an item's features times its move. Needs no query;
    where there is one it is not looked at. The offset does not adapt and gets gradient 0.

    Args:
        model: The meta-parameters.
        inner_lr: Step size of the inner loop.
        inner_steps: K, how many steps.
        adapt: "all": user and items adapt; "user": the user vector and bias alone, and items stay as they are.
        extra_count: n0, as of `MAML`.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """

    name = "reptile"
    default_outer_lr = module_outer_lr = 0.5  # ε

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: Steps = 5,
        adapt: str | Sequence[str] = "all",
        extra_count: float = 0.0,
    ) -> None:
        if getattr(model, "loss", None) in PAIRWISE:
            raise ValueError(f"model: Reptile adapts on a loss of single scores, got loss={model.loss!r}")
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=True, adapt=adapt, outer_loss=None,
            extra_count=extra_count,
        )  # fmt: skip
        for name in ("first_order", "outer_loss"):
            del self.hyperparameters[name]
        self._check()

    def forward(self, batch: TaskBatch) -> Tensor:
        """The mean over tasks of their support loss after adaptation, a scalar.

        Raises:
            ValueError: The support has no targets.
            IndexError: An item id lies outside the model's table.
        """
        return self.tasks.reptile_loss(self._prepare(batch, query=None, localized=True))

    def _deposit(self, batch: TaskBatch) -> Tensor | None:
        if not self._has_forward_of(Reptile) or not self.tasks.deposits(moves=True):
            return None
        assert isinstance(self.tasks, DotTasks)
        return self.tasks.deposit_moves(self._prepare(batch, query=None))

    def default_optimizers(self, outer_lr: float | None = None) -> list[Optimizer]:
        """SGD with rate ε = `outer_lr`, `optim.SparseSGD` for embeddings with sparse gradients."""
        return self._optimizers(outer_lr, SGD, SparseSGD)
