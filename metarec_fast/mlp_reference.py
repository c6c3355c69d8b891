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
from metarec_fast.reference import pointwise_loss
from metarec_fast.results import SparseRows, TowerMetaStep
from metarec_fast.tasks import Entries, TaskBatch


def score(weights: Sequence[Tensor], user: Tensor, rows: Tensor, activation: str) -> Tensor:
    """p [n] of item rows [n, D] for a user part [Du]; `weights` are W_1, b_1, …, W_L, b_L."""
    hidden = torch.cat([user.expand(len(rows), -1), rows], dim=1)
    for layer in range(0, len(weights), 2):
        if layer > 0:
            hidden = nn.relu(hidden) if activation == "relu" else nn.gelu(hidden)
        hidden = hidden @ weights[layer].T + weights[layer + 1]
    return hidden[:, 0]


def adapt_task(tower: Tower, support: Entries, loop: TowerLoop, task: int) -> list[Tensor]:
    """The fast weights φ_K of one task.

    φ_{k+1} = φ_k − s_k ∇L_S(φ_k),   L_S(φ) = Σ_s w_s ℓ(p_s, y_s) / |S|
    """
    weights = [part for layer in tower.layers for part in layer]
    here = slice(*support.offsets[task : task + 2].tolist())
    items, targets = support.items[here], support.targets
    assert targets is not None
    if items.numel() == 0:
        return weights
    share = 1.0 if support.weights is None else support.weights[here]
    for step in range(loop.inner_steps):
        with torch.enable_grad():
            tracked = [value if value.requires_grad else value.detach().requires_grad_() for value in weights]
            scores = score(tracked, tower.user_part[task], tower.item_table[items], tower.activation)
            loss = (share * pointwise_loss(loop.loss, scores, targets[here])).mean()
            slopes = torch.autograd.grad(loss, tracked, create_graph=not loop.first_order)
        rate = loop.inner_lr[step] if loop.inner_lr.dim() else loop.inner_lr
        weights = [value - rate * slope for value, slope in zip(weights, slopes, strict=True)]
    return weights


def adapt_and_score(tower: Tower, batch: TaskBatch, loop: TowerLoop) -> Tensor:
    """The scores [n] of all query items, each by the fast weights of its task."""
    assert batch.query is not None
    scores = [tower.user_part[:, :0].sum(1)[:0]]
    for task, items in enumerate(batch.query.items.split(batch.query.sizes().tolist())):
        weights = adapt_task(tower, batch.support, loop, task)
        scores.append(score(weights, tower.user_part[task], tower.item_table[items], tower.activation))
    return torch.cat(scores)


def outer_loss(tower: Tower, batch: TaskBatch, loop: TowerLoop, losses: dict[str, float]) -> Tensor:
    """L = Σ_t ω_t L_Q,t / Σ_t ω_t over tasks with a query,   L_Q,t = Σ_q v_q ℓ(p_q, y_q) / Σ_q v_q."""
    query = batch.query
    assert query is not None
    assert query.targets is not None
    scores = adapt_and_score(tower, batch, loop)
    errors = sum(share * pointwise_loss(name, scores, query.targets) for name, share in losses.items())
    entry_weights = torch.ones_like(query.targets) if query.weights is None else query.weights
    sizes = query.sizes().tolist()
    total, count = (weight.sum() * 0 for weight in (tower.layers[0][0], entry_weights))
    parts = zip((entry_weights * errors).split(sizes), entry_weights.split(sizes), strict=True)
    for task, (error, weights) in enumerate(parts):
        if weights.numel() > 0:
            share = 1.0 if batch.weights is None else batch.weights[task]
            total, count = total + share * error.sum() / weights.sum(), count + share
    return total / count if count > 0 else total


def meta_step(tower: Tower, batch: TaskBatch, loop: TowerLoop, losses: dict[str, float]) -> TowerMetaStep:
    """The outer loss and its gradients; those of the items as a row for each support item, unless first_order, where
    it has none, and each query item.

    Each of them gets a row of its own in a fresh table, so that autograd keeps their gradients apart.
    """
    support, query = batch.support, batch.query
    assert query is not None
    ids = torch.cat([support.items, query.items])
    places = torch.arange(len(ids), device=ids.device).split([len(support), len(query)])
    local = TaskBatch.unchecked(
        support.with_items(places[0], max_item=len(ids)),
        query.with_items(places[1], max_item=len(ids)),
        weights=batch.weights,
    )
    originals = [tower.user_part, tower.item_table[ids], loop.inner_lr]
    originals += [part for layer in tower.layers for part in layer]
    leaves = [value.detach().requires_grad_() for value in originals]
    layers = list(zip(leaves[3::2], leaves[4::2], strict=True))
    with torch.enable_grad():
        tracked = Tower(leaves[0], leaves[1], layers, tower.activation)
        loss = outer_loss(tracked, local, replace(loop, inner_lr=leaves[2]), losses)
        slopes = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    first = len(support) if loop.first_order else 0
    grads = {
        "user_part": slopes[0],
        "item_table": SparseRows(ids[first:], slopes[1][first:]),
        "inner_lr": slopes[2],
        "layers": list(zip(slopes[3::2], slopes[4::2], strict=True)),
    }
    return TowerMetaStep(KnownGradients.apply("mlp_meta_step", loss.detach(), slopes, *originals), grads)
