"""MAML-R: MAML for recommendation. The start comes from a Bayesian factor model, the inner loop is learned whole.

    φ_{k+1} = φ_k − s_k A ∘ [∇L_S(φ_k) + ρ (φ_k − φ_0)] + β_k (φ_k − φ_{k−1}),    ρ (|S| + n0)/2 = λ0 + λ1 |S|
    φ_0 = φ_start + (|S| + 1)^(−1/2) Σ_{j∈S} y_j

with s, A, β, λ0, λ1, the weight w_i of a rating of item i, and what it says about a user that he rated it, y_i, all
learned; K → ∞ would be the factor model's ridge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarec_fast import warm_start as warm_starts
from metarec_fast.data import Interactions
from metarec_fast.dot_tasks import DotTasks
from metarec_fast.factor_model import FactorModel
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.functional import Steps
from metarec_fast.learner import Learner, OuterLoss
from metarec_fast.models import DotRecommender
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.tasks import Entries, TaskBatch

_PULL_PER_RATING = 0.008  # λ1/λ0 at the start
_FIRST_RATE = 0.2  # s_k A_j starts at this over the curvature of coordinate j
_TYPICAL_SUPPORT = 30.0  # for which that curvature is taken
_PULL = 1.0  # λ0 without a warm start
_ENOUGH_STEPS = 600


class MAMLR(Learner):
    """MAML with a learned inner loop, started from a factor model of the training users.

    With every part off (`warm_start=False, choices=False, learn_rates=False, momentum=0, pull=False,
    weigh_items=False, extra_count=0, outer_loss="squared"`) it is MAML.

    Args:
        model: The meta-parameters. On a module there is no warm start and there are no choices, and rates are one per
            adapted parameter; with several heads there is no warm start.
        inner_lr: Where step sizes start if not warm-started; the step size if `learn_rates` is off.
        inner_steps: K, or "exact" for the limit of many steps, which needs neither rates nor momentum.
        first_order: Leave out second derivatives.
        adapt: "user"; "all" only with `learn_rates`, `momentum` and `pull` off.
        outer_loss: "squared", "logistic", "absolute", or the weight of each. By default half squared and half
            absolute, or for a logistic model "logistic".
        warm_start: What `initialize` fits for the squared loss: "variational" (or True), "ppca" or "als" of
            `metarec_fast.warm_start`; False to start as MAML does. `start_from` takes any other.
        choices: Let a user's start depend on which items he rated. Turn it off where users do not choose.
        learn_rates: Learn a step size per step, s, and per coordinate, A.
        momentum: Where the learned momentum β of all steps starts; 0 for none.
        pull: Learn a pull to the start that grows with the support, λ0 + λ1 |S|.
        weigh_items: Learn how much a rating of each item can be trusted.
        weigh_users: How much users count in the outer loss: "equal", or "ratings" in proportion to their queries.
        extra_count: n0, added to the number of support entries in the inner loss' mean: steadier for small supports.

    Raises:
        ValueError, TypeError: An argument does not fit; the message names it.
    """

    name = "maml-r"
    default_outer_lr = 2e-4  # of the items; other parameters in proportion
    largest_batch = 64

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float = 0.1,
        inner_steps: Steps = 5,
        first_order: bool = False,
        adapt: str | Sequence[str] = "user",
        outer_loss: OuterLoss | None = None,
        warm_start: bool | str = True,
        choices: bool = True,
        learn_rates: bool = True,
        momentum: float = 0.4,
        pull: bool = True,
        weigh_items: bool = True,
        weigh_users: str = "equal",
        extra_count: float = 5.0,
    ) -> None:
        settings = {
            "warm_start": warm_start, "choices": choices, "learn_rates": learn_rates, "momentum": momentum,
            "pull": pull, "weigh_items": weigh_items, "weigh_users": weigh_users,
        }  # fmt: skip
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            outer_loss=outer_loss, extra_count=extra_count, **settings,
        )  # fmt: skip
        if outer_loss is None and self.model.loss == "squared":
            self.outer_loss = {"squared": 0.5, "absolute": 0.5}
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: must be in [0, 1), got {momentum}")
        self.method = "variational" if warm_start is True else warm_start
        if self.method is not False and self.method not in warm_starts.METHODS:
            known = ", ".join(map(repr, warm_starts.METHODS))
            raise ValueError(f"warm_start: expected a bool or one of {known}, got {warm_start!r}")
        if weigh_users not in ("equal", "ratings"):
            raise ValueError(f'weigh_users: expected "equal" or "ratings", got {weigh_users!r}')
        self.weigh_users = weigh_users
        is_module = not isinstance(self.tasks, DotTasks)
        if is_module:
            self.method, choices = False, False
        if isinstance(model, MultiTaskRecommender):
            self.method = False

        steps = inner_steps if isinstance(inner_steps, int) else 0
        base: Any = self.model
        like = base.offset
        sparse = not is_module and base.sparse
        kind: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.log_steps = self.log_rates = self.momentum = self.log_pull = self.log_weight = self.choice = None
        if learn_rates and steps > 0:
            self.log_steps = nn.Parameter(torch.zeros(steps, **kind))  # s [K]
            self.log_rates = nn.Parameter(torch.full((self.tasks.num_rates,), math.log(inner_lr), **kind))  # A
        if momentum > 0 and steps > 0:
            self.momentum = nn.Parameter(torch.full((steps,), float(momentum), **kind))  # β [K]
        if pull:
            self.log_pull = nn.Parameter(torch.tensor([_PULL, _PULL * _PULL_PER_RATING], **kind).log())  # λ0, λ1
        if weigh_items:
            self.log_weight = nn.Embedding(base.num_items, 1, sparse=sparse, **kind)  # w [N, 1]
            nn.init.zeros_(self.log_weight.weight)
        if choices:
            self.choice = nn.EmbeddingBag(  # y [N, D + 1]
                base.num_items, base.dim + 1, mode="sum", sparse=sparse, include_last_offset=True, **kind
            )
            nn.init.zeros_(self.choice.weight)
        self._check()

    def weigh_tasks(self, batch: TaskBatch) -> TaskBatch:
        if self.weigh_users != "ratings" or batch.query is None:
            return batch
        sizes = batch.query.sizes().to(self.model.offset)
        return batch.with_weights(sizes if batch.weights is None else sizes * batch.weights.to(sizes))

    def start_of(self, support: Entries, users: FeatureMatrix | None = None) -> tuple[Tensor, Tensor]:
        user, bias = super().start_of(support, users)
        if self.choice is None:
            return user, bias
        sums = self.choice(support.items, support.offsets)  # [T, D + 1]
        moved = sums / (support.sizes() + 1).to(sums.dtype).sqrt()[:, None]
        return user + moved[:, :-1], bias + moved[:, -1]

    def inner_loop(self, support: Entries) -> dict[str, Any]:
        loop = super().inner_loop(support)
        if self.log_steps is not None and self.log_rates is not None:
            loop["inner_lr"], loop["preconditioner"] = self.log_steps.exp(), self.tasks.preconditioner(self.log_rates)
        if self.momentum is not None:
            loop["momentum"] = self.momentum
        if self.log_pull is not None:
            first, per_rating = self.log_pull.exp()
            sizes = support.sizes()
            # Tasks without support never move, whatever pulls them.
            count = (sizes + self.extra_count).clamp(min=1)
            loop["prior_pull"] = 2 * (first + per_rating * sizes) / count
        return loop

    def weigh(self, support: Entries, items: Tensor) -> Entries:
        if self.log_weight is None:
            return support
        weights = self.log_weight(items).squeeze(1).exp()
        if support.weights is not None:
            weights = weights * support.weights
        return support.with_weights(weights)

    @torch.no_grad()
    def initialize(self, log: Interactions, seed: int = 0) -> None:
        """Starts from a factor model of the log, or without a warm start (or for other losses) as MAML does; with item
        vectors that are frozen or given, as MAML does too, at step sizes that suit them."""
        super().initialize(log, seed)

    def _initialize(self, log: Interactions, seed: int) -> None:
        if not isinstance(self.method, str) or self.model.loss != "squared":
            super()._initialize(log, seed)
            return
        if self._given.holds(self, "model.item_embedding.weight"):
            super()._initialize(log, seed)
            with torch.device("cpu"):
                self._suit_rates(self.model.tables()[0].cpu().double(), _shares(log), _PULL)
            return
        self.model.check_log(log)
        self.know_items(log)
        more: dict[str, Any] = {}
        if self.method == "variational":
            encoders = {"user_features": self.model.user_encoder, "item_features": self.model.item_encoder}
            more = {name: encoder.features for name, encoder in encoders.items() if encoder is not None}
            more["choices"] = self.choice is not None
        with torch.device("cpu"):  # where the log is, whatever the default
            self.start_from(warm_starts.METHODS[self.method](log, dim=self.model.dim, seed=seed, **more), log)

    @torch.no_grad()
    def start_from(self, factors: FactorModel, log: Interactions) -> None:
        """Starts from a factor model: items, offset, weights, choices, pull, and rates that fit its curvature.

        Args:
            factors: What a function of `metarec_fast.warm_start` gives, of the model's width.
            log: The ratings that say how often items occur; its items are the model's.

        Raises:
            ValueError: The sizes are not the model's.
        """
        model = self.model
        model.check_log(log)
        self.know_items(log)
        if factors.item_table.shape != model.item_embedding.weight.shape:
            expected, found = (tuple(each.shape) for each in (model.item_embedding.weight, factors.item_table))
            raise ValueError(f"factors.item_table: expected shape [N, D] = {expected}, like the model's, got {found}")
        for name, encoder in (("user", model.user_encoder), ("item", model.item_encoder)):
            weights = getattr(factors, f"{name}_weights")
            if encoder is not None and weights is not None and weights.shape != encoder.weight.shape:
                expected, found = tuple(encoder.weight.shape), tuple(weights.shape)
                raise ValueError(
                    f"factors.{name}_weights: expected shape [F, D + 1] = {expected}, as the model's {name} features "
                    f"have it, got {found}"
                )
        share = _shares(log)

        # Users come from an isotropic Gaussian, so a rotation changes nothing but where rates are diagonal.
        table = factors.item_table.double()
        axes = torch.linalg.eigh(table.T @ (share[:, None] * table)).eigenvectors.flip(1)
        table = table @ axes
        rows = torch.cat([table, factors.item_bias[:, None].double()], 1)  # [N, D + 1]
        if model.user_encoder is not None:
            model.user_encoder.weight.copy_(_rotated(factors.user_weights, axes))
        if model.item_encoder is not None:
            model.item_encoder.weight.copy_(_rotated(factors.item_weights, axes))
            rows -= model.of_features().cpu()
        model.item_embedding.weight.copy_(rows[:, :-1])
        model.item_bias.weight.copy_(rows[:, -1:])
        model.offset.fill_(factors.offset)
        model.user_init.zero_()
        model.user_bias_init.zero_()
        if self.choice is not None:
            self.choice.weight.copy_(_rotated(factors.user_start, axes))
        if self.log_weight is not None:
            self.log_weight.weight.copy_(factors.support_weights.log()[:, None])
        if self.log_pull is not None:
            self.log_pull.copy_(torch.tensor([factors.pull, factors.pull * _PULL_PER_RATING]).log())
        self._suit_rates(table, share, factors.pull)
        model.initialized.fill_(True)

    def _suit_rates(self, table: Tensor, share: Tensor, pull: float) -> None:
        """Sets step sizes that fit the curvature of item vectors [N, D], given how often items occur, [N]."""
        if self.log_steps is not None and self.log_rates is not None:
            squares = torch.cat([share @ table.square(), torch.ones(1)])  # [D + 1], mean square of each input
            self.log_rates.copy_((_FIRST_RATE / (squares + pull / _TYPICAL_SUPPORT)).log())
            self.log_steps.zero_()

    def default_epochs(self, num_batches: int) -> int:
        """So many that there are some 600 steps, but 10 to 30: it starts near its goal."""
        return min(30, max(10, math.ceil(_ENOUGH_STEPS / num_batches)))

    def _groups_at(self, rate: float) -> list[dict[str, Any]]:
        """Items and their features at `rate`; offset, start and pull at 5 times that; weights, choices and features
        of users at 15 times; steps at 10 times. With a module, everything at `rate`."""
        if not isinstance(self.tasks, DotTasks):
            return [{"params": list(self.parameters()), "lr": rate}]
        model = self.model
        groups: list[tuple[float, list[Tensor | None]]] = [
            (1, [model.item_embedding.weight, model.item_bias.weight]),
            (1, [None if model.item_encoder is None else model.item_encoder.weight]),
            (5, [model.offset, model.user_init, model.user_bias_init, self.log_pull]),
            (15, [None if each is None else each.weight for each in (self.log_weight, self.choice)]),
            (15, [None if model.user_encoder is None else model.user_encoder.weight]),
            (10, [self.log_steps, self.log_rates, self.momentum]),
        ]
        named = {parameter for _, parameters in groups for parameter in parameters}
        groups.append((1, [parameter for parameter in self.parameters() if parameter not in named]))
        present = ((times, [p for p in parameters if p is not None]) for times, parameters in groups)
        return [{"params": parameters, "lr": times * rate} for times, parameters in present if parameters]


def _shares(log: Interactions) -> Tensor:
    """How often each item occurs, as a share of all ratings, [N]."""
    counts = torch.bincount(torch.from_numpy(log.items).long(), minlength=log.num_items).double()
    return counts / counts.sum()


def _rotated(rows: Tensor | None, axes: Tensor) -> Tensor:
    """Vectors [n, D] and, behind them, biases, the vectors in other axes [D, D]; 0 where there are none."""
    if rows is None:
        return torch.zeros(())
    rows = rows.double()
    return torch.cat([rows[:, :-1] @ axes, rows[:, -1:]], 1)
