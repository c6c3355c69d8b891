"""MAML, its first-order form, and Meta-SGD, which learns the step sizes too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from metarec_fast.functional import Steps
from metarec_fast.learner import Learner, OuterLoss
from metarec_fast.models import DotRecommender
from metarec_fast.tasks import Entries


class MAML(Learner):
    """Model-agnostic meta-learning (Finn et al. 2017): the start from which a few steps of SGD on a new user's ratings
    predict his others best, by exact gradients through those steps.

    Args:
        model: The meta-parameters: a `DotRecommender`, or any nn.Module (`ModuleRecommender` says what it must do).
        inner_lr: Step size of the inner loop.
        inner_steps: K, how many steps.
        first_order: Leave out second derivatives; cheaper, and often as good (FOMAML).
        adapt: "user": user vector and bias adapt, items are shared (as in MeLU and ANIL). "all": the item vectors and
            biases of a task's support adapt too, each task its own copy. Of a module, the names of the parameters that
            adapt, or patterns of them: ["tower.*"].
        outer_loss: "squared", "logistic", "absolute", "bpr", "softmax", or the weight of each; by default the model's
            loss.
        extra_count: n0, added to the number of support entries in the inner loss' mean. With 0, as in the papers, one
            rating moves a user as far as many do, which makes the first few worse than none; 5 mends that.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """

    name = "maml"

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: Steps = 5,
        first_order: bool = False,
        adapt: str | Sequence[str] = "user",
        outer_loss: OuterLoss | None = None,
        extra_count: float = 0.0,
    ) -> None:
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            outer_loss=outer_loss, extra_count=extra_count,
        )  # fmt: skip
        self._check()


class FOMAML(MAML):
    """First-order MAML (Finn et al. 2017, section 5.2): the inner gradient counts as constant. MAML's arguments."""

    name = "fomaml"

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: Steps = 5,
        adapt: str | Sequence[str] = "user",
        outer_loss: OuterLoss | None = None,
        extra_count: float = 0.0,
    ) -> None:
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=True, adapt=adapt, outer_loss=outer_loss,
            extra_count=extra_count,
        )  # fmt: skip
        del self.hyperparameters["first_order"]


class MetaSGD(Learner):
    """MAML that also learns the step size of each coordinate (Li et al. 2017): s A with A [D + 1] learned, A > 0.

    Args:
        inner_lr: Where all step sizes start. The other arguments are those of `MAML`.
        rates: What has a step size of its own: "weight", each coordinate; or of a module "tensor", each weight matrix
            and bias vector that adapts, or "step", each of them in each step (MAML++, Antoniou et al. 2019).

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """

    name = "meta-sgd"

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: Steps = 5,
        first_order: bool = False,
        adapt: str | Sequence[str] = "user",
        outer_loss: OuterLoss | None = None,
        extra_count: float = 0.0,
        rates: str = "weight",
    ) -> None:
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            outer_loss=outer_loss, extra_count=extra_count, rates=rates,
        )  # fmt: skip
        self.rates_of = rates
        self.log_rates: Any = self.tasks.new_rates(rates, math.log(inner_lr))
        self._check()

    @property
    def rates(self) -> Any:
        """The step size of each coordinate, the user bias last, [D + 1]; of a module, of each parameter by name: of its
        shape, a scalar or [K]."""
        return self.tasks.preconditioner(self.log_rates)

    def inner_loop(self, support: Entries) -> dict[str, Any]:
        if self.rates_of != "weight":
            return {**super().inner_loop(support), "inner_lr": self.rates}
        return {**super().inner_loop(support), "inner_lr": 1.0, "preconditioner": self.rates}

    def _groups_at(self, rate: float) -> list[dict[str, Any]]:
        rates = [self.log_rates] if isinstance(self.log_rates, Tensor) else list(self.log_rates)
        return [{"params": list(self.model.parameters()), "lr": rate}, {"params": rates, "lr": 5 * rate}]
