"""The command line, end to end on a small file, and what it says of bad input."""

import json

import numpy as np
import pytest

from metarec_fast import cli


@pytest.fixture
def ratings(tmp_path):
    rng = np.random.default_rng(0)
    rows = {(user, item) for user in range(40) for item in rng.choice(30, 12, replace=False)}
    lines = [f"u{user},i{item},{rng.integers(1, 6)}" for user, item in sorted(rows)]
    path = tmp_path / "small.csv"
    path.write_text("\n".join(["user,item,rating", *lines]) + "\n")
    return str(path)


def test_prepare_train_evaluate_and_recommend(ratings, tmp_path, capsys):
    assert cli.main(["prepare", "--ratings", ratings]) == 0
    assert "480 ratings from 1 to 5" in capsys.readouterr().out
    out = tmp_path / "run"
    assert cli.main(["train", "--ratings", ratings, "--epochs", "1", "--dim", "3", "--out", str(out)]) == 0
    assert "maml-r" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"results", "seeds"}
    assert {"maml-r", "bias", "fold-in", "random", "popularity"} <= set(report["results"])
    assert report["seeds"]["bias"]["rmse"] == [report["results"]["bias"]["rmse"]]
    learner = str(out / "learner")
    assert cli.main(["evaluate", "--learner", learner, "--ratings", ratings, "--train", ratings]) == 0
    table = capsys.readouterr().out
    assert "maml-r" in table
    assert "fold-in" in table
    assert cli.main(["recommend", "--learner", learner, "--rated", "i1:5,i2:1", "--k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert not {"i1", "i2"} & {line.split("\t")[0] for line in lines}


def test_doctor_says_that_the_fast_path_is_active(capsys):
    assert cli.main(["doctor"]) == 0
    assert "The fast path is active." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--ratings", "nowhere.csv"], "--ratings: there is no nowhere.csv"),
        (["prepare", "--rating", "stars"], "stars"),
        (["train", "--test", "2"], "test"),
        (["recommend", "--learner", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_status_2(ratings, arguments, message, capsys):
    if "--ratings" not in arguments and arguments[0] != "recommend":
        arguments = [*arguments, "--ratings", ratings]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_broken_row_is_named_with_its_line(ratings, capsys):
    with open(ratings, "a") as file:
        file.write("u1,i29,many\n")
    assert cli.main(["prepare", "--ratings", ratings]) == 2
    assert "482" in capsys.readouterr().err
