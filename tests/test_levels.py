"""The library for every kind of processor gives the same numbers: here as in a process that may use less of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Draw
from towers import draw_tower, gradients_of

from metarec_fast import _library
from metarec_fast import functional as F
from metarec_fast.results import SparseRows

LEVELS = {"default": "_C", "avx2": "_C_avx2", "avx512": "_C_avx512"}  # of ATEN_CPU_CAPABILITY
RUNS = {"default": ["default"], "avx2": ["default", "avx2"], "avx512": ["default", "avx2", "avx512"]}


def results(dtype):
    """What the operators make of problems with widths and sizes that fill registers, and such that do not."""
    found = []
    for dim in (5, 16, 64):
        draw = Draw(dim, dtype)
        model, batch = draw.model(dim=dim), draw.batch(weights=True)
        arguments = (model.user_init, model.item_table, model.item_bias)
        pairs = draw.batch(negatives=3, log_q=True)
        slow = {"inner_lr": 0.02}  # so that nothing grows, and rounding with it
        runs = [
            F.meta_step(*arguments, batch, **slow),
            F.meta_step(*arguments, batch, loss="logistic", prior_pull=0.1, momentum=0.1, inner_steps=30, **slow),
            F.meta_step(*arguments, batch, prior_pull=0.5, inner_steps="exact"),
            F.meta_step(*arguments, batch, adapt="all", outer_loss="absolute", **slow),
            F.meta_step(*arguments, pairs, loss="softmax", outer_loss="softmax", **slow),
            F.reptile_step(*arguments, batch.support, **slow),
        ]
        for run in runs:
            gradients = [grad.rows if isinstance(grad, SparseRows) else grad for grad in run.grads.values()]
            found += [run.loss, *gradients]
        for activation in ("relu", "gelu"):
            tower = draw_tower(draw, (2 * dim, 9), dim=dim, activation=activation)
            parts = tower.user_part, tower.item_table, tower.layers
            rates = {"inner_lr": 0.02 * draw.uniform(5, 6), "activation": activation}
            mixture = {"bpr": 0.5, "softmax": 0.5}
            runs = [
                F.mlp_meta_step(*parts, batch, loss="logistic", **rates),
                F.mlp_meta_step(*parts, draw.batch(negatives=3), loss="bpr", outer_loss=mixture, **rates),
                F.mlp_meta_step(*parts, pairs, loss="softmax", outer_loss=mixture, **rates),
            ]
            for run in runs:
                found += [run.loss, *gradients_of(run)]
        users = draw.normal(3, dim)
        found += [*F.score_top_k(users, users[:, 0], *arguments[1:], k=4)]
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_same_numbers(level, dtype, tmp_path):
    best = torch.backends.cpu.get_cpu_capability().lower()
    if level not in RUNS.get(best, []) or not (_library.FOLDER / f"{LEVELS[level]}.so").exists():
        pytest.skip(f"this machine runs {best}")
    file = tmp_path / "results.pt"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    subprocess.run([sys.executable, __file__, str(dtype)[6:], str(file)], check=True, env=environment, timeout=120)
    name, found = torch.load(file)
    assert name == LEVELS[level]
    expected = results(dtype)
    assert len(found) == len(expected) > 100
    for one, other in zip(found, expected, strict=True):
        # A few hundred roundings of 2⁻²⁴ or 2⁻⁵³ each, which add up like a random walk; they are those of the terms,
        # which are about 0.1 where a gradient cancels (that of the offset, for losses of differences).
        largest = max(0.1, float(other.abs().max()) if other.numel() else 0)
        bound = 100 * torch.finfo(dtype).eps * largest
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    dtype, file = sys.argv[1:]
    torch.save((_library.cpu.name, results(getattr(torch, dtype))), file)
