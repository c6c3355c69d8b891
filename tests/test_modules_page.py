"""The page on modules: its own module runs, and the loop with `higher` gives the gradients that ours gives."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import metarec_fast as mf

PAGE = (Path(__file__).parent.parent / "docs" / "modules.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def make_log():
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.choice(20, 8, replace=False) for _ in range(40)])
    return mf.Interactions.from_arrays(np.repeat(np.arange(40), 8), items, rng.integers(1, 6, 320))


def block(beginning):
    return next(code for code in BLOCKS if beginning in code)


def test_the_module_of_the_page_is_trained_judged_and_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = make_log()
    names = {"torch": torch, "mf": mf, "log": log, "split": mf.split_users(log)}
    code = block("class Mine").replace("valid=split.valid)", "valid=split.valid, epochs=1, progress=False)")
    exec(compile(code, "modules.md", "exec"), names)
    assert isinstance(names["learner"].model.module, names["Mine"])


def test_higher_gives_the_same_gradients():
    higher = pytest.importorskip("higher", reason="the extra `bench` has it")
    log, gradients = make_log(), []
    names = {"torch": torch, "mf": mf}
    exec(compile(block("class Mine").split("learner =")[0], "modules.md", "exec"), names)
    for code in (block("higher.innerloop_ctx"), block("inner_steps=5")):
        torch.manual_seed(0)
        module = names["Mine"](log.num_items)
        given = {
            "torch": torch, "mf": mf, "higher": higher, "mse": torch.nn.functional.mse_loss, "users_of": users_of,
            "module": module, "inner_optimizer": torch.optim.SGD(module.head.parameters(), lr=0.05),
            "outer_optimizer": torch.optim.SGD(module.parameters(), lr=0.0),
            "sampler": mf.TaskSampler(log, support=3, query=4, batch_size=40),
        }  # fmt: skip
        exec(compile(code, "modules.md", "exec"), given)
        gradients.append([parameter.grad for parameter in module.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)  # float32, five steps


def users_of(batch):
    for task in range(batch.num_tasks):
        parts = []
        for entries in (batch.support, batch.query):
            rows = slice(*entries.offsets[task : task + 2].tolist())
            parts += [entries.items[rows], entries.targets[rows]]
        yield tuple(parts)
