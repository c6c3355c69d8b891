"""The examples of the README run as they stand, its links lead somewhere, and the commands shown are understood."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code):
    names = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_first_example_trains_evaluates_and_recommends(capsys):
    run(EXAMPLES[0])
    printed = capsys.readouterr().out
    assert "maml-r" in printed
    assert "fold-in" in printed


def test_the_example_of_the_operators_gives_scores_gradients_and_the_best_items():
    names = run(EXAMPLES[1])
    assert names["scores"].shape == (2,)
    assert names["result"].grads["user_init"].abs().max() > 0
    assert names["best"].items.shape == (2, 10)
    assert 3 not in names["best"].items[0]


def test_the_example_of_a_gpu_runs_but_for_the_gpu():
    rng = np.random.default_rng(0)
    log = mf.Interactions.from_arrays(rng.integers(0, 60, 900), rng.integers(0, 30, 900), rng.random(900))
    names = {"mf": mf, "log": log, "split": mf.split_users(log, valid=0.2, test=0.2, seed=0)}
    assert '"cuda"' in EXAMPLES[2]
    exec(compile(EXAMPLES[2].replace('"cuda"', '"cpu"'), "README.md", "exec"), names)
    assert len(names["user"].recommend(3)[0]) == 3


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/cli.md"])
def test_the_commands_shown_are_understood(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    commands = re.findall(r"^    metarec-fast (.*)", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert cli._parser().parse_args(shlex.split(command, comments=True)).run
