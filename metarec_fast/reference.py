"""The operators in plain PyTorch, one task after the other: their specification, and what runs where no binary loads.

Nothing here is fast. Inner gradients come from autograd, so that no derivative is written down twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as nn

from metarec_fast._arguments import InnerLoop, Model, differentiable
from metarec_fast._known_gradients import KnownGradients
from metarec_fast.results import AdaptedItems, FastWeights, MetaStep, SparseRows, TopK
from metarec_fast.tasks import Entries, TaskBatch

SMOOTH_ABSOLUTE_WIDTH = 0.1
"""Below this distance from the target the absolute loss is quadratic."""


@dataclass(frozen=True)
class TaskWeights:
    """One task's fast weights: user vector and bias, and (adapt="all") rows and biases of its distinct items."""

    user: Tensor  # u, [D]
    bias: Tensor  # c, scalar
    rows: Tensor  # e of the distinct support items, [I, D]
    biases: Tensor  # b of the distinct support items, [I]


def pointwise_loss(name: str, scores: Tensor, targets: Tensor) -> Tensor:
    """ℓ(p, y), element by element."""
    if name == "squared":
        return (scores - targets) ** 2
    if name == "logistic":
        return nn.softplus(scores) - targets * scores
    if name == "absolute":
        return nn.smooth_l1_loss(scores, targets, reduction="none", beta=SMOOTH_ABSOLUTE_WIDTH)
    raise ValueError(f"loss: expected 'squared', 'logistic' or 'absolute', got {name!r}")


def entry_losses(name: str, scores: Tensor, entries: Entries | Task) -> Tensor:
    """ℓ [n] of every entry, from the scores [n, 1 + M] of its item and its negatives."""
    own = scores[:, 0]
    if name == "bpr":
        return nn.softplus(scores[:, 1:] - own[:, None]).mean(1)
    if name == "softmax":
        logits = scores if entries.log_q is None else scores - entries.log_q
        return logits.logsumexp(1) - logits[:, 0]
    assert entries.targets is not None
    return pointwise_loss(name, own, entries.targets)


def adapt_task(start: TaskWeights, model: Model, support: Task, loop: InnerLoop, task: int) -> list[TaskWeights]:
    """The fast weights φ_0 … φ_K of one task.

    φ_{k+1} = φ_k − s_k A ∘ [∇L_S(φ_k) + ρ (φ_k − φ_0)] + β_k (φ_k − φ_{k−1}),   φ_{−1} = φ_0
    L_S(φ) = Σ_s w_s ℓ(p_s, y_s) / (|S| + n0)
    """
    pull = _at(loop.prior_pull, task, default=0.0)
    if loop.inner_steps == "exact":
        return [start, _solve_ridge(start, model, support, pull, loop.extra_count)]
    path = [start]
    for step in range(int(loop.inner_steps)):
        now, before = path[-1], path[-2] if step else start
        gradient = _inner_gradient(now, model, support, loop)
        rate, momentum = _at(loop.inner_lr, step), _at(loop.momentum, step, default=0.0)
        if loop.adapt == "all":
            path.append(_moved(now, gradient, lambda value, slope, rate=rate: value - rate * slope))
            continue
        scale_user, scale_bias = (1.0, 1.0) if loop.preconditioner is None else _split(loop.preconditioner)
        user = now.user - rate * scale_user * (gradient.user + pull * (now.user - start.user))
        bias = now.bias - rate * scale_bias * (gradient.bias + pull * (now.bias - start.bias))
        path.append(
            replace(
                now,
                user=user + momentum * (now.user - before.user),
                bias=bias + momentum * (now.bias - before.bias),
            )
        )
    return path


