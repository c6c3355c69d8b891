"""Training any module by torch.compile: the same numbers, few compilations, and what runs where it cannot be done."""

import warnings
from functools import partial

import pytest
import torch
from problems import Draw
from torch import nn

import metarec_fast as mf

pytestmark = pytest.mark.cpu


class Tower(nn.Module):
    def __init__(self, hidden=nn.GELU):
        super().__init__()
        self.num_items = 20
        self.items = nn.Embedding(20, 3)
        self.head = nn.Sequential(nn.Linear(3, 4), hidden(), nn.Linear(4, 1))

    def forward(self, items):
        return self.head(self.items(items)).squeeze(-1)


def make_learner(kind=Tower, algorithm=mf.MAML, loss="squared", **arguments):
    torch.manual_seed(0)
    model = mf.ModuleRecommender(kind().double(), loss=loss, **arguments)
    return algorithm(model, adapt=["head.*"], inner_lr=0.05, inner_steps=2)


@pytest.fixture
def quick(monkeypatch):
    """Traced and differentiated as compiled code is, but not translated to C++."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def step(learner, batch):
    learner.zero_grad()
    loss = learner(batch)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in learner.parameters()]


@pytest.mark.parametrize(("algorithm", "loss"), [(mf.MAML, "squared"), (mf.MAMLR, "squared"), (mf.MetaSGD, "bpr")])
def test_what_is_compiled_gives_the_same_numbers(algorithm, loss, quick):
    draw = Draw(0)
    batch = draw.batch((3, 0, 9, 5, 2), (2, 3, 1, 4, 5), 20, weights=True, negatives=2 if loss == "bpr" else 0)
    compiled, plain = (make_learner(Tower, algorithm, loss, chunk_size=3, compile=each) for each in (True, False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = step(compiled, batch)
    assert not compiled.tasks._compiled.fails
    torch.testing.assert_close(found, step(plain, batch), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(compiled.predict(batch), plain.predict(batch))
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch), found[0])


def test_batches_of_other_sizes_are_compiled_once_for_each_power_of_two(quick):
    learner = make_learner(chunk_size=4, compile=True)
    torch._dynamo.utils.counters.clear()
    for seed, sizes in enumerate([(5, 8, 2), (7, 1, 6, 3), (6, 6, 6, 6, 5, 8, 7), (8, 0, 3, 1)]):
        draw = Draw(seed)
        step(learner, draw.batch(sizes, tuple(3 for _ in sizes), 20))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiler_makes_it_the_same():
    draw = Draw(1, torch.float32)
    batch = draw.batch((3, 5), (2, 4), 20)
    torch.manual_seed(0)
    learners = [
        mf.MAML(mf.ModuleRecommender(Tower(), compile=each), adapt=["head.*"], inner_lr=0.05, inner_steps=1)
        for each in (True, False)
    ]
    learners[1].load_state_dict(learners[0].state_dict())
    torch.testing.assert_close(*(step(learner, batch) for learner in learners))
    assert not learners[0].tasks._compiled.fails


class Untraceable(nn.Module):
    """What vmap runs and the compiler does not trace."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return x.relu()


def test_where_it_cannot_be_compiled_it_runs_as_it_is_and_is_said_once(quick):
    batch = Draw(2).batch((3, 5), (2, 4), 20)
    learner, plain = (make_learner(partial(Tower, Untraceable), compile=each) for each in (True, False))
    with pytest.warns(RuntimeWarning, match="^compile: Tower runs as it is, for it could not be compiled: "):
        found = step(learner, batch)
    torch.testing.assert_close(found, step(plain, batch))
    step(learner, batch)  # without another warning, which would be an error


def test_what_a_module_cannot_do_for_many_users_is_said_as_without(quick):
    class Branching(Tower):
        def forward(self, items):
            scores = super().forward(items)
            return scores if scores.sum() > 0 else -scores

    with pytest.raises(RuntimeError, match="cannot run for many users at once"):
        step(make_learner(Branching, compile=True), Draw(3).batch((3, 5), (2, 4), 20))
