"""fit: it learns, stops, restores the best weights, and goes on after a kill as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import metarec_fast as mf
from metarec_fast.training import CHECKPOINT

NUM_ITEMS = 30
ALL = [mf.MAML, mf.FOMAML, mf.Reptile, mf.MetaSGD, mf.MAMLR]


def make_split(num_users=90, seed=0):
    """Ratings 1 … 5 of users who each rated about half of the items, by mood, a rank-two taste, and noise."""
    generator = np.random.default_rng(seed)
    taste, kind = generator.normal(size=(num_users, 2)), generator.normal(size=(2, NUM_ITEMS))
    mood = generator.normal(size=num_users)
    users, items = np.nonzero(generator.random((num_users, NUM_ITEMS)) < 0.5)
    ratings = 3 + 0.7 * (mood[:, None] + taste @ kind)[users, items] + 0.3 * generator.normal(size=len(users))
    log = mf.Interactions.from_arrays(users, items + 100, ratings.clip(1, 5))
    return mf.split_users(log, valid=0.2, test=0.2, seed=seed)


def make_learner(algorithm=mf.MAML, seed=0, loss="squared", sparse=False, **arguments):
    torch.manual_seed(seed)
    return algorithm(mf.DotRecommender(NUM_ITEMS, 2, loss=loss, sparse=sparse), **arguments)


def fit(learner, split, **arguments):
    settings = {"support": (2, 8), "epochs": 4, "progress": False, "batch_size": 16, **arguments}
    return learner.fit(split.train, split.valid, **settings)


def same_weights(one, other):
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


@pytest.mark.parametrize("algorithm", ALL)
def test_training_improves_on_the_start_and_adapting_beats_not_adapting(algorithm):
    split = make_split(num_users=200)
    learner = make_learner(algorithm, inner_lr=0.03 if algorithm is mf.Reptile else 0.1)
    outer_lr = None if algorithm in (mf.Reptile, mf.MAMLR) else 1e-2
    history = fit(learner, split, epochs=15, patience=None, outer_lr=outer_lr)
    assert history.best < history.epochs[0].valid
    tasks = mf.TaskSampler(split.test, support=8, query="rest", shuffle=False, batch_size=100)
    batch = next(iter(tasks))
    nothing = mf.Entries(batch.support.items[:0], batch.support.targets[:0], torch.zeros_like(batch.support.offsets))
    errors = [
        (learner.predict(mf.TaskBatch(support, batch.query)) - batch.query.targets).square().mean()
        for support in (batch.support, nothing)
    ]
    assert errors[0] < errors[1]


def test_the_history_tells_every_epoch_and_the_best_weights_are_restored(tmp_path):
    split = make_split()
    learner = make_learner()
    history = fit(learner, split, epochs=40, patience=2, outer_lr=0.1)
    assert [epoch.number for epoch in history.epochs] == list(range(len(history.epochs)))
    assert history.epochs[0].train_loss is None
    assert all(epoch.seconds > 0 and epoch.outer_lr > 0 for epoch in history.epochs)
    assert history.stopped_early
    assert len(history.epochs) - 1 == history.best_epoch + 2

    tasks = mf.TaskSampler(split.valid, support=(2, 8), query="rest", shuffle=False, batch_size=100)
    batch = next(iter(tasks))
    error = learner.predict(batch).clamp(*learner.rating_range) - batch.query.targets
    assert float(error.square().mean().sqrt()) == pytest.approx(history.best, rel=1e-5)

    path = tmp_path / "history.json"
    content = json.loads(history.to_json(path))
    assert content == json.loads(path.read_text())
    assert content["metric"] == "rmse"
    assert content["best_epoch"] == history.best_epoch
    assert content["epochs"][1]["train_loss"] == history.epochs[1].train_loss


def test_the_learning_rate_warms_up_and_decays():
    history = fit(make_learner(), make_split(), epochs=20, patience=None, outer_lr=1e-3)
    rates = [epoch.outer_lr for epoch in history.epochs[1:]]
    assert max(rates) <= 1e-3
    top = rates.index(max(rates))
    assert rates[0] < max(rates)
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] < 0.05 * 1e-3


def test_training_without_validation_runs_all_epochs_and_keeps_the_last_weights():
    split = make_split()
    learner = make_learner()
    history = learner.fit(split.train, support=5, epochs=3, progress=False)
    assert len(history.epochs) == 4
    assert history.best is None
    assert history.best_epoch is None


def test_a_further_fit_trains_on():
    split = make_split()
    learner = make_learner()
    first = fit(learner, split, epochs=6, patience=None, outer_lr=1e-2)
    second = fit(learner, split, epochs=1, patience=None)
    assert second.epochs[0].valid == pytest.approx(first.best, rel=1e-6)


def test_logistic_models_train_on_clicks():
    split = make_split(num_users=200)
    logs = [mf.Interactions.from_arrays(log.user_ids.repeat(log.sizes()), log.item_ids[log.items], log.ratings > 3)
            for log in (split.train, split.valid)]  # fmt: skip
    learner = make_learner(loss="logistic", inner_lr=0.5)
    history = learner.fit(*logs, support=(2, 8), epochs=10, outer_lr=2e-2, progress=False)
    assert history.metric == "log_loss"
    assert history.best < history.epochs[0].valid < 0.75


@pytest.mark.cpu
def test_the_same_seed_gives_the_same_bits_whatever_the_threads():
    split = make_split()
    one, other, different = make_learner(), make_learner(), make_learner()
    threads = torch.get_num_threads()
    fit(one, split)
    torch.set_num_threads(2 if threads == 1 else 1)
    fit(other, split)
    torch.set_num_threads(threads)
    fit(different, split, seed=1)
    assert same_weights(one, other)
    assert not same_weights(one, different)


@pytest.mark.parametrize("algorithm", [mf.MAMLR, mf.Reptile])
def test_sparse_tables_train_with_the_default_optimisers(algorithm):
    history = fit(make_learner(algorithm, sparse=True), make_split())
    assert len(history.epochs) > 1


@pytest.mark.parametrize("algorithm", [mf.MAML, mf.MetaSGD, mf.MAMLR])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_training_sparse_tables_by_sgd_is_training_dense_ones(algorithm, clip):
    split, states = make_split(), []
    for sparse in (False, True):
        learner = make_learner(algorithm, sparse=sparse)
        if sparse:
            tables = [module.weight for module in learner.modules() if isinstance(module, torch.nn.Embedding)]
            others = [value for value in learner.parameters() if all(value is not table for table in tables)]
            optimizer = [torch.optim.SGD(others, lr=0.1), mf.SparseSGD(tables, lr=0.1)]
        else:
            optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        fit(learner, split, epochs=2, patience=None, optimizer=optimizer, clip=clip)
        states.append(learner.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("algorithm", [mf.MAML, mf.MAMLR])
def test_the_default_optimisers_train_sparse_tables_as_torchs_do(algorithm):
    split, states = make_split(), []
    for replace in (False, True):
        learner = make_learner(algorithm, sparse=True)
        dense, sparse = learner.default_optimizers(1e-2)
        assert type(sparse) is mf.SparseAdam
        if replace:
            groups = [{name: group[name] for name in ("params", "lr")} for group in sparse.param_groups]
            sparse = torch.optim.SparseAdam(groups, betas=(0.9, 0.99))
        fit(learner, split, epochs=2, patience=None, optimizer=[dense, sparse])
        states.append(learner.state_dict())
    for name, value in states[0].items():
        # Adam divides gradients near 0 by their own size, so that what rounding they carry is seen in a step of 0.01.
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.cpu
@pytest.mark.parametrize("algorithm", [mf.MAML, mf.MAMLR])
def test_sparse_training_gives_the_same_bits_whatever_the_threads(algorithm):
    split = make_split()
    one, other = make_learner(algorithm, sparse=True), make_learner(algorithm, sparse=True)
    threads = torch.get_num_threads()
    fit(one, split)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        fit(other, split)
    finally:
        torch.set_num_threads(threads)
    assert same_weights(one, other)


def test_an_own_optimiser_is_used_and_gradients_are_clipped():
    learner = make_learner()
    learner.initialize(make_split().train)
    before = learner.model.item_embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    learner.fit(make_split().train, support=5, epochs=1, optimizer=optimizer, clip=1e-3, batch_size=54, progress=False)
    moved = (learner.model.item_embedding.weight.detach() - before).norm()
    assert 0 < moved <= 1e-3 * 1.0001


def test_logs_are_mapped_by_original_ids_and_unknown_items_are_ignored_with_one_warning():
    split = make_split()
    learner = make_learner()
    fit(learner, split, epochs=1)
    users = split.train.user_ids.repeat(split.train.sizes())
    items = split.train.item_ids[split.train.items]
    # The same ratings among items numbered otherwise, and five ratings of an item that is new.
    renumbered = mf.Interactions.from_arrays(
        [*users, *split.train.user_ids[:5]], [*(-items), *[-7] * 5], [*split.train.ratings, *[3.0] * 5]
    )
    learner.item_ids = -split.train.item_ids
    with pytest.warns(UserWarning, match="5 ratings of items that the learner does not know are ignored") as caught:
        history = learner.fit(renumbered, epochs=1, support=5, progress=False)
    assert len(caught) == 1
    assert len(history.epochs) == 2


def test_the_progress_bar_is_one_line_with_loss_and_validation_figure(capsys):
    fit(make_learner(), make_split(), epochs=2, progress=True)
    shown = capsys.readouterr().err
    assert "MAML" in shown
    assert "loss=" in shown
    assert "rmse=" in shown
    assert shown.count("\n") == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from test_training import *

split, learner = make_split(), make_learner(mf.{algorithm}, sparse={sparse})
forward, steps = learner.forward, 0

def forward_until_killed(batch):
    global steps
    steps += 1
    if steps == {steps}:
        {death}
    return forward(batch)

learner.forward = forward_until_killed
fit(learner, split, epochs=4, patience=None, checkpoint={checkpoint!r})
"""