def adapt(model: Model, support: Entries, loop: InnerLoop) -> FastWeights:
    """φ_K of every task."""
    tasks = split_tasks(support)
    last = [adapt_task(_start(model, task, t), model, task, loop, t)[-1] for t, task in enumerate(tasks)]
    user, bias = _stack(model, last)
    if loop.adapt != "all":
        return FastWeights(user, bias)
    rows = [weights.rows[task.position] for weights, task in zip(last, tasks, strict=True)]
    biases = [weights.biases[task.position] for weights, task in zip(last, tasks, strict=True)]
    none = _rows(model, support.items[:0])
    return FastWeights(user, bias, AdaptedItems(torch.cat([none, *rows]), torch.cat([model.item_bias[:0], *biases])))


def adapt_and_score(model: Model, batch: TaskBatch, loop: InnerLoop) -> tuple[FastWeights, Tensor]:
    """φ_K of every task and the scores [n] of its query items."""
    assert batch.query is not None
    supports, queries = split_tasks(batch.support), split_tasks(batch.query)
    last = [adapt_task(_start(model, task, t), model, task, loop, t)[-1] for t, task in enumerate(supports)]
    scores = [
        score(weights, model, query.items, support if loop.adapt == "all" else None)
        for weights, support, query in zip(last, supports, queries, strict=True)
    ]
    return FastWeights(*_stack(model, last)), torch.cat([model.item_bias[:0], *scores])


def outer_loss(
    model: Model, batch: TaskBatch, loop: InnerLoop, losses: dict[str, float], step_weights: Tensor | None = None
) -> Tensor:
    """L = Σ_t ω_t L_Q,t / Σ_t ω_t over tasks with a query, L_Q,t = Σ_k κ_k Σ_q v_q ℓ(p_q, y_q) / Σ_q v_q at φ_k."""
    assert batch.query is not None
    total, count = model.offset * 0, model.offset.new_zeros(())
    for t, (support, query) in enumerate(zip(split_tasks(batch.support), split_tasks(batch.query), strict=True)):
        if query.items.numel() == 0:
            continue
        path = adapt_task(_start(model, support, t), model, support, loop, t)
        if step_weights is None:
            path = path[-1:]
        weight = _at(batch.weights, t, default=1.0)
        for step, weights in enumerate(path):
            step_weight = _at(step_weights, step, default=1.0)
            scores = score(weights, model, query.candidates, support if loop.adapt == "all" else None)
            errors = sum(share * entry_losses(name, scores, query) for name, share in losses.items() if share)
            total = total + weight * step_weight * (query.weights * errors).sum() / query.weights.sum()
        count = count + weight
    return total / count if count > 0 else total


def meta_step(
    model: Model,
    batch: TaskBatch,
    loop: InnerLoop,
    losses: dict[str, float],
    step_weights: Tensor | None = None,
) -> MetaStep:
    """The outer loss and its gradients; those of the items as a row for each support item, support negative, query
    item and query negative, the support left out with first_order, where it has none.

    Each of them gets a row of its own in a fresh table, so that autograd keeps their gradients apart.
    """
    assert batch.query is not None
    support, query = batch.support, batch.query
    pieces = [support.items, support.negatives, query.items, query.negatives]
    ids = torch.cat([piece.reshape(-1) for piece in pieces if piece is not None])
    entries = iter(torch.arange(ids.numel(), device=ids.device).split([0 if p is None else p.numel() for p in pieces]))
    places = [place if piece is None else place.view_as(piece) for piece, place in zip(pieces, entries, strict=True)]
    if loop.adapt == "all":  # equal items of a task must stay one item, so the table is kept
        local = batch
        table, item_bias = model.item_table, model.item_bias
    else:
        local = TaskBatch(
            support.with_items(places[0], None if support.negatives is None else places[1]),
            query.with_items(places[2], None if query.negatives is None else places[3]),
            weights=batch.weights,
        )
        table, item_bias = _rows(model, ids), model.item_bias[ids]

    leaves = differentiable(replace(model, item_table=table, item_bias=item_bias), loop, support)
    given = {name: value.detach().requires_grad_() for name, value in leaves.items() if value is not None}
    leaf_model = Model(*(given[name] for name in ("user_init", "user_bias_init", "item_table", "item_bias", "offset")))
    leaf_loop = replace(
        loop,
        inner_lr=given["inner_lr"],
        preconditioner=given.get("preconditioner"),
        prior_pull=given.get("prior_pull"),
        momentum=given.get("momentum"),
    )
    local = TaskBatch(local.support.with_weights(given.get("support_weights")), local.query, weights=batch.weights)
    with torch.enable_grad():
        loss = outer_loss(leaf_model, local, leaf_loop, losses, step_weights)
        slopes = torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True)
    grads: dict[str, Tensor | SparseRows] = dict(zip(given, slopes, strict=True))
    if loop.adapt == "all":
        ids = ids.unique()
    support_rows = places[0].numel() + places[1].numel()
    for name in ("item_table", "item_bias"):
        rows = grads[name]
        assert isinstance(rows, Tensor)
        first = support_rows if loop.first_order and loop.adapt != "all" else 0
        grads[name] = SparseRows(ids[first:], rows[ids] if loop.adapt == "all" else rows[first:])
    originals = (value for value in leaves.values() if value is not None)
    return MetaStep(KnownGradients.apply("meta_step", loss.detach(), slopes, *originals), grads)


