"""The command line, end to end on a small file, and what it says of bad input."""

import json
import sys

import numpy as np
import pytest

import metarec_fast as mf
from metarec_fast import _library, cli, doctor
from metarec_fast.prepared import read_prepared, write_prepared


@pytest.fixture
def ratings(tmp_path, monkeypatch):
    """A CSV of 40 users, in the folder where commands run."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = {(user, item) for user in range(40) for item in rng.choice(30, 12, replace=False)}
    lines = [f"u{user},i{item},{rng.integers(1, 6)}" for user, item in sorted(rows)]
    path = tmp_path / "ratings.csv"
    path.write_text("\n".join(["user,item,rating", *lines]) + "\n")
    (tmp_path / "titles.csv").write_text("item,title\n" + "".join(f'i{i},"Film, {i}"\n' for i in range(30)))
    return path


def test_draws_and_the_order_of_what_is_known_are_those_of_evaluate(ratings, tmp_path):
    assert cli.main(["prepare"]) == 0
    assert cli.main(["train", "--epochs", "1", "--dim", "2", "--support", "4", "--draws", "2"]) == 0
    learner, log = mf.load("runs/train/learner"), read_prepared(tmp_path / "runs/train/test.npz")
    written = json.loads((tmp_path / "runs/train/report.json").read_text())["results"]["maml-r"]["rmse"]
    twice = mf.evaluate(learner, log, support=4, draws=2)
    assert written == pytest.approx(twice.results["maml-r"]["rmse"], rel=1e-6)

    assert cli.main(["evaluate", "--order", "time", "--support", "4", "--out", "a.json", "--report", "a.html"]) == 0
    written = json.loads((tmp_path / "a.json").read_text())["results"]["maml-r"]["rmse"]
    first = mf.evaluate(learner, log, support=4, order="time")
    assert written == pytest.approx(first.results["maml-r"]["rmse"], rel=1e-6)
    assert written != pytest.approx(twice.results["maml-r"]["rmse"], rel=1e-6)

    assert cli.main(["evaluate", "--order", "time", "--draws", "2"]) == 2


@pytest.mark.parametrize(("options", "said"), [(["--draws", "0"], "draws"), (["--support", "-1"], "--support")])
def test_what_is_wrong_with_the_judging_is_said_before_the_training(options, said, ratings, tmp_path, capsys):
    assert cli.main(["train", "--ratings", "ratings.csv", *options]) == 2
    assert f"{said}: " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_prepare_train_evaluate_and_recommend_follow_each_other_without_options(ratings, tmp_path, capsys):
    assert cli.main(["prepare"]) == 0
    printed = capsys.readouterr().out
    assert "480 ratings from 1 to 5" in printed
    assert "40 users, 12 to 12 ratings each; 30 items" in printed

    assert cli.main(["train", "--epochs", "1", "--dim", "3"]) == 0
    table = capsys.readouterr().out
    assert "maml-r" in table
    assert "fold-in" in table
    out = tmp_path / "runs" / "train"
    assert {"history.json", "learner", "learning_curve.png", "report.html", "report.json"} <= {
        path.name for path in out.iterdir()
    }
    report = json.loads((out / "report.json").read_text())
    assert set(report) == {"results", "spread", "seeds", "chance"}
    assert {"maml-r", "bias", "vb-fold-in", "random", "popularity"} <= set(report["results"])
    assert report["seeds"]["bias"]["rmse"] == [report["results"]["bias"]["rmse"]]

    page = (out / "report.html").read_text()
    for heading in ("maml-r</th>", "Cold start", "Learning curve"):
        assert heading in page

    assert cli.main(["evaluate", "--out", "again.json", "--report", "again.html"]) == 0
    assert "fold-in" in capsys.readouterr().out
    assert "Cold start" in (tmp_path / "again.html").read_text()
    again = json.loads((tmp_path / "again.json").read_text())["results"]
    assert again["maml-r"]["rmse"] == pytest.approx(report["results"]["maml-r"]["rmse"], rel=1e-6)
    assert again["bias"] == pytest.approx(report["results"]["bias"])

    assert cli.main(["recommend", "--rated", "i1:5, i2:1", "--k", "3", "--items", "titles.csv"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert all(title == f"Film, {item[1:]}" for item, _, title in lines)
    assert not {"i1", "i2"} & {item for item, *_ in lines}

    newcomer = read_prepared(out / "test.npz")
    assert cli.main(["recommend", "--user", str(newcomer.user_ids[0])]) == 0
    recommended = {line.split("\t")[0] for line in capsys.readouterr().out.splitlines()}
    seen = set(newcomer.item_ids[newcomer.items[newcomer.rows(0)]].tolist())
    assert len(recommended) == 10
    assert not recommended & seen


def test_without_enough_ratings_there_is_a_page_but_no_cold_start_curve(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [f"{user},{(user + step) % 8},{1 + (user * step) % 5}" for user in range(40) for step in range(4)]
    (tmp_path / "few.csv").write_text("\n".join(["user,item,rating", *lines]) + "\n")
    assert cli.main(["train", "--ratings", "few.csv", "--epochs", "1", "--dim", "2", "--support", "2"]) == 0
    told = "no cold-start curve: sizes: no user of the log has the 5 ratings that 0 known and 5 to predict need"
    assert told in capsys.readouterr().err
    page = (tmp_path / "runs" / "train" / "report.html").read_text()
    assert "Learning curve" in page
    assert "Cold start" not in page


def test_training_can_tune_and_a_study_can_be_continued(ratings, tmp_path, capsys):
    arguments = ["train", "--ratings", str(ratings), "--algorithm", "maml", "--epochs", "1", "--dim", "2", "--tune"]

    def trials():
        return json.loads((tmp_path / "runs" / "train" / "history.json").read_text())["trials"]

    assert cli.main([*arguments, "2"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["trial", "rmse", "outer_lr"]
    first = trials()
    assert len(first) == 2
    assert cli.main([*arguments, "4", "--resume"]) == 0
    assert len(trials()) == 4
    assert "<h2>Tuning</h2>" in (tmp_path / "runs" / "train" / "report.html").read_text()
    assert trials()[:2] == first
    assert cli.main([*arguments, "1"]) == 0
    assert trials() == first[:1]
    assert cli.main([*arguments, "1", "--valid", "0"]) == 2
    assert "valid: tuning needs ratings of other users to judge by, got None" in capsys.readouterr().err


def test_columns_have_the_names_that_one_says(ratings, capsys):
    text = ratings.read_text().replace("user,item,rating", "who,what,stars")
    ratings.write_text(text)
    columns = ["--user-column", "who", "--item-column", "what", "--rating-column", "stars"]
    assert cli.main(["prepare", *columns, "--out", "other.npz"]) == 0
    assert "480 ratings" in capsys.readouterr().out


def test_features_of_users_and_items_are_learned_from_and_kept(ratings, tmp_path, capsys):
    users = [f"u{user},{'fm'[user % 2]},{20 + user}" for user in range(40)]
    (tmp_path / "users.csv").write_text("\n".join(["user,gender,age", *users[:35]]) + "\n")
    items = [f"i{item},Film {item},{'Action|War' if item % 3 else 'Comedy'}" for item in range(33)]
    (tmp_path / "items.csv").write_text("\n".join(["item,title,genres", *items]) + "\n")
    tables = ["--users", "users.csv", "--items", "items.csv"]
    assert cli.main(["train", "--ratings", str(ratings), *tables, "--epochs", "1", "--dim", "2"]) == 0
    learner = mf.load("runs/train/learner")
    assert repr(learner.model.user_encoder.features) == "Features(35 rows; gender: category of 2, age: category of 35)"
    assert repr(learner.model.item_encoder.features) == "Features(33 rows; genres: bag of 3)"
    assert set(learner.item_ids.tolist()) == {f"i{item}" for item in range(33)}  # three of them nobody rated

    (tmp_path / "more.csv").write_text("\n".join(["id,gender,age", *users[35:]]) + "\n")  # where ids are called so
    capsys.readouterr()
    assert cli.main(["evaluate", "--ratings", str(ratings), "--users", "more.csv"]) == 0
    assert "maml-r" in capsys.readouterr().out
    assert cli.main(["recommend", "--user", "u3", "--ratings", str(ratings), "--items", "items.csv", "--k", "30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 33 - 12
    assert all(line.split("\t")[2].startswith("Film ") for line in lines)


def test_tables_without_features_or_of_other_ids_are_taken_for_what_they_are(ratings, tmp_path, capsys):
    run = ["train", "--ratings", str(ratings), "--epochs", "1", "--dim", "2"]
    assert cli.main([*run, "--items", "titles.csv"]) == 0
    assert mf.load("runs/train/learner").model.item_encoder is None
    (tmp_path / "other.csv").write_text("item,genre\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(30)))
    capsys.readouterr()
    assert cli.main([*run, "--items", "other.csv"]) == 0
    assert "item_features: none of the 30 ids is in the table, which has ids such as 0" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="none of the 30 ids"):
        assert len(mf.load("runs/train/learner").item_ids) == 30
    capsys.readouterr()
    (tmp_path / "semicolons.csv").write_text("user;age\nu1;20\n")
    assert cli.main([*run, "--users", "semicolons.csv"]) == 2
    assert capsys.readouterr().err.endswith("expected fields separated by ',', got the header 'user;age'\n")


def test_a_movielens_data_set_is_read_with_its_users_and_films(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rated = [
        f"{u}::{i}::{rng.integers(1, 6)}::{u + i}" for u in range(1, 31) for i in range(1, 21) if rng.random() < 0.5
    ]
    (tmp_path / "ratings.dat").write_text("\n".join(rated) + "\n")
    users = [f"{u}::{'FM'[u % 2]}::{25 + u % 3}::{u % 4}::0246{u % 10}" for u in range(1, 31)]
    (tmp_path / "users.dat").write_text("\n".join(users) + "\n")
    films = [f"{i}::Film \xe9 {i} ({1980 + i})::{'Drama|War' if i % 2 else 'Comedy'}" for i in range(1, 21)]
    (tmp_path / "movies.dat").write_bytes("\n".join(films).encode("latin-1"))
    files = ["--ratings", "ratings.dat", "--users", "users.dat", "--items", "movies.dat"]
    assert cli.main(["train", *files, "--epochs", "1", "--dim", "2"]) == 0
    features = mf.load("runs/train/learner").model.item_encoder.features
    assert repr(features) == "Features(20 rows; year: category of 20, genres: bag of 3)"
    capsys.readouterr()
    assert cli.main(["recommend", "--rated", "1:5", "--k", "2"]) == 0
    assert all("Film \xe9" in line for line in capsys.readouterr().out.splitlines())


def test_every_algorithm_can_be_trained(ratings, capsys):
    for algorithm in ("maml", "fomaml", "reptile", "meta-sgd"):
        arguments = ["--ratings", str(ratings), "--algorithm", algorithm, "--epochs", "1", "--dim", "2"]
        assert cli.main(["train", *arguments, "--out", algorithm]) == 0
        assert algorithm in capsys.readouterr().out


@pytest.mark.parametrize("with_times", [False, True])
def test_a_prepared_file_gives_the_same_log_back(tmp_path, with_times):
    log = mf.Interactions.from_arrays(
        ["b", "a", "a"], [10, 20, 10], [1.0, 2.5, 4.0], times=[3, 2, 1] if with_times else None
    )
    write_prepared(log, tmp_path / "log.npz")
    read = read_prepared(tmp_path / "log.npz")
    for name in ("offsets", "items", "ratings", "user_ids", "item_ids"):
        np.testing.assert_array_equal(getattr(read, name), getattr(log, name))
    assert (read.times is None) == (not with_times)
    if with_times:
        np.testing.assert_array_equal(read.times, log.times)


def test_unknown_items_are_told_on_one_line(ratings, capsys):
    assert cli.main(["train", "--ratings", str(ratings), "--epochs", "1", "--dim", "2"]) == 0
    capsys.readouterr()
    assert cli.main(["recommend", "--rated", "nonsense:5"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("metarec-fast: 1 items that the learner does not know are ignored")
    assert len(error.splitlines()) == 1


def test_doctor_says_that_the_fast_path_is_active(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("The fast path is active")
    for fact in ("torch", "threads", "C++ compiler", "_C_cuda", "_tasks", "_calls"):
        assert fact in printed


def test_doctor_says_why_the_fast_path_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor._library, "cpu", _library.Library("_C", False, "it was not built"))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "missing: it was not built" in printed
    assert printed.splitlines()[-1].startswith("The slow path is active")


@pytest.mark.parametrize(
    ("kernels", "verdict"),
    [
        (True, "The fast path is active, on the CPU and on the GPU."),
        (False, "The fast path is active on the CPU; on the"),
    ],
)
def test_doctor_says_what_a_gpu_is_worked_on_with(kernels, verdict, monkeypatch, tmp_path, capsys):
    (tmp_path / "_C_cuda.version").write_text("13.0.88\n")
    monkeypatch.setattr(doctor._library, "FOLDER", tmp_path)
    monkeypatch.setattr(doctor._library, "cuda", _library.Library("_C_cuda", kernels, "it does not load: no file"))
    monkeypatch.setattr(doctor.torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "13.0, A GPU (compute capability 9.0)" in printed
    assert "(operators on the GPU, built for CUDA 13.0.88)" in printed
    assert printed.splitlines()[-1].startswith(verdict)


def test_bench_runs_the_benchmark_of_the_source_tree(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.py").write_text("def main(arguments):\n    print(arguments)\n")
    monkeypatch.setattr(cli, "BENCHMARK", tmp_path / "run.py")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["bench", "--threads", "1", "--quick", "--workload", "user,deep"]) == 0
    expected = ["--threads", "1", "--out", "runs/bench", "--workload", "user,deep", "--quick"]
    assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.setattr(cli, "BENCHMARK", tmp_path / "nowhere.py")
    assert cli.main(["bench"]) == 2
    assert "it comes with the source tree" in capsys.readouterr().err


def test_version_and_help_are_printed(capsys):
    for arguments, text in ((["--version"], mf.__version__), (["train", "--help"], "(default: maml-r)")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
        assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--ratings", "nowhere.csv"], "--ratings: there is no nowhere.csv"),
        (["prepare", "--rating-column", "stars"], "has no column 'stars'"),
        (["prepare", "--out", "ratings.txt"], "ratings.txt: expected a name that ends in .npz"),
        (["prepare", "--items", "nowhere.csv"], "--items: there is no nowhere.csv"),
        (["prepare", "--items", "titles.csv", "--title-column", "name"], "has no column 'name'"),
        (["train", "--ratings", "ratings.csv", "--users", "titles.csv"], "titles.csv has no column 'user'"),
        (["train", "--ratings", "ratings.csv", "--users", "nothing.csv"], "--users: there is no nothing.csv"),
        (["train"], "--ratings: there is no ratings.npz; `metarec-fast prepare` makes it"),
        (["train", "--ratings", "ratings.csv", "--test", "2.0"], "test: a fraction of the users must be in [0, 1)"),
        (["train", "--ratings", "broken.npz"], "broken.npz: expected what `metarec-fast prepare` writes"),
        (["evaluate", "--learner", "nowhere"], "nowhere/learner.json: no such file"),
        (["recommend", "--learner", "nowhere"], "nowhere/learner.json: no such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(ratings, tmp_path, arguments, message, capsys):
    (tmp_path / "broken.npz").write_bytes(b"PK not a zip file")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_what_recommend_is_asked_must_make_sense(ratings, capsys):
    assert cli.main(["train", "--ratings", str(ratings), "--epochs", "1", "--dim", "2"]) == 0
    capsys.readouterr()
    for arguments, message in (
        (["--rated", "i1"], "--rated: expected \"item:rating,item:rating\", each item an id, got 'i1'"),
        (["--rated", "i1:good"], "got 'i1:good'"),
        (["--user", "nobody"], "--user: there is no user 'nobody' in runs/train/test.npz"),
        (["--user", "u1", "--rated", "i1:5"], "--rated and --user: expected one of them, got both"),
        (["--k", "31"], "k: must be in [1, 30]"),
    ):
        assert cli.main(["recommend", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_an_unknown_algorithm_is_refused_and_those_known_are_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--algorithm", "mamba"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'mamba'" in error
    assert "meta-sgd" in error


def test_a_broken_row_is_named_with_its_line(ratings, capsys):
    with ratings.open("a") as file:
        file.write("u1,i29,many\n")
    assert cli.main(["prepare"]) == 2
    assert "482" in capsys.readouterr().err
