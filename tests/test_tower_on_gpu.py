"""What only a GPU shows of an MLP tower: graphs, waiting, and that learners do there what they do on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import Draw
from test_cuda import captured, make_log
from towers import draw_tower, gradients_of

import metarec_fast as mf
from metarec_fast import functional as F
from metarec_fast._mlp_arguments import Tower
from metarec_fast.results import TowerMetaStep

pytestmark = pytest.mark.gpu

NUM_ITEMS, DIM = 60, 4
LEARNERS: dict[str, Callable[[str], mf.Learner]] = {
    "all of it": lambda loss: mf.MAML(tower(loss)),
    "its last layer": lambda loss: mf.FOMAML(tower(loss), adapt=["tower.4.*"]),
    "rates of tensors": lambda loss: mf.MetaSGD(tower(loss), rates="tensor"),
}
LOSSES = ("squared", "bpr")


def tower(loss: str) -> mf.MLPRecommender:
    torch.manual_seed(0)
    return mf.MLPRecommender(NUM_ITEMS, DIM, (9, 5), "gelu", loss)


def problem(sizes: tuple[int, ...] = (3, 0, 1, 13, 40, 5), **kind: bool) -> tuple[Tower, mf.TaskBatch]:
    draw = Draw(0, torch.float32)
    here, batch = draw_tower(draw, num_tasks=len(sizes)), draw.batch(sizes, **kind)
    layers = [(weight.cuda(), bias.cuda()) for weight, bias in here.layers]
    there = replace(here, user_part=here.user_part.cuda(), item_table=here.item_table.cuda(), layers=layers)
    return there, batch.to("cuda")


def meta_step(there: Tower, batch: mf.TaskBatch) -> TowerMetaStep:
    rates = torch.full((2, 2 * len(there.layers)), 0.02, device="cuda")
    return F.mlp_meta_step(there.user_part, there.item_table, there.layers, batch, inner_lr=rates, inner_steps=2)


def test_a_captured_meta_step_gives_on_replay_what_it_gives_uncaptured():
    there, batch = problem()
    graph, result = captured(lambda: meta_step(there, batch))
    for seed in range(3):  # other numbers in the same memory
        there.item_table.copy_(Draw(seed + 1, torch.float32).normal(*there.item_table.shape) / 3)
        graph.replay()
        for replayed, called in zip(gradients_of(result), gradients_of(meta_step(there, batch)), strict=True):
            assert torch.equal(replayed, called)


@pytest.mark.parametrize("kind", [{}, {"weights": True}])
def test_no_operator_waits_for_the_gpu(kind, patience):
    there, batch = problem(**kind)
    leaves = [there.user_part.clone().requires_grad_(), there.item_table.clone().requires_grad_()]

    def everything():
        meta_step(there, batch)
        F.mlp_adapt_and_score(*leaves, there.layers, batch, inner_lr=0.02, activation="gelu").sum().backward()

    everything()
    patience()
    everything()


def test_the_same_problem_gives_the_same_bits_every_time():
    there, batch = problem(tuple(range(90)))
    first = gradients_of(meta_step(there, batch))
    for _ in range(5):
        again = gradients_of(meta_step(there, batch))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", LEARNERS)
def test_a_training_step_on_a_batch_that_is_there_does_not_wait_for_the_gpu(kind, loss, patience):
    learner = LEARNERS[kind](loss).to("cuda")
    negatives = 2 if loss == "bpr" else 0
    batches = list(mf.TaskSampler(make_log(), (3, 8), "rest", 40, negatives=negatives, device="cuda"))
    optimizers = learner.default_optimizers()

    def step(batch):
        for optimizer in optimizers:
            optimizer.zero_grad()
        learner(batch).backward()
        for optimizer in optimizers:
            optimizer.step()

    step(batches[0])
    patience()
    step(batches[1])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", LEARNERS)
def test_training_on_the_gpu_is_training_on_the_cpu_up_to_rounding(kind, loss):
    split = mf.split_users(make_log(), valid=0.2, test=0.2, seed=0)
    figures = []
    for device in ("cpu", "cuda"):
        learner = LEARNERS[kind](loss).to(device)
        history = learner.fit(
            split.train, valid=split.valid, support=(3, 8), epochs=3, patience=None, batch_size=32, progress=False
        )
        assert learner.model.offset.device.type == device
        values = [value for epoch in history.epochs[1:] for value in (epoch.train_loss, epoch.valid)]
        figures.append([*values, mf.evaluate(learner, split.test, support=5, k=5).results[learner.name]["ndcg@5"]])
    # Adam's steps do not shrink with the gradient: where that is rounding, so are they.
    np.testing.assert_allclose(figures[1], figures[0], rtol=1e-3)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_learner_adapts_a_new_user_there_as_here(kind):
    learner = LEARNERS[kind]("squared")
    learner.initialize(make_log())
    learner.item_ids = [f"m{i}" for i in range(NUM_ITEMS)]
    expected = learner.adapt(["m3", "m9"], [5.0, 1.0]).predict(["m1", "m2"])
    there = learner.to("cuda").adapt(["m3", "m9"], [5.0, 1.0])
    np.testing.assert_allclose(there.predict(["m1", "m2"]), expected, rtol=1e-5)
