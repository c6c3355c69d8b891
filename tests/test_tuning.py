"""fit(tune=...): the best trial's hyperparameters and weights end up in the learner, and a study goes on."""

import json
import sys

import optuna
import pytest
import torch
from test_training import make_learner, make_split, same_weights

import metarec_fast as mf

ALL = [mf.MAML, mf.FOMAML, mf.Reptile, mf.MetaSGD, mf.MAMLR]


def tune(learner, split, budget, **arguments):
    settings = {"support": (2, 8), "epochs": 2, "progress": False, "batch_size": 16, **arguments}
    return learner.fit(split.train, split.valid, tune=budget, **settings)


@pytest.mark.parametrize("algorithm", ALL)
def test_the_learner_becomes_the_best_trial(algorithm, tmp_path):
    split, learner = make_split(), make_learner(algorithm)
    model, defaults = learner.model, dict(learner.hyperparameters)
    history = tune(learner, split, 6)
    assert [trial.number for trial in history.trials] == list(range(6))
    first, best = history.trials[0], min(history.trials, key=lambda trial: trial.valid)
    constructed = {name: value for name, value in best.hyperparameters.items() if name != "outer_lr"}
    assert first.hyperparameters["outer_lr"] == algorithm.default_outer_lr
    assert {**defaults, **first.hyperparameters} == {**defaults, "outer_lr": algorithm.default_outer_lr}
    assert learner.hyperparameters == {**defaults, **constructed}
    assert history.best == best.valid <= first.valid
    assert len(history.epochs) == best.epochs + 1

    assert learner.model is model
    alone = algorithm(make_learner(algorithm).model, **learner.hyperparameters)
    outer_lr = best.hyperparameters["outer_lr"]
    alone.fit(split.train, split.valid, support=(2, 8), epochs=2, progress=False, batch_size=16, outer_lr=outer_lr)
    assert same_weights(alone, learner)
    learner.save(tmp_path)
    loaded = mf.load(tmp_path)
    assert same_weights(loaded, learner)
    assert loaded.hyperparameters == learner.hyperparameters
    assert loaded.rating_range == learner.rating_range == alone.rating_range
    assert loaded.item_ids.tolist() == learner.item_ids.tolist() == split.train.item_ids.tolist()


def test_a_seed_gives_the_same_trials_and_weights_and_another_others():
    split, learners = make_split(), [make_learner() for _ in range(3)]
    histories = [tune(learner, split, 4, seed=seed) for learner, seed in zip(learners, (1, 1, -2), strict=True)]
    assert histories[0].trials == histories[1].trials
    assert same_weights(learners[0], learners[1])
    searched = [[trial.hyperparameters for trial in history.trials] for history in histories]
    assert searched[0][0] == searched[2][0]
    assert len({trial["inner_lr"] for trial in searched[0]}) == 4
    assert searched[0][1:] != searched[2][1:]


def test_a_study_that_is_continued_goes_on_as_if_it_had_never_ended(tmp_path):
    split, whole, begun, continued, shown = make_split(), *(make_learner() for _ in range(4))
    expected = tune(whole, split, 14)
    path = tmp_path / "new" / "study.jsonl"
    first = tune(begun, split, 5, study=path)
    assert first.trials == expected.trials[:5]
    history = tune(continued, split, 14, study=path)
    assert history.trials == expected.trials
    assert same_weights(whole, continued)
    again = tune(shown, split, 3, study=path)
    assert again.trials == expected.trials
    assert same_weights(whole, shown)
    assert [epoch.valid for epoch in again.epochs] == [epoch.valid for epoch in expected.epochs]


class Watched(mf.MAML):
    """Calls `watch(learner)` with every batch."""

    def forward(self, batch):
        type(self).watch(self)
        return super().forward(batch)


def test_ctrl_c_leaves_the_best_trial_so_far_and_the_study_can_be_continued(tmp_path):
    split, learner, best = make_split(), make_learner(Watched), make_learner(Watched)
    Watched.watch = lambda learner: None
    expected = tune(best, split, 2)
    seen = []

    def interrupt_the_third(learner):
        if id(learner) not in seen:
            seen.append(id(learner))
            kept.append(learner)
        if len(seen) == 3:
            raise KeyboardInterrupt

    kept = []  # so that no id comes again
    Watched.watch = interrupt_the_third
    path = tmp_path / "study.jsonl"
    with pytest.raises(KeyboardInterrupt):
        tune(learner, split, 4, study=path)
    assert same_weights(learner, best)
    assert learner.hyperparameters == best.hyperparameters

    Watched.watch = lambda learner: None
    continued, whole = make_learner(Watched), make_learner(Watched)
    history = tune(continued, split, 4, study=path)
    assert history.trials[:2] == expected.trials
    assert history.trials == tune(whole, split, 4).trials
    assert same_weights(continued, whole)


def test_a_trial_during_which_the_process_was_killed_is_run_again(tmp_path):
    split, path, whole = make_split(), tmp_path / "study.jsonl", make_learner()
    tune(make_learner(), split, 2, study=path)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    killed = optuna.load_study(study_name="metarec_fast", storage=storage).ask()
    killed.suggest_float("outer_lr", 1e-3, 1e-1, log=True)
    continued = make_learner()
    assert tune(continued, split, 4, study=path).trials == tune(whole, split, 4).trials
    assert same_weights(continued, whole)


