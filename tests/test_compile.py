"""torch.compile on ragged batches, whose sizes differ from one to the next: what it compiled serves nearly all."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from metarec_fast import MAML, DotRecommender, Interactions, MetaSGD, Reptile, TaskSampler
from metarec_fast import functional as F

NUM_ITEMS = 400
# The first batch is compiled for its sizes, the second for any; then for a number that both had by chance, and once for
# each power of two above the largest support, of which there are three here.
MOST = 6


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def batches(device="cpu"):
    rng = np.random.default_rng(0)
    sizes = rng.integers(4, 100, 300)
    users = np.repeat(np.arange(300), sizes)
    items = rng.integers(0, NUM_ITEMS, len(users))
    items[:NUM_ITEMS] = np.arange(NUM_ITEMS)
    log = Interactions.from_arrays(users, items, rng.random(len(users)))
    sampler = TaskSampler(log, support=(1, 90), query="rest", batch_size=12)
    found = [batch.to(device) for batch in sampler]
    assert len(found) == 25
    assert len({batch.support.max_size for batch in found}) > 5
    assert len({batch.support.size_bound for batch in found}) <= 3
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it
@pytest.mark.parametrize("cls", [MAML, MetaSGD, Reptile])
def test_a_learner_is_compiled_a_few_times_for_many_ragged_batches(cls):
    learner = cls(DotRecommender(NUM_ITEMS, 8))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(learner, backend=counter, fullgraph=True)
    for batch in batches():
        expected, actual = learner(batch), compiled(batch)
        torch.testing.assert_close(actual, expected)
        actual.backward()
    assert counter.frame_count <= MOST


def test_scores_and_meta_gradients_are_compiled_a_few_times_for_many_ragged_batches():
    start, table, bias = torch.zeros(8, requires_grad=True), torch.randn(NUM_ITEMS, 8) / 3, torch.zeros(NUM_ITEMS)
    for run in (
        lambda batch: F.meta_step(start, table, bias, batch).loss,
        lambda batch: F.adapt_and_score(start, table, bias, batch).sum(),
        lambda batch: F.adapt(start, table, bias, batch.support).user.sum(),
    ):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(run, backend=counter, fullgraph=True)
        for batch in batches():
            actual = compiled(batch)
            torch.testing.assert_close(actual, run(batch))
            actual.backward()
        assert counter.frame_count <= MOST


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # it looks there
def test_a_learner_whose_items_have_sparse_gradients_runs_uncompiled_under_torch_compile():
    learner = MAML(DotRecommender(NUM_ITEMS, 8, sparse=True))
    compiled = torch.compile(learner, backend="aot_eager")
    for batch in batches()[:2]:
        learner.zero_grad()
        compiled(batch).backward()
        actual = learner.model.item_embedding.weight.grad
        learner.zero_grad()
        learner(batch).backward()
        assert actual.is_sparse
        torch.testing.assert_close(actual, learner.model.item_embedding.weight.grad)
