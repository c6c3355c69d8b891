"""Random MLP towers for the tests of their operators, and how these compare with the reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from problems import Draw, relative_error
from torch import Tensor

from metarec_fast import _mlp_ops, mlp_reference
from metarec_fast._mlp_arguments import Tower, TowerLoop
from metarec_fast._mlp_autograd import ITEM_TABLE, PARAMETERS, USER_PART
from metarec_fast.results import TowerMetaStep
from metarec_fast.tasks import Entries, TaskBatch

SQUARED = {"squared": 1.0}


def draw_tower(
    draw: Draw,
    hidden: tuple[int, ...] = (9, 5),
    *,
    num_tasks: int = 6,
    user_width: int = 3,
    dim: int = 7,
    num_items: int = 60,
    activation: str = "relu",
) -> Tower:
    """Weights as of He's initialisation, so that inner steps of 0.1 are stable."""
    widths = (user_width + dim, *hidden, 1)
    layers = [
        (draw.normal(out, width) * (2 / max(width, 1)) ** 0.5, 0.3 * draw.normal(out))
        for width, out in pairwise(widths)
    ]
    return Tower(draw.normal(num_tasks, user_width), draw.normal(num_items, dim) / dim**0.5, layers, activation)


def draw_loop(draw: Draw, steps: int = 5, **settings: object) -> TowerLoop:
    return replace(TowerLoop(0.05 * draw.uniform(steps) + 0.01, steps), **settings)


def leaves_of(tower: Tower, loop: TowerLoop) -> tuple[list[Tensor], Tower, TowerLoop]:
    """Fresh leaves that require gradients (user part, items, rates, then W_1, b_1, …), and the problem on them."""
    parts = [part for layer in tower.layers for part in layer]
    values = [tower.user_part, tower.item_table, loop.inner_lr, *parts]
    leaves = [value.detach().clone().requires_grad_() for value in values]
    layers = list(zip(leaves[3::2], leaves[4::2], strict=True))
    return (
        leaves,
        replace(tower, user_part=leaves[0], item_table=leaves[1], layers=layers),
        replace(loop, inner_lr=leaves[2]),
    )


def raw_inputs(tower: Tower, support: Entries) -> list[object]:
    """What the operators get of a tower and its support, fresh leaves of what has gradients."""
    inputs = list(_mlp_ops._inputs(tower, support))
    for place in (USER_PART, ITEM_TABLE, PARAMETERS):
        inputs[place] = inputs[place].detach().clone().requires_grad_()
    return inputs


def gradients_of(result: TowerMetaStep) -> list[Tensor]:
    """Of user part, item rows and rates, then layer by layer."""
    layers = [part for layer in result.grads["layers"] for part in layer]
    return [result.grads["user_part"], result.grads["item_table"].rows, result.grads["inner_lr"], *layers]


def compare_with_reference(
    tower: Tower, batch: TaskBatch, loop: TowerLoop, losses: dict[str, float] = SQUARED, tolerance: float = 1e-10
) -> None:
    """The kernels' loss and every gradient against autograd through the reference, in float64.

    What differences of scores do not depend on, the last bias say, has a gradient that is zero but for rounding.
    """
    actual = _mlp_ops.meta_step(tower, batch, loop, losses)
    expected = mlp_reference.meta_step(tower, batch, loop, losses)
    assert relative_error(actual.loss, expected.loss) < tolerance
    for place, (one, other) in enumerate(zip(gradients_of(actual), gradients_of(expected), strict=True)):
        zero = other.numel() > 0 and other.abs().max() < 1e-14
        assert (one.abs().max() < 1e-14) if zero else relative_error(one, other) < tolerance, place
    assert torch.equal(actual.grads["item_table"].ids, expected.grads["item_table"].ids)
    assert torch.isfinite(expected.loss)
