"""The operators on tensors, for larger codebases: batched over ragged tasks, differentiable once, no state.

Everything is for the dot-product recommender, whose score of item i for a user is p_i = m + b_i + c + u·e_i
(offset, item bias, user bias, user vector times item row); the user's c and u are what adapts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from metarec_fast import _library, _ops, _usual, reference
from metarec_fast._arguments import (
    PAIRWISE,
    InnerLoop,
    Model,
    Number,
    check_batch,
    check_differentiation,
    check_entries,
    check_inner_loop,
    check_model,
    check_outer_loss,
    check_step_weights,
    check_task_weights,
    with_negatives,
)
from metarec_fast._mlp_functional import mlp_adapt_and_score, mlp_meta_step
from metarec_fast.results import FastWeights, MetaStep, SparseRows, TopK
from metarec_fast.tasks import Entries, TaskBatch

Steps = int | Literal["exact"]


def adapt(
    user_init: Tensor,  # [D] or [T, D]
    item_table: Tensor,  # [N, D]
    item_bias: Tensor,  # [N]
    support: Entries,
    *,
    user_bias_init: Number | None = None,  # scalar or [T]
    offset: Number = 0.0,
    inner_lr: Number = 0.1,  # scalar or [K]
    inner_steps: Steps = 5,
    preconditioner: Tensor | None = None,  # [D + 1]
    prior_pull: Number = 0.0,  # scalar or [T]
    extra_count: float = 0.0,
    momentum: Number | None = None,  # scalar or [K]
    loss: str = "squared",
    first_order: bool = False,
    adapt: str = "user",
) -> FastWeights:
    """Adapts one user vector and bias per task by `inner_steps` of SGD on its support set (Finn et al. 2017, eq. 1).

        φ_{k+1} = φ_k − s_k A ∘ [∇L_S(φ_k) + ρ (φ_k − φ_0)] + β_k (φ_k − φ_{k−1}),   φ = (u, c)
        L_S(φ) = Σ_s w_s ℓ(p_s, y_s) / (|S| + n0)

    Args:
        user_init: u_0, where every task starts, [D], or [T, D] for one start per task.
        item_table: Item rows e_i, [N, D], float32 or float64. Their dtype is everyone's. Or bfloat16, half the memory
            to read: arithmetic and everything else are then float32.
        item_bias: b_i, [N].
        support: The entries to adapt on, T tasks; weights w default to 1.
        user_bias_init: c_0, a number, a scalar tensor or [T]; 0 by default.
        offset: m, a number or a scalar tensor.
        inner_lr: s, a number, a scalar tensor or one per step, [K].
        inner_steps: K, or "exact" for the limit of many steps: the ridge solution with λ = ρ (|S| + n0)/2.
        preconditioner: A > 0, [D + 1], the bias last (Meta-SGD, Li et al. 2017); 1 by default.
        prior_pull: ρ ≥ 0, a number, a scalar tensor or [T] (iMAML's proximal term, Rajeswaran et al. 2019).
        extra_count: n0 ≥ 0, added to the number of support entries in the mean.
        momentum: β, a number, a scalar tensor or [K]; none by default.
        loss: ℓ, "squared" (p − y)² or "logistic" log(1 + eᵖ) − y p with y in [0, 1]. Or one that compares the entry's
            item with its `negatives`, and looks at no targets: "bpr", the mean of log(1 + e^(p⁻ − p)) over them (Rendle
            et al. 2009), or "softmax", −log of the share of e^(p − log_q) in its sum over item and negatives (log_q 0
            by default).
        first_order: Treat ∇L_S as constant when differentiating (FOMAML).
        adapt: "user", or "all": item rows and biases of the support adapt too, each task its own copy.

    Returns:
        The adapted user vectors [T, D] and biases [T]; with adapt="all" also the row [n, D] and bias [n] that each
        support entry's item has become. Gradients as of `adapt_and_score`.

    Raises:
        IndexError: An item id lies outside the table.
        ValueError, TypeError: An argument does not fit; the message names it.
        NotImplementedError: Derivatives are asked for in forward mode (`torch.func.jvp`).
    """
    start = user_init, user_bias_init, item_table, item_bias, offset
    settings = inner_lr, inner_steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt
    usual = None if torch.compiler.is_compiling() else _usual.adapt(start, settings, support)
    if usual is not None:
        return usual
    num_tasks = _count_tasks("support", support)
    model = check_model(*start, num_tasks)
    loop = check_inner_loop(model, num_tasks, settings)
    support = check_entries("support", support, model.item_bias.shape[0], model.item_bias, (loss,))
    check_differentiation(model, loop, TaskBatch(support))
    return _ops.either(_ops.adapt, reference.adapt, item_table)(model, support, loop)


def adapt_and_score(
    user_init: Tensor,  # [D] or [T, D]
    item_table: Tensor,  # [N, D]
    item_bias: Tensor,  # [N]
    batch: TaskBatch,
    *,
    user_bias_init: Number | None = None,  # scalar or [T]
    offset: Number = 0.0,
    inner_lr: Number = 0.1,  # scalar or [K]
    inner_steps: Steps = 5,
    preconditioner: Tensor | None = None,  # [D + 1]
    prior_pull: Number = 0.0,  # scalar or [T]
    extra_count: float = 0.0,
    momentum: Number | None = None,  # scalar or [K]
    loss: str = "squared",
    first_order: bool = False,
    adapt: str = "user",
) -> Tensor:
    """Adapts every task on `batch.support` and scores its query items: `adapt`, then p_i = m + b_i + c + u·e_i.

    Args:
        batch: Support and query; the query needs no targets. The other arguments are those of `adapt`.

    Returns:
        The scores [n] of the query entries, or [n, 1 + M] where `batch.query.negatives` is [n, M], the entry's own
        item first. Gradients with respect to every tensor argument and the support weights are exact (or those of
        `first_order`), and can be taken once.

    Raises:
        IndexError, ValueError, TypeError: As for `adapt`.
    """
    start = user_init, user_bias_init, item_table, item_bias, offset
    settings = inner_lr, inner_steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt
    usual = None if torch.compiler.is_compiling() else _usual.adapt_and_score(start, settings, batch)
    if usual is not None:
        return usual
    num_tasks = _count_tasks("batch", batch)
    model = check_model(*start, num_tasks)
    loop = check_inner_loop(model, num_tasks, settings)
    batch = check_batch(batch, model.item_bias, loss, outer_losses=())
    check_differentiation(model, loop, batch)
    candidates = with_negatives(batch)
    run = _ops.either(_ops.adapt_and_score, reference.adapt_and_score, item_table)
    _, scores = run(model, candidates, loop)
    negatives = None if batch.query is None else batch.query.negative_rows
    return scores if negatives is None else scores.view(-1, 1 + negatives.shape[1])


def meta_step(
    user_init: Tensor,  # [D] or [T, D]
    item_table: Tensor,  # [N, D]
    item_bias: Tensor,  # [N]
    batch: TaskBatch,
    *,
    user_bias_init: Number | None = None,  # scalar or [T]
    offset: Number = 0.0,
    inner_lr: Number = 0.1,  # scalar or [K]
    inner_steps: Steps = 5,
    preconditioner: Tensor | None = None,  # [D + 1]
    prior_pull: Number = 0.0,  # scalar or [T]
    extra_count: float = 0.0,
    momentum: Number | None = None,  # scalar or [K]
    loss: str = "squared",
    first_order: bool = False,
    adapt: str = "user",
    outer_loss: str | Mapping[str, float] = "squared",
    step_weights: Tensor | None = None,  # [K + 1]
    coalesce: bool = False,
) -> MetaStep:
    """The outer loss of a batch and all its meta-gradients, in one pass over the data.

        L = Σ_t ω_t L_Q,t / Σ_t ω_t,    L_Q,t = Σ_q v_q ℓ_out(p_q, y_q) / Σ_q v_q  at φ_K

    over the tasks that have query entries; ω are `batch.weights`, v `batch.query.weights`, 1 by default.

    Args:
        batch: Support and query, with what their losses look at: targets, or negatives. The arguments before
            `outer_loss` are those of `adapt`.
        outer_loss: "squared", "logistic", "absolute" (quadratic within 0.1 of the target), "bpr", "softmax", or the
            weight of each, such as {"squared": 0.5, "absolute": 0.5}.
        step_weights: κ [K + 1]: the query loss is Σ_k κ_k L_Q(φ_k), κ_0 first (MAML++, Antoniou et al. 2019).
            By default only φ_K counts.
        coalesce: Sum item gradients of equal ids, so that ids come once, ascending.

    Returns:
        `.loss`, a scalar, whose own `backward()` gives the same gradients to whatever requires them, dense ones to
        the items; `.grads` by argument name: user_init, user_bias_init, item_table and item_bias (as SparseRows),
        offset, inner_lr, and preconditioner, prior_pull, momentum, support_weights where given as tensors.

    Raises:
        IndexError, ValueError, TypeError: As for `adapt`.
    """
    start = user_init, user_bias_init, item_table, item_bias, offset
    settings = inner_lr, inner_steps, preconditioner, prior_pull, extra_count, momentum, loss, first_order, adapt
    result = None
    if step_weights is None and not torch.compiler.is_compiling():
        result = _usual.meta_step(start, settings, batch, outer_loss)
    if result is None:
        num_tasks = _count_tasks("batch", batch)
        losses = check_outer_loss(outer_loss)
        model = check_model(*start, num_tasks)
        loop = check_inner_loop(model, num_tasks, settings)
        batch = check_batch(batch, model.item_bias, loss, losses)
        step_weights = check_step_weights(step_weights, loop, model.item_bias)
        check_differentiation(model, loop, batch, step_weights)
        run = _ops.either(_ops.meta_step, reference.meta_step, item_table)
        result = run(model, batch, loop, losses, step_weights)
    if coalesce:
        for name in ("item_table", "item_bias"):
            gradient = result.grads[name]
            assert isinstance(gradient, SparseRows)
            result.grads[name] = coalesce_rows(gradient)
    return result


def reptile_step(
    user_init: Tensor,  # [D] or [T, D]
    item_table: Tensor,  # [N, D]
    item_bias: Tensor,  # [N]
    support: Entries,
    *,
    user_bias_init: Number | None = None,  # scalar or [T]
    offset: Number = 0.0,
    inner_lr: Number = 0.1,  # scalar or [K]
    inner_steps: int = 5,
    preconditioner: Tensor | None = None,  # [D + 1]
    prior_pull: Number = 0.0,  # scalar or [T]
    extra_count: float = 0.0,
    momentum: Number | None = None,  # scalar or [K]
    loss: str = "squared",
    adapt: str = "all",
    task_weights: Tensor | None = None,  # [T]
) -> MetaStep:
    """Reptile's step for a batch (Nichol et al. 2018, algorithm 2), as a gradient: descending by it with rate ε moves
    the meta-parameters by ε towards where tasks end up.

        φ_0 − Σ_t ω_t φ_K,t / Σ_t ω_t,   item rows and biases averaged over the tasks that hold the item

    Args:
        support: The entries to adapt on. All other arguments but the last are those of `adapt`.
        task_weights: ω [T] ≥ 0, 1 by default.

    Returns:
        `.loss`, the mean over tasks of their support loss after adaptation, without a gradient of its own; `.grads`:
        user_init, user_bias_init and, with adapt="all", item_table and item_bias, SparseRows with a row for each
        support entry (of the entries of one task that hold the same item, the first has it all).

    Raises:
        IndexError, ValueError, TypeError: As for `adapt`; the losses "bpr" and "softmax" are refused.
    """
    start = user_init, user_bias_init, item_table, item_bias, offset
    settings = inner_lr, inner_steps, preconditioner, prior_pull, extra_count, momentum, loss, False, adapt
    if task_weights is None and not torch.compiler.is_compiling():
        usual = _usual.reptile_step(start, settings, support)
        if usual is not None:
            return usual
    num_tasks = _count_tasks("support", support)
    model = check_model(*start, num_tasks)
    if loss in PAIRWISE:
        raise ValueError(f"loss: Reptile adapts on a loss of single scores, got {loss!r}")
    loop = check_inner_loop(model, num_tasks, settings)
    support = check_entries("support", support, model.item_bias.shape[0], model.item_bias, (loss,))
    weights = check_task_weights(task_weights, model.item_bias, num_tasks)
    run = _ops.either(_ops.reptile_step, reference.reptile_step, item_table)
    with torch.no_grad():
        return run(model, support, weights, loop)


def score_top_k(
    user: Tensor,  # [T, D]
    user_bias: Tensor,  # [T]
    item_table: Tensor,  # [N, D]
    item_bias: Tensor,  # [N]
    k: int,
    *,
    exclude: Entries | None = None,
) -> TopK:
    """The k best items of the whole catalogue for many users, without a score matrix [T, N] in memory.

    On a GPU, `torch.set_float32_matmul_precision("high")` lets it multiply float32 on tensor cores, for more than 8
    users and k ≤ 128: each number is split into two of tf32, and scores have an error of less than 2⁻¹⁹ Σ_d |u_d e_d|
    besides that of summing; those made of an infinite number are no numbers.

    Args:
        user: User vectors, [T, D].
        user_bias: Added to all scores of a user, [T] (put the offset m here too).
        item_table: Item rows, [N, D].
        item_bias: [N].
        k: How many, 1 … N.
        exclude: Items that must not be returned, T tasks: those seen already, say.

    Returns:
        Ids [T, k] and scores [T, k], best first; among equal scores the smaller id comes first, and a score that is
        no number counts as −inf. Where fewer than k items are left, id −1 and score −inf.

    Raises:
        ValueError, TypeError, IndexError: An argument does not fit; the message names it.
    """
    num_tasks = user.shape[0]
    model = check_model(user, user_bias, item_table, item_bias, 0.0, num_tasks)
    if user.dim() != 2 or model.user_bias_init.dim() != 1:
        raise ValueError(f"user, user_bias: expected shapes [T, D] and [T], got {[*user.shape]}, {[*user_bias.shape]}")
    if not 1 <= k <= item_table.shape[0]:
        raise ValueError(f"k: must be in [1, {item_table.shape[0]}], the number of items, got {k}")
    if exclude is not None:
        exclude = check_entries("exclude", exclude, item_table.shape[0], model.item_bias)
        if exclude.num_tasks != num_tasks:
            raise ValueError(f"exclude: expected {num_tasks} tasks, one per user, got {exclude.num_tasks}")
    return _ops.either(_ops.score_top_k, reference.score_top_k, item_table)(
        model.user_init, model.user_bias_init, model.item_table, model.item_bias, k, exclude
    )


def coalesce_rows(gradient: SparseRows) -> SparseRows:
    """Sums rows of equal ids, always in the same order; ids come out once each, ascending.

    Args:
        gradient: ids int64 [n] ≥ 0 and rows [n, D] or [n], float32 or float64.
    """
    return _ops.either(_ops.coalesce_rows, reference.coalesce_rows, gradient.rows)(gradient)


def coalesce_rows_padded(gradient: SparseRows) -> tuple[SparseRows, Tensor]:
    """As `coalesce_rows`, in shapes that do not depend on the ids, so that nobody waits for the device to count them.

    Args:
        gradient: ids int64 [n] ≥ 0 and rows [n, D] or [n], float32 or float64.

    Returns:
        Ids [n], −1 after the distinct ones, with rows of zeros there; and how many are distinct, an int64 scalar.
    """
    return _ops.either(_ops.coalesce_rows_padded, reference.coalesce_rows_padded, gradient.rows)(gradient)


def sum_rows(gradient: SparseRows, num_rows: int) -> Tensor:
    """The gradient of the whole table, [num_rows, D] or [num_rows], summed in the order of the rows.

    On a GPU in any order, if `allow_atomics` allows it.

    Args:
        gradient: ids int64 [n] in [0, num_rows) and rows [n, D] or [n], float32 or float64.
    """
    if not _library.loaded_for(gradient.rows):
        return gradient.to_dense(num_rows)
    result: Tensor = _ops.ops.sum_rows(*gradient, num_rows)
    return result


def _count_tasks(name: str, tasks: Entries | TaskBatch) -> int:
    expected = Entries if name == "support" else TaskBatch
    if not isinstance(tasks, expected):
        raise TypeError(f"{name}: expected {expected.__name__}, got {type(tasks).__name__}")
    return tasks.num_tasks


__all__ = [
    "InnerLoop", "Model", "adapt", "adapt_and_score", "coalesce_rows", "coalesce_rows_padded",
    "meta_step", "mlp_adapt_and_score", "mlp_meta_step", "reptile_step", "score_top_k", "sum_rows",
]  # fmt: skip
