"""Tasks on the dot-product model, by the fused operators: user vector and bias adapt, or the items of the support too.

    unique rows of the batch = model's nn.Embedding → functional.meta_step → loss, exact gradients on `backward()`

so every optimiser, gradient clipping and DistributedDataParallel work as they do without us. Embeddings with sparse
gradients are given them directly: `meta_step` reads the table itself, and what it returns is the gradient's rows. So
are all parameters where the loss is wanted for nothing but its gradients, as in `fit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metarec_fast import functional
from metarec_fast._compiling import left_uncompiled
from metarec_fast._known_gradients import KnownGradients, sparse_tensor
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.models import DotRecommender
from metarec_fast.reference import entry_losses
from metarec_fast.results import FastWeights, MetaStep, SparseRows
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learner import Learner


class DotTasks:
    """What a learner does with tasks on a `DotRecommender`.

    Args:
        learner: Whose inner loop, losses and parameters count.
        model: Its model.
    """

    def __init__(self, learner: Learner, model: DotRecommender) -> None:
        self.learner, self.model = learner, model

    @property
    def reads_table(self) -> bool:
        """Whether the model keeps all rows as they are used, so that without gradients nothing is looked up."""
        return self.model.item_encoder is None

    @property
    def num_rates(self) -> int:
        """How many step sizes can be told apart: of each coordinate of the user vector, and of the bias."""
        return self.model.dim + 1

    def new_rates(self, of: str, value: float) -> nn.Parameter:
        """The same value for each coordinate ("weight") that adapts, the user bias last, [D + 1]."""
        if of != "weight":
            raise ValueError(f"rates: expected one of weight of a DotRecommender, got {of!r}")
        return nn.Parameter(self.model.user_init.new_full((self.num_rates,), value))

    def preconditioner(self, log_rates: Tensor) -> Tensor:
        """A of the inner loop, from its logarithm [D + 1]."""
        return log_rates.exp()

    def needs_local(self, training: bool) -> bool:
        """Whether items are looked up that the batch names, rather than read from the whole table."""
        return not (self._deposits_rows() if training else self.reads_table)

    def meta_loss(self, batch: TaskBatch) -> Tensor:
        """The outer loss, a scalar that can be differentiated once with respect to all parameters of the learner."""
        if torch.is_grad_enabled() and self._deposits_rows():
            loss: Tensor = self._loss_with_rows(batch)
            return loss
        outer_loss = self.learner.outer_loss
        unique, local = batch.localize()
        rows, biases = self.model.lookup(unique)
        support = self.learner.weigh(local.support, batch.support.items)
        local = batch.with_entries(support, local.query)  # its weights, which may be newer
        block: dict[str, Any] = {
            "item_table": rows,
            "item_bias": biases,
            "batch": local,
            **self._settings(batch, batch.support),
        }
        if torch.is_grad_enabled():
            return functional.meta_step(**block, outer_loss=outer_loss).loss
        scores = functional.adapt_and_score(**block)
        assert local.query is not None
        return mean_task_loss(outer_loss, scores, local.query, local.weights)

    def predict(self, batch: TaskBatch) -> Tensor:
        """Scores of the query, [n], or [n, 1 + M] with negatives."""
        settings = self._settings(batch, batch.support)
        table, item_bias, batch = self._rows_for(batch)
        return functional.adapt_and_score(item_table=table, item_bias=item_bias, batch=batch, **settings)

    def adapt(self, batch: TaskBatch, users: FeatureMatrix | None = None) -> FastWeights:
        """User vectors [T, D], biases [T], and with adapt="all" items; features of the users [T, F] are found by
        `batch.user_ids` unless they are given."""
        settings = self._settings(batch, batch.support, users)
        table, item_bias, batch = self._rows_for(batch)
        return functional.adapt(item_table=table, item_bias=item_bias, support=batch.support, **settings)

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        """Scores of every item for each task, [T, N]."""
        fast = self.adapt(batch)
        table, item_bias = self.model.tables()
        scores: Tensor = self.model.offset + item_bias + fast.bias[:, None] + fast.user @ table.T
        if fast.items is not None:
            tasks, items = batch.support.task_ids().to(scores.device), batch.support.items.to(scores.device)
            own = fast.items.biases + (fast.user[tasks] * fast.items.rows).sum(1)
            scores[tasks, items] = self.model.offset + fast.bias[tasks] + own
        return scores

    def reptile_loss(self, batch: TaskBatch) -> Tensor:
        """The mean support loss after adaptation, whose gradients are φ_0 − mean φ_K."""
        unique, local = batch.localize()
        model, support = self.model, local.support
        rows, biases = model.lookup(unique)
        settings = self._settings(batch, batch.support)
        del settings["first_order"]
        result = functional.reptile_step(
            item_table=rows.detach(), item_bias=biases.detach(), support=support, task_weights=batch.weights, **settings
        )
        user, bias, *items = result.grads.values()
        # What does not move has a gradient of zero rather than none: DDP waits for everybody's.
        moves = [_dense(each, len(unique)) for each in items] or [torch.zeros_like(rows), torch.zeros_like(biases)]
        inputs = [settings["user_init"], settings["user_bias_init"], model.offset, rows, biases]
        gradients = [user, bias, torch.zeros_like(model.offset), *moves]
        if model.item_encoder is not None:
            # What is an item's own and what features add to it move each on their own.
            inputs[-2:] = model.item_embedding(unique), model.item_bias(unique).squeeze(1)
            inputs.append(model.item_encoder(model.item_encoder.bound_rows(unique)))
            moving = torch.zeros_like(biases).index_fill(0, support.items, 1).sum()
            gradients.append(torch.cat([moves[0], moves[1][:, None]], 1) / moving.clamp(min=1))
        loss: Tensor = KnownGradients.apply("Reptile", result.loss, gradients, *inputs)
        return loss

    def deposits(self, moves: bool = False) -> bool:
        """Whether `deposit`, or `deposit_moves`, knows all gradients that autograd would find."""
        model = self.model
        plain = type(model).lookup is DotRecommender.lookup and type(model).tables is DotRecommender.tables
        embeddings = model.item_embedding, model.item_bias
        plain = plain and model.item_encoder is None
        moving = not moves or self.learner.adapted == "all"  # else there are zeros for items that do not move
        return plain and moving and all(map(_is_plain, embeddings))

    def deposit(self, batch: TaskBatch) -> Tensor:
        """Adds the gradients of the outer loss to those that parameters have, and returns the loss.

        Autograd goes only from what was computed of parameters to these, such as step sizes from their logarithms.
        """
        result, inputs = self._meta_step(batch)
        self._deposit(result.grads, inputs)
        return result.loss

    def deposit_moves(self, batch: TaskBatch) -> Tensor:
        """The same for Reptile, whose gradients are φ_0 − mean φ_K, and whose loss is that of the support."""
        model = self.model
        settings = self._settings(batch, batch.support)
        del settings["first_order"]
        table, item_bias = model.tables()
        result = functional.reptile_step(
            item_table=table.detach(), item_bias=item_bias.detach(), support=batch.support, task_weights=batch.weights,
            **settings,
        )  # fmt: skip
        given = {"item_table": model.item_embedding.weight, "item_bias": model.item_bias.weight, **settings}
        self._deposit({**result.grads, "offset": torch.zeros_like(model.offset)}, _asking(given))
        return result.loss

    def _deposit(self, gradients: Mapping[str, Tensor | SparseRows], inputs: Mapping[str, Tensor]) -> None:
        embeddings = {"item_table": self.model.item_embedding, "item_bias": self.model.item_bias}
        computed, factors = [], []
        for name, value in inputs.items():
            gradient = gradients[name]
            if isinstance(gradient, SparseRows):
                if embeddings[name].sparse:
                    gradient = sparse_tensor(gradient, value.shape)
                else:
                    gradient = _dense(gradient, len(value)).view_as(value)
            if value.is_leaf and not _is_watched(value):
                value.grad = gradient if value.grad is None else value.grad + gradient
            else:
                computed.append(value)
                factors.append(gradient)
        if computed:
            torch.autograd.backward(computed, factors)

    def _deposits_rows(self) -> bool:
        """Whether the gradients of both item tables may be deposited as rows, past the embeddings' forward."""
        return self.deposits() and self.model.item_embedding.sparse and self.model.item_bias.sparse

    @left_uncompiled("a compiled graph gives no sparse gradients")
    def _loss_with_rows(self, batch: TaskBatch) -> Tensor:
        """The outer loss, whose `backward` gives the item tables sparse gradients: a row per entry, uncoalesced."""
        result, inputs = self._meta_step(batch)
        gradients = [result.grads[name] for name in inputs]
        loss: Tensor = KnownGradients.apply("meta_step", result.loss, gradients, *inputs.values())
        return loss

    def _meta_step(self, batch: TaskBatch) -> tuple[MetaStep, dict[str, Tensor]]:
        """The outer loss and its gradients, and what asks for them, by argument name."""
        model = self.model
        support = self.learner.weigh(batch.support, batch.support.items)
        batch = batch.with_entries(support, batch.query)
        settings = self._settings(batch, support)
        with torch.no_grad():
            table, item_bias = model.tables()
            result = functional.meta_step(
                item_table=table, item_bias=item_bias, batch=batch, outer_loss=self.learner.outer_loss, **settings
            )
        given = {
            "item_table": model.item_embedding.weight,
            "item_bias": model.item_bias.weight,
            "support_weights": support.weights,
            **settings,
        }
        return result, _asking(given)

    def _rows_for(self, batch: TaskBatch) -> tuple[Tensor, Tensor, TaskBatch]:
        """Item vectors and biases and the batch, its support weighed, with ids into them: all items as they are, but
        where features have to be added to them only the items of the batch."""
        support = self.learner.weigh(batch.support, batch.support.items)
        if self.reads_table:
            return *self.model.tables(), batch.with_entries(support, batch.query)
        unique, local = batch.localize()
        return *self.model.lookup(unique), batch.with_entries(local.support.with_weights(support.weights), local.query)

    def _settings(self, batch: TaskBatch, support: Entries, users: FeatureMatrix | None = None) -> dict[str, Any]:
        """The keyword arguments of a functional operator, tables and batch apart, for the batch's support, weighed."""
        encoder = self.model.user_encoder
        if users is None and encoder is not None:
            # Nothing known is a row of zeros, not no row: DDP waits for everybody's gradients.
            known = batch.user_ids is not None
            users = encoder.rows_of(batch.user_ids) if known else encoder.matrix.nothing(batch.num_tasks)
        user, bias = self.learner.start_of(support, users)
        loop = self.learner.inner_loop(support)
        return {"user_init": user, "user_bias_init": bias, "offset": self.model.offset, **loop}