def reptile_step(model: Model, support: Entries, task_weights: Tensor | None, loop: InnerLoop) -> MetaStep:
    """Reptile's step as a gradient: φ_0 − Σ_t ω_t φ_K,t / Σ_t ω_t, and the mean support loss at φ_K.

    A row or bias moves by the mean over the tasks that hold its item; the first of a task's entries that hold it has
    the task's part of it, the others have zeros.
    """
    tasks = split_tasks(support)
    weights = model.item_bias.new_ones(len(tasks)) if task_weights is None else task_weights
    holders = torch.zeros_like(model.item_bias)
    for task, weight in zip(tasks, weights, strict=True):
        holders[task.distinct] += weight
    user, bias = torch.zeros_like(model.user_init), torch.zeros_like(model.user_bias_init)
    loss, judged = model.offset.new_zeros(()), model.offset.new_zeros(())
    rows, biases = [_rows(model, support.items[:0])], [model.item_bias[:0]]
    for t, (task, weight) in enumerate(zip(tasks, weights, strict=True)):
        start = _start(model, task, t)
        end = adapt_task(start, model, task, loop, t)[-1]
        share = weight / weights.sum() if weights.sum() > 0 else weight
        user[t if user.dim() == 2 else ...] += share * (start.user - end.user)
        bias[t if bias.dim() == 1 else ...] += share * (start.bias - end.bias)
        if task.items.numel():
            scores = score(end, model, task.items, task if loop.adapt == "all" else None)
            errors = pointwise_loss(loop.loss, scores, task.targets)
            loss, judged = loss + weight * (task.weights * errors).sum() / task.weights.sum(), judged + weight
        first = torch.tensor([bool((task.items[:e] != item).all()) for e, item in enumerate(task.items)])
        part = weight / holders[task.items] * first.to(weights)
        rows.append(part[:, None] * (start.rows - end.rows)[task.position])
        biases.append(part * (start.biases - end.biases)[task.position])
    grads: dict[str, Tensor | SparseRows] = {"user_init": user, "user_bias_init": bias}
    if loop.adapt == "all":
        grads["item_table"] = SparseRows(support.items, torch.cat(rows))
        grads["item_bias"] = SparseRows(support.items, torch.cat(biases))
    return MetaStep(loss / judged if judged > 0 else loss, grads)


