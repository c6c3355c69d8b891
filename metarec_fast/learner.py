"""Meta-learning algorithms as modules: calling one on a batch of tasks gives the outer loss to be minimised.

A learner says how a task adapts; its `tasks` do it, as the model asks for: `DotTasks` by the fused operators, and for
any module `ModuleTasks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from metarec_fast import _known_gradients, checkpoint, freezing, pretrained, serving, training
from metarec_fast._arguments import PAIRWISE, check_entries, check_outer_loss
from metarec_fast.catalogue import Catalogue
from metarec_fast.data import Interactions
from metarec_fast.dot_tasks import DotTasks, has_hooks
from metarec_fast.encoder import FeatureEncoder
from metarec_fast.feature_matrix import FeatureMatrix
from metarec_fast.functional import Steps
from metarec_fast.head_tasks import HeadTasks
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.models import DotRecommender
from metarec_fast.module_recommender import ModuleRecommender
from metarec_fast.module_tasks import ModuleTasks
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.negatives import draw_negatives
from metarec_fast.optim import SparseAdam
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
        lr_factors: By what the rate of a parameter is multiplied, by name; `scale_lr` sets them.
    """

    name: str
    extra_count: float
    default_outer_lr = 1e-2
    module_outer_lr = 1e-3
    """What takes its place where the model is any module."""
    largest_batch = 256
    num_negatives = 4
    """Negatives for each item that a user adapts on, drawn where a loss compares with them and a batch has none."""

    fit = training.fit
    adapt = serving.adapt
    save = checkpoint.save
    freeze = freezing.freeze
    scale_lr = freezing.scale_lr
    load_items = pretrained.load_items
    load_from = pretrained.load_from
    transfer = pretrained.transfer

    def __init__(
        self,
        model: DotRecommender | nn.Module,
        *,
        inner_lr: float,
        inner_steps: Steps,
        first_order: bool,
        adapt: str | Sequence[str],
        outer_loss: OuterLoss | None,
        extra_count: float,
        **extra: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model, (DotRecommender, ModuleRecommender)):
            model = ModuleRecommender(model)
        if not (isinstance(inner_lr, (int, float)) and 0 < inner_lr < float("inf")):
            raise ValueError(f"inner_lr: expected a number > 0, got {inner_lr!r}")
        if not (isinstance(extra_count, (int, float)) and 0 <= extra_count < float("inf")):
            raise ValueError(f"extra_count: expected a number ≥ 0, got {extra_count!r}")
        self.model: Any = model
        self.inner_lr, self.inner_steps, self.first_order, self.adapted = inner_lr, inner_steps, first_order, adapt
        self.extra_count = extra_count
        self.outer_loss = {model.loss: 1.0} if outer_loss is None else check_outer_loss(outer_loss)
        self.hyperparameters: dict[str, Any] = {
            "inner_lr": inner_lr,
            "inner_steps": inner_steps,
            "first_order": first_order,
            "adapt": adapt,
            "outer_loss": outer_loss if outer_loss is None or isinstance(outer_loss, str) else dict(outer_loss),
            "extra_count": extra_count,
            **extra,
        }
        self.rating_range: tuple[float, float] | None = None
        self.lr_factors: dict[str, float] = {}
        self._given = pretrained.Given()
        self._catalogue: Catalogue | None = None
        # Tables of features, which DistributedDataParallel would send around before every step.
        self._ddp_params_and_buffers_to_ignore = [
            f"model.{name}.{buffer}"
            for name, part in model.named_modules() if isinstance(part, (FeatureEncoder, MLPRecommender))
            for buffer, _ in part.named_buffers()
        ]  # fmt: skip
        self.tasks: DotTasks | ModuleTasks
        if isinstance(model, ModuleRecommender):
            if isinstance(inner_steps, bool) or not isinstance(inner_steps, int) or inner_steps < 0:
                raise ValueError(f"inner_steps: a module needs a whole number ≥ 0, got {inner_steps!r}")
            self.default_outer_lr = self.module_outer_lr
            kind = TowerTasks if isinstance(model.module, MLPRecommender) else ModuleTasks
            self.tasks = kind(self, model, model.choose(adapt))
        elif isinstance(model, MultiTaskRecommender):
            self.tasks = HeadTasks(self, model)
        else:
            self.tasks = DotTasks(self, model)

    def forward(self, batch: TaskBatch) -> Tensor:
        """The outer loss of a batch, a scalar: how well tasks that adapted on their support predict their query.

        L = Σ_t ω_t L_Q,t / Σ_t ω_t,  the mean over tasks (weighted by `batch.weights`) of their mean query losses.

        Raises:
            ValueError: The batch has no query or no targets.
            IndexError: An item id lies outside the model's table.
        """
        needs_local = self.tasks.needs_local(training=torch.is_grad_enabled())
        return self.tasks.meta_loss(self.weigh_tasks(self._prepare(batch, query="targets", localized=needs_local)))

    def backward(self, batch: TaskBatch) -> Tensor:
        """Adds the meta-gradients of a batch to the `grad` of the parameters, and returns its outer loss.

        The same as `loss = learner(batch); loss.backward()`, faster for small batches: most gradients are known and put
        where they belong, with no graph for autograd to go through.

        Raises:
            As `forward`.
        """
        if torch.is_grad_enabled() and self._compiled_call_impl is None and not has_hooks(self):
            known = self._deposit(batch)
            if known is not None:
                return known
        loss: Tensor = self(batch)
        _known_gradients.backward(loss)
        return loss.detach()

    def _deposit(self, batch: TaskBatch) -> Tensor | None:
        """The same without a graph, or None where there has to be one."""
        if not self._has_forward_of(Learner) or not self.tasks.deposits():
            return None
        assert isinstance(self.tasks, DotTasks)
        return self.tasks.deposit(self.weigh_tasks(self._prepare(batch, query="targets")))

    def _has_forward_of(self, kind: type[Learner]) -> bool:
        """Whether calling it is what a learner of that kind does, and not what somebody made of it."""
        return getattr(self.forward, "__func__", None) is kind.forward

    def inner_loop(self, support: Entries) -> dict[str, Any]:
        """How the tasks of a support adapt: the keyword arguments of `functional.adapt`."""
        return {
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "loss": self.model.loss,
            "first_order": self.first_order,
            "adapt": self.adapted,
            "extra_count": self.extra_count,
        }

    def weigh(self, support: Entries, items: Tensor) -> Entries:
        """The support with the weight of every entry, given its items' row numbers [n] in the model."""
        return support

    def weigh_tasks(self, batch: TaskBatch) -> TaskBatch:
        """The batch with the weight of every task in the outer loss."""
        return batch

    def start_of(self, support: Entries, users: FeatureMatrix | None = None) -> tuple[Tensor, Tensor]:
        """Where tasks start before they adapt, given the features of their users [T, F] if these are known: user
        vectors, [D] or [T, D], and biases, a scalar or [T]."""
        start: tuple[Tensor, Tensor] = self.model.start(users)
        return start

    @torch.no_grad()
    def initialize(self, log: Interactions, seed: int = 0) -> None:
        """Gives the meta-parameters a start that fits the log; `fit` calls it unless the model has one already. What is
        frozen, or came from `load_items` or `load_from`, stays."""
        with self._given.kept(self):
            self._initialize(log, seed)

    def _initialize(self, log: Interactions, seed: int) -> None:
        self.model.initialize(log)
        self.know_items(log)

    def know_items(self, log: Interactions) -> None:
        """Takes over `item_ids` from a log in the model's numbering, unless they are known."""
        if self._catalogue is None:
            self.item_ids = log.item_ids

    def parameter_groups(self, outer_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameters and their learning rates, for `torch.optim`; by default at `default_outer_lr`. Those that are
        frozen are left out, others at what `scale_lr` makes of their rate."""
        return freezing.scaled_groups(self, self._groups_at(self._outer_lr(outer_lr)))

    def _groups_at(self, rate: float) -> list[dict[str, Any]]:
        """Groups of all parameters, where items or what stands for them are trained at `rate`."""
        return [{"params": list(self.parameters()), "lr": rate}]

    def default_epochs(self, num_batches: int) -> int:
        """At most how many epochs `fit` trains for, given the batches in one."""
        return 30

    def default_optimizers(self, outer_lr: float | None = None) -> list[Optimizer]:
        """What `fit` uses unless told otherwise: Adam, and `optim.SparseAdam` for embeddings with sparse gradients."""
        return self._optimizers(
            outer_lr,
            lambda dense: Adam(dense, betas=(0.9, 0.99), fused=True),
            lambda sparse: SparseAdam(sparse, betas=(0.9, 0.99)),
        )

    def _optimizers(
        self, outer_lr: float | None, *kinds: Callable[[list[dict[str, Any]]], Optimizer]
    ) -> list[Optimizer]:
        """An optimiser for the groups with dense gradients and one for those with sparse ones, where there are any."""
        optimizers = [make(groups) for make, groups in zip(kinds, self._split_groups(outer_lr), strict=True) if groups]
        if not optimizers:
            raise ValueError("learner: every parameter is frozen, so that nothing is left to train")
        return optimizers

    @torch.no_grad()
    def predict(self, batch: TaskBatch) -> Tensor:
        """The score [n] of every query item, after adapting each task on its support; targets are not looked at.

        Raises:
            ValueError: The batch has no query.
            IndexError: An item id lies outside the model's table.
        """
        needs_local = self.tasks.needs_local(training=False)
        return self.tasks.predict(self._prepare(batch, query="items", localized=needs_local))

    @torch.no_grad()
    def fast_weights(self, batch: TaskBatch, users: FeatureMatrix | None = None) -> FastWeights:
        """What each task becomes on its support: user vectors [T, D], biases [T], with adapt="all" items too.

        Args:
            users: Features of the tasks' users, [T, F]; by default those found by `batch.user_ids`.
        """
        if not isinstance(self.tasks, DotTasks):
            raise TypeError("fast_weights: the model is a module; fast_parameters has what adapts")
        needs_local = self.tasks.needs_local(training=False)
        return self.tasks.adapt(self._prepare(batch, query=None, localized=needs_local), users)

    @torch.no_grad()
    def fast_parameters(self, batch: TaskBatch, users: Tensor | None = None) -> dict[str, Tensor]:
        """What the parameters of a module that adapt become for each task, [T, ...] by name.

        Args:
            users: What the module gets of the tasks' users, [T, F]; by default found by `batch.user_ids`.

        Raises:
            TypeError: The model is no module but a `DotRecommender`, of which `fast_weights` are known.
        """
        if isinstance(self.tasks, DotTasks):
            raise TypeError("fast_parameters: the model is a DotRecommender; fast_weights has what adapts")
        return self.tasks.adapt(self._prepare(batch, query=None), users)

    @torch.no_grad()
    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        """The scores of all items for each task of the batch, [T, N], after adapting on its support."""
        needs_local = self.tasks.needs_local(training=False)
        return self.tasks.score_catalogue(self._prepare(batch, query=None, localized=needs_local))

    @property
    def item_ids(self) -> NDArray[Any] | None:
        """Original ids of the model's items, [N]; None as long as nobody said."""
        return None if self._catalogue is None else self._catalogue.ids

    @item_ids.setter
    def item_ids(self, ids: Any) -> None:
        catalogue = None if ids is None else Catalogue(ids, self.model.num_items)
        if catalogue is not None:
            self.model.bind_items(catalogue.ids)
        self._catalogue = catalogue

    @property
    def catalogue(self) -> Catalogue:
        """Original item ids and the way back to row numbers."""
        if self._catalogue is None:
            raise ValueError("item_ids: not known yet; fit sets them, or assign learner.item_ids = log.item_ids")
        return self._catalogue

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters.items())

    def _prepare(self, batch: TaskBatch, query: str | None, localized: bool = False) -> TaskBatch:
        """The batch with the model's device and dtype, its ids checked against the table; asked whether `localized`."""
        if not isinstance(batch, TaskBatch):
            raise TypeError(f"batch: expected a TaskBatch, got {type(batch).__name__}")
        if query is not None and batch.query is None:
            raise ValueError("batch.query: expected Entries, got None")
        model, like = self.model, self.model.offset
        if self._catalogue is None and "item" in model.feature_tables() and len(batch.support):
            raise ValueError("item_ids: features of items are found by them; fit sets them, or assign learner.item_ids")
        targets, device = batch.support.targets, batch.support.items.device
        if device != like.device or (targets is not None and targets.dtype != like.dtype):
            if localized and device.type == "cpu" and like.device.type != "cpu":
                batch.localize()  # before it leaves: here nobody waits for the number of distinct items
            batch = batch.to(like.device, like.dtype, non_blocking=like.device.type == "cuda")
        inside, outside = model.loss in PAIRWISE, not PAIRWISE.isdisjoint(self.outer_loss)
        if inside and query != "targets" and batch.support.negatives is None:
            support = draw_negatives(batch.support, model.num_items, self.num_negatives)
            batch = batch.with_entries(support, batch.query)
        if inside != outside:  # a sampler draws negatives for both parts, and one has no use for them
            batch = batch.with_negatives_of(support=inside, query=outside or query == "items")
        check_entries("support", batch.support, model.num_items, like, (model.loss,))
        if query is not None and batch.query is not None:
            losses = self.outer_loss if query == "targets" else ()
            check_entries("query", batch.query, model.num_items, like, losses)
        return batch

    def _check(self) -> None:
        """Raises now what the operators would say on the first batch; constructors end with it."""
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        batch = TaskBatch(Entries(nothing, nothing.float(), nothing.new_zeros(1)))
        with torch.no_grad():
            self.tasks.adapt(self._prepare(batch, query=None))

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


def _select(groups: Iterable[dict[str, Any]], wanted: Any) -> list[dict[str, Any]]:
    """The groups with those of their parameters that are wanted, without the groups left empty."""
    selected = ({**group, "params": [p for p in group["params"] if wanted(p)]} for group in groups)
    return [group for group in selected if group["params"]]
