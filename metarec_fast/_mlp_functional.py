"""The operators of an MLP tower whose every weight adapts (MeLU): what `functional` exports of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from metarec_fast import _mlp_ops, _ops, mlp_reference
from metarec_fast._arguments import Number, check_outer_loss, with_negatives
from metarec_fast._mlp_arguments import (
    Layers,
    check_tower,
    check_tower_batch,
    check_tower_differentiation,
    check_tower_loop,
)
from metarec_fast.results import TowerMetaStep
from metarec_fast.tasks import TaskBatch


def mlp_adapt_and_score(
    user_part: Tensor,  # [T, Du]
    item_table: Tensor,  # [N, D]
    layers: Layers,
    batch: TaskBatch,
    *,
    item_bias: Tensor | None = None,  # [N]
    inner_lr: Number = 0.1,  # scalar, [K], [1, P] or [K, P]
    inner_steps: int = 5,
    activation: str = "relu",
    loss: str = "squared",
    first_order: bool = False,
) -> Tensor:
    """Adapts an MLP tower to every task on `batch.support` and scores its query items (MeLU, Lee et al. 2019).

        p_i = β_i + W_L h_{L−1} + b_L,   h_l = σ(W_l h_{l−1} + b_l),   h_0 = [user part; item row i]
        φ_{k+1} = φ_k − s_k ∇L_S(φ_k),   φ = (W_1, b_1, …, W_L, b_L),   L_S = Σ_s w_s ℓ(p_s, y_s) / |S|

    Args:
        user_part: What is known of each task's user, [T, Du]; Du may be 0.
        item_table: Item rows, [N, D], float32 or float64. Their dtype is everyone's.
        layers: (W_l [out, in], b_l [out]) from the first, with in = Du + D, to the last, with out = 1.
        batch: Support and query; the query needs no targets. Weights w of support entries default to 1.
        item_bias: β, [N], a constant: no gradient is taken of it. None is 0.
        inner_lr: s, a number, a scalar tensor or one per step, [K]. Or a column for each of the P = 2L tensors W_1,
            b_1, …, W_L, b_L: [1, P] for all steps (as Meta-SGD, Li et al. 2017, but a rate per tensor) or [K, P] (a
            rate per step and layer: MAML++, Antoniou et al. 2019, section 4). A tensor whose rates are 0 does not adapt
            (ANIL, Raghu et al. 2020).
        inner_steps: K.
        activation: σ, "relu" or "gelu" (z Φ(z), not its approximation by tanh).
        loss: ℓ, "squared" (p − y)² or "logistic" log(1 + eᵖ) − y p with y in [0, 1]. Or one that compares the entry's
            item with its `negatives`, and looks at no targets: "bpr", the mean of log(1 + e^(p⁻ − p)) over them (Rendle
            et al. 2009), or "softmax", −log of the share of e^(p − log_q) in its sum over item and negatives (log_q 0
            by default).
        first_order: Treat ∇L_S as constant when differentiating (FOMAML).

    Returns:
        The scores [n] of the query entries, or [n, 1 + M] where `batch.query.negatives` is [n, M], the entry's own item
        first. Gradients with respect to user_part, item_table, layers and inner_lr are exact (or those of
        `first_order`), and can be taken once.

    Raises:
        IndexError: An item id lies outside the table.
        ValueError, TypeError: An argument does not fit; the message names it.
        NotImplementedError: Derivatives are asked for in forward mode (`torch.func.jvp`).
    """
    tower = check_tower(user_part, item_table, layers, activation, item_bias, batch)
    loop = check_tower_loop(tower, inner_lr, inner_steps, loss, first_order)
    batch = check_tower_batch(tower, batch, loss, ())
    check_tower_differentiation(tower, loop, batch)
    run = _ops.either(_mlp_ops.adapt_and_score, mlp_reference.adapt_and_score, item_table)
    scores = run(tower, with_negatives(batch), loop)
    negatives = None if batch.query is None else batch.query.negative_rows
    return scores if negatives is None else scores.view(-1, 1 + negatives.shape[1])


def mlp_meta_step(
    user_part: Tensor,  # [T, Du]
    item_table: Tensor,  # [N, D]
    layers: Layers,
    batch: TaskBatch,
    *,
    item_bias: Tensor | None = None,  # [N]
    inner_lr: Number = 0.1,  # scalar, [K], [1, P] or [K, P]
    inner_steps: int = 5,
    activation: str = "relu",
    loss: str = "squared",
    first_order: bool = False,
    outer_loss: str | Mapping[str, float] = "squared",
) -> TowerMetaStep:
    """The outer loss of a batch under an MLP tower and all its meta-gradients, in one pass over the data.

        L = Σ_t ω_t L_Q,t / Σ_t ω_t,    L_Q,t = Σ_q v_q ℓ_out(p_q, y_q) / Σ_q v_q  at φ_K

    over the tasks that have query entries; ω are `batch.weights`, v `batch.query.weights`, 1 by default.

    Args:
        batch: Support and query, with what their losses look at: targets, or negatives. The arguments before
            `outer_loss` are those of `mlp_adapt_and_score`.
        outer_loss: "squared", "logistic", "absolute" (quadratic within 0.1 of the target), "bpr", "softmax", or the
            weight of each.

    Returns:
        `.loss`, a scalar, whose own `backward()` gives the same gradients to whatever requires them, a dense one to
        the items; `.grads`: "user_part" [T, Du], "item_table" (SparseRows: a row for each support item and support
        negative, unless `first_order`, then each query item and query negative), "layers", a list of (weight, bias)
        gradients, and "inner_lr", in the shape in which it was given.

    Raises:
        IndexError, ValueError, TypeError, NotImplementedError: As for `mlp_adapt_and_score`.
    """
    tower = check_tower(user_part, item_table, layers, activation, item_bias, batch)
    loop = check_tower_loop(tower, inner_lr, inner_steps, loss, first_order)
    losses = check_outer_loss(outer_loss)
    batch = check_tower_batch(tower, batch, loss, tuple(losses))
    check_tower_differentiation(tower, loop, batch)
    return _ops.either(_mlp_ops.meta_step, mlp_reference.meta_step, item_table)(tower, batch, loop, losses)