def score_top_k(
    user: Tensor, user_bias: Tensor, item_table: Tensor, item_bias: Tensor, k: int, exclude: Entries | None = None
) -> TopK:
    """The k items with the largest b_i + c + u·e_i for each user; among equals the smaller id comes first."""
    items = torch.full((user.shape[0], k), -1, dtype=torch.int64, device=user.device)
    scores = user.new_full((user.shape[0], k), float("-inf"))
    excluded = None if exclude is None else split_tasks(exclude)
    for t in range(user.shape[0]):
        all_scores = (item_bias + user_bias[t] + item_table.to(user.dtype) @ user[t]).nan_to_num(
            nan=float("-inf"), posinf=float("inf"), neginf=float("-inf")
        )
        allowed = torch.ones_like(item_bias, dtype=torch.bool)
        if excluded is not None:
            allowed[excluded[t].items] = False
        candidates = allowed.nonzero().squeeze(1)
        order = all_scores[candidates].sort(descending=True, stable=True).indices[:k]
        items[t, : order.numel()] = candidates[order]
        scores[t, : order.numel()] = all_scores[candidates][order]
    return TopK(items, scores)


def coalesce_rows(gradient: SparseRows) -> SparseRows:
    """One row per distinct id, ascending: the sum of its rows."""
    ids, place = torch.unique(gradient.ids, return_inverse=True)
    return SparseRows(ids, SparseRows(place, gradient.rows).to_dense(ids.numel()))


def coalesce_rows_padded(gradient: SparseRows) -> tuple[SparseRows, Tensor]:
    """The same, followed by ids −1 with rows of zeros up to the size of the gradient; and the number of ids."""
    ids, rows = coalesce_rows(gradient)
    padding = gradient.ids.numel() - ids.numel()
    padded = (
        torch.cat([ids, ids.new_full((padding,), -1)]),
        torch.cat([rows, rows.new_zeros((padding, *rows.shape[1:]))]),
    )
    return SparseRows(*padded), ids.new_tensor(ids.numel())


