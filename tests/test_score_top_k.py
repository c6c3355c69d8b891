"""The operators score_top_k, coalesce_rows and sum_rows."""

import pytest
import torch
from problems import Draw, less_precise_products
from torch.library import opcheck

from metarec_fast import _ops, reference
from metarec_fast import functional as F
from metarec_fast.results import SparseRows
from metarec_fast.tasks import Entries


def problem(num_users=5, num_items=60, dim=7, dtype=torch.float64):
    draw = Draw(0, dtype)
    return draw.normal(num_users, dim), draw.normal(num_users), draw.normal(num_items, dim), draw.normal(num_items)


@pytest.mark.parametrize("num_users", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("dim", [1, 7, 16, 33])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_it_equals_sorting_all_scores(num_users, dim, k):
    arguments = problem(num_users, dim=dim)
    best, expected = F.score_top_k(*arguments, k), reference.score_top_k(*arguments, k)
    assert torch.equal(best.items, expected.items)
    torch.testing.assert_close(best.scores, expected.scores)


@pytest.mark.cpu
def test_a_catalogue_of_many_ranges_gives_the_same_bits_for_any_number_of_threads():
    arguments = problem(num_users=3, num_items=50_000, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(F.score_top_k(*arguments, 20))
    finally:
        torch.set_num_threads(threads)
    expected = reference.score_top_k(*arguments, 20)
    for best in found:
        assert torch.equal(best.items, expected.items)
        assert torch.equal(best.scores, found[0].scores)


@pytest.mark.parametrize("num_users", [1, 3, 4])
@pytest.mark.parametrize("dim", [7, 64])
def test_a_bfloat16_table_is_the_same_as_its_values_in_float32(num_users, dim):
    user, bias, table, item_bias = problem(num_users, num_items=700, dim=dim, dtype=torch.float32)
    narrow = table.bfloat16()
    best, expected = (F.score_top_k(user, bias, each, item_bias, 20) for each in (narrow, narrow.float()))
    assert torch.equal(best.items, expected.items)
    assert torch.equal(best.scores, expected.scores)
    assert torch.equal(reference.score_top_k(user, bias, narrow, item_bias, 20).items, expected.items)


@pytest.fixture
def high_precision():
    with less_precise_products():
        yield


@pytest.mark.parametrize("num_users", [8, 9, 33])
@pytest.mark.parametrize("dim", [1, 8, 33, 64])
@pytest.mark.parametrize("narrow", [False, True])
def test_on_tensor_cores_scores_are_as_near_as_documented(num_users, dim, narrow, high_precision):
    user, bias, table, item_bias = problem(num_users, num_items=130, dim=dim, dtype=torch.float32)
    if narrow:
        table = table.bfloat16()
    best = F.score_top_k(user, bias, table, item_bias, 128)
    rows, double = table.double(), (user.double(), bias.double(), item_bias.double())
    exact = double[0] @ rows.T + double[1][:, None] + double[2]
    products = double[0].abs() @ rows.abs().T
    additions = 3 * dim + 2  # each with an error of 2⁻²³ at most of what has been summed
    sums = products + bias.abs()[:, None] + item_bias.abs()
    allowed = 2.0**-19 * products + additions * 2.0**-23 * sums
    apart = (best.scores.double() - exact.gather(1, best.items)).abs()
    assert (apart <= allowed.gather(1, best.items)).all()
    assert (best.scores.diff(dim=1) <= 0).all()


def test_on_tensor_cores_equal_rows_come_in_order_and_what_is_no_number_last(high_precision):
    # Eighths: sums of them are exact, so that equal rows have equal scores in whatever order a product is summed.
    arguments = problem(9, num_items=130, dtype=torch.float32)
    user, bias, table, item_bias = ((8 * each).round() / 8 for each in arguments)
    table[1::2], item_bias[1::2] = table[0], item_bias[0]
    table[64:80] = float("nan")
    best = F.score_top_k(user, bias, table, item_bias, 128)
    expected = reference.score_top_k(user, bias, table, item_bias, 128)
    assert torch.equal(best.items, expected.items)
    torch.testing.assert_close(best.scores, expected.scores)


def test_either_way_to_ask_for_a_precision_is_heard():
    precision, arguments = torch.backends.cuda.matmul, problem(9, dtype=torch.float32)
    before = precision.fp32_precision
    try:
        for asked in ("tf32", "ieee"):
            precision.fp32_precision = asked
            assert _ops._tensor_cores_allowed() == (asked == "tf32")
            assert F.score_top_k(*arguments, 4).items.shape == (9, 4)
    finally:
        precision.fp32_precision = before
        torch.set_float32_matmul_precision("highest")


@pytest.mark.cpu
def test_what_is_compiled_follows_the_precision_asked_for():
    user, bias, table, item_bias = problem(9, dtype=torch.float32)
    graphs = []

    def keep(graph, example):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(
        lambda users: F.score_top_k(users, bias, table, item_bias, 4).items, fullgraph=True, backend=keep
    )
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            compiled(user)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.compiler.reset()
    assert [", True)" in code for code in graphs] == [False, True]


def test_the_best_are_found_wherever_they_lie_between_many_that_are_passed_over():
    user, bias, table, item_bias = problem(5, num_items=20_000)
    for ids in (torch.arange(3), torch.tensor([4095, 4096, 19_999]), torch.tensor([63, 64, 8191])):
        lifted = item_bias.index_add(0, ids, torch.tensor([300.0, 200.0, 100.0], dtype=torch.float64))
        lifted[5_000:5_300] = float("nan")
        seen = Entries(ids[:1].repeat(5), None, torch.arange(6))
        best = F.score_top_k(user, bias, table, lifted, 4, exclude=seen)
        expected = reference.score_top_k(user, bias, table, lifted, 4, seen)
        assert torch.equal(best.items, expected.items)
        assert best.items[:, :2].tolist() == [ids[1:].tolist()] * 5


def test_excluded_items_do_not_come_back_repeated_or_not():
    user, bias, table, item_bias = problem(3)
    seen = Entries(torch.tensor([4, 2, 4, 59, 0]), None, torch.tensor([0, 3, 3, 5]))
    best = F.score_top_k(user, bias, table, item_bias, 60, exclude=seen)
    expected = reference.score_top_k(user, bias, table, item_bias, 60, seen)
    assert torch.equal(best.items, expected.items)
    assert set(best.items[0].tolist()) == {*range(60), -1} - {2, 4}
    assert best.scores[0, -2:].tolist() == [float("-inf")] * 2


def test_among_equal_scores_the_smaller_id_comes_first_and_nan_last():
    table = torch.zeros(6, 2)
    bias = torch.tensor([1.0, 2.0, 1.0, float("nan"), 2.0, float("-inf")])
    best = F.score_top_k(torch.zeros(1, 2), torch.zeros(1), table, bias, 6)
    assert best.items.tolist() == [[1, 4, 0, 2, 3, 5]]
    assert best.scores[0, 4:].tolist() == [float("-inf")] * 2


@pytest.mark.parametrize("num_items", [127, 129, 513, 1300])
@pytest.mark.parametrize("num_users", [1, 8, 33])
@pytest.mark.parametrize("k", [1, 32, 33, 127, "N"])
def test_catalogues_are_cut_anywhere(num_items, num_users, k):
    k = num_items if k == "N" else k
    user, bias, table, item_bias = problem(num_users, num_items, dim=3)
    seen = Entries(torch.arange(num_users * 5) * 7 % num_items, None, 5 * torch.arange(num_users + 1))
    best = F.score_top_k(user, bias, table, item_bias, k, exclude=seen)
    expected = reference.score_top_k(user, bias, table, item_bias, k, seen)
    assert torch.equal(best.items, expected.items)
    torch.testing.assert_close(best.scores, expected.scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 10, 130, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_equal_scores_are_in_the_order_of_their_ids(k, dtype):
    draw = Draw(3, torch.float32)
    table = draw.integers(-1, 2, 700, 2).to(dtype)
    user, bias, item_bias = (
        torch.ones(size, dtype=torch.promote_types(dtype, torch.float32)) for size in ((9, 2), (9,), (700,))
    )
    user[3], item_bias[::50] = -1, float("nan")
    item_bias[7::50] = float("-inf")
    seen = Entries(torch.arange(0, 700, 3).repeat(2), None, torch.tensor([0, 0, 0, 0, 234, 234, 468, 468, 468, 468]))
    for exclude in (None, seen):
        best = F.score_top_k(user, bias, table, item_bias, k, exclude=exclude)
        expected = reference.score_top_k(user, bias, table, item_bias, k, exclude)
        assert torch.equal(best.items, expected.items)
        assert torch.equal(best.scores, expected.scores)


@pytest.mark.parametrize("k", [5, 129, 400])
def test_users_may_exclude_nothing_or_everything(k):
    user, bias, table, item_bias = problem(4, 400, dim=5)
    some = Draw(0).permutation(400)[:390]
    items = torch.cat([torch.arange(400).flip(0), some, some[:3].repeat(50)])
    seen = Entries(items, None, torch.tensor([0, 0, 400, 790, 940]))
    best = F.score_top_k(user, bias, table, item_bias, k, exclude=seen)
    expected = reference.score_top_k(user, bias, table, item_bias, k, seen)
    assert torch.equal(best.items, expected.items)
    torch.testing.assert_close(best.scores, expected.scores)
    assert (best.items[1] == -1).all()
    nothing = Entries(items[:0], None, torch.zeros(5, dtype=torch.int64))
    best = F.score_top_k(user, bias, table, item_bias, k, exclude=nothing)
    assert torch.equal(best.items, F.score_top_k(user, bias, table, item_bias, k).items)


@pytest.mark.parametrize("k", [10, 200])
def test_both_ways_to_the_best_give_the_same_bits_every_time(k, monkeypatch):
    arguments = problem(9, 600, dim=33, dtype=torch.float32)
    best, more = F.score_top_k(*arguments, k), F.score_top_k(*arguments, 600)
    assert torch.equal(best.items, more.items[:, :k])
    assert torch.equal(best.scores, more.scores[:, :k])
    for schedule in ("forward", "reverse", "random:7"):  # in which the simulator runs threads and blocks
        monkeypatch.setenv("METAREC_SCHEDULE", schedule)
        again = F.score_top_k(*arguments, k)
        assert torch.equal(best.items, again.items)
        assert torch.equal(best.scores, again.scores)


@pytest.mark.parametrize("k", [0, -1, 61])
def test_k_outside_the_catalogue_is_named(k):
    with pytest.raises(ValueError, match=rf"k: must be in \[1, 60\], the number of items, got {k}"):
        F.score_top_k(*problem(), k)


def test_other_bad_arguments_are_named():
    user, bias, table, item_bias = problem()
    with pytest.raises(ValueError, match="user_bias"):
        F.score_top_k(user, bias[0], table, item_bias, 3)
    with pytest.raises(ValueError, match="exclude: expected 5 tasks, one per user, got 1"):
        F.score_top_k(user, bias, table, item_bias, 3, exclude=Entries(torch.tensor([1]), None, torch.tensor([0, 1])))
    with pytest.raises(IndexError, match=r"exclude.items: ids must be in \[0, 60\), got 60 at position 0"):
        F.score_top_k(
            user, bias, table, item_bias, 3, exclude=Entries(torch.tensor([60]), None, torch.tensor([0, 1, 1, 1, 1, 1]))
        )


@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,)])
@pytest.mark.parametrize("count", [0, 1, 500])
def test_rows_of_equal_ids_are_summed(shape, count):
    draw = Draw(1)
    ids = draw.integers(0, 40, count) * 1_000_003
    rows = draw.normal(count, *shape)
    tidy, expected = (run(SparseRows(ids, rows)) for run in (F.coalesce_rows, reference.coalesce_rows))
    assert torch.equal(tidy.ids, expected.ids)
    torch.testing.assert_close(tidy.rows, expected.rows)
    small = ids // 1_000_003
    dense = _ops.ops.sum_rows(small, rows, 45)
    torch.testing.assert_close(dense, SparseRows(small, rows).to_dense(45))


@pytest.mark.cpu
def test_ids_outside_are_named():
    with pytest.raises(RuntimeError, match=r"ids: must be in \[0, 3\), got 3 at position 1"):
        _ops.ops.sum_rows(torch.tensor([0, 3]), torch.ones(2), 3)
    with pytest.raises(RuntimeError, match="ids: must be in .* got -1 at position 0"):
        F.coalesce_rows(SparseRows(torch.tensor([-1]), torch.ones(1)))


def test_rows_that_do_not_fit_ids_are_named():
    with pytest.raises(RuntimeError, match="rows: expected shape"):
        F.coalesce_rows(SparseRows(torch.tensor([1]), torch.ones(2)))


def test_opcheck_finds_nothing():
    seen = (torch.tensor([4, 2]), torch.tensor([0, 1, 1, 2, 2, 2]))
    opcheck(_ops.ops.score_top_k, (*problem(), 3, *seen))
    opcheck(_ops.ops.coalesce_rows, (torch.tensor([3, 1, 3]), torch.ones(3, 2)))
    opcheck(_ops.ops.sum_rows, (torch.tensor([3, 1, 3]), torch.ones(3, 2), 5))
