"""What only a GPU shows: graphs, streams, waiting, and that learners do there what they do on the CPU."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from problems import Draw

import metarec_fast as mf
from metarec_fast import functional as F
from metarec_fast.results import SparseRows

pytestmark = pytest.mark.gpu

LEARNERS = [mf.MAML, mf.FOMAML, mf.Reptile, mf.MetaSGD, mf.MAMLR]
NUM_ITEMS, DIM = 60, 7


def problem(device: torch.device | str = "cuda", sizes: tuple[int, ...] = (3, 0, 1, 13, 40, 5), **kind: object):
    """(user_init, item_table, item_bias) and a batch."""
    draw = Draw(0, torch.float32)
    model, batch = draw.model(NUM_ITEMS, DIM), draw.batch(sizes, **kind)
    return tuple(value.to(device) for value in (model.user_init, model.item_table, model.item_bias)), batch.to(device)


def numbers(result: mf.MetaStep) -> list[torch.Tensor]:
    """The loss, and every gradient, rows too."""
    gradients = [grad.rows if isinstance(grad, SparseRows) else grad for grad in result.grads.values()]
    return [result.loss, *gradients]


def make_log(num_users: int = 120, seed: int = 0) -> mf.Interactions:
    rng = np.random.default_rng(seed)
    taste, kind = rng.normal(size=(num_users, 2)), rng.normal(size=(2, NUM_ITEMS))
    users, items = np.nonzero(rng.random((num_users, NUM_ITEMS)) < 0.5)
    ratings = 3 + 0.7 * (taste @ kind)[users, items] + 0.3 * rng.normal(size=len(users))
    return mf.Interactions.from_arrays(users, items, ratings)


def make_learner(algorithm: type[mf.Learner], sparse: bool = False) -> mf.Learner:
    torch.manual_seed(0)
    return algorithm(mf.DotRecommender(NUM_ITEMS, DIM, sparse=sparse))


def captured(work):
    """A graph of the work, and what it returned; the work is done once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


def test_the_kernels_of_the_gpu_are_loaded():
    from metarec_fast import _library

    assert _library.cuda.loaded, _library.cuda.reason


@pytest.mark.parametrize("adapt", ["user", "all"])
def test_a_captured_meta_step_gives_on_replay_what_it_gives_uncaptured(adapt):
    model, batch = problem()
    settings = {"inner_lr": torch.tensor(0.05, device="cuda"), "adapt": adapt}

    graph, result = captured(lambda: F.meta_step(*model, batch, **settings))

    for seed in range(3):  # other numbers in the same memory
        fresh = Draw(seed + 1, torch.float32)
        model[0].copy_(fresh.normal(DIM))
        model[1].copy_(fresh.normal(NUM_ITEMS, DIM) / DIM**0.5)
        graph.replay()
        for replayed, called in zip(numbers(result), numbers(F.meta_step(*model, batch, **settings)), strict=True):
            assert torch.equal(replayed, called)


def test_a_captured_training_step_gives_the_same_tables_as_an_uncaptured_one():
    (start, *tables), batch = problem()
    trained = [[table.clone() for table in tables] for _ in range(2)]

    def step(table, bias):
        result = F.meta_step(start, table, bias, batch, inner_lr=0.05)
        for parameter, name in ((table, "item_table"), (bias, "item_bias")):
            gradient = result.grads[name]
            torch.ops.metarec_fast.sparse_sgd([parameter], gradient.ids, [gradient.rows], 0.01)

    for _ in range(3):
        step(*trained[0])
    graph = captured(lambda: step(*trained[1]))[0]
    for _ in range(2):  # one was made before the capture
        graph.replay()
    for called, replayed in zip(*trained, strict=True):
        assert torch.equal(called, replayed)


def test_sums_by_atomics_need_no_room_for_sorting_and_can_be_captured():
    draw, count, num_rows = Draw(0, torch.float32), 4096, 200
    gradient = SparseRows(*(value.to("cuda") for value in (draw.integers(0, num_rows, count), draw.normal(count, 64))))
    start = draw.normal(num_rows, 64).to("cuda")
    table = torch.empty_like(start)

    def work():
        table.copy_(start)
        torch.ops.metarec_fast.sparse_sgd([table], gradient.ids, [gradient.rows], 0.1)
        return F.sum_rows(gradient, num_rows)

    def room():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        return torch.cuda.max_memory_allocated() - before - result.nbytes

    assert room() >= 2 * gradient.ids.nbytes
    with mf.allow_atomics():
        assert room() == 0
        graph, dense = captured(work)
    gradient.rows.mul_(-2)
    graph.replay()
    expected = SparseRows(gradient.ids, gradient.rows.double()).to_dense(num_rows)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table.double(), start - 0.1 * expected, rtol=1e-5, atol=1e-5)


