"""TaskSampler: sizes, order, randomness, negatives, local ids, and the C++ beside the NumPy implementation."""

import gc
import itertools
import threading

import numpy as np
import pytest
import torch

from metarec_fast import _random, _tasks
from metarec_fast.data import Interactions
from metarec_fast.sampler import TaskSampler
from metarec_fast.tasks import TaskBatch


def make_log(sizes=(1, 2, 3, 5, 8, 40, 0, 25, 60, 12), num_items=80, seed=0):
    """Users with the given numbers of ratings; the rating is the row, so that entries can be recognised."""
    rng = np.random.default_rng(seed)
    items = [np.sort(rng.permutation(num_items)[:size]) for size in sizes]
    items = [rng.permutation(part) for part in items]
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    n = int(offsets[-1])
    return Interactions(
        offsets=offsets,
        items=np.concatenate(items).astype(np.int32),
        ratings=np.arange(n, dtype=np.float32),
        times=np.arange(n, dtype=np.int64),
        user_ids=np.arange(len(sizes)) * 10,
        item_ids=np.arange(num_items),
    )


def rows_by_user(batch):
    """{user: (support rows, query rows)}, by the ratings of `make_log`."""
    query = batch.query
    result = {}
    for t, user in enumerate(batch.users.tolist()):
        parts = []
        for entries in (batch.support, query):
            if entries is None:
                parts.append([])
            else:
                begin, end = entries.offsets[t : t + 2].tolist()
                parts.append([int(row) for row in entries.targets[begin:end]])
        result[user] = tuple(parts)
    return result


