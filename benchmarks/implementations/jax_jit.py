"""JAX: jit of grad of vmap, the gather inside what is compiled. Its threads: those CPUs that it sees when it starts."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from benchmarks.implementations.blocks import Blocks, Outputs, Peer, Step
from benchmarks.implementations.optional import missing_package
from benchmarks.workloads import Problem, Workload
from metarec_fast import SparseRows

MOST_UNROLLED_STEPS = 10  # beyond: a scan, which compiles in the time of one step


def start(threads: int, platform: str = "cpu") -> Any:
    """JAX with a thread pool of `threads`: it makes one thread for each CPU that its process may use at that time."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ.setdefault("JAX_PLATFORMS", platform)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of a GPU's memory, which others need too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if allowed is not None:
            os.sched_setaffinity(0, sorted(allowed)[:threads])
        try:
            import jax

            jax.devices()
        finally:
            if allowed is not None:
                os.sched_setaffinity(0, allowed)
    return jax


def prepare(problem: Problem) -> Step:
    jax = start(torch.get_num_threads(), problem.device.type)
    jnp = jax.numpy
    work, blocks = problem.workload, Blocks.of(problem.batch)
    known, asked = blocks.support, blocks.query
    assert asked is not None
    pairs, everything = work.loss == "bpr", work.adapt == "all"

    def loss(scores: Any, targets: Any) -> Any:
        return jax.nn.softplus(-scores) if pairs else (scores - targets) ** 2

    def scores(user: Any, bias: Any, rows: Any, biases: Any) -> Any:
        if pairs:
            return (rows[0] - rows[1]) @ user + biases[0] - biases[1]
        return rows[0] @ user + biases[0] + bias

    def task_loss(user: Any, bias: Any, rows: Any, biases: Any, targets: Any, weights: Any, asked: Any) -> Any:
        count = len(rows) // 2

        def step(fast: Any, _: Any) -> Any:
            slopes = jax.grad(lambda fast: (loss(scores(*fast), targets) * weights).sum())(fast)
            if work.first_order:
                slopes = jax.lax.stop_gradient(slopes)
            adapting = (1, 1, 1, 1) if everything else (1, 1, 0, 0)
            moved = tuple(
                jax.tree.map(lambda value, slope: value - work.inner_lr * slope, value, slope) if moves else value
                for value, slope, moves in zip(fast, slopes, adapting, strict=True)
            )
            return moved, None

        fast = (user, bias, rows[:count], biases[:count])
        if work.steps <= MOST_UNROLLED_STEPS:
            for _ in range(work.steps):
                fast, _ = step(fast, None)
        else:
            fast, _ = jax.lax.scan(step, fast, length=work.steps)
        return loss(scores(*fast[:2], rows[count:], biases[count:]), asked).mean()

    def mean_loss(user: Any, bias: Any, rows: Any, biases: Any, targets: Any, weights: Any, asked: Any) -> Any:
        dims = (None, None, 0, 0, 0, 0, 0)
        return jax.vmap(task_loss, in_axes=dims)(user, bias, rows, biases, targets, weights, asked).mean()

    @jax.jit
    def gradients(user: Any, bias: Any, table: Any, table_bias: Any, ids: Any, targets: Any, weights: Any, asked: Any):
        known = {"mode": "promise_in_bounds"}
        rows, biases = [table.at[each].get(**known) for each in ids], [table_bias.at[each].get(**known) for each in ids]
        gradient = jax.value_and_grad(mean_loss, argnums=(0, 1, 2, 3))
        value, (user, bias, rows, biases) = gradient(user, bias, rows, biases, targets, weights, asked)
        return value, user, bias, [each.reshape(-1, work.dim) for each in rows], [each.reshape(-1) for each in biases]

    def array(tensor: torch.Tensor) -> Any:
        return jnp.asarray(tensor.numpy()) if tensor.device.type == "cpu" else jnp.from_dlpack(tensor.contiguous())

    weights = torch.as_tensor(known.weights, dtype=problem.user.dtype, device=problem.device).expand(known.items.shape)
    ids = [array(each.int()) for each in blocks.ids]
    tensors = (problem.user, problem.user_bias, problem.item_table, problem.item_bias)
    inputs = (*map(array, tensors), ids, array(known.targets), array(weights), array(asked.targets))

    flat = blocks.flat_ids

    def step() -> Outputs:
        value, user, bias, rows, biases = jax.block_until_ready(gradients(*inputs))
        return {
            "loss": value,
            "user_init": user,
            "user_bias_init": bias,
            "item_table": [SparseRows(*pair) for pair in zip(flat, rows, strict=True)],
            "item_bias": [SparseRows(*pair) for pair in zip(flat, biases, strict=True)],
        }

    return step


def _effort(work: Workload) -> str | None:
    if work.kind != "gradient":
        return None
    return (
        "normal" if work.group not in ("tasks", "items") or work.num_tasks * work.num_items <= 4096 * 10**5 else "all"
    )


PEERS = (Peer("JAX jit", prepare, _effort, missing_package("jax"), compiles=True),)
