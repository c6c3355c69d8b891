"""Meta-learning algorithms as modules: calling one on a batch of tasks gives the outer loss to be minimised.

    unique rows of the batch = model's nn.Embedding → functional.meta_step → loss, exact gradients on `backward()`

so every optimiser, gradient clipping and DistributedDataParallel work as they do without us. Embeddings with sparse
gradients are given them directly: `meta_step` reads the table itself, and what it returns is the gradient's rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from metarec_fast import checkpoint, functional, serving, training
from metarec_fast._arguments import PAIRWISE, check_entries, check_outer_loss
from metarec_fast._known_gradients import KnownGradients
from metarec_fast.catalogue import Catalogue
from metarec_fast.data import Interactions
from metarec_fast.encoder import FeatureEncoder
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.functional import Steps
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.models import DotRecommender
from metarec_fast.module_recommender import ModuleRecommender
from metarec_fast.module_tasks import ModuleTasks
from metarec_fast.negatives import draw_negatives
from metarec_fast.optim import SparseAdam
from metarec_fast.reference import entry_losses
from metarec_fast.results import FastWeights
from metarec_fast.tasks import Entries, TaskBatch
from metarec_fast.tower_tasks import TowerTasks

OuterLoss = str | Mapping[str, float]


class Learner(nn.Module):
    """What all algorithms share: a model, how a task adapts, and an outer loss.

    A subclass says in `inner_loop` how a task adapts, and in `weigh` how much a support entry counts.

    Attributes:
        name: What tables call the algorithm.
        model: The meta-parameters that all users share.
        hyperparameters: The constructor's arguments, the model apart.
        item_ids: Original ids of the model's items, [N]; `fit` sets them, or assign `log.item_ids`.
        rating_range: Lowest and highest target seen by `fit`, to which `evaluate` clips predictions.
    """

    name: str
    default_outer_lr = 1e-2
    module_outer_lr = 1e-3
    """What takes its place where the model is any module."""
    largest_batch = 256
    num_negatives = 4
    """Negatives for each item that a user adapts on, drawn where a loss compares with them and a batch has none."""

    fit = training.fit
    adapt = serving.adapt
    save = checkpoint.save

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float,
        inner_steps: Steps,
        first_order: bool,
        adapt: str | Sequence[str],
        outer_loss: OuterLoss | None,
        **extra: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model, (DotRecommender, ModuleRecommender)):
            model = ModuleRecommender(model)
        if not (isinstance(inner_lr, (int, float)) and 0 < inner_lr < float("inf")):
            raise ValueError(f"inner_lr: expected a number > 0, got {inner_lr!r}")
        self.model: Any = model
        self.inner_lr, self.inner_steps, self.first_order, self.adapted = inner_lr, inner_steps, first_order, adapt
        self.outer_loss = check_outer_loss(model.loss if outer_loss is None else outer_loss)
        self.hyperparameters: dict[str, Any] = {
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "first_order": first_order,
            "adapt": adapt,
            "outer_loss": outer_loss if outer_loss is None or isinstance(outer_loss, str) else dict(outer_loss),
            **extra,
        }
        self.rating_range: tuple[float, float] | None = None
        self._catalogue: Catalogue | None = None
        # Tables of features, which DistributedDataParallel would send around before every step.
        self._ddp_params_and_buffers_to_ignore = [
            f"model.{name}.{buffer}"
            for name, part in model.named_modules() if isinstance(part, (FeatureEncoder, MLPRecommender))
            for buffer, _ in part.named_buffers()
        ]  # fmt: skip
        self.tasks: ModuleTasks | None = None  # where the model is any module
        if isinstance(model, ModuleRecommender):
            if isinstance(inner_steps, bool) or not isinstance(inner_steps, int) or inner_steps < 0:
                raise ValueError(f"inner_steps: a module needs a whole number ≥ 0, got {inner_steps!r}")
            self.default_outer_lr = self.module_outer_lr
            kind = TowerTasks if isinstance(model.module, MLPRecommender) else ModuleTasks
            self.tasks = kind(self, model, model.choose(adapt))

    def forward(self, batch: TaskBatch) -> Tensor:
        """The outer loss of a batch, a scalar: how well tasks that adapted on their support predict their query.

        L = Σ_t ω_t L_Q,t / Σ_t ω_t,  the mean over tasks (weighted by `batch.weights`) of their mean query losses.

        Raises:
            ValueError: The batch has no query or no targets.
            IndexError: An item id lies outside the model's table.
        """
        if self.tasks is not None:
            return self.tasks.meta_loss(self._prepare(batch, query="targets"))
        takes_rows = torch.is_grad_enabled() and self._takes_rows()
        batch = self._prepare(batch, query="targets", localized=not takes_rows)
        if takes_rows:
            loss: Tensor = self._loss_with_rows(batch)
            return loss
        unique, local = batch.localize()
        rows, biases = self.model.lookup(unique)
        support = self.weigh(local.support, batch.support.items)
        local = batch.with_entries(support, local.query)  # its weights, which may be newer
        block: dict[str, Any] = {
            "item_table": rows,
            "item_bias": biases,
            "batch": local,
            **self._settings(batch, batch.support),
        }
        if torch.is_grad_enabled():
            return functional.meta_step(**block, outer_loss=self.outer_loss).loss
        scores = functional.adapt_and_score(**block)
        assert local.query is not None
        return mean_task_loss(self.outer_loss, scores, local.query, local.weights)

    def inner_loop(self, sizes: Tensor) -> dict[str, Any]:
        """How tasks with `sizes` [T] support entries adapt: the keyword arguments of `functional.adapt`."""
        return {
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "loss": self.model.loss,
            "first_order": self.first_order,
            "adapt": self.adapted,
        }

    def weigh(self, support: Entries, items: Tensor) -> Entries:
        """The support with the weight of every entry, given its items' row numbers [n] in the model."""
        return support

    def start_of(self, support: Entries, users: FeatureMatrix | None = None) -> tuple[Tensor, Tensor]:
        """Where tasks start before they adapt, given the features of their users [T, F] if these are known: user
        vectors, [D] or [T, D], and biases, a scalar or [T]."""
        start: tuple[Tensor, Tensor] = self.model.start(users)
        return start

    @torch.no_grad()
    def initialize(self, log: Interactions, seed: int = 0) -> None:
        """Gives the meta-parameters a start that fits the log; `fit` calls it unless the model has one already."""
        self.model.initialize(log)
        self.know_items(log)

    def know_items(self, log: Interactions) -> None:
        """Takes over `item_ids` from a log in the model's numbering, unless they are known."""
        if self._catalogue is None:
            self.item_ids = log.item_ids

    def parameter_groups(self, outer_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameters and their learning rates, for `torch.optim`; by default at `default_outer_lr`."""
        return [{"params": list(self.parameters()), "lr": self._outer_lr(outer_lr)}]

    def default_epochs(self, num_batches: int) -> int:
        """At most how many epochs `fit` trains for, given the batches in one."""
        return 30

    def default_optimizers(self, outer_lr: float | None = None) -> list[Optimizer]:
        """What `fit` uses unless told otherwise: Adam, and `optim.SparseAdam` for embeddings with sparse gradients."""
        dense, sparse = self._split_groups(outer_lr)
        optimizers: list[Optimizer] = []
        if dense:
            optimizers.append(Adam(dense, betas=(0.9, 0.99), fused=True))
        if sparse:
            optimizers.append(SparseAdam(sparse, betas=(0.9, 0.99)))
        return optimizers

    @torch.no_grad()
    def predict(self, batch: TaskBatch) -> Tensor:
        """The score [n] of every query item, after adapting each task on its support; targets are not looked at.

        Raises:
            ValueError: The batch has no query.
            IndexError: An item id lies outside the model's table.
        """
        if self.tasks is not None:
            return self.tasks.predict(self._prepare(batch, query="items"))
        batch = self._prepare(batch, query="items", localized=self.model.item_encoder is not None)
        settings = self._settings(batch, batch.support)
        table, item_bias, batch = self._rows_for(batch)
        return functional.adapt_and_score(item_table=table, item_bias=item_bias, batch=batch, **settings)

    @torch.no_grad()
    def fast_weights(self, batch: TaskBatch, users: FeatureMatrix | None = None) -> FastWeights:
        """What each task becomes on its support: user vectors [T, D], biases [T], with adapt="all" items too.

        Args:
            users: Features of the tasks' users, [T, F]; by default those found by `batch.user_ids`.
        """
        if self.tasks is not None:
            raise TypeError("fast_weights: the model is a module; fast_parameters has what adapts")
        batch = self._prepare(batch, query=None, localized=self.model.item_encoder is not None)
        settings = self._settings(batch, batch.support, users)
        table, item_bias, batch = self._rows_for(batch)
        return functional.adapt(item_table=table, item_bias=item_bias, support=batch.support, **settings)

    @torch.no_grad()
    def fast_parameters(self, batch: TaskBatch, users: Tensor | None = None) -> dict[str, Tensor]:
        """What the parameters of a module that adapt become for each task, [T, ...] by name.

        Args:
            users: What the module gets of the tasks' users, [T, F]; by default found by `batch.user_ids`.

        Raises:
            TypeError: The model is no module but a `DotRecommender`, of which `fast_weights` are known.
        """
        if self.tasks is None:
            raise TypeError("fast_parameters: the model is a DotRecommender; fast_weights has what adapts")
        return self.tasks.fast_parameters(self._prepare(batch, query=None), users)

    @torch.no_grad()
    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        """The scores of all items for each task of the batch, [T, N], after adapting on its support."""
        if self.tasks is not None:
            return self.tasks.score_catalogue(self._prepare(batch, query=None))
        fast = self.fast_weights(batch)
        table, item_bias = self.model.tables()
        scores: Tensor = self.model.offset + item_bias + fast.bias[:, None] + fast.user @ table.T
        if fast.items is not None:
            tasks, items = batch.support.task_ids().to(scores.device), batch.support.items.to(scores.device)
            own = fast.items.biases + (fast.user[tasks] * fast.items.rows).sum(1)
            scores[tasks, items] = self.model.offset + fast.bias[tasks] + own
        return scores

    @property
    def item_ids(self) -> NDArray[Any] | None:
        """Original ids of the model's items, [N]; None as long as nobody said."""
        return None if self._catalogue is None else self._catalogue.ids

    @item_ids.setter
    def item_ids(self, ids: Any) -> None:
        self._catalogue = None if ids is None else Catalogue(ids, self.model.num_items)
        if self._catalogue is not None:
            self.model.bind_items(self._catalogue.ids)

    @property
    def catalogue(self) -> Catalogue:
        """Original item ids and the way back to row numbers."""
        if self._catalogue is None:
            raise ValueError("item_ids: not known yet; fit sets them, or assign learner.item_ids = log.item_ids")
        return self._catalogue

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters.items())

    def _takes_rows(self) -> bool:
        """Whether the gradients of both item tables may be deposited as rows, past the embeddings' forward."""
        model = self.model
        plain = type(model).lookup is DotRecommender.lookup and type(model).tables is DotRecommender.tables
        embeddings = model.item_embedding, model.item_bias
        plain = plain and model.item_encoder is None
        return plain and self.adapted == "user" and all(map(_is_plain_and_sparse, embeddings))

    @torch.compiler.disable(reason="a compiled graph gives no sparse gradients")  # type: ignore[untyped-decorator]
    def _loss_with_rows(self, batch: TaskBatch) -> Tensor:
        """The outer loss, whose `backward` gives the item tables sparse gradients: a row per entry, uncoalesced."""
        model = self.model
        support = self.weigh(batch.support, batch.support.items)
        batch = batch.with_entries(support, batch.query)
        settings = self._settings(batch, support)
        with torch.no_grad():
            table, item_bias = model.tables()
            result = functional.meta_step(
                item_table=table, item_bias=item_bias, batch=batch, outer_loss=self.outer_loss, **settings
            )
        given = {
            "item_table": model.item_embedding.weight,
            "item_bias": model.item_bias.weight,
            "support_weights": support.weights,
            **settings,
        }
        inputs = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.requires_grad}
        gradients = [result.grads[name] for name in inputs]
        loss: Tensor = KnownGradients.apply("meta_step", result.loss, gradients, *inputs.values())
        return loss

    def _rows_for(self, batch: TaskBatch) -> tuple[Tensor, Tensor, TaskBatch]:
        """Item vectors and biases and the batch, its support weighed, with ids into them: all items as they are, but
        where features have to be added to them only the items of the batch."""
        support = self.weigh(batch.support, batch.support.items)
        if self.model.item_encoder is None:
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
        user, bias = self.start_of(support, users)
        loop = self.inner_loop(support.sizes())
        return {"user_init": user, "user_bias_init": bias, "offset": self.model.offset, **loop}

    def _prepare(self, batch: TaskBatch, query: str | None, localized: bool = False) -> TaskBatch:
        """The batch with the model's device and dtype, its ids checked against the table; asked whether `localized`."""
        if not isinstance(batch, TaskBatch):
            raise TypeError(f"batch: expected a TaskBatch, got {type(batch).__name__}")
        if query is not None and batch.query is None:
            raise ValueError("batch.query: expected Entries, got None")
        if self._catalogue is None and "item" in self.model.feature_tables() and len(batch.support):
            raise ValueError("item_ids: features of items are found by them; fit sets them, or assign learner.item_ids")
        targets, item_bias = batch.support.targets, self.model.offset.expand(self.model.num_items)
        if self.tasks is None:
            item_bias = self.model.item_bias.weight[:, 0]
        if batch.support.items.device != item_bias.device or (targets is not None and targets.dtype != item_bias.dtype):
            if localized and item_bias.device.type != "cpu" and batch.support.items.device.type == "cpu":
                batch.localize()  # before it leaves: here nobody waits for the number of distinct items
            batch = batch.to(item_bias.device, item_bias.dtype, non_blocking=item_bias.device.type == "cuda")
        if query != "targets" and self.model.loss in PAIRWISE and batch.support.negatives is None:
            support = draw_negatives(batch.support, self.model.num_items, self.num_negatives)
            batch = batch.with_entries(support, batch.query)
        inside, outside = (any(loss in PAIRWISE for loss in losses) for losses in ((self.model.loss,), self.outer_loss))
        if inside != outside:  # a sampler draws negatives for both parts, and one has no use for them
            batch = batch.with_negatives_of(support=inside, query=outside or query == "items")
        check_entries("support", batch.support, item_bias, (self.model.loss,))
        if query is not None and batch.query is not None:
            check_entries("query", batch.query, item_bias, self.outer_loss if query == "targets" else ())
        return batch

    def _check(self) -> None:
        """Raises now what the operators would say on the first batch; constructors end with it."""
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        batch = TaskBatch(Entries(nothing, nothing.float(), nothing.new_zeros(1)))
        self.fast_weights(batch) if self.tasks is None else self.fast_parameters(batch)

    def _split_groups(self, outer_lr: float | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """`parameter_groups`, apart for those with dense and those with sparse gradients."""
        groups = self.parameter_groups(outer_lr)
        modules = (
            module for module in self.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        )
        sparse = {module.weight for module in modules}
        return (
            _select(groups, lambda parameter: parameter not in sparse),
            _select(groups, lambda parameter: parameter in sparse),
        )

    def _outer_lr(self, outer_lr: float | None) -> float:
        if outer_lr is None:
            return self.default_outer_lr
        if not 0 < outer_lr < float("inf"):
            raise ValueError(f"outer_lr: must be > 0 and finite, got {outer_lr}")
        return float(outer_lr)


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
    ) -> None:
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            outer_loss=outer_loss,
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
    ) -> None:
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=True, adapt=adapt, outer_loss=outer_loss
        )
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
        rates: str = "weight",
    ) -> None:
        super().__init__(
            model, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order, adapt=adapt,
            outer_loss=outer_loss, rates=rates,
        )  # fmt: skip
        kinds = ("weight",) if self.tasks is None else ("weight", "tensor", "step")
        if rates not in kinds:
            kind = "a DotRecommender" if self.tasks is None else "a module"
            raise ValueError(f"rates: expected one of {', '.join(kinds)} of {kind}, got {rates!r}")
        self.rates_of, start = rates, math.log(inner_lr)
        if self.tasks is None:
            self.log_rates: Any = nn.Parameter(self.model.user_init.new_full((self.model.dim + 1,), start))
        else:
            shapes: dict[str, Any] = {"tensor": (), "step": (inner_steps,)}
            self.log_rates = nn.ParameterList(
                nn.Parameter(p.new_full(shapes.get(rates, p.shape), start)) for p in self.tasks.parameters()
            )
        self._check()

    @property
    def rates(self) -> Any:
        """The step size of each coordinate, the user bias last, [D + 1]; of a module, of each parameter by name: of its
        shape, a scalar or [K]."""
        if self.tasks is None:
            return self.log_rates.exp()
        return {name: rate.exp() for name, rate in zip(self.tasks.names, self.log_rates, strict=True)}

    def inner_loop(self, sizes: Tensor) -> dict[str, Any]:
        if self.rates_of != "weight":
            return {**super().inner_loop(sizes), "inner_lr": self.rates}
        return {**super().inner_loop(sizes), "inner_lr": 1.0, "preconditioner": self.rates}

    def parameter_groups(self, outer_lr: float | None = None) -> list[dict[str, Any]]:
        rate = self._outer_lr(outer_lr)
        rates = [self.log_rates] if self.tasks is None else list(self.log_rates)
        return [{"params": list(self.model.parameters()), "lr": rate}, {"params": rates, "lr": 5 * rate}]


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
    weights = torch.ones_like(errors) if entries.weights is None else entries.weights
    zeros = errors.new_zeros(entries.num_tasks)
    tasks = entries.task_ids()
    totals, counts = zeros.index_add(0, tasks, weights * errors), zeros.index_add(0, tasks, weights)
    present = counts > 0
    importance = present.to(errors.dtype) if task_weights is None else present * task_weights
    means = totals / torch.where(present, counts, 1.0)
    return (importance * means).sum() / importance.sum().clamp(min=torch.finfo(errors.dtype).tiny)


def _is_plain_and_sparse(embedding: nn.Embedding) -> bool:
    """Whether looking rows up is all that the embedding does, and its gradient sparse."""
    return (
        type(embedding) is nn.Embedding
        and embedding.sparse
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not embedding.scale_grad_by_freq
        and not embedding._forward_hooks
        and not embedding._forward_pre_hooks
    )


def _select(groups: Iterable[dict[str, Any]], wanted: Any) -> list[dict[str, Any]]:
    """The groups with those of their parameters that are wanted, without the groups left empty."""
    selected = ({**group, "params": [p for p in group["params"] if wanted(p)]} for group in groups)
    return [group for group in selected if group["params"]]