def run_until_killed(tmp_path, steps, death, algorithm="MAML", sparse=False):
    script = KILLED.format(
        folder=str(Path(__file__).parent), steps=steps, death=death, checkpoint=str(tmp_path), algorithm=algorithm,
        sparse=sparse,
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, sparse):
    death = "os.kill(os.getpid(), signal.SIGKILL)"
    done = run_until_killed(tmp_path, steps=10, death=death, algorithm="MAMLR", sparse=sparse)
    assert done.returncode == -signal.SIGKILL, done.stderr
    split = make_split()
    resumed, whole = make_learner(mf.MAMLR, seed=5, sparse=sparse), make_learner(mf.MAMLR, sparse=sparse)
    history = fit(resumed, split, patience=None, checkpoint=tmp_path, resume=True)
    expected = fit(whole, split, patience=None)
    assert same_weights(resumed, whole)
    figures = [(epoch.train_loss, epoch.valid, epoch.outer_lr) for epoch in history.epochs]
    assert figures == [(epoch.train_loss, epoch.valid, epoch.outer_lr) for epoch in expected.epochs]


def test_ctrl_c_leaves_a_valid_checkpoint_and_raises(tmp_path):
    done = run_until_killed(tmp_path, steps=6, death="os.kill(os.getpid(), signal.SIGINT)")
    assert "KeyboardInterrupt" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]
    split = make_split()
    resumed, whole = make_learner(seed=5), make_learner()
    fit(resumed, split, patience=None, checkpoint=tmp_path, resume=True)
    fit(whole, split, patience=None)
    assert same_weights(resumed, whole)


