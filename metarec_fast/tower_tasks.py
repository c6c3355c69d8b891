"""Tasks on an MLPRecommender: by the fused operators of a tower whose every weight adapts, where they say it all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from metarec_fast import functional
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.module_tasks import ModuleTasks
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learners import Learner
    from metarec_fast.module_recommender import ModuleRecommender

_PLAIN_LOOP = {"inner_lr", "inner_steps", "loss", "first_order", "adapt"}
_SHIFTED = {"squared", "absolute"}  # losses of p − y, in which a constant may as well be taken from y


class TowerTasks(ModuleTasks):
    """As `ModuleTasks`, but by `functional.mlp_meta_step` and `mlp_adapt_and_score` where the whole tower adapts by
    plain SGD on the squared loss. The averages of items, which operators do not know, are taken from the targets."""

    def __init__(self, learner: Learner, model: ModuleRecommender, names: list[str]) -> None:
        super().__init__(learner, model, names)
        assert isinstance(model.module, MLPRecommender)
        self.mlp = model.module
        self.is_whole = set(names) == {f"tower.{name}" for name, _ in self.mlp.tower.named_parameters()}

    def meta_loss(self, batch: TaskBatch) -> Tensor:
        if not self.is_fused() or not _SHIFTED.issuperset(self.learner.outer_loss):
            return super().meta_loss(batch)
        step = functional.mlp_meta_step(**self._arguments(batch), outer_loss=self.learner.outer_loss)
        return step.loss

    def predict(self, batch: TaskBatch) -> Tensor:
        assert batch.query is not None
        if not self.is_fused() or batch.query.negatives is not None:
            return super().predict(batch)
        return functional.mlp_adapt_and_score(**self._arguments(batch)) + self._constant(batch.query)

    def is_fused(self) -> bool:
        """Whether the operators compute what this learner's inner loop says."""
        loop = self.learner.inner_loop(self.model.offset.new_zeros(0))
        return self.is_whole and loop["loss"] == "squared" and _PLAIN_LOOP.issuperset(loop)

    def _arguments(self, batch: TaskBatch) -> dict[str, Any]:
        unique, local = batch.localize()
        local_support = self._shifted(local.support.with_weights(self._weighed(batch).weights), batch.support)
        query = None if local.query is None or batch.query is None else self._shifted(local.query, batch.query)
        users = self.mlp.user_part(self.model.users(batch.user_ids, batch.num_tasks))
        layers = [(layer.weight, layer.bias) for layer in self.mlp.linear_layers()]
        loop = self.learner.inner_loop(batch.support.sizes())
        return {
            "user_part": users.expand(batch.num_tasks, -1),
            "item_table": self.mlp.item_part(unique),
            "layers": layers,
            "batch": TaskBatch.unchecked(local_support, query, weights=batch.weights),
            "activation": self.mlp.activation,
            **{name: loop[name] for name in ("inner_lr", "inner_steps", "loss", "first_order")},
        }

    def _shifted(self, local: Entries, entries: Entries) -> Entries:
        """Entries with local ids, and with what the tower is to say as targets."""
        if local.targets is None:
            return local
        targets = local.targets - self._constant(entries)
        return Entries.unchecked(
            local.items, targets, local.offsets, local.weights, max_size=local.max_size, max_item=local.max_item
        )

    def _constant(self, entries: Entries) -> Tensor:
        """What scores are when the tower says 0, [n]."""
        return self.model.offset + self.mlp.item_average[entries.items]
