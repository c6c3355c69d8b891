"""allow_atomics: who is told, what is then summed in any order, and that it is still the sum."""

import threading

import pytest
import torch
from problems import Draw
from torch.testing import assert_close

import metarec_fast as mf
from metarec_fast import _library, _ops
from metarec_fast import functional as F
from metarec_fast.results import SparseRows

SIZES = {"one id": [300], "few of many": [1, 5, 0, 70, 2], "one each": [1] * 40, "none": []}


@pytest.fixture(autouse=True)
def off_before_and_after():
    mf.allow_atomics(False)
    yield
    mf.allow_atomics(False)


@pytest.fixture
def depends_on_order(request, monkeypatch):
    """Whether the bits of what a function returns are others where threads run in another order."""
    if request.config.getoption("--device") != "simulated":
        pytest.skip("only the simulator runs threads in a given order")

    def depends(run) -> bool:
        results = []
        for schedule in ("forward", "reverse"):
            monkeypatch.setenv("METAREC_SCHEDULE", schedule)
            results.append(run())
        return not torch.equal(*results)

    return depends


def gradient_of(sizes, shape, dtype=torch.float32):
    """Rows of ids that come as often as `sizes` say, in disorder."""
    draw = Draw(0, dtype)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64))
    return SparseRows(ids[draw.permutation(ids.numel())], draw.normal(ids.numel(), *shape))


def test_a_call_holds_and_a_block_ends():
    assert not mf.atomics_allowed()
    mf.allow_atomics()
    assert mf.atomics_allowed()
    with mf.allow_atomics(False):
        assert not mf.atomics_allowed()
        with mf.allow_atomics():
            assert mf.atomics_allowed()
        assert not mf.atomics_allowed()
    assert mf.atomics_allowed()
    mf.allow_atomics(False)
    assert not mf.atomics_allowed()


def test_a_block_that_fails_ends_too():
    with pytest.raises(ZeroDivisionError), mf.allow_atomics():
        raise ZeroDivisionError
    assert not mf.atomics_allowed()


def test_it_holds_in_all_threads():
    found = []
    with mf.allow_atomics():
        thread = threading.Thread(target=lambda: found.append(mf.atomics_allowed()))
        thread.start()
        thread.join()
    assert found == [True]


def test_deterministic_algorithms_win():
    with mf.allow_atomics():
        torch.use_deterministic_algorithms(True)
        try:
            assert not mf.atomics_allowed()
        finally:
            torch.use_deterministic_algorithms(False)
        assert mf.atomics_allowed()


@pytest.mark.parametrize("mode", [1, None, "yes"])
def test_a_mode_that_is_no_bool_is_refused(mode):
    with pytest.raises(TypeError, match=f"mode: expected a bool, got {mode!r}"):
        mf.allow_atomics(mode)


def test_where_there_are_no_kernels_nothing_happens(monkeypatch):
    monkeypatch.setattr(_library, "cpu", _library.Library("_C", False, "it was not built"))
    with mf.allow_atomics():
        assert not mf.atomics_allowed()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (64,), (132,), (260,)])