def test_ctrl_c_leaves_the_best_weights_so_far_in_the_learner():
    split = make_split()
    learner, reference = make_learner(), make_learner()
    expected = fit(reference, split, epochs=1, patience=None)  # the first epochs of both warm up alike
    forward, steps = learner.forward, 0

    def interrupted(batch):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return forward(batch)

    learner.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        fit(learner, split, epochs=1, patience=None)
    reference.initialize(split.train)
    tasks = mf.TaskSampler(split.valid, support=(2, 8), query="rest", shuffle=False)
    batch = next(iter(tasks))
    error = learner.predict(batch).clamp(*learner.rating_range) - batch.query.targets
    assert float(error.square().mean().sqrt()) == pytest.approx(expected.epochs[0].valid, rel=1e-5)


def test_a_finished_run_that_is_resumed_is_finished(tmp_path):
    split = make_split()
    learner, again = make_learner(), make_learner(seed=7)
    history = fit(learner, split, checkpoint=tmp_path)
    same = fit(again, split, checkpoint=tmp_path, resume=True)
    assert same_weights(learner, again)
    assert same.epochs == history.epochs


def test_a_run_begun_on_a_gpu_can_be_resumed_without_one(tmp_path):
    split = make_split()
    fit(make_learner(), split, checkpoint=tmp_path, epochs=2)
    state = torch.load(tmp_path / CHECKPOINT)
    torch.save({**state, "random_cuda": [torch.zeros(16, dtype=torch.uint8)]}, tmp_path / CHECKPOINT)
    assert len(fit(make_learner(seed=7), split, checkpoint=tmp_path, resume=True, epochs=2).epochs) == 3