def assert_same_entries(actual, expected):
    assert (actual is None) == (expected is None)
    if actual is None:
        return
    for name in ("items", "targets", "offsets", "weights", "negatives", "log_q"):
        left, right = getattr(actual, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            assert torch.equal(left, right), name
    assert (actual.max_size, actual.max_item) == (expected.max_size, expected.max_item)


def assert_same_batch(actual, expected):
    assert torch.equal(actual.users, expected.users)
    for left, right in ((actual, expected), (actual.localize()[1], expected.localize()[1])):
        assert_same_entries(left.support, right.support)
        assert_same_entries(left.query, right.query)
    assert torch.equal(actual.localize()[0], expected.localize()[0])


SUPPORTS = (0, 1, 4, (0, 3), (2, 50), "rest")
QUERIES = (None, 0, 1, 7, (1, 5), "rest")
SETTINGS = [
    (support, query)
    for support, query in itertools.product(SUPPORTS, QUERIES)
    if not (support == query == "rest") and not (query in (None, 0) and support in (0, (0, 3)))
]


# ---- both implementations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("support", "query"), SETTINGS)
@pytest.mark.parametrize("order", ["random", "time"])
@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_cpp_and_numpy_give_the_same_batches(support, query, order, negatives):
    log = make_log()
    for seed, shuffle in ((0, True), (-7, False)):
        samplers = [
            TaskSampler(log, support, query, 4, order, seed, negatives, shuffle=shuffle, backend=backend, prefetch=0)
            for backend in ("c++", "numpy")
        ]
        for epoch in (0, 3):
            for index in range(len(samplers[0])):
                assert_same_batch(*(sampler.batch(index, epoch) for sampler in samplers))


def test_cpp_and_numpy_agree_on_catalogues_beyond_one_level_of_the_item_set():
    rng = np.random.default_rng(1)
    num_items = 70_001
    log = Interactions.from_arrays(
        np.repeat(np.arange(50), 200), rng.integers(0, num_items, 10_000), rng.random(10_000)
    )
    log, _ = log.align_items(np.arange(num_items))
    for negatives in (0, 2):
        samplers = [
            TaskSampler(log, (3, 90), (1, 20), 50, negatives=negatives, backend=backend, prefetch=0)
            for backend in ("c++", "numpy")
        ]
        assert_same_batch(samplers[0].batch(0), samplers[1].batch(0))


def test_auto_chooses_the_compiled_sampler():
    assert TaskSampler(make_log()).backend == "c++"


def test_splitmix64_gives_its_published_numbers():
    assert _random.at(1234567, np.arange(2)).tolist() == [6457827717110365317, 3203168211198807973]


@pytest.fixture(params=["c++", "numpy"])
def backend(request):
    return request.param


# ---- sizes and rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("support", "query"), SETTINGS)
@pytest.mark.parametrize("order", ["random", "time"])
def test_support_and_query_share_no_rating_and_follow_the_rule_of_sizes(backend, support, query, order):
    log = make_log()
    sampler = TaskSampler(log, support, query, 100, order, backend=backend)
    wanted = query not in (None, 0)
    (batch,) = list(sampler)
    tasks = rows_by_user(batch)
    assert set(tasks) == set(np.flatnonzero(log.sizes() >= (2 if wanted else 1)).tolist())
    assert (batch.query is None) == (not wanted)
    for user, (support_rows, query_rows) in tasks.items():
        owned = set(range(*log.rows(user).indices(len(log))))
        n = len(owned)
        assert not set(support_rows) & set(query_rows)
        assert len(set(support_rows)) + len(set(query_rows)) == len(support_rows) + len(query_rows)
        assert set(support_rows) | set(query_rows) <= owned
        if isinstance(support, int):
            assert len(support_rows) == min(support, n - 1 if wanted else n)
        elif support == "rest":
            assert len(support_rows) == n - len(query_rows)
        else:
            assert min(support[0], n - 1) <= len(support_rows) <= support[1]
        if wanted:
            assert query_rows
            left = n - 1 if support == "rest" else n - len(support_rows)
            if query == "rest":
                assert len(query_rows) == left
            elif isinstance(query, int):
                assert len(query_rows) == min(query, left)
            else:
                assert min(query[0], left) <= len(query_rows) <= min(query[1], left)


def test_entries_carry_the_items_and_ratings_of_the_log(backend):
    log = make_log()
    (batch,) = list(TaskSampler(log, 5, 5, 100, backend=backend))
    for entries in (batch.support, batch.query):
        rows = entries.targets.to(torch.int64)
        assert entries.items.tolist() == log.items[rows.numpy()].tolist()
        assert entries.weights is None
        assert entries.negatives is None
        assert entries.log_q is None
        assert entries.max_size == int(entries.sizes().max())


def test_time_order_takes_the_earliest_for_support_and_the_next_for_query(backend):
    log = make_log()
    for batch in TaskSampler(log, 3, 2, 3, "time", backend=backend):
        for user, (support_rows, query_rows) in rows_by_user(batch).items():
            begin = int(log.offsets[user])
            s, q = len(support_rows), len(query_rows)
            assert support_rows == list(range(begin, begin + s))
            assert query_rows == list(range(begin + s, begin + s + q))


def test_time_order_with_the_rest_as_support_predicts_the_latest(backend):
    log = make_log()
    (batch,) = list(TaskSampler(log, "rest", 2, 100, "time", backend=backend))
    for user, (_, query_rows) in rows_by_user(batch).items():
        end = int(log.offsets[user + 1])
        assert query_rows == list(range(end - len(query_rows), end))


def test_random_order_draws_every_rating_equally_often(backend):
    log = make_log(sizes=(10,))
    sampler = TaskSampler(log, 3, 2, backend=backend, prefetch=0)
    counts = np.zeros((2, 10))
    epochs = 3000
    for epoch in range(epochs):
        ((support_rows, query_rows),) = rows_by_user(sampler.batch(0, epoch)).values()
        counts[0, support_rows] += 1
        counts[1, query_rows] += 1
    expected = epochs * np.array([[0.3], [0.2]])
    # Binomial counts: five standard deviations around the mean.
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_ranges_reach_both_ends_and_change_from_epoch_to_epoch(backend):
    sampler = TaskSampler(make_log(sizes=(50,)), (2, 5), (1, 3), backend=backend, prefetch=0)
    batches = [sampler.batch(0, epoch) for epoch in range(100)]
    assert {len(batch.support) for batch in batches} == {2, 3, 4, 5}
    assert {len(batch.query) for batch in batches} == {1, 2, 3}


# ---- epochs and determinism --------------------------------------------------------------------------------------


def test_an_epoch_visits_every_eligible_user_once(backend):
    log = make_log()
    sampler = TaskSampler(log, 2, 2, batch_size=3, backend=backend)
    batches = list(sampler)
    assert [batch.num_tasks for batch in batches] == [3, 3, 2]
    assert len(batches) == len(sampler) == 3
    users = torch.cat([batch.users for batch in batches]).tolist()
    assert sorted(users) == np.flatnonzero(log.sizes() >= 2).tolist()
    assert (sampler.num_tasks, sampler.num_skipped) == (8, 2)


def test_drop_last_leaves_out_the_small_batch():
    sampler = TaskSampler(make_log(), 2, 2, batch_size=3, drop_last=True)
    assert [batch.num_tasks for batch in sampler] == [3, 3]
    assert len(sampler) == 2


def test_epochs_advance_differ_and_can_be_set_again(backend):
    sampler = TaskSampler(make_log(), 4, 4, 4, backend=backend)
    first, second = list(sampler), list(sampler)
    assert sampler.epoch == 2
    assert any(not torch.equal(a.users, b.users) for a, b in zip(first, second, strict=True))
    sampler.set_epoch(0)
    for again, before in zip(sampler, first, strict=True):
        assert_same_batch(again, before)
    assert sampler.epoch == 1


def test_without_shuffle_users_ascend_and_ratings_are_still_drawn_by_epoch(backend):
    sampler = TaskSampler(make_log(), 4, 4, 100, shuffle=False, backend=backend)
    (first,), (second,) = list(sampler), list(sampler)
    assert first.users.tolist() == sorted(first.users.tolist()) == second.users.tolist()
    assert not torch.equal(first.support.items, second.support.items)


def test_the_seed_decides():
    log = make_log()
    same = [TaskSampler(log, 4, 4, 100, seed=seed).batch(0) for seed in (3, 3, 4)]
    assert_same_batch(same[0], same[1])
    assert not torch.equal(same[0].users, same[2].users)
    assert TaskSampler(log, seed=2**70 - 1).batch(0).num_tasks == 8


@pytest.mark.parametrize("prefetch", [1, 2, 50])
def test_prefetching_changes_nothing(backend, prefetch):
    log = make_log()
    for ahead, plain in zip(
        TaskSampler(log, (1, 4), 4, 3, negatives=2, backend=backend, prefetch=prefetch),
        TaskSampler(log, (1, 4), 4, 3, negatives=2, backend=backend, prefetch=0),
        strict=True,
    ):
        assert_same_batch(ahead, plain)


def test_several_threads_may_draw_from_one_sampler_at_once():
    log = make_log(sizes=(30,) * 200)
    sampler = TaskSampler(log, 5, 5, 20, negatives=1, prefetch=0)
    expected = [sampler.batch(index) for index in range(len(sampler))]
    results = [None] * 4

    def draw(place):
        results[place] = [sampler.batch(index) for index in range(len(sampler))]

    threads = [threading.Thread(target=draw, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batches in results:
        for actual, wanted in zip(batches, expected, strict=True):
            assert_same_batch(actual, wanted)


def sampler_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("TaskSampler")]


def test_an_abandoned_iteration_ends_its_thread_and_its_epoch_stays():
    sampler = TaskSampler(make_log(), 2, 2, 1, prefetch=3)
    iterator = iter(sampler)
    next(iterator)
    assert len(sampler_threads()) == 1
    del iterator
    gc.collect()
    assert sampler_threads() == []
    assert sampler.epoch == 0


def test_an_interrupt_in_the_loop_ends_the_thread():
    def train():
        for index, _ in enumerate(TaskSampler(make_log(), 2, 2, 1, prefetch=3)):
            if index == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    gc.collect()
    assert sampler_threads() == []


def test_an_error_in_the_background_reaches_the_loop(monkeypatch):
    sampler = TaskSampler(make_log(), 2, 2, 2, prefetch=2)

    def fail(order, epoch, index):
        raise RuntimeError(f"batch {index}")

    monkeypatch.setattr(sampler, "_batch", fail)
    with pytest.raises(RuntimeError, match="batch 0"):
        list(sampler)
    assert sampler_threads() == []


# ---- what a batch carries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", [None, 5])
@pytest.mark.parametrize("negatives", [0, 2])
def test_local_ids_and_distinct_items_are_those_that_the_batch_would_find(backend, query, negatives):
    for batch in TaskSampler(make_log(), 5, query, 4, negatives=negatives, backend=backend):
        unique, local = batch.localize()
        expected_unique, expected = TaskBatch(batch.support, batch.query, batch.users).localize()
        assert torch.equal(unique, expected_unique)
        assert_same_entries(local.support, expected.support)
        assert_same_entries(local.query, expected.query)
        assert torch.equal(unique[local.support.items], batch.support.items)


def test_batches_do_not_share_memory_with_the_sampler_or_each_other():
    sampler = TaskSampler(make_log(), 5, 5, 4)
    before = sampler.batch(0)
    for tensor in (before.users, before.support.items, before.support.targets, before.localize()[0]):
        tensor.zero_()
    again = sampler.batch(0)
    assert again.users.any()
    assert again.support.items.any()
    assert again.support.targets.any()


def test_a_checked_batch_accepts_what_the_sampler_made(backend):
    from metarec_fast.tasks import Entries

    (batch,) = list(TaskSampler(make_log(), 5, 5, 100, negatives=2, backend=backend))
    for entries in (batch.support, batch.query):
        checked = Entries(entries.items, entries.targets, entries.offsets, negatives=entries.negatives)
        assert (checked.max_size, checked.max_item) == (entries.max_size, entries.max_item)


# ---- negatives ---------------------------------------------------------------------------------------------------


def negatives_of(batch):
    for t, user in enumerate(batch.users.tolist()):
        for entries in (batch.support, batch.query):
            begin, end = entries.offsets[t : t + 2].tolist()
            yield user, entries.negatives[begin:end].reshape(-1).tolist()


def test_negatives_are_never_items_the_user_has_rated(backend):
    log = make_log()  # the user of 60 ratings has rated more than half of the 80 items
    for batch in TaskSampler(log, 5, 5, 3, negatives=4, backend=backend):
        assert batch.support.negatives.shape == (len(batch.support), 4)
        for user, items in negatives_of(batch):
            rated = set(log.items[log.rows(user)].tolist())
            assert not rated & set(items)
            assert all(0 <= item < log.num_items for item in items)


@pytest.mark.parametrize("rated", [4, 16])
def test_negatives_are_drawn_uniformly(backend, rated):
    log = make_log(sizes=(rated,), num_items=20)
    sampler = TaskSampler(log, 1, 1, negatives=50, backend=backend, prefetch=0)
    counts = np.zeros(20)
    for epoch in range(100):
        for _, items in negatives_of(sampler.batch(0, epoch)):
            np.add.at(counts, items, 1)
    unrated = np.setdiff1d(np.arange(20), log.items)
    expected = counts.sum() / len(unrated)
    assert (np.abs(counts[unrated] - expected) < 5 * np.sqrt(expected)).all()


def test_negatives_for_a_user_who_rated_everything_are_refused():
    log = make_log(sizes=(3, 20), num_items=20)
    with pytest.raises(ValueError, match=r"negatives: user 10 has rated all 20 items"):
        TaskSampler(log, negatives=1)


def test_one_unrated_item_is_found(backend):
    log = make_log(sizes=(19,), num_items=20)
    batch = TaskSampler(log, 2, 2, negatives=3, backend=backend).batch(0)
    (missing,) = set(range(20)) - set(log.items.tolist())
    assert set(batch.support.negatives.reshape(-1).tolist()) == {missing}


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"support": -1}, ValueError, r"support: must be ≥ 0, got -1"),
        ({"support": 2.5}, TypeError, r"support: expected an int, got float 2.5"),
        ({"support": True}, TypeError, r"support: expected an int, got bool True"),
        ({"support": None}, TypeError, r"support: expected an int, got NoneType"),
        ({"support": "all"}, ValueError, r'support: expected a number, \(low, high\) or "rest", got \'all\''),
        ({"support": (5, 3)}, ValueError, r"support: low must not exceed high, got \(5, 3\)"),
        ({"support": (1, 2, 3)}, ValueError, r"support: expected two numbers \(low, high\), got \(1, 2, 3\)"),
        ({"support": 1 << 31}, ValueError, r"support: must be below 2³¹"),
        ({"query": (0, 3)}, ValueError, r"query: a range must begin at 1 or more, got \(0, 3\)"),
        ({"query": -2}, ValueError, r"query: must be ≥ 0, got -2"),
        ({"support": 0, "query": None}, ValueError, r"support: must be ≥ 1 without a query, got 0"),
        ({"support": "rest", "query": "rest"}, ValueError, r'only one of them can be "rest"'),
        ({"batch_size": 0}, ValueError, r"batch_size: must be ≥ 1, got 0"),
        ({"batch_size": 8.0}, TypeError, r"batch_size: expected an int, got float 8.0"),
        ({"order": "newest"}, ValueError, r'order: expected "random" or "time", got \'newest\''),
        ({"seed": "x"}, TypeError, r"seed: expected an int, got str 'x'"),
        ({"negatives": -1}, ValueError, r"negatives: must be ≥ 0, got -1"),
        ({"prefetch": -1}, ValueError, r"prefetch: must be ≥ 0, got -1"),
        ({"backend": "cuda"}, ValueError, r'backend: expected "auto", "c\+\+" or "numpy", got \'cuda\''),
        ({"batch_size": 9, "drop_last": True}, ValueError, r"batch_size: 8 users do not fill a batch of 9"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        TaskSampler(make_log(), **arguments)


def test_a_log_without_users_to_learn_from_is_refused_with_the_counts():
    with pytest.raises(ValueError, match=r"the 2 ratings that a task needs; of 4 users 1 have none and 3 have one"):
        TaskSampler(make_log(sizes=(1, 0, 1, 1)))
    with pytest.raises(ValueError, match=r"no user has the 1 ratings"):
        TaskSampler(Interactions.from_arrays([], [], []), query=None)


def test_something_else_than_a_log_is_refused():
    with pytest.raises(TypeError, match=r"log: expected Interactions, got list"):
        TaskSampler([1, 2, 3])


def test_batches_and_epochs_out_of_range_are_refused():
    sampler = TaskSampler(make_log(), batch_size=3)
    with pytest.raises(IndexError, match=r"index: must be in \[0, 3\), got 3"):
        sampler.batch(3)
    with pytest.raises(ValueError, match=r"epoch: must be ≥ 0, got -1"):
        sampler.set_epoch(-1)


def test_the_compiled_sampler_checks_what_it_would_read_out_of_bounds():
    offsets, items, ratings = np.array([0, 2]), np.array([0, 5], np.int32), np.zeros(2, np.float32)
    with pytest.raises(IndexError, match=r"items: must be in \[0, 5\), got 5 at position 1"):
        _tasks.Sampler(offsets, items, ratings, 5, (1, 1), (1, 1), False, 0)
    with pytest.raises(ValueError, match=r"offsets: must run from 0"):
        _tasks.Sampler(np.array([0, 3]), items, ratings, 6, (1, 1), (1, 1), False, 0)
    with pytest.raises(ValueError, match=r"offsets: must not decrease"):
        _tasks.Sampler(np.array([0, 3, 2]), items, ratings, 6, (1, 1), (1, 1), False, 0)
    sampler = _tasks.Sampler(offsets, items, ratings, 6, (1, 1), (1, 1), False, 0)
    with pytest.raises(IndexError, match=r"users: must be in \[0, 1\), got 1 at position 0"):
        sampler.sample(np.array([1]), 0)


def test_its_description_says_what_it_does():
    text = repr(TaskSampler(make_log(), (1, 5), "rest", 4))
    assert text == (
        "TaskSampler(tasks=8, batches=2, support=(1, 5), query=\"rest\", order='random', epoch=0, backend='c++')"
    )