@pytest.mark.parametrize("sizes", list(SIZES.values()), ids=list(SIZES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_by_atomics_are_sums(dtype, sizes, shape):
    gradient = gradient_of(sizes, shape, dtype)
    expected = SparseRows(gradient.ids, gradient.rows.double()).to_dense(len(sizes) + 1)
    with mf.allow_atomics():
        actual = F.sum_rows(gradient, len(sizes) + 1)
    assert actual.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]  # of up to 300 terms of about 1
    assert_close(actual.double(), expected, rtol=0, atol=tolerance * float(expected.abs().amax()))


@pytest.mark.parametrize("shape", [(), (3,), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sgd_by_atomics_is_sgd(dtype, shape):
    gradient = gradient_of(SIZES["few of many"], shape, dtype)
    table, bias = Draw(1, dtype).normal(6, *shape), Draw(2, dtype).normal(6)
    expected = table - 0.1 * gradient.to_dense(6), bias.clone()
    expected[1].index_add_(0, gradient.ids, -0.1 * gradient.rows.reshape(len(gradient.ids), -1)[:, 0])
    with mf.allow_atomics():
        biases = gradient.rows.reshape(len(gradient.ids), -1)[:, 0].contiguous()
        _ops.ops.sparse_sgd([table, bias], gradient.ids, [gradient.rows, biases], 0.1)
    assert_close((table, bias), expected)


def test_rows_without_columns_and_unaligned_ones_are_added():
    ids = torch.tensor([5, 2, 5])
    wide = Draw(0, torch.float32).normal(3 * 64 + 1)[1:].view(3, 64)  # 4 bytes off
    table = torch.zeros(6 * 64 + 1)[1:].view(6, 64)
    expected = SparseRows(ids, wide).to_dense(6)
    with mf.allow_atomics():
        assert F.sum_rows(SparseRows(ids, torch.zeros(3, 0)), 6).shape == (6, 0)
        assert_close(F.sum_rows(SparseRows(ids, wide), 6), expected)
        _ops.ops.sparse_sgd([table], ids, [wide.clone()], 0.5)
    assert_close(table, -0.5 * expected)


@pytest.mark.parametrize("shape", [(), (64,)])
def test_the_order_of_threads_is_seen_only_where_it_may_be(shape, depends_on_order):
    gradient = gradient_of(SIZES["few of many"], shape)
    start = Draw(1, torch.float32).normal(5, *shape)

    def sgd():
        table = start.clone()
        _ops.ops.sparse_sgd([table], gradient.ids, [gradient.rows], 0.1)
        return table

    for run in (sgd, lambda: F.sum_rows(gradient, 5)):
        assert not depends_on_order(run)
        with mf.allow_atomics():
            assert depends_on_order(run)
            torch.use_deterministic_algorithms(True)
            try:
                assert not depends_on_order(run)
            finally:
                torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_optimisers_that_take_a_root_of_the_sum_go_on_sorting(name, depends_on_order):
    gradient = gradient_of(SIZES["few of many"], (64,))

    def step():
        table, *states = (torch.ones(5, 64) for _ in range({"adam": 3, "adagrad": 2}[name]))
        numbers = {"adam": (0.1, 0.9, 0.99, 1e-8, 1), "adagrad": (0.1, 1e-8)}[name]
        getattr(_ops.ops, f"sparse_{name}")(
            [table], *[[state] for state in states], gradient.ids, [gradient.rows], *numbers
        )
        return table

    with mf.allow_atomics():
        assert not depends_on_order(step)


@pytest.mark.parametrize("adapt", ["user", "all"])
def test_dense_gradients_of_items_are_summed_in_any_order(adapt, depends_on_order):
    model, batch = Draw(0, torch.float32).model(), Draw(1, torch.float32).batch((30, 20, 25))

    def gradient():
        table = model.item_table.clone().requires_grad_()
        args = model.user_init, table, model.item_bias
        if adapt == "user":
            result = F.adapt_and_score(*args, batch)
        else:
            result = F.adapt(*args, batch.support, adapt="all", inner_lr=0.02).user
        return torch.autograd.grad(result.sum(), table)[0]

    assert not depends_on_order(gradient)
    with mf.allow_atomics():
        assert depends_on_order(gradient)


def test_what_was_compiled_before_knows_of_it(depends_on_order):
    gradient = gradient_of(SIZES["few of many"], (64,))
    torch.compiler.reset()
    compiled = torch.compile(lambda ids, rows: _ops.ops.sum_rows(ids, rows, 5), backend="aot_eager", fullgraph=True)
    assert not depends_on_order(lambda: compiled(*gradient))
    with mf.allow_atomics():
        assert depends_on_order(lambda: compiled(*gradient))


def test_it_cannot_be_changed_inside_of_what_is_compiled():
    def double(x):
        with mf.allow_atomics():
            return 2 * x, mf.atomics_allowed()

    torch.compiler.reset()
    value = torch.ones(3, device="cpu")
    assert torch.compile(double, backend="aot_eager")(value)[1]  # which leaves this part to Python
    assert not mf.atomics_allowed()
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_atomics"):
        torch.compile(double, backend="aot_eager", fullgraph=True)(value)
