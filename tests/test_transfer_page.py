"""The page on transfer runs as it stands, and so does the example that it quotes."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch

import metarec_fast as mf

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "transfer.md").read_text(encoding="utf-8"), re.DOTALL)


def make_log(items=range(40), num_users=90):
    rng = np.random.default_rng(0)
    rated = np.concatenate([rng.choice(items, 14, replace=False) for _ in range(num_users)])
    return mf.Interactions.from_arrays(np.repeat(np.arange(num_users), 14), rated, rng.integers(1, 6, len(rated)))


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, old = make_log(), make_log(range(20, 50))
    big = mf.MAML(mf.MLPRecommender(30, 16))
    big.fit(old, epochs=1, progress=False)
    big.save("runs/big")
    other = mf.MAML(mf.DotRecommender(30, 16))
    other.fit(old, epochs=1, progress=False)
    names = {
        "mf": mf, "log": log, "split": mf.split_users(log), "other": other,
        "ids": [3, 1, 99], "vectors": torch.ones(3, 16), "biases": [0.1, 0.2, 0.3],
    }  # fmt: skip
    quick = [code.replace("valid=split.valid)", "valid=split.valid, epochs=1, progress=False)") for code in BLOCKS]
    load_items, freeze, load_from, transfer = quick
    exec(load_items, names)
    exec(freeze, names)
    assert not names["learner"].model.item_embedding.weight.requires_grad
    tower, items = load_from.splitlines()
    exec(items, names)
    assert torch.equal(names["learner"].model.item_bias.weight[20:], other.model.item_bias.weight[:20])
    names["learner"] = mf.MAML(mf.MLPRecommender(40, 16))
    exec(tower, names)
    exec(transfer, names)
    assert names["learner"].item_ids.tolist() == list(range(40))


def test_the_example_compares_every_way_with_none(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("transfer_example", ROOT / "examples" / "transfer.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    log = make_log()
    films = mf.Features.from_frame({"id": list(range(40)), "genres": [["a", "b"][: 1 + n % 2] for n in range(40)]})
    monkeypatch.setattr(example, "load", lambda: (log, films))
    threads = torch.get_num_threads()
    example.main(["--users", "12", "--seeds", "2", "--epochs", "1", "--dim", "3"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for name in ("maml", "maml-r"):
        ways = (
            "transferred",
            "transferred and trained",
            "items frozen",
            "items at a tenth of the rate",
            "items trained",
        )
        for way in ways:
            assert re.search(
                rf"^{name}, {way} +\d\.\d{{4}} ±\d\.\d{{4}}   [+-]\d\.\d{{4}} ±\d", printed, re.MULTILINE
            ), way
        assert len(re.findall(rf"^{name} +\d\.\d{{4}} ±\d\.\d{{4}}$", printed, re.MULTILINE)) == 2
