"""The operator meta_step: the outer loss and every meta-gradient equal autograd through the reference."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from problems import RAGGED, Draw, compare_with_reference, relative_error, tracked
from torch.library import opcheck

from metarec_fast import _ops, reference
from metarec_fast import functional as F
from metarec_fast._arguments import InnerLoop
from metarec_fast.results import SparseRows
from metarec_fast.tasks import Entries, TaskBatch

OUTER = ({"squared": 1.0}, {"logistic": 1.0}, {"absolute": 1.0}, {"squared": 0.5, "logistic": 0.2, "absolute": 0.3})


@pytest.mark.parametrize("losses", OUTER)
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("first_order", [False, True])
def test_every_gradient_equals_autograd_through_the_reference(losses, loss, first_order):
    draw = Draw(1)
    loop = draw.loop(5, learned=True, num_tasks=6, loss=loss, first_order=first_order)
    compare_with_reference(draw.model(num_tasks=6), draw.batch(weights=True), loop, losses)


@pytest.mark.parametrize("form", ["gram", "direct", "normal"])
@pytest.mark.parametrize("steps", [0, 1, 20])
def test_every_form_agrees(form, steps):
    draw = Draw(2)
    without = {"prior_pull": None} if form == "gram" else {}
    loop = draw.loop(steps, learned=True, form=form, **without)
    compare_with_reference(draw.model(), draw.batch(RAGGED, weights=True), loop, {"squared": 1.0})


@pytest.mark.parametrize("sizes", [RAGGED, (1, 7), (8, 9), (200,)])
def test_the_exact_form_agrees(sizes):
    draw = Draw(3)
    loop = InnerLoop(draw.uniform(), "exact", prior_pull=draw.uniform() + 0.5)
    compare_with_reference(draw.model(), draw.batch(sizes, weights=True), loop, {"squared": 1.0})


@pytest.mark.parametrize(
    ("dim", "sizes", "steps"),
    [(1, (5, 3), 3), (3, (9,), 5), (4, (40, 2), 3), (64, (150, 2), 10), (132, (300, 3, 40), 20), (256, (70, 0, 5), 3)],
)
def test_tasks_of_any_size_and_width_agree(dim, sizes, steps):
    draw = Draw(dim)
    model, batch = draw.model(dim=dim), draw.batch(sizes, tuple(3 for _ in sizes), weights=True)
    rate = 0.02 * draw.uniform()
    for loop in (
        InnerLoop(rate, steps),
        InnerLoop(rate, steps, form="direct"),
        InnerLoop(rate, steps, adapt="all"),
        InnerLoop(rate, "exact", prior_pull=draw.uniform() + 0.5),
    ):
        compare_with_reference(model, batch, loop, {"squared": 1.0})


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("form", ["auto", "normal"])
def test_the_multi_step_loss_weighs_every_step(form, first_order):
    draw = Draw(4)
    loop = draw.loop(4, learned=True, form=form, first_order=first_order)
    compare_with_reference(draw.model(), draw.batch(weights=True), loop, {"squared": 1.0}, draw.uniform(5))


@pytest.mark.parametrize("dim", [7, 64])
@pytest.mark.parametrize("loss", ["squared", "logistic", "bpr", "softmax"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("whole_path", [False, True])
def test_steps_of_nothing_but_the_gradient_have_a_form_of_their_own(dim, loss, first_order, whole_path):
    draw = Draw(dim)
    pairs = loss in ("bpr", "softmax")
    batch = draw.batch(weights=True, negatives=2 if pairs else 0, log_q=loss == "softmax")
    losses = {"bpr": 1.0} if loss == "bpr" else {"softmax": 1.0} if pairs else {"squared": 1.0}
    rates = torch.tensor([0.05, 0.0, 0.1], dtype=torch.float64)  # a step of none has a gradient too
    loop = InnerLoop(rates, 3, loss=loss, first_order=first_order, extra_count=1.5, form="direct")
    kappa = draw.uniform(4) if whole_path else None
    unmoved = ("user_bias_init", "offset") if pairs else ()  # differences of scores know neither
    compare_with_reference(draw.model(dim=dim), batch, loop, losses, kappa, unmoved=unmoved)
    one_rate = replace(loop, inner_lr=rates[0])
    compare_with_reference(draw.model(dim=dim), batch, one_rate, losses, kappa, unmoved=unmoved)


def test_weighing_only_the_last_step_is_the_ordinary_loss():
    draw = Draw(4)
    model, batch, loop = draw.model(), draw.batch(), draw.loop(3)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    ordinary = _ops.meta_step(model, batch, loop, {"squared": 1.0}, None)
    weighed = _ops.meta_step(model, batch, loop, {"squared": 1.0}, last)
    assert relative_error(weighed.grads["item_table"], ordinary.grads["item_table"]) < 1e-12


def test_full_adaptation_goes_through_the_reference_with_exact_gradients():
    draw = Draw(5)
    model, batch = draw.model(num_items=9, dim=3), draw.batch((3, 0, 5), (2, 1, 3), num_items=9)
    result = F.meta_step(model.user_init, model.item_table, model.item_bias, batch, adapt="all", inner_steps=2)
    leaves = [value.requires_grad_() for value in (model.user_init, model.item_table, model.item_bias)]
    scores = F.adapt_and_score(*leaves, batch, adapt="all", inner_steps=2)
    sizes = batch.query.sizes()[batch.query.task_ids()]
    loss = ((scores - batch.query.targets) ** 2 / sizes).sum() / 3
    user, table, _ = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(result.grads["user_init"], user)
    torch.testing.assert_close(result.grads["item_table"].to_dense(9), table)


def test_the_loss_has_the_same_gradients_by_backward_and_only_once():
    draw = Draw(6)
    leaves, model, batch, loop = tracked(draw.model(), draw.batch(weights=True), draw.loop(3, learned=True))
    result = _ops.meta_step(model, batch, loop, {"squared": 1.0}, None)
    gradients = torch.autograd.grad(3 * result.loss, list(leaves.values()), create_graph=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        expected = result.grads[name]
        dense = expected.to_dense(len(leaf)) if isinstance(expected, SparseRows) else expected
        torch.testing.assert_close(gradient, 3 * dense)
        assert not dense.requires_grad
    with pytest.raises(RuntimeError, match="^meta_step cannot be differentiated twice"):
        gradients[0].sum().backward()


def test_gradcheck_in_double_precision():
    draw = Draw(7)
    leaves, model, batch, loop = tracked(
        draw.model(num_items=9, dim=3),
        draw.batch((3, 0, 6), (2, 1, 3), num_items=9, weights=True),
        draw.loop(3, dim=3, learned=True),
    )
    assert torch.autograd.gradcheck(
        lambda *values: _ops.meta_step(model, batch, loop, {"squared": 1.0}, None).loss, tuple(leaves.values())
    )


def test_opcheck_finds_nothing_and_it_compiles_into_one_graph():
    draw = Draw(8)
    leaves, model, batch, loop = tracked(draw.model(), draw.batch(weights=True), draw.loop(3, learned=True))
    arguments = (
        *_ops._inputs(model, batch.support), *_ops.judged_query(batch), *_ops._loop(loop), "squared", None, 127,
    )  # fmt: skip
    opcheck(torch.ops.metarec_fast.meta_step, arguments)

    def loss(table):
        return F.meta_step(model.user_init, table, model.item_bias, batch, inner_lr=loop.inner_lr, inner_steps=3).loss

    (eager,) = torch.autograd.grad(loss(model.item_table), model.item_table)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(model.item_table), model.item_table)
    torch.testing.assert_close(compiled, eager)
    assert leaves


def test_coalesced_rows_come_once_and_sum_to_the_same():
    draw = Draw(9)
    model, batch = draw.model(), draw.batch()
    arguments = (model.user_init, model.item_table, model.item_bias, batch)
    loose, tidy = (F.meta_step(*arguments, coalesce=coalesce).grads["item_table"] for coalesce in (False, True))
    assert torch.equal(tidy.ids, loose.ids.unique())
    torch.testing.assert_close(tidy.to_dense(60), loose.to_dense(60))


def test_float32_agrees_with_float64():
    draw = Draw(10)
    model, batch = draw.model(), draw.batch()
    double = F.meta_step(model.user_init, model.item_table, model.item_bias, batch)
    single = F.meta_step(model.user_init.float(), model.item_table.float(), model.item_bias.float(), batch)
    torch.testing.assert_close(single.loss, double.loss.float())
    rows = double.grads["item_table"].rows.float()
    # Rows are sums of terms of either sign, so what is small is judged by the largest: 2⁻²³ for each of about 50 terms.
    torch.testing.assert_close(single.grads["item_table"].rows, rows, rtol=1e-5, atol=6e-6 * float(rows.abs().max()))


@pytest.mark.parametrize("dim", [7, 64])
@pytest.mark.parametrize("adapt", ["user", "all"])
def test_a_bfloat16_table_is_the_same_as_its_values_in_float32(adapt, dim):
    draw = Draw(12, torch.float32)
    model, batch = draw.model(dim=dim), draw.batch(weights=True)
    narrow = model.item_table.bfloat16()
    loop = InnerLoop(torch.tensor(0.1), 5, adapt=adapt)
    stored, widened = (
        _ops.meta_step(replace(model, item_table=table), batch, loop, {"squared": 1.0}, None)
        for table in (narrow, narrow.float())
    )
    for name, gradient in widened.grads.items():
        assert relative_error(stored.grads[name], gradient) == 0, name
    assert stored.grads["item_table"].rows.dtype == torch.float32
    slow = reference.meta_step(replace(model, item_table=narrow), batch, loop, {"squared": 1.0})
    torch.testing.assert_close(stored.loss, slow.loss)


def test_a_bfloat16_table_gets_dense_gradients_in_bfloat16():
    draw = Draw(13, torch.float32)
    model, batch = draw.model(), draw.batch()
    tables = [model.item_table.bfloat16().requires_grad_(), model.item_table.bfloat16().float().requires_grad_()]
    for table in tables:
        scores = F.adapt_and_score(model.user_init, table, model.item_bias, batch)
        scores.square().sum().backward()
    assert torch.equal(tables[0].grad, tables[1].grad.bfloat16())


def test_without_any_query_the_loss_is_zero_and_so_are_the_gradients():
    draw = Draw(0)
    model = draw.model()
    result = F.meta_step(model.user_init, model.item_table, model.item_bias, draw.batch((3, 2), (0, 0)))
    assert float(result.loss) == 0
    assert not result.grads["item_table"].rows.any()


@pytest.mark.parametrize("sizes", [(), (0, 0), (3, 2)])
def test_backward_without_any_query_gives_zeros(sizes):
    draw = Draw(0)
    model = draw.model()
    leaves = [value.requires_grad_() for value in (model.user_init, model.item_table, model.item_bias)]
    batch = draw.batch(sizes, (0,) * len(sizes))
    F.meta_step(*leaves, batch, first_order=True).loss.backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_the_default_device_of_one_call_does_not_reach_the_next():
    draw = Draw(0)
    model, batch = draw.model(), draw.batch()
    arguments = (model.user_init, model.item_table, model.item_bias, batch)
    with torch.device("meta"):
        F.meta_step(*arguments, inner_lr=0.0789)
    expected = F.meta_step(*arguments, inner_lr=torch.tensor(0.0789).double()).loss
    torch.testing.assert_close(F.meta_step(*arguments, inner_lr=0.0789).loss, expected)


def test_where_no_binary_loads_the_reference_gives_the_same(monkeypatch):
    draw = Draw(0)
    model, batch = draw.model(), draw.batch()
    leaves = [value.requires_grad_() for value in (model.user_init, model.item_table, model.item_bias)]
    fast = F.meta_step(*leaves, batch)
    monkeypatch.setattr("metarec_fast._library.loaded_for", lambda tensor: False)
    slow = F.meta_step(*leaves, batch, coalesce=True)
    torch.testing.assert_close(slow.loss, fast.loss)
    slopes = (torch.autograd.grad(result.loss, leaves) for result in (slow, fast))
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"outer_loss": "hinge"}, ValueError,
         "outer_loss: expected one of squared, logistic, absolute, bpr, softmax, got 'hinge'"),
        ({"outer_loss": {"squared": -1.0}}, ValueError, r"outer_loss\['squared'\]: must be finite and ≥ 0, got -1.0"),
        ({"step_weights": torch.ones(5).double()}, ValueError, r"step_weights: expected shape \[K \+ 1\] = \(6,\)"),
        ({"step_weights": torch.ones(2).double(), "inner_steps": "exact", "prior_pull": 1.0}, ValueError,
         "step_weights: 'exact' has no steps"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    draw = Draw(0)
    model = draw.model()
    with pytest.raises(error, match=message):
        F.meta_step(model.user_init, model.item_table, model.item_bias, draw.batch(), **changes)


@pytest.mark.parametrize(
    ("outer_loss", "message"),
    [
        ("hinge", "expected squared, logistic, absolute, bpr or softmax, got 'hinge'"),
        ("squared=1,hinge=1", "expected squared, logistic, absolute, bpr or softmax, got 'hinge'"),
        ("squared=-1", "expected a weight ≥ 0, got '-1' in 'squared=-1'"),
        ("squared=", "expected a weight ≥ 0, got '' in 'squared='"),
        ("absolute=0.5,squared=0.5x", "expected a weight ≥ 0, got '0.5x' in 'absolute=0.5,squared=0.5x'"),
        ("squared=inf", "expected a weight ≥ 0, got 'inf'"),
    ],
)
def test_the_operator_says_what_it_cannot_read_of_an_outer_loss(outer_loss, message):
    draw = Draw(0)
    batch = draw.batch()
    arguments = *_ops._inputs(draw.model(), batch.support), *_ops.judged_query(batch), *_ops._loop(draw.loop(2))
    with pytest.raises(RuntimeError, match=f"outer_loss: {message}"):
        torch.ops.metarec_fast.meta_step(*arguments, outer_loss, None, 127)


def test_weights_of_outer_losses_are_read_as_they_are_written():
    draw = Draw(0)
    model, batch, loop = draw.model(), draw.batch(), draw.loop(2)
    losses = [_ops.meta_step(model, batch, loop, {name: 1}, None).loss for name in ("squared", "absolute")]
    weights = 1 / 3, 1e-7
    mixed = _ops.meta_step(model, batch, loop, dict(zip(("squared", "absolute"), weights, strict=True)), None).loss
    torch.testing.assert_close(mixed, weights[0] * losses[0] + weights[1] * losses[1], rtol=1e-14, atol=0)


def test_a_query_without_targets_is_named():
    draw = Draw(0)
    model, batch = draw.model(), draw.batch()
    silent = TaskBatch(batch.support, batch.query.with_items(batch.query.items))
    silent.query.targets = None
    with pytest.raises(ValueError, match="query.targets: expected a tensor"):
        F.meta_step(model.user_init, model.item_table, model.item_bias, silent)


def test_a_form_that_would_be_wrong_is_never_chosen():
    draw = Draw(11)
    loop = replace(draw.loop(50, learned=True), form="auto")  # long and small: Gram's home, but A and ρ together
    compare_with_reference(draw.model(dim=7), draw.batch((2, 3), (2, 2), weights=True), loop, {"squared": 1.0})


@pytest.mark.parametrize("name", ["support.targets", "query.targets", "query.weights", "batch.weights"])
def test_gradients_of_data_are_refused_instead_of_missing(name):
    draw = Draw(21)
    model, batch = draw.model(), draw.batch(weights=True)
    part, _, field = name.partition(".")
    getattr(batch if part == "batch" else getattr(batch, part), field).requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: no gradient is taken of it"):
        F.meta_step(model.user_init, model.item_table, model.item_bias, batch)
    with torch.no_grad():
        F.meta_step(model.user_init, model.item_table, model.item_bias, batch)


@pytest.mark.parametrize("run", [F.meta_step, F.adapt_and_score])
def test_derivatives_in_forward_mode_are_refused_instead_of_zero(run):
    draw = Draw(22)
    model, batch = draw.model(), draw.batch()

    def call(table):
        result = run(model.user_init, table, model.item_bias, batch)
        return result if isinstance(result, torch.Tensor) else result.loss

    with pytest.raises(NotImplementedError, match="item_table: derivatives in forward mode"):
        torch.func.jvp(call, (model.item_table,), (torch.ones_like(model.item_table),))


@pytest.mark.parametrize("adapt", ["user", "all"])
def test_the_reference_leaves_the_batch_as_it_is(adapt):
    draw = Draw(23)
    model, batch = draw.model(), draw.batch(weights=True)
    weights = batch.support.weights
    reference.meta_step(model, batch, draw.loop(2, adapt=adapt), {"squared": 1.0})
    assert batch.support.weights is weights
    assert not weights.requires_grad


def test_parts_of_different_dtypes_meet_in_that_of_the_table():
    draw, double = Draw(24, torch.float32), Draw(24)
    model, batch, other = draw.model(), draw.batch(weights=True), double.batch(weights=True)
    mixed = TaskBatch(
        batch.support.with_weights(other.support.weights),
        batch.query.with_weights(other.query.weights),
        weights=torch.ones(batch.num_tasks, dtype=torch.int64),
    )
    same = TaskBatch(
        batch.support.with_weights(other.support.weights.float()),
        batch.query.with_weights(other.query.weights.float()),
    )
    results = [F.meta_step(model.user_init, model.item_table, model.item_bias, each) for each in (mixed, same)]
    torch.testing.assert_close(results[0].loss, results[1].loss)


def test_large_gradients_are_those_of_their_parts_and_their_memory_comes_again():
    """From 6 MB on rows are written past the caches, and all but small ones' memory is kept for the next call."""
    draw = Draw(25, torch.float32)
    tasks, size, num_items = 8192, 9, 500
    model = draw.model(num_items, 64)
    whole = draw.batch((size,) * tasks, (size,) * tasks, num_items)

    def part(entries, first, last):
        here = slice(first * size, last * size)
        offsets = entries.offsets[first : last + 1] - first * size
        return Entries(entries.items[here], entries.targets[here], offsets)

    def gradients(batch):
        return F.meta_step(model.user_init, model.item_table, model.item_bias, batch, inner_steps=2).grads

    bounds = [tasks // 8 * i for i in range(9)]
    parts = [TaskBatch(part(whole.support, *ends), part(whole.query, *ends)) for ends in pairwise(bounds)]
    rows = [gradients(each)["item_table"].rows for each in parts]
    assert all(each.nbytes < 6 << 20 for each in rows)
    support = torch.cat([each[: len(each) // 2] for each in rows])
    query = torch.cat([each[len(each) // 2 :] for each in rows])
    expected = torch.cat([support, query]) / 8  # a mean over eight times as many tasks, so exactly an eighth of it
    assert expected.nbytes >= 32 << 20
    seen = set()
    for _ in range(4):
        actual = gradients(whole)["item_table"].rows
        seen.add(actual.data_ptr())
        assert torch.equal(actual, expected)
        actual.fill_(float("nan"))
        del actual
    if _keeps_result_memory():
        assert len(seen) < 4


@pytest.mark.cpu
@pytest.mark.skipif("not _keeps_result_memory()")
@pytest.mark.parametrize("megabytes", [0.003, 0.08, 2.0, 4.1, 6.3, 8.0, 40.5])
def test_results_of_any_size_but_a_small_one_get_the_memory_of_the_last_one(megabytes):
    count = int(megabytes * 2**20 / 256)
    gradient = SparseRows(torch.arange(count), torch.ones(count, 64))
    first = F.coalesce_rows(gradient).rows.data_ptr()  # freed at once
    assert F.coalesce_rows(gradient).rows.data_ptr() == first


@pytest.mark.cpu
@pytest.mark.skipif("not _keeps_result_memory()")
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says what is free to take")
def test_only_memory_that_was_not_in_use_lately_is_free_to_take():
    script = """
import re, torch
from pathlib import Path
from metarec_fast import functional as F
from metarec_fast.results import SparseRows
for megabytes in (48, 8, 96):
    count = megabytes * 2**20 // 256
    F.coalesce_rows(SparseRows(torch.arange(count), torch.ones(count, 64)))
    print(re.search(r"LazyFree: +(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second, last = (int(line) / 1024 for line in done.stdout.splitlines())
    assert first == second == 0
    assert last >= 48 + 8 + 96


def _keeps_result_memory():
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