def test_work_is_queued_on_the_current_stream():
    model, batch = problem()
    expected = numbers(F.meta_step(*model, batch))
    late = [torch.zeros_like(value) for value in model]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second, for which nothing behind it may begin
        for value, there in zip(late, model, strict=True):
            value.copy_(there)
        actual = numbers(F.meta_step(*late, batch))
        fast = F.adapt(*late, batch.support)
        best = F.score_top_k(fast.user, fast.bias, *late[1:], 4)
    side.synchronize()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
    fast = F.adapt(*model, batch.support)
    assert torch.equal(best.items, F.score_top_k(fast.user, fast.bias, *model[1:], 4).items)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one_are_worked_on_there():
    model, batch = problem("cuda:1")
    with torch.cuda.device(0):
        result = F.meta_step(*model, batch)
    assert result.loss.device == torch.device("cuda:1")
    here, same = problem("cuda:0")
    for there, one in zip(numbers(result), numbers(F.meta_step(*here, same)), strict=True):
        assert torch.equal(there.cpu(), one.cpu())


def test_tensors_of_the_cpu_beside_those_of_the_gpu_are_refused_by_name():
    (start, table, bias), batch = problem()
    with pytest.raises(ValueError, match="user_init: expected to be on cuda:0, like item_table, got cpu"):
        F.meta_step(start.cpu(), table, bias, batch)
    with pytest.raises(ValueError, match="support.items: expected to be on cuda:0, like item_table, got cpu"):
        F.meta_step(start, table, bias, batch.to("cpu"))


@pytest.mark.parametrize("kind", [{}, {"weights": True}])
def test_no_operator_waits_for_the_gpu(kind, patience):
    model, batch = problem(**kind)
    seen = batch.support
    parameters = [value.clone().requires_grad_() for value in model[1:]]
    optimizers = [
        optimizer(parameters, lr=0.01) for optimizer in (mf.SparseAdam, mf.optim.SparseAdagrad, mf.optim.SparseSGD)
    ]

    def everything():
        result = F.meta_step(*model, batch)
        F.meta_step(*model, batch, adapt="all", inner_lr=0.02)
        F.meta_step(*model, batch, inner_steps="exact", prior_pull=0.5)
        F.adapt_and_score(*model, batch)
        fast = F.adapt(*model, batch.support)
        F.score_top_k(fast.user, fast.bias, *model[1:], 4, exclude=seen)
        F.reptile_step(*model, batch.support, inner_lr=0.02, task_weights=batch.weights)
        for optimizer in optimizers:
            for parameter, name in zip(parameters, ("item_table", "item_bias"), strict=True):
                gradient = result.grads[name]
                parameter.grad = torch.sparse_coo_tensor(
                    gradient.ids[None], gradient.rows.clone(), parameter.shape, check_invariants=False
                )
            optimizer.step()
        with mf.allow_atomics():
            F.sum_rows(result.grads["item_table"], NUM_ITEMS)
            optimizers[-1].step()

    everything()
    patience()
    everything()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_training_step_on_a_batch_that_is_there_does_not_wait_for_the_gpu(algorithm, sparse, patience):
    learner = make_learner(algorithm, sparse).to("cuda")
    sampler = mf.TaskSampler(make_log(), (3, 8), "rest", 40, device="cuda")
    batches, optimizers = list(sampler), learner.default_optimizers()

    def step(batch):
        for optimizer in optimizers:
            optimizer.zero_grad()
        learner(batch).backward()
        for optimizer in optimizers:
            optimizer.step()

    step(batches[0])
    patience()
    step(batches[1])


def test_the_same_problem_gives_the_same_bits_every_time():
    model, batch = problem(sizes=tuple(range(90)))
    for settings in ({}, {"adapt": "all", "inner_lr": 0.02}, {"inner_steps": "exact", "prior_pull": 0.5}):
        first = numbers(F.meta_step(*model, batch, **settings))
        for _ in range(5):
            again = numbers(F.meta_step(*model, batch, **settings))
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("algorithm", LEARNERS)
def test_training_on_the_gpu_is_training_on_the_cpu_up_to_rounding(algorithm, sparse):
    split = mf.split_users(make_log(), valid=0.2, test=0.2, seed=0)
    figures, errors = [], []
    for device in ("cpu", "cuda"):
        learner = make_learner(algorithm, sparse).to(device)
        history = learner.fit(
            split.train, valid=split.valid, support=(3, 8), epochs=3, patience=None, batch_size=32, progress=False
        )
        assert learner.model.user_init.device.type == device
        figures.append([value for epoch in history.epochs[1:] for value in (epoch.train_loss, epoch.valid)])
        report = mf.evaluate(learner, split.test, support=5, k=5)
        errors.append(report.results[learner.name]["rmse"])
    # Adam's steps do not shrink with the gradient: where that is rounding, so are they.
    np.testing.assert_allclose(figures[1], figures[0], rtol=1e-3)
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-3)