def sparse_adam(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: SparseRows,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> None:
    """m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,  p ← p − lr √(1 − β2ᵗ)/(1 − β1ᵗ) · m / (√v + ε), rows with g."""
    ids, g = coalesce_rows(gradient)
    exp_avg[ids] = mean = beta1 * exp_avg[ids] + (1 - beta1) * g
    exp_avg_sq[ids] = square = beta2 * exp_avg_sq[ids] + (1 - beta2) * g**2
    rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    param[ids] -= rate * mean / (square.sqrt() + eps)


def sparse_adagrad(param: Tensor, sum: Tensor, gradient: SparseRows, *, lr: float, eps: float) -> None:
    """s ← s + g²,  p ← p − lr g / (√s + ε), rows with a gradient."""
    ids, g = coalesce_rows(gradient)
    sum[ids] += g**2
    param[ids] -= lr * g / (sum[ids].sqrt() + eps)


def sparse_sgd(param: Tensor, gradient: SparseRows, *, lr: float) -> None:
    """p ← p − lr g, rows with a gradient."""
    ids, g = coalesce_rows(gradient)
    param[ids] -= lr * g


@dataclass(frozen=True)
class Task:
    items: Tensor  # [n]
    targets: Tensor  # [n]
    weights: Tensor  # [n]
    candidates: Tensor  # [n, 1 + M], each entry's item and its negatives
    log_q: Tensor | None  # [n, 1 + M]
    distinct: Tensor  # [I], the different items
    position: Tensor  # [n], where in `distinct` an entry's item stands


def split_tasks(entries: Entries) -> list[Task]:
    targets = torch.zeros(len(entries), device=entries.items.device) if entries.targets is None else entries.targets
    weights = torch.ones_like(targets) if entries.weights is None else entries.weights
    sizes = entries.sizes().tolist()
    candidates = entries.items[:, None]
    if entries.negative_rows is not None:
        candidates = torch.cat([candidates, entries.negative_rows], dim=1)
    log_q = [None] * len(sizes) if entries.log_q is None else entries.log_q.split(sizes)
    parts = zip(*(part.split(sizes) for part in (entries.items, targets, weights, candidates)), log_q, strict=True)
    return [Task(*part, *torch.unique(part[0], return_inverse=True)) for part in parts]


def _start(model: Model, support: Task, task: int) -> TaskWeights:
    user = model.user_init[task] if model.user_init.dim() == 2 else model.user_init
    bias = model.user_bias_init[task] if model.user_bias_init.dim() == 1 else model.user_bias_init
    return TaskWeights(user, bias, _rows(model, support.distinct), model.item_bias[support.distinct])


def _rows(model: Model, items: Tensor) -> Tensor:
    """e_i, of a bfloat16 table too in the dtype of everything else."""
    return model.item_table[items].to(model.item_bias.dtype)


def score(weights: TaskWeights, model: Model, items: Tensor, support: Task | None) -> Tensor:
    """p_i = m + b_i + c + u·e_i for items of any shape; with `support`, its items by their adapted rows."""
    rows, biases = _rows(model, items), model.item_bias[items]
    if support is not None and support.distinct.numel():
        place = torch.searchsorted(support.distinct, items).clamp(max=support.distinct.numel() - 1)
        adapted = support.distinct[place] == items
        rows = torch.where(adapted[..., None], weights.rows[place], rows)
        biases = torch.where(adapted, weights.biases[place], biases)
    return model.offset + biases + weights.bias + rows @ weights.user


def _inner_gradient(now: TaskWeights, model: Model, support: Task, loop: InnerLoop) -> TaskWeights:
    """∇L_S at φ = `now`, itself differentiable unless first_order."""
    everything = [now.user, now.bias, now.rows, now.biases]
    if support.items.numel() == 0:
        return TaskWeights(*(torch.zeros_like(value) for value in everything))
    with torch.enable_grad():
        tracked = [value if value.requires_grad else value.detach().requires_grad_() for value in everything]
        moving = TaskWeights(*tracked)
        scores = score(moving, model, support.candidates, support)
        losses = support.weights * entry_losses(loop.loss, scores, support)
        loss = losses.sum() / (support.items.numel() + loop.extra_count)
        slopes = torch.autograd.grad(
            loss, tracked, create_graph=not loop.first_order, allow_unused=True, materialize_grads=True
        )
    return TaskWeights(*slopes)


def _moved(now: TaskWeights, gradient: TaskWeights, move) -> TaskWeights:  # type: ignore[no-untyped-def]
    return TaskWeights(
        move(now.user, gradient.user),
        move(now.bias, gradient.bias),
        move(now.rows, gradient.rows),
        move(now.biases, gradient.biases),
    )


def _solve_ridge(
    start: TaskWeights, model: Model, support: Task, pull: Tensor | float, extra_count: float
) -> TaskWeights:
    """(Xᵀ W X + λ I)(φ − φ_0) = Xᵀ W (y − p_0),  λ = ρ (|S| + n0)/2,  X the support rows with a 1 appended."""
    count = support.items.numel()
    if count == 0:
        return start
    rows = _rows(model, support.items)
    inputs = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    residuals = support.targets - score(start, model, support.items, None)
    strength = pull * (count + extra_count) / 2
    normal = inputs.T @ (support.weights[:, None] * inputs) + strength * torch.eye(inputs.shape[1]).to(inputs)
    user, bias = _split(torch.linalg.solve(normal, inputs.T @ (support.weights * residuals)))
    return replace(start, user=start.user + user, bias=start.bias + bias)


def _split(vector: Tensor) -> tuple[Tensor, Tensor]:
    return vector[:-1], vector[-1]


def _stack(model: Model, weights: Sequence[TaskWeights]) -> tuple[Tensor, Tensor]:
    if not weights:
        return model.item_bias.new_empty(0, model.item_table.shape[1]), model.item_bias.new_empty(0)
    return torch.stack([each.user for each in weights]), torch.stack([each.bias for each in weights])


def _at(value: Tensor | None, index: int, default: float = 0.0) -> Tensor | float:
    """Entry `index` of a vector, or the scalar that holds for all."""
    if value is None:
        return default
    return value[index] if value.dim() else value
