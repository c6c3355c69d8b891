"""Tasks on several heads: each head's entries weighted, then as on the dot-product model.

    w_s = α_h (|S| + n0) / (|S_h| + n0),   so that   1/(|S| + n0) Σ_s w_s ℓ_s = Σ_h α_h L_S,h

The one bias that operators know of a user does not move, A is 0 there: heads have their own, among the coordinates of
his vector. Heads of one loss run by the fused operators. Where losses differ, the steps are written out here, a batch
at once, and autograd goes through them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metarec_fast._ragged import pad
from metarec_fast.dot_tasks import DotTasks, mean_over_tasks
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.module_tasks import at_step
from metarec_fast.multi_task import MIXED, MultiTaskRecommender
from metarec_fast.reference import pointwise_loss
from metarec_fast.results import FastWeights
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learner import Learner


class HeadTasks(DotTasks):
    """What a learner does with tasks on a `MultiTaskRecommender`; the arguments are those of `DotTasks`."""

    model: MultiTaskRecommender

    def __init__(self, learner: Learner, model: MultiTaskRecommender) -> None:
        super().__init__(learner, model)
        self.is_mixed = model.loss == MIXED
        if learner.adapted != "user":
            raise ValueError(f'adapt: heads share their items, so that only "user" adapts, got {learner.adapted!r}')
        if learner.inner_steps == "exact":
            raise ValueError('inner_steps: expected a number of steps for a model with heads, got "exact"')

        if self.is_mixed and set(learner.outer_loss) != {MIXED}:
            raise ValueError(f"outer_loss: heads of different losses are judged by their own, got {learner.outer_loss}")

    @property
    def num_rates(self) -> int:
        return self.model.dim

    def preconditioner(self, log_rates: Tensor) -> Tensor:
        return nn.functional.pad(log_rates.exp(), (0, 1))

    @property
    def reads_table(self) -> bool:
        return False

    def meta_loss(self, batch: TaskBatch) -> Tensor:
        batch = self._weighted(batch, judged=True)
        if not self.is_mixed:
            return super().meta_loss(batch)
        fast, local, (rows, biases) = self._adapt_mixed(batch, None)
        query = local.query
        assert query is not None
        assert query.targets is not None
        scores = self._scores(fast, query, rows, biases)
        logistic = self._is_logistic(batch.query)
        squared, log_loss = (pointwise_loss(name, scores, query.targets) for name in ("squared", "logistic"))
        return mean_over_tasks(torch.where(logistic, log_loss, squared), query, batch.weights)

    def predict(self, batch: TaskBatch) -> Tensor:
        batch = self._weighted(batch, judged=False)
        if not self.is_mixed:
            return super().predict(batch)
        fast, local, (rows, biases) = self._adapt_mixed(batch, None)
        assert local.query is not None
        return self._scores(fast, local.query, rows, biases)

    def adapt(self, batch: TaskBatch, users: FeatureMatrix | None = None) -> FastWeights:
        batch = self._weighted(batch, judged=False)
        return self._adapt_mixed(batch, users)[0] if self.is_mixed else super().adapt(batch, users)

    def reptile_loss(self, batch: TaskBatch) -> Tensor:
        if self.is_mixed:
            raise ValueError("model: Reptile needs heads of one loss, got different ones")
        return super().reptile_loss(self._weighted(batch, judged=False))

    def _settings(self, batch: TaskBatch, support: Entries, users: FeatureMatrix | None = None) -> dict[str, Any]:
        settings = super()._settings(batch, support, users)
        plain = self.preconditioner(self.model.offset.new_zeros(self.num_rates))
        return {"preconditioner": plain, **settings}

    def _weighted(self, batch: TaskBatch, judged: bool) -> TaskBatch:
        """The batch without support entries that do not count, the others with their weights; so with the query if it
        is to be `judged`."""
        heads = self.model.heads.values()
        extra = float(self.learner.inner_loop(batch.support).get("extra_count", 0.0))
        support = self._weigh(batch.support, [head.weight for head in heads], extra)
        query = batch.query
        if judged and query is not None:
            query = self._weigh(query, [head.query_weight for head in heads], 0.0)
        return batch.with_entries(support, query)

    def _weigh(self, entries: Entries, importance: list[float], extra: float) -> Entries:
        alphas = self.model.head_offset.new_tensor(importance)
        if 0 in importance:
            entries = _select(entries, alphas[self._heads_of(entries)] > 0)
        heads, tasks, sizes = self._heads_of(entries), entries.task_ids(), entries.sizes()
        places = tasks * len(importance) + heads
        counts = torch.zeros(entries.num_tasks * len(importance), dtype=sizes.dtype, device=sizes.device)
        counts.index_add_(0, places, torch.ones_like(places))
        weights = alphas[heads] * (sizes[tasks] + extra) / (counts[places] + extra)
        return entries.with_weights(weights if entries.weights is None else weights * entries.weights)

    def _heads_of(self, entries: Entries) -> Tensor:
        return entries.items // self.model.items_per_head

    def _is_logistic(self, entries: Entries | None) -> Tensor:
        """Which entries are compared by the logistic loss, [n]."""
        assert entries is not None
        kinds = [head.loss == "logistic" for head in self.model.heads.values()]
        return torch.tensor(kinds, device=entries.items.device)[self._heads_of(entries)]

    def _adapt_mixed(
        self, batch: TaskBatch, users: FeatureMatrix | None
    ) -> tuple[FastWeights, TaskBatch, tuple[Tensor, Tensor]]:
        """φ_K of every task where losses differ, the batch with ids into the rows of its distinct items, and these."""
        weighed = self.learner.weigh(batch.support, batch.support.items)
        settings = self._settings(batch, batch.support, users)
        unique, local = batch.localize()
        rows, biases = self.model.lookup(unique)
        support = local.support
        assert support.targets is not None
        assert weighed.weights is not None

        inputs = torch.cat([rows, torch.ones_like(biases)[:, None]], 1)[support.items]  # [n, D + H + 1]
        parts = {
            "inputs": inputs,
            "biases": self.model.offset + biases[support.items],
            "targets": support.targets,
            "weights": weighed.weights,
            "logistic": self._is_logistic(batch.support),
        }
        padded = {name: pad(part, support.offsets) for name, part in parts.items()}
        fast = _inner_loop(**padded, sizes=support.sizes(), settings=settings)
        return FastWeights(fast[:, :-1], fast[:, -1]), local, (rows, biases)

    def _scores(self, fast: FastWeights, query: Entries, rows: Tensor, biases: Tensor) -> Tensor:
        tasks = query.task_ids()
        own = (fast.user[tasks] * rows[query.items]).sum(1)
        scores: Tensor = self.model.offset + biases[query.items] + fast.bias[tasks] + own
        return scores


def _inner_loop(
    inputs: Tensor,  # x, [T, S, W]
    biases: Tensor,  # b, [T, S]
    targets: Tensor,  # y, [T, S]
    weights: Tensor,  # w, [T, S]; 0 where there is no entry
    logistic: Tensor,  # bool [T, S]
    sizes: Tensor,  # [T]
    settings: dict[str, Any],
) -> Tensor:
    """φ_K [T, W]:  φ ← φ − s_k A ∘ [Σ_s w_s ℓ'_s x_s / (|S| + n0) + ρ (φ − φ_0)] + β_k (φ − φ_before)."""
    user, bias = settings["user_init"], settings["user_bias_init"]
    num_tasks = len(sizes)
    start = torch.cat([user.expand(num_tasks, -1), bias.expand(num_tasks)[:, None]], 1)
    scale, pull = settings["preconditioner"], settings.get("prior_pull", 0.0)
    pull = pull[:, None] if isinstance(pull, Tensor) and pull.dim() else pull
    momentum = settings.get("momentum", 0.0)
    count = (sizes + settings.get("extra_count", 0.0)).clamp(min=1)[:, None].to(start)

    now = before = start
    for step in range(settings["inner_steps"]):
        scores = biases + (inputs @ now[:, :, None]).squeeze(2)
        derivatives = torch.where(logistic, scores.sigmoid() - targets, 2 * (scores - targets))
        slopes = ((weights * derivatives)[:, None, :] @ inputs).squeeze(1) / count
        slopes = slopes.detach() if settings["first_order"] else slopes
        moved = now - at_step(settings["inner_lr"], step) * scale * (slopes + pull * (now - start))
        now, before = moved + at_step(momentum, step) * (now - before), now
    return now


def _select(entries: Entries, chosen: Tensor) -> Entries:
    """Those of the entries that are chosen, [n]; all tasks stay."""
    before = torch.cat([chosen.new_zeros(1, dtype=torch.int64), chosen.cumsum(0)])
    offsets = before[entries.offsets]

    def some(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[chosen]

    return Entries.unchecked(
        entries.items[chosen], some(entries.targets), offsets, some(entries.weights),
        max_size=int(offsets.diff().max()) if entries.num_tasks else 0, max_item=entries.max_item,
    )  # fmt: skip
