"""The MLP operators in plain PyTorch, one task after the other: their specification.

A task adapts every weight and bias of the tower by K steps of SGD on its support loss (Finn et al. 2017, eq. 1); user
part and item rows do not adapt, as in MeLU (Lee et al. 2019, algorithm 1), but have meta-gradients like all the rest.
Nothing here is fast. Gradients come from autograd, so that no derivative is written down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as nn

from metarec_fast._known_gradients import KnownGradients
from metarec_fast._mlp_arguments import Tower, TowerLoop
from metarec_fast.reference import Task, entry_losses, split_tasks
from metarec_fast.results import SparseRows, TowerMetaStep
from metarec_fast.tasks import TaskBatch


def score(weights: Sequence[Tensor], user: Tensor, rows: Tensor, activation: str) -> Tensor:
    """What the tower says [...] of item rows [..., D] for a user part [Du]; `weights` are W_1, b_1, …, W_L, b_L."""
    hidden = torch.cat([user.expand(*rows.shape[:-1], -1), rows], dim=-1)
    for layer in range(0, len(weights), 2):
        if layer > 0:
            hidden = nn.relu(hidden) if activation == "relu" else nn.gelu(hidden)
        hidden = hidden @ weights[layer].T + weights[layer + 1]
    return hidden[..., 0]


def score_items(tower: Tower, weights: Sequence[Tensor], task: int, items: Tensor) -> Tensor:
    """p_i of items of any shape, for a task's user and its weights."""
    scores = score(weights, tower.user_part[task], tower.item_table[items], tower.activation)
    return scores if tower.item_bias is None else scores + tower.item_bias[items]


def adapt_task(tower: Tower, support: Task, loop: TowerLoop, task: int) -> list[Tensor]:
    """The fast weights φ_K of one task.

    φ_{k+1} = φ_k − s_k ∘ ∇L_S(φ_k),   L_S(φ) = Σ_s w_s ℓ(p_s, y_s) / |S|
    """
    weights = [part for layer in tower.layers for part in layer]
    if support.items.numel() == 0:
        return weights
    rates = loop.inner_lr if loop.inner_lr.dim() == 2 else loop.inner_lr.reshape(-1, 1)
    rates = rates.expand(loop.inner_steps, len(weights))
    for step in range(loop.inner_steps):
        with torch.enable_grad():
            tracked = [value if value.requires_grad else value.detach().requires_grad_() for value in weights]
            scores = score_items(tower, tracked, task, support.candidates)
            loss = (support.weights * entry_losses(loop.loss, scores, support)).mean()
            slopes = torch.autograd.grad(loss, tracked, create_graph=not loop.first_order)
        weights = [value - rate * slope for value, rate, slope in zip(weights, rates[step], slopes, strict=True)]
    return weights


def adapt_and_score(tower: Tower, batch: TaskBatch, loop: TowerLoop) -> Tensor:
    """The scores [n] of all query items, each by the fast weights of its task."""
    assert batch.query is not None
    scores = [tower.user_part[:, :0].sum(1)[:0]]
    tasks = zip(split_tasks(batch.support), split_tasks(batch.query), strict=True)
    for task, (support, query) in enumerate(tasks):
        scores.append(score_items(tower, adapt_task(tower, support, loop, task), task, query.items))
    return torch.cat(scores)


def outer_loss(tower: Tower, batch: TaskBatch, loop: TowerLoop, losses: dict[str, float]) -> Tensor:
    """L = Σ_t ω_t L_Q,t / Σ_t ω_t over tasks with a query,   L_Q,t = Σ_q v_q ℓ(p_q, y_q) / Σ_q v_q."""
    assert batch.query is not None
    total, count = tower.layers[0][0].sum() * 0, tower.item_table.new_zeros(())
    tasks = zip(split_tasks(batch.support), split_tasks(batch.query), strict=True)
    for task, (support, query) in enumerate(tasks):
        if query.items.numel() == 0:
            continue
        scores = score_items(tower, adapt_task(tower, support, loop, task), task, query.candidates)
        errors = sum(share * entry_losses(name, scores, query) for name, share in losses.items() if share)
        weight = 1.0 if batch.weights is None else batch.weights[task]
        total = total + weight * (query.weights * errors).sum() / query.weights.sum()
        count = count + weight
    return total / count if count > 0 else total


def meta_step(tower: Tower, batch: TaskBatch, loop: TowerLoop, losses: dict[str, float]) -> TowerMetaStep:
    """The outer loss and its gradients; those of the items as a row for each support item, support negative, query
    item and query negative, the support left out with first_order, where it has none.

    Each of them gets a row of its own in a fresh table, so that autograd keeps their gradients apart.
    """
    support, query = batch.support, batch.query
    assert query is not None
    pieces = [support.items, support.negatives, query.items, query.negatives]
    counts = [0 if piece is None else piece.numel() for piece in pieces]
    ids = torch.cat([piece.reshape(-1) for piece in pieces if piece is not None])
    entries = torch.arange(len(ids), device=ids.device).split(counts)
    places = [None if piece is None else place.view_as(piece) for piece, place in zip(pieces, entries, strict=True)]
    local = TaskBatch.unchecked(
        support.with_items(entries[0], places[1], max_item=len(ids)),
        query.with_items(entries[2], places[3], max_item=len(ids)),
        weights=batch.weights,
    )
    originals = [tower.user_part, tower.item_table[ids], loop.inner_lr]
    originals += [part for layer in tower.layers for part in layer]
    leaves = [value.detach().requires_grad_() for value in originals]
    layers = list(zip(leaves[3::2], leaves[4::2], strict=True))
    biases = None if tower.item_bias is None else tower.item_bias[ids]
    with torch.enable_grad():
        tracked = Tower(leaves[0], leaves[1], layers, tower.activation, biases)
        loss = outer_loss(tracked, local, replace(loop, inner_lr=leaves[2]), losses)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    first = counts[0] + counts[1] if loop.first_order else 0
    grads = {
        "user_part": slopes[0],
        "item_table": SparseRows(ids[first:], slopes[1][first:]),
        "inner_lr": slopes[2],
        "layers": list(zip(slopes[3::2], slopes[4::2], strict=True)),
    }
    return TowerMetaStep(KnownGradients.apply("mlp_meta_step", loss.detach(), slopes, *originals), grads)