@pytest.mark.parametrize("algorithm", LEARNERS)
def test_a_learner_saved_on_the_gpu_is_loaded_on_the_cpu_and_goes_back(algorithm, tmp_path):
    log = make_log()
    learner = make_learner(algorithm).to("cuda")
    learner.fit(log, support=(3, 8), epochs=1, batch_size=32, progress=False)
    learner.save(tmp_path)
    loaded = mf.load(tmp_path)
    assert loaded.model.user_init.device.type == "cpu"
    rated, ratings = log.item_ids[:3], [5.0, 1.0, 4.0]
    expected = learner.adapt(rated, ratings)
    for other in (loaded, loaded.to("cuda")):
        user = other.adapt(rated, ratings)
        np.testing.assert_allclose(user.predict(log.item_ids), expected.predict(log.item_ids), rtol=1e-4, atol=1e-5)


def test_a_run_begun_on_the_gpu_is_resumed_on_the_cpu_and_the_other_way_round(tmp_path):
    log = make_log()
    for first, then in (("cuda", "cpu"), ("cpu", "cuda")):
        folder = tmp_path / first
        settings = {"support": (3, 8), "epochs": 2, "batch_size": 32, "progress": False, "checkpoint": folder}
        learner = make_learner(mf.MAML, sparse=True).to(first)
        learner.fit(log, **settings)
        resumed = make_learner(mf.MAML, sparse=True).to(then)
        resumed.fit(log, **settings, resume=True)
        for one, other in zip(learner.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("adapt", ["user", "all"])
def test_recommendations_are_those_of_the_cpu(adapt, exclude_seen):
    learner = mf.MAML(mf.DotRecommender(NUM_ITEMS, DIM), adapt=adapt)
    learner.initialize(make_log())
    learner.item_ids = [f"m{i}" for i in range(NUM_ITEMS)]
    found = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(learner).to(device)
        found.append(there.adapt(["m3", "m9"], [5, 1]).recommend(10, exclude_seen=exclude_seen))
    assert found[0][0].tolist() == found[1][0].tolist()
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_learner_trains_under_autocast_as_without_it(dtype):
    batch = mf.TaskSampler(make_log(), (3, 8), "rest", 40, device="cuda").batch(0)
    gradients = []
    for enabled in (True, False):
        learner = make_learner(mf.MAML).to("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled):
            loss = learner(batch)
        loss.backward()
        gradients.append([parameter.grad for parameter in learner.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_learner_is_compiled_into_one_graph():
    learner = make_learner(mf.MAML).to("cuda")
    compiled = torch.compile(learner, fullgraph=True)
    for batch in mf.TaskSampler(make_log(), (3, 8), "rest", 40, device="cuda"):
        learner.zero_grad()
        expected = learner(batch)
        expected.backward()
        gradients = [parameter.grad for parameter in learner.parameters()]
        learner.zero_grad()
        actual = compiled(batch)
        actual.backward()
        torch.testing.assert_close(actual, expected)
        for parameter, gradient in zip(learner.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_sampler_delivers_the_batches_of_the_cpu(prefetch):
    log = make_log()
    settings = {"support": (3, 8), "query": "rest", "batch_size": 16, "negatives": 2}
    here, there = mf.TaskSampler(log, **settings), mf.TaskSampler(log, **settings, device="cuda", prefetch=prefetch)
    for expected, batch in zip(here, there, strict=True):
        assert batch.support.items.device.type == "cuda"
        for part in ("support", "query"):
            one, other = getattr(batch, part), getattr(expected, part)
            for name in ("items", "targets", "offsets", "negatives"):
                assert torch.equal(getattr(one, name).cpu(), getattr(other, name))
        assert torch.equal(batch.localize()[0].cpu(), expected.localize()[0])


@pytest.mark.filterwarnings("ignore:.*pin.*memory.*:UserWarning")
def test_a_batch_in_page_locked_memory_is_moved_without_waiting(patience):
    batch = mf.TaskSampler(make_log(), (3, 8), "rest", 40).batch(0).pin_memory()
    batch.to("cuda", non_blocking=True)
    patience()
    moved = batch.to("cuda", non_blocking=True)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.support.items.cpu(), batch.support.items)


def test_large_tables_are_indexed_beyond_two_to_the_31_numbers():
    free, _ = torch.cuda.mem_get_info()
    num_items, dim = 34_000_000, 64
    if free < 3 * num_items * dim * 4 // 2:
        pytest.skip("needs 13 GB of GPU memory")
    table, bias = torch.zeros(num_items, dim, device="cuda"), torch.zeros(num_items, device="cuda")
    last = num_items - 1
    table[last] = 0.1
    known = mf.Entries(torch.tensor([last, 5]), torch.tensor([1.0, 2.0]), torch.tensor([0, 2])).to("cuda")
    batch = mf.TaskBatch(known, known)
    result = F.meta_step(torch.ones(dim, device="cuda"), table, bias, batch)
    small = torch.zeros(2, dim, device="cuda")
    small[1] = 0.1
    same = known.with_items(torch.tensor([1, 0], device="cuda"), max_item=1)
    expected = F.meta_step(torch.ones(dim, device="cuda"), small, bias[:2], mf.TaskBatch(same, same))
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.grads["item_table"].rows, expected.grads["item_table"].rows)
    best = F.score_top_k(torch.ones(1, dim, device="cuda"), bias[:1], table, bias, 1)
    assert best.items.tolist() == [[last]]