def test_resuming_where_there_is_no_checkpoint_starts_anew(tmp_path):
    learner = make_learner()
    history = fit(learner, make_split(), checkpoint=tmp_path / "new", resume=True, epochs=1)
    assert len(history.epochs) == 2
    assert (tmp_path / "new" / CHECKPOINT).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 9}, "epochs: the checkpoint .* was made with 2, got 9"),
        ({"outer_lr": 0.5}, "outer_lr: the checkpoint"),
        ({"support": 3}, "support: the checkpoint"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, change, message):
    split = make_split()
    fit(make_learner(), split, checkpoint=tmp_path, epochs=2)
    with pytest.raises(ValueError, match=message):
        fit(make_learner(), split, checkpoint=tmp_path, resume=True, **{"epochs": 2, **change})


def test_resuming_with_other_ratings_or_another_learner_is_refused(tmp_path):
    fit(make_learner(), make_split(), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="train: the checkpoint"):
        fit(make_learner(), make_split(seed=1), checkpoint=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"learner: the checkpoint .* was made with 'MAML', got 'FOMAML'"):
        fit(make_learner(mf.FOMAML), make_split(), checkpoint=tmp_path, resume=True)


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=f"{CHECKPOINT}: not a training checkpoint"):
        fit(make_learner(), make_split(), checkpoint=tmp_path, resume=True)


def test_a_diverging_inner_loop_is_explained():
    learner = make_learner(inner_lr=1e3, inner_steps=40)
    with pytest.raises(
        FloatingPointError, match=r"epoch 1, step 1: the inner loop diverges, inner_lr=1000.0 is likely"
    ):
        fit(learner, make_split())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": -1}, ValueError, "epochs: must be ≥ 0, got -1"),
        ({"epochs": 1.5}, TypeError, "epochs: expected an int, got 1.5"),
        ({"patience": 0}, ValueError, "patience: must be ≥ 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: must be ≥ 1, got 0"),
        ({"clip": 0.0}, ValueError, "clip: must be > 0, got 0.0"),
        ({"outer_lr": 0.0}, ValueError, "outer_lr: must be > 0"),
        ({"resume": True}, ValueError, "resume: needs checkpoint"),
        ({"support": "rest"}, ValueError, "support and query: only one of them"),
        ({"order": "size"}, ValueError, "order: expected"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fit(make_learner(), make_split(), **arguments)


def test_a_learning_rate_beside_an_optimiser_is_refused():
    learner = make_learner()
    with pytest.raises(ValueError, match="outer_lr: the optimizer given has its own"):
        fit(learner, make_split(), optimizer=torch.optim.SGD(learner.parameters(), lr=0.1), outer_lr=0.1)


def test_a_log_with_another_catalogue_than_the_model_is_refused():
    learner = mf.MAML(mf.DotRecommender(NUM_ITEMS + 1, 2))
    with pytest.raises(ValueError, match=f"log: expected {NUM_ITEMS + 1} items, like the model, got {NUM_ITEMS}"):
        fit(learner, make_split())


def test_a_missing_tensorboard_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"tensorboard: pip install 'metarec-fast\[tensorboard\]'"):
        fit(make_learner(), make_split(), tensorboard=tmp_path)


def test_figures_go_to_tensorboard(monkeypatch, tmp_path):
    written = []

    class SummaryWriter:
        def __init__(self, directory):
            written.append(directory)

        def add_scalar(self, name, value, number):
            written.append((name, number))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    fit(make_learner(), make_split(), epochs=1, tensorboard=tmp_path)
    assert written[0] == str(tmp_path)
    assert written[-1] == "closed"
    assert {("train/loss", 1), ("valid/rmse", 0), ("valid/rmse", 1), ("outer_lr", 1)} <= set(written[1:-1])
