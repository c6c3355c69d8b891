"""Tasks on any module: each has its own copy of the parameters that adapt, through torch.func, a chunk at a time.

    φ_{k+1} = φ_k − s_k A ∘ [∇L_S(φ_k) + ρ (φ_k − φ_0)] + β_k (φ_k − φ_{k−1})

as on the dot-product model, with φ the parameters that adapt and A a rate for each of them; a mapping of step sizes has
those of each parameter by name. Tasks of a chunk are padded to its largest and run under vmap; entries that pad have
weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metarec_fast._compiled_chunks import CompiledChunks
from metarec_fast._known_gradients import KnownGradients
from metarec_fast._padded_tasks import Padded, largest_twice, padded_tasks, task_of
from metarec_fast._peak_memory import peak_memory
from metarec_fast.reference import entry_losses
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learner import Learner
    from metarec_fast.module_recommender import ModuleRecommender

Parameters = dict[str, Tensor]
Found = TypeVar("Found")
Work = Callable[[TaskBatch, Entries, slice], Found]
"""Something found of some tasks of a batch whose support is weighed."""


class ModuleTasks:
    """What a learner does with tasks on a `ModuleRecommender`.

    Args:
        learner: Whose inner loop, losses and parameters count.
        model: Its model.
        names: The parameters of the module that adapt.
    """

    def __init__(self, learner: Learner, model: ModuleRecommender, names: list[str]) -> None:
        self.learner, self.model, self.names = learner, model, names
        self._compiled = CompiledChunks(self._chunk, type(model.module).__name__)
        self._measured: dict[Any, tuple[int, ...]] = {}  # bytes that one and two tasks of some sizes take

    @property
    def num_rates(self) -> int:
        """Step sizes that can be told apart: one for each parameter that adapts."""
        return len(self.names)

    def new_rates(self, of: str, value: float) -> nn.ParameterList:
        """The same value for what has a rate of its own: each "weight" that adapts, each parameter ("tensor"), or each
        of them in each "step"."""
        shapes: dict[str, Any] = {"tensor": (), "step": (self.learner.inner_steps,)}
        if of not in ("weight", *shapes):
            raise ValueError(f"rates: expected one of weight, tensor, step of a module, got {of!r}")
        return nn.ParameterList(nn.Parameter(p.new_full(shapes.get(of, p.shape), value)) for p in self.parameters())

    def preconditioner(self, log_rates: Iterable[Tensor]) -> Parameters:
        """A of the inner loop by name, from its logarithm for each parameter."""
        return {name: rate.exp() for name, rate in zip(self.names, log_rates, strict=True)}

    def deposits(self, moves: bool = False) -> bool:
        """Whether gradients can do without autograd: through modules nothing else goes."""
        return False

    def needs_local(self, training: bool) -> bool:
        """Whether items are looked up that the batch names, each once."""
        return False

    def meta_gradients(self, batch: TaskBatch) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """The outer loss, the learner's parameters and their gradients, chunk by chunk: only one chunk's graph is there
        at a time."""
        inputs = [parameter for parameter in self.learner.parameters() if parameter.requires_grad]
        totals = [torch.zeros_like(value) for value in inputs]
        shares, loss = self._shares(batch), torch.zeros_like(self.model.offset)

        def differentiate(batch: TaskBatch, support: Entries, tasks: slice) -> tuple[Tensor, Sequence[Tensor | None]]:
            with torch.enable_grad():
                part = self._outer_losses(batch, support, tasks) @ shares[tasks]
            if not part.requires_grad:
                return part, [None] * len(inputs)
            return part.detach(), torch.autograd.grad(part, inputs, allow_unused=True, retain_graph=True)

        for _, (part, found) in self._by_chunks(batch, self._weighed(batch), differentiate):
            loss += part
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient
        return loss, inputs, totals

    def meta_loss(self, batch: TaskBatch) -> Tensor:
        """The outer loss, a scalar that can be differentiated once with respect to all parameters of the learner."""
        if not torch.is_grad_enabled():
            return self.outer_loss(batch)
        loss, inputs, gradients = self.meta_gradients(batch)
        known: Tensor = KnownGradients.apply("the outer loss", loss, gradients, *inputs)
        return known

    def outer_loss(self, batch: TaskBatch) -> Tensor:
        """The outer loss without gradients."""
        chunks = self._by_chunks(batch, self._weighed(batch), self._outer_losses)
        shares = self._shares(batch)
        losses = [found @ shares[tasks] for tasks, found in chunks]
        return torch.stack(losses).sum() if losses else torch.zeros_like(self.model.offset)

    def predict(self, batch: TaskBatch) -> Tensor:
        """Scores of the query, [n], or [n, 1 + M] with negatives."""
        assert batch.query is not None

        def score(batch: TaskBatch, support: Entries, tasks: slice) -> Tensor:
            assert batch.query is not None
            query = padded_tasks(batch.query, tasks)
            found: Tensor = self._run(batch, support, tasks, self._scores, query)[query.weights > 0]
            return found

        scores = [found for _, found in self._by_chunks(batch, self._weighed(batch), score)]
        width = 1 if batch.query.negative_rows is None else 1 + batch.query.negative_rows.shape[1]
        joined = torch.cat(scores) if scores else self.model.offset.new_zeros(0, width)
        return joined if batch.query.negatives is not None else joined[:, 0]

    def adapt(self, batch: TaskBatch, users: Tensor | None = None) -> Parameters:
        """The adapted parameters of each task, [T, ...]; features of the users [T, F] are found by `batch.user_ids`
        unless they are given."""

        def adapt(batch: TaskBatch, support: Entries, tasks: slice) -> Parameters:
            fast: Parameters = self._run(batch, support, tasks, lambda fast, _, __: fast, None, users)
            return fast

        chunks = [found for _, found in self._by_chunks(batch, self._weighed(batch), adapt)]
        if not chunks:
            return {name: value.new_zeros(0, *value.shape) for name, value in self._start().items()}
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in self.names}

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        """Scores of every item for each task, [T, N]."""
        everything = torch.arange(self.model.num_items, device=batch.support.items.device)

        def score(batch: TaskBatch, support: Entries, tasks: slice) -> Tensor:
            found: Tensor = self._run(
                batch, support, tasks, lambda fast, _, user: self._call(fast, everything, user), None
            )
            return found

        scores = [found for _, found in self._by_chunks(batch, self._weighed(batch), score)]
        return torch.cat(scores) if scores else self.model.offset.new_zeros(0, len(everything))

    def reptile_loss(self, batch: TaskBatch) -> Tensor:
        """The mean support loss after adaptation, whose gradients are φ_0 − mean φ_K."""
        with torch.no_grad():
            found, adapted, changes = self.reptile_gradients(batch)
        loss: Tensor = KnownGradients.apply("Reptile", found, changes, *adapted)
        return loss

    def reptile_gradients(self, batch: TaskBatch) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        """The mean support loss after adaptation, the parameters that adapt, and φ_0 − Σ_t ω_t φ_K,t / Σ_t ω_t."""
        start = self._start()

        def adapted(fast: Parameters, entries: Padded, user: Tensor | None) -> tuple[Parameters, Tensor]:
            return fast, self._mean_loss({self.model.loss: 1.0}, fast, entries, user)

        def adapt(batch: TaskBatch, support: Entries, tasks: slice) -> tuple[Parameters, Tensor]:
            found: tuple[Parameters, Tensor] = self._run(batch, support, tasks, adapted, padded_tasks(support, tasks))
            return found

        weights = self._task_weights(batch, torch.ones_like(batch.support.sizes(), dtype=torch.bool))
        moves = {name: torch.zeros_like(value) for name, value in start.items()}
        loss = torch.zeros_like(self.model.offset)
        for tasks, (fast, losses) in self._by_chunks(batch, self._weighed(batch), adapt):
            loss += losses @ weights[tasks]
            for name, value in fast.items():
                moves[name] += torch.tensordot(weights[tasks], start[name] - value, 1)
        return loss, self.parameters(), list(moves.values())

    def score(self, fast: Parameters, items: Tensor, user: Tensor | None) -> Tensor:
        """Scores [n] of items for one user with parameters of his own and features x [F]."""
        return self._call(fast, items.to(self.model.offset.device), user)

    def parameters(self) -> list[Tensor]:
        """Those that adapt."""
        return list(self._start().values())

    def _weighed(self, batch: TaskBatch) -> Entries:
        return self.learner.weigh(batch.support, batch.support.items)

    def _parameter(self, name: str) -> Tensor:
        return self.model.module.get_parameter(name)

    def _start(self) -> Parameters:
        return {name: self._parameter(name) for name in self.names}

    def _by_chunks(self, batch: TaskBatch, support: Entries, work: Work[Found]) -> Iterator[tuple[slice, Found]]:
        """What is found of the tasks, `chunk_size` at a time, or as many as fit into the model's `memory_limit`."""
        size = self.model.chunk_size if self.model.memory_limit is None else self._fitting(batch, support, work)
        for begin in range(0, batch.num_tasks, size):
            tasks = slice(begin, min(begin + size, batch.num_tasks))
            yield tasks, work(batch, support, tasks)

    def _fitting(self, batch: TaskBatch, support: Entries, work: Work[Found]) -> int:
        """How many tasks fit into the memory limit: what one and two take is measured, once for tasks of such sizes."""
        limit, query = self.model.memory_limit, batch.query
        assert limit is not None
        if batch.num_tasks < 2:
            return 1
        sizes = [(p.size_bound, p.candidates) for p in (support, query) if p is not None]
        key = work.__qualname__, torch.is_grad_enabled(), *sizes
        if key not in self._measured:
            large = largest_twice(support)
            twice = batch.with_entries(large, None if query is None else largest_twice(query))
            twice.user_ids = None if batch.user_ids is None else batch.user_ids[:2]
            self._measured[key] = tuple(
                peak_memory(lambda count=count: work(twice, large, slice(0, count)), support.items.device)  # type: ignore[misc]
                for count in (1, 2)
            )
        one, two = self._measured[key]
        count = max(1, 1 + (limit - one) // max(1, two - one))
        return 1 << (count.bit_length() - 1) if self.model.compiled else count

    def _shares(self, batch: TaskBatch) -> Tensor:
        """The share of the outer loss that each task has, [T]."""
        assert batch.query is not None
        return self._task_weights(batch, batch.query.sizes() > 0)

    def _task_weights(self, batch: TaskBatch, counted: Tensor) -> Tensor:
        """ω_t / Σ ω_t of the tasks that count, 0 for others, [T]."""
        weights = counted.to(self.model.offset)
        if batch.weights is not None:
            weights = weights * batch.weights.to(weights)
        return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    def _outer_losses(self, batch: TaskBatch, support: Entries, tasks: slice) -> Tensor:
        """The mean query loss of each task, [t]."""
        assert batch.query is not None
        losses: Tensor = self._run(batch, support, tasks, self._query_loss, padded_tasks(batch.query, tasks))
        return losses

    def _run(
        self,
        batch: TaskBatch,
        support: Entries,
        tasks: slice,
        then: Callable[..., Any],
        given: Padded | None,
        users: Tensor | None = None,
    ) -> Any:
        """Adapts each task of a chunk, and does something with its parameters: `then(fast, given, user)`."""
        loop = self.learner.inner_loop(support)
        if users is None:
            ids = None if batch.user_ids is None else batch.user_ids[tasks]
            users = self.model.users(ids, tasks.stop - tasks.start)
        else:
            users = users[tasks]
        known = padded_tasks(support, tasks)
        mapped: dict[str, Any] = {"known": known.parts(), "given": {} if given is None else given.parts()}
        if users is not None:
            mapped["user"] = users
        pull = loop.pop("prior_pull", 0.0)
        if isinstance(pull, Tensor) and pull.dim():
            mapped["pull"] = pull[tasks]
        else:
            loop["prior_pull"] = pull
        try:
            if self.model.compiled and then == self._query_loss:
                return self._compiled(then, loop, self._start(), mapped=mapped, num_tasks=tasks.stop - tasks.start)
            return self._chunk(then, loop, self._start(), mapped)
        except RuntimeError as error:
            if "vmap" in str(error) or "functorch" in str(error):
                kind = type(self.model.module).__name__
                raise RuntimeError(f"{kind} cannot run for many users at once (torch.func.vmap): {error}") from error
            raise

    def _chunk(self, then: Callable[..., Any], loop: Mapping[str, Any], start: Parameters, mapped: Any) -> Any:
        """`then` of tasks whose parts are those of `mapped`, [t, ...]."""

        def one(start: Parameters, task: dict[str, Any]) -> Any:
            user = task.get("user")
            own = {**loop, "prior_pull": task["pull"]} if "pull" in task else loop
            fast = self._adapt(start, task_of(task["known"]), user, own)
            return then(fast, task_of(task["given"]) if task["given"] else None, user)

        return vmap(one, in_dims=(None, 0), randomness="different")(start, mapped)

    def _adapt(self, start: Parameters, support: Padded, user: Tensor | None, loop: Mapping[str, Any]) -> Parameters:
        """φ_K of one task."""
        rate, momentum, scales = loop["inner_lr"], loop.get("momentum"), loop.get("preconditioner")
        extra, pull = loop.get("extra_count", 0.0), loop["prior_pull"]
        now = before = start
        for step in range(loop["inner_steps"]):
            slopes = grad(self._inner_loss)(now, support, user, extra)
            moved = {}
            for name, value in now.items():
                slope = slopes[name].detach() if loop["first_order"] else slopes[name]
                if not isinstance(pull, float) or pull:
                    slope = slope + pull * (value - start[name])
                scale = 1.0 if scales is None else scales[name]
                own = rate[name] if isinstance(rate, Mapping) else rate
                moved[name] = value - at_step(own, step) * scale * slope
                if momentum is not None:
                    moved[name] = moved[name] + at_step(momentum, step) * (value - before[name])
            now, before = moved, now
        return now

    def _inner_loss(self, fast: Parameters, support: Padded, user: Tensor | None, extra: float) -> Tensor:
        losses = entry_losses(self.model.loss, self._scores(fast, support, user), support)  # type: ignore[arg-type]
        count = (support.weights > 0).sum() + extra
        total: Tensor = (support.weights * losses).sum() / count.clamp(min=1)
        return total

    def _query_loss(self, fast: Parameters, query: Padded, user: Tensor | None) -> Tensor:
        return self._mean_loss(self.learner.outer_loss, fast, query, user)

    def _mean_loss(self, losses: Mapping[str, float], fast: Parameters, entries: Padded, user: Tensor | None) -> Tensor:
        scores = self._scores(fast, entries, user)
        errors = torch.zeros_like(scores[:, 0])
        for name, share in losses.items():
            errors = errors + share * entry_losses(name, scores, entries)  # type: ignore[arg-type]
        tiny = torch.finfo(scores.dtype).tiny
        mean: Tensor = (entries.weights * errors).sum() / entries.weights.sum().clamp(min=tiny)
        return mean

    def _scores(self, fast: Parameters, entries: Padded, user: Tensor | None) -> Tensor:
        """Scores [S, 1 + M] of each entry's item and its negatives."""
        candidates = entries.candidates
        return self._call(fast, candidates.reshape(-1), user).view(candidates.shape)

    def _call(self, fast: Parameters, items: Tensor, user: Tensor | None) -> Tensor:
        own = {f"module.{name}": value for name, value in fast.items()}
        scores: Tensor = functional_call(self.model, own, (items,) if user is None else (items, user))
        return scores


def at_step(values: Any, step: int) -> Any:
    """The value of a step, of a number or of one for each."""
    return values[step] if isinstance(values, Tensor) and values.dim() else values
