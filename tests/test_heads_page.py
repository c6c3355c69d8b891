"""The page on heads runs as it stands, and so does the example that it quotes."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch

import metarec_fast as mf

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "heads.md").read_text(encoding="utf-8"), re.DOTALL)


def make_log(seed, ratings):
    rng = np.random.default_rng(seed)
    items = np.concatenate([rng.choice(20, 12, replace=False) for _ in range(60)])
    return mf.Interactions.from_arrays(np.repeat(np.arange(60), 12), items, rng.choice(ratings, len(items)))


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"mf": mf, "ratings": make_log(0, [1, 2, 3, 4, 5]), "clicks": make_log(1, [0, 1])}
    train, use = BLOCKS
    exec(train.replace("valid=split.valid)", "valid=split.valid, epochs=1, progress=False)"), names)
    exec(use, names)
    assert list(names["reports"]) == ["rating", "click"]
    assert len(names["items"]) == 10
    assert mf.load(tmp_path / "runs" / "heads").model.heads["click"].weight == 0.5


def test_the_example_compares_every_way_in_both_worlds(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("heads_example", ROOT / "examples" / "heads.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "load", lambda: make_log(0, [1, 2, 3, 4, 5]))
    threads = torch.get_num_threads()
    example.main(["--seeds", "2", "--epochs", "1", "--users", "60"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    figure = r" +\d\.\d{4} ±\d\.\d{4}"
    for name in ("two heads", "two heads, clicks alone", "clicks tell, not judged"):
        assert len(re.findall(rf"^{name}{figure}   [+-]\d\.\d{{4}} ±\d\.\d{{4}}$", printed, re.MULTILINE)) == 2, name
    assert len(re.findall(rf"^ratings alone{figure}$", printed, re.MULTILINE)) == 2