def test_trials_that_diverge_count_and_are_told(capsys):
    def diverge(learner):
        if learner.inner_lr != 0.1:
            raise FloatingPointError("too large")

    Watched.watch = diverge
    learner = make_learner(Watched)
    history = tune(learner, make_split(), 3, progress=True)
    assert [trial.valid is None for trial in history.trials] == [False, True, True]
    assert [trial.epochs for trial in history.trials] == [2, None, None]
    assert learner.inner_lr == 0.1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["trial", "rmse", "outer_lr", "inner_lr", "inner_steps", "epochs"]
    assert lines[1].split() == ["0", f"{history.best:.4f}*", "0.01", "0.1", "5", "2"]
    assert lines[2].split()[:2] == ["1", "–"]
    assert len(lines) == 4

    def always(learner):
        raise FloatingPointError("too large")

    Watched.watch = always
    with pytest.raises(FloatingPointError, match="tune: the loss became infinite or NaN in each of 2 trials"):
        tune(make_learner(Watched), make_split(), 2)


@pytest.mark.parametrize(
    ("algorithm", "arguments", "outer_lr", "searched"),
    [
        (mf.MAML, {}, None, {"outer_lr", "inner_lr", "inner_steps"}),
        (mf.MAML, {"inner_lr": 50.0}, 1e-3, {"inner_lr", "inner_steps"}),
        (mf.MAML, {"inner_steps": 0}, None, {"outer_lr"}),
        (mf.MAMLR, {}, None, {"outer_lr", "inner_steps", "momentum", "extra_count"}),
        (mf.MAMLR, {"warm_start": False, "momentum": 0, "extra_count": 0}, 1e-3, {"inner_lr", "inner_steps"}),
        (mf.MAMLR, {"inner_steps": "exact"}, None, {"outer_lr", "extra_count"}),
    ],
)
def test_what_matters_is_searched_around_where_it_stands(algorithm, arguments, outer_lr, searched):
    learner = make_learner(algorithm, **arguments)
    start = {**learner.hyperparameters, "outer_lr": outer_lr or learner.default_outer_lr}
    history = tune(learner, make_split(), 3, outer_lr=outer_lr, epochs=0)
    for trial in history.trials:
        assert set(trial.hyperparameters) == searched
        for name in searched - {"inner_steps", "momentum"}:
            assert start[name] / 10.001 <= trial.hyperparameters[name] <= start[name] * 10.001
        assert trial.hyperparameters.get("inner_steps", 1) in range(1, 11)
        assert 0 <= trial.hyperparameters.get("momentum", 0) <= 0.9
    assert all(history.trials[0].hyperparameters[name] == start[name] for name in searched)


def test_the_history_on_disk_has_the_trials(tmp_path):
    history = tune(make_learner(), make_split(), 2, study=tmp_path / "study.jsonl")
    trials = json.loads(history.to_json())["trials"]
    assert [mf.Trial(**trial) for trial in trials] == history.trials
    untuned = make_learner().fit(make_split().train, epochs=0, progress=False)
    assert "trials" not in json.loads(untuned.to_json())
    assert untuned.trials_table() == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, "epochs: the study .* was made with 2, got 3"),
        ({"seed": 1}, "seed: the study .* was made with 0, got 1"),
        ({"outer_lr": 0.1}, "outer_lr: the study .* was made with None, got 0.1"),
    ],
)
def test_a_study_of_other_settings_is_refused(tmp_path, change, message):
    tune(make_learner(), make_split(), 1, study=tmp_path / "study.jsonl")
    with pytest.raises(ValueError, match=message):
        tune(make_learner(), make_split(), 2, study=tmp_path / "study.jsonl", **change)


def test_a_study_of_another_learner_or_other_ratings_is_refused(tmp_path):
    path = tmp_path / "study.jsonl"
    tune(make_learner(), make_split(), 1, study=path)
    with pytest.raises(ValueError, match="learner: the study .* was made with 'MAML', got 'MetaSGD'"):
        tune(make_learner(mf.MetaSGD), make_split(), 2, study=path)
    with pytest.raises(ValueError, match="hyperparameters: the study"):
        tune(make_learner(inner_lr=0.2), make_split(), 2, study=path)
    with pytest.raises(ValueError, match="train: the study"):
        tune(make_learner(), make_split(seed=1), 2, study=path)


def test_a_file_that_is_no_study_is_named(tmp_path):
    for content in ("nonsense\nmore\n", '{"no": "journal"}\n', "[1]\n", "\u00e4\n"):
        (tmp_path / "study.jsonl").write_text(content)
        with pytest.raises(ValueError, match="study: .*study.jsonl is no journal of a study"):
            tune(make_learner(), make_split(), 1, study=tmp_path / "study.jsonl")


def test_bad_arguments_are_refused_by_name(tmp_path):
    split, learner = make_split(), make_learner()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    for message, arguments in (
        (r"tune: must be ≥ 1, got 0", {"tune": 0}),
        (r"tune: expected an int, got bool True", {"tune": True}),
        (r"valid: tuning needs ratings of other users to judge by, got None", {"tune": 2, "valid": None}),
        (r"checkpoint: does not go with tune", {"tune": 2, "checkpoint": tmp_path}),
        (r"optimizer: does not go with tune", {"tune": 2, "optimizer": optimizer}),
        (r"study: needs tune", {"study": tmp_path / "study.jsonl"}),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            learner.fit(split.train, **{"valid": split.valid, "progress": False, **arguments})
    with pytest.raises(ValueError, match="tune: nothing is left to search"):
        tune(make_learner(inner_steps=0), split, 2, outer_lr=0.1)
    learner.fit(split.train, epochs=1, progress=False)
    with pytest.raises(ValueError, match="tune: expected a new learner"):
        tune(learner, split, 2)


def test_a_missing_optuna_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"tuning needs Optuna: pip install 'metarec-fast\[tune\]'"):
        tune(make_learner(), make_split(), 2)
