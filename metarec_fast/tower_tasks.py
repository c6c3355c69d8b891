"""Tasks on an MLPRecommender: by the fused operators of a tower whose every weight adapts, where they say it all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metarec_fast import functional
from metarec_fast.dot_tasks import mean_task_loss
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.module_tasks import ModuleTasks
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learner import Learner
    from metarec_fast.module_recommender import ModuleRecommender

_PLAIN_LOOP = {"inner_lr", "inner_steps", "loss", "first_order", "adapt", "extra_count"}


class TowerTasks(ModuleTasks):
    """As `ModuleTasks`, but by `functional.mlp_meta_step` and `mlp_adapt_and_score` where nothing but tensors of the
    tower adapt, by plain SGD with a rate for all or for each. One that does not adapt has a rate of 0."""

    def __init__(self, learner: Learner, model: ModuleRecommender, names: list[str]) -> None:
        super().__init__(learner, model, names)
        assert isinstance(model.module, MLPRecommender)
        self.mlp = model.module
        self.tensors = [f"tower.{name}" for name, _ in self.mlp.tower.named_parameters()]  # W_1, b_1, …, W_L, b_L

    def meta_loss(self, batch: TaskBatch) -> Tensor:
        loop = self.learner.inner_loop(batch.support)
        if not self.is_fused(loop):
            return super().meta_loss(batch)
        return functional.mlp_meta_step(**self._arguments(batch, loop), outer_loss=self.learner.outer_loss).loss

    def predict(self, batch: TaskBatch) -> Tensor:
        loop = self.learner.inner_loop(batch.support)
        if not self.is_fused(loop):
            return super().predict(batch)
        return functional.mlp_adapt_and_score(**self._arguments(batch, loop))

    def reptile_gradients(self, batch: TaskBatch) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """φ_0 − φ_K is what the steps went, Σ_k s ∇L_S(φ_k), and each of these the first-order gradient of the
        support's loss after k steps."""
        loop = self.learner.inner_loop(batch.support)
        if not self.is_fused(loop):
            return super().reptile_gradients(batch)
        arguments = self._arguments(batch, loop)
        support, steps = arguments["batch"].support, arguments.pop("inner_steps")
        sizes, weights = support.sizes(), self._task_weights(batch, batch.support.sizes() >= 0)
        # L_S divides by the number of entries, the loss of a query by their weights.
        counts = sizes.to(weights)
        if support.weights is not None:
            counts = torch.zeros_like(weights).index_add(0, support.task_ids(), support.weights)
        shares = torch.where(sizes > 0, weights * counts / sizes.clamp(min=1), 0)
        arguments["batch"] = TaskBatch.unchecked(support, support, weights=shares)
        rate = self.learner.inner_lr * shares.sum()
        moves = [torch.zeros_like(parameter) for parameter in self.parameters()]
        for step in range(steps):
            found = functional.mlp_meta_step(**arguments, inner_steps=step, outer_loss=self.model.loss)
            gradients = dict(
                zip(self.tensors, (part for layer in found.grads["layers"] for part in layer), strict=True)
            )
            for name, move in zip(self.names, moves, strict=True):
                move += rate * gradients[name]
        scores = functional.mlp_adapt_and_score(**arguments, inner_steps=steps)
        loss = mean_task_loss({self.model.loss: 1.0}, scores, support, weights) * (weights * (sizes > 0)).sum()
        return loss, self.parameters(), moves

    def is_fused(self, loop: Mapping[str, Any]) -> bool:
        """Whether the operators compute what the learner's inner loop says."""
        return set(self.tensors).issuperset(self.names) and _PLAIN_LOOP.issuperset(loop)

    def _arguments(self, batch: TaskBatch, loop: Mapping[str, Any]) -> dict[str, Any]:
        unique, local = batch.localize()
        support = self._damped(local.support.with_weights(self._weighed(batch).weights))
        users = self.mlp.user_part(self.model.users(batch.user_ids, batch.num_tasks))
        return {
            "user_part": users.expand(batch.num_tasks, -1),
            "item_table": self.mlp.item_part(unique),
            "item_bias": self.model.offset + self.mlp.item_average[unique],
            "layers": [(layer.weight, layer.bias) for layer in self.mlp.linear_layers()],
            "batch": TaskBatch.unchecked(support, local.query, weights=batch.weights),
            "activation": self.mlp.activation,
            "inner_lr": self._rates(loop["inner_lr"]),
            **{name: loop[name] for name in ("inner_steps", "loss", "first_order")},
        }

    def _damped(self, support: Entries) -> Entries:
        """With n0 more in the mean: 1/(S + n0) is S/(S + n0) of the 1/S that operators know."""
        extra = self.learner.extra_count
        if extra == 0 or len(support) == 0:
            return support
        sizes = support.sizes().to(self.model.offset)
        shares = (sizes / (sizes + extra))[support.task_ids()]
        return support.with_weights(shares if support.weights is None else shares * support.weights)

    def _rates(self, rates: Any) -> Any:
        """A rate for all, a number or [K], or a column for each tensor, [1, P] or [K, P]."""
        if not isinstance(rates, Mapping):
            if len(self.names) == len(self.tensors):
                return rates
            rates = dict.fromkeys(self.names, rates)
        columns = [self._column(rates.get(name, 0.0)) for name in self.tensors]
        return torch.stack(torch.broadcast_tensors(*columns), -1)

    def _column(self, rate: Any) -> Tensor:
        """[1] or [K]; a number is written there, which a GPU need not wait for."""
        offset = self.model.offset
        return (rate.to(offset) if isinstance(rate, Tensor) else offset.new_full((), rate)).reshape(-1)