def mean_task_loss(
    losses: Mapping[str, float], scores: Tensor, entries: Entries, task_weights: Tensor | None
) -> Tensor:
    """Σ_t ω_t L_t / Σ_t ω_t over tasks that have entries, L_t = Σ_i v_i ℓ_i / Σ_i v_i; 0 without entries.

    Scores are [n], or [n, 1 + M] where entries have negatives.
    """
    candidates = scores if scores.dim() == 2 else scores[:, None]
    errors = torch.zeros_like(candidates[:, 0])
    for name, share in losses.items():
        errors = errors + share * entry_losses(name, candidates, entries)
    return mean_over_tasks(errors, entries, task_weights)


def mean_over_tasks(errors: Tensor, entries: Entries, task_weights: Tensor | None) -> Tensor:
    """Σ_t ω_t L_t / Σ_t ω_t over tasks that have entries, L_t = Σ_i v_i ℓ_i / Σ_i v_i, from the losses ℓ [n]."""
    weights = torch.ones_like(errors) if entries.weights is None else entries.weights
    zeros = errors.new_zeros(entries.num_tasks)
    tasks = entries.task_ids()
    totals, counts = zeros.index_add(0, tasks, weights * errors), zeros.index_add(0, tasks, weights)
    present = counts > 0
    importance = present.to(errors.dtype) if task_weights is None else present * task_weights
    means = totals / torch.where(present, counts, 1.0)
    return (importance * means).sum() / importance.sum().clamp(min=torch.finfo(errors.dtype).tiny)


def _asking(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those that ask for gradients."""
    return {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}


def _is_plain(embedding: nn.Embedding) -> bool:
    """Whether looking rows up is all that the embedding does."""
    return (
        type(embedding) is nn.Embedding
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not has_hooks(embedding)
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs whenever the module is called, or its gradients are there."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _is_watched(parameter: Tensor) -> bool:
    """Whether somebody wants to be told of its gradient."""
    return bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _dense(gradient: Tensor | SparseRows, num_rows: int) -> Tensor:
    """Rows of a block or table, [num_rows, D] or [num_rows]."""
    assert isinstance(gradient, SparseRows)
    return functional.sum_rows(gradient, num_rows)
