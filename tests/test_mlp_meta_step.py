"""The operator mlp_meta_step: the outer loss and every meta-gradient equal autograd through the reference."""

from dataclasses import replace

import pytest
import torch
from problems import Draw, relative_error
from torch.library import opcheck
from towers import SQUARED, compare_with_reference, draw_loop, draw_tower, gradients_of, leaves_of, raw_inputs

from metarec_fast import _library, _mlp_ops, mlp_reference
from metarec_fast import functional as F
from metarec_fast._mlp_arguments import Tower, TowerLoop
from metarec_fast.results import SparseRows
from metarec_fast.tasks import Entries, TaskBatch

HIDDEN = ((), (9,), (9, 5), (16, 33, 8))
DOUBLE = torch.float64


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_every_gradient_equals_autograd_through_the_reference(hidden, activation, first_order, loss):
    draw = Draw(len(hidden))
    tower, loop = draw_tower(draw, hidden, activation=activation), draw_loop(draw, loss=loss, first_order=first_order)
    mixture = {"squared": 0.5, "logistic": 0.2, "absolute": 0.3}
    compare_with_reference(tower, draw.batch(weights=True), loop, mixture)


@pytest.mark.parametrize("steps", [0, 1, 2, 10])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_any_number_of_steps_agrees(steps, activation):
    draw = Draw(steps)
    tower, loop = draw_tower(draw, activation=activation), draw_loop(draw, steps)
    compare_with_reference(tower, draw.batch(), loop)


@pytest.mark.parametrize(
    ("user_width", "dim", "hidden", "sizes"),
    [(0, 1, (1,), (1,)), (1, 16, (64, 64), (16, 16)), (64, 64, (64, 64), (4, 90)), (5, 130, (17, 1, 3), (33, 0, 2)),
     (3, 8, (257,), (7, 65))],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_tasks_and_towers_of_any_size_agree(user_width, dim, hidden, sizes, activation):
    draw = Draw(dim)
    tower = draw_tower(draw, hidden, num_tasks=len(sizes), user_width=user_width, dim=dim, activation=activation)
    batch = draw.batch(sizes, tuple(5 + 3 * t for t in range(len(sizes))))
    for first_order in (False, True):
        loop = draw_loop(draw, 3, first_order=first_order)
        loop.inner_lr = loop.inner_lr / dim**0.5
        compare_with_reference(tower, batch, loop)


@pytest.mark.parametrize("hidden", [(), (9, 5)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("first_order", [False, True])
def test_large_supports_have_a_first_layer_of_their_own(hidden, activation, first_order):
    draw = Draw(15)
    sizes = (20, 21, 300)  # beside inputs of width 10: up to 20 entries share the first layer
    tower = draw_tower(draw, hidden, num_tasks=3, activation=activation)
    loop = draw_loop(draw, 3, first_order=first_order)
    compare_with_reference(tower, draw.batch(sizes, (3, 9, 4), weights=True), loop)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_every_tensor_may_have_a_rate_of_its_own(hidden, activation, first_order, steps):
    draw = Draw(20 + len(hidden))
    tower, batch = draw_tower(draw, hidden, activation=activation), draw.batch(weights=True)  # 40 entries are many
    for shape in ((1, 2 * len(tower.layers)), (5, 2 * len(tower.layers))):
        rates = 0.05 * draw.uniform(*shape)[:steps]
        compare_with_reference(tower, batch, TowerLoop(rates, steps, first_order=first_order))


def test_a_rate_of_zero_freezes_a_tensor_and_has_a_gradient_nevertheless():
    """The last layer alone adapts (ANIL): the weights before it are what they are for a tower of inputs H."""
    draw = Draw(19)
    tower, batch = draw_tower(draw, activation="gelu"), draw.batch()
    rates = torch.tensor([[0, 0, 0, 0, 0.05, 0.02]], dtype=DOUBLE)
    loop = TowerLoop(rates, 3)
    compare_with_reference(tower, batch, loop)
    assert _mlp_ops.meta_step(tower, batch, loop, SQUARED).grads["inner_lr"].abs().min() > 0
    frozen = _mlp_ops.adapt_and_score(tower, batch, TowerLoop(0 * rates, 3))
    torch.testing.assert_close(frozen, _mlp_ops.adapt_and_score(tower, batch, TowerLoop(rates, 0)))


def test_one_rate_for_all_has_the_sum_of_their_gradients():
    draw = Draw(1)
    tower, batch = draw_tower(draw), draw.batch()
    one, steps, tensors, each = (
        _mlp_ops.meta_step(tower, batch, TowerLoop(torch.full(shape, 0.03, dtype=DOUBLE), 4), SQUARED).grads["inner_lr"]
        for shape in ((), (4,), (1, 6), (4, 6))
    )
    torch.testing.assert_close(steps, each.sum(1))
    torch.testing.assert_close(tensors, each.sum(0, keepdim=True))
    torch.testing.assert_close(one, each.sum())


def test_the_loss_has_the_same_gradients_by_backward_and_only_once():
    draw = Draw(2)
    leaves, tower, loop = leaves_of(draw_tower(draw), draw_loop(draw, 3))
    result = _mlp_ops.meta_step(tower, draw.batch(weights=True), loop, SQUARED)
    gradients = torch.autograd.grad(3 * result.loss, leaves, create_graph=True)
    layers = [part for layer in result.grads["layers"] for part in layer]
    expected = [result.grads[name] for name in ("user_part", "item_table", "inner_lr")] + layers
    for leaf, gradient, known in zip(leaves, gradients, expected, strict=True):
        dense = known.to_dense(len(leaf)) if isinstance(known, SparseRows) else known
        torch.testing.assert_close(gradient, 3 * dense)
        assert not dense.requires_grad
    with pytest.raises(RuntimeError, match="^mlp_meta_step cannot be differentiated twice"):
        gradients[0].sum().backward()


def test_the_loss_of_the_reference_has_gradients_too():
    draw = Draw(2)
    leaves, tower, loop = leaves_of(draw_tower(draw), draw_loop(draw, 2))
    result = mlp_reference.meta_step(tower, draw.batch(), loop, SQUARED)
    table, weight = torch.autograd.grad(result.loss, [leaves[1], leaves[3]])
    torch.testing.assert_close(table, result.grads["item_table"].to_dense(len(table)))
    torch.testing.assert_close(weight, result.grads["layers"][0][0])


def test_gradcheck_in_double_precision():
    draw = Draw(3)
    tower = draw_tower(draw, (4,), num_tasks=3, user_width=2, dim=2, num_items=5, activation="gelu")
    leaves, tower, loop = leaves_of(tower, draw_loop(draw, 2, inner_lr=0.05 * draw.uniform(2, 4)))
    batch = draw.batch((3, 0, 5), (2, 1, 3), num_items=5, weights=True)
    assert torch.autograd.gradcheck(lambda *_: _mlp_ops.meta_step(tower, batch, loop, SQUARED).loss, tuple(leaves))


def test_opcheck_finds_nothing_and_it_compiles_into_one_graph():
    draw = Draw(4)
    leaves, tower, loop = leaves_of(draw_tower(draw), draw_loop(draw, 2, inner_lr=0.05 * draw.uniform(2, 6)))
    batch = draw.batch(weights=True)
    query = batch.query
    arguments = (
        *raw_inputs(tower, batch.support), query.items, query.offsets, query.targets, query.weights,
        query.negative_rows, query.log_q, batch.weights, *_mlp_ops._loop(tower, loop), "squared",
    )  # fmt: skip
    opcheck(torch.ops.metarec_fast.mlp_meta_step, arguments)

    def loss(table):
        return F.mlp_meta_step(tower.user_part, table, tower.layers, batch, inner_lr=loop.inner_lr, inner_steps=2).loss

    (eager,) = torch.autograd.grad(loss(tower.item_table), leaves[1])
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True)(tower.item_table), leaves[1])
    torch.testing.assert_close(compiled, eager)


def test_tasks_without_entries_and_no_tasks_at_all_have_defined_results():
    draw = Draw(5)
    loop = draw_loop(draw, 3)
    tower = draw_tower(draw, num_tasks=4)
    compare_with_reference(tower, draw.batch((0, 3, 0, 1), (2, 0, 0, 1)), loop)
    nothing = _mlp_ops.meta_step(tower, draw.batch((3, 0, 2, 1), (0, 0, 0, 0)), loop, SQUARED)
    none = _mlp_ops.meta_step(draw_tower(draw, num_tasks=0), draw.batch((), ()), loop, SQUARED)
    unweighted = draw.batch((3, 0, 2, 1)).with_weights(torch.zeros(4, dtype=torch.float64))
    weightless = _mlp_ops.meta_step(tower, unweighted, loop, SQUARED)
    for result in (nothing, none, weightless):
        assert result.loss == 0
        assert not result.grads["item_table"].rows.any()
        assert not result.grads["layers"][0][0].any()
        assert not result.grads["user_part"].any()


def test_items_that_repeat_inside_a_task_add_up():
    draw = Draw(6)
    tower = draw_tower(draw, num_tasks=2, num_items=3)
    compare_with_reference(tower, draw.batch((9, 5), (4, 8), num_items=3), draw_loop(draw, 3))


def test_inputs_need_not_be_contiguous():
    draw = Draw(7)
    tower, batch, loop = draw_tower(draw), draw.batch(), draw_loop(draw, 3)
    expected = _mlp_ops.meta_step(tower, batch, loop, SQUARED)
    tower.item_table, tower.user_part = tower.item_table.T.contiguous().T, tower.user_part.T.contiguous().T
    tower.layers = [(weight.T.contiguous().T, bias) for weight, bias in tower.layers]
    actual = _mlp_ops.meta_step(tower, batch, loop, SQUARED)
    assert torch.equal(actual.grads["item_table"].rows, expected.grads["item_table"].rows)
    assert torch.equal(actual.grads["layers"][1][0], expected.grads["layers"][1][0])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_float32_is_as_near_to_float64_as_the_reference_is(activation):
    mine, others = [], []
    for seed in range(8, 13):
        draw = Draw(seed)
        tower, batch, loop = draw_tower(draw, (32, 16), activation=activation), draw.batch(), draw_loop(draw, 5)
        layers = [(weight.float(), bias.float()) for weight, bias in tower.layers]
        single = Tower(tower.user_part.float(), tower.item_table.float(), layers, activation)
        lower = batch.to(batch.support.items.device, torch.float32)
        rates = replace(loop, inner_lr=loop.inner_lr.float())
        expected = mlp_reference.meta_step(tower, batch, loop, SQUARED)
        actual = _mlp_ops.meta_step(single, lower, rates, SQUARED)
        assert actual.loss.dtype == torch.float32
        torch.testing.assert_close(actual.loss, expected.loss.float(), rtol=1e-5, atol=0)  # some dozens of roundings
        for result, errors in ((actual, mine), (mlp_reference.meta_step(single, lower, rates, SQUARED), others)):
            pairs = zip(gradients_of(result), gradients_of(expected), strict=True)
            errors.append(max(relative_error(one.double(), other) for one, other in pairs))
    # Of the same size: some gradients are sums of large terms that cancel, a few of them so by chance.
    assert max(mine) < 3 * max(others) < 3e-4


@pytest.mark.cpu
def test_any_number_of_threads_gives_the_same_bits():
    draw = Draw(9, torch.float32)
    tower = draw_tower(draw, (64, 64), num_tasks=200)
    batch, loop = draw.batch(tuple(t % 13 for t in range(200))), draw_loop(draw, 3)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = _mlp_ops.meta_step(tower, batch, loop, SQUARED)
            found.append([result.loss, result.grads["item_table"].rows, *(w for w, _ in result.grads["layers"])])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def _call(**changes):
    draw = Draw(10)
    tower, batch = draw_tower(draw), draw.batch()
    arguments = {
        "user_part": tower.user_part, "item_table": tower.item_table, "layers": tower.layers, "batch": batch, **changes,
    }  # fmt: skip
    return F.mlp_meta_step(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"item_table": torch.zeros(5)}, ValueError, r"^item_table: expected a tensor \[N, D\], got shape \(5,\)"),
        ({"item_table": torch.zeros(60, 0, dtype=DOUBLE)}, ValueError, "^item_table: expected D ≥ 1"),
        ({"item_table": torch.zeros(60, 7).long()}, TypeError, "^item_table: expected dtype float32 or float64, got"),
        ({"user_part": torch.zeros(5, 3, dtype=DOUBLE)}, ValueError, r"^user_part: expected .* with T = 6, got shape"),
        ({"user_part": torch.zeros(6, 3)}, TypeError, "^user_part: expected dtype torch.float64"),
        ({"layers": []}, ValueError, r"^layers: expected a list of \(weight, bias\), at least one, got \[\]"),
        ({"layers": [torch.zeros(1, 10)]}, ValueError, r"^layers\[0\]: expected \(weight, bias\), got shape"),
        ({"layers": [(torch.zeros(1, 9, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE))]}, ValueError,
         r"^layers\[0\] weight: expected \[out, in\] with in = 10, Du \+ D, got shape \(1, 9\)"),
        ({"layers": [(torch.zeros(2, 10, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))]}, ValueError,
         r"^layers\[0\] weight: expected out = 1, the score, got 2"),
        ({"layers": [(torch.zeros(1, 10, dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))]}, ValueError,
         r"^layers\[0\] bias: expected shape \[out\]"),
        ({"activation": "tanh"}, ValueError, "^activation: expected one of relu, gelu, got 'tanh'"),
        ({"loss": "absolute"}, ValueError, "^loss: expected one of squared, logistic, bpr, softmax, got 'absolute'"),
        ({"loss": "bpr"}, ValueError, "^support.negatives: the loss 'bpr' compares with them, got None"),
        ({"outer_loss": "hinge"}, ValueError, "^outer_loss: expected one of squared, .*, softmax, got 'hinge'"),
        ({"outer_loss": "bpr"}, ValueError, "^query.negatives: the loss 'bpr' compares with them, got None"),
        ({"item_bias": torch.zeros(59, dtype=DOUBLE)}, ValueError, r"^item_bias: expected shape \[N\] = \(60,\)"),
        ({"item_bias": torch.zeros(60, dtype=DOUBLE, requires_grad=True)}, ValueError, "^item_bias: no gradient is"),
        ({"inner_steps": -1}, ValueError, "^inner_steps: must be ≥ 0, got -1"),
        ({"inner_steps": "exact"}, TypeError, "^inner_steps: expected an int, got 'exact'"),
        ({"inner_lr": torch.zeros(4, dtype=DOUBLE)}, ValueError,
         r"^inner_lr: expected shape a scalar, \[K\], \[1, P\] or \[K, P\] = .* or \(1, 6\) or \(5, 6\), got \(4,\)"),
        ({"inner_lr": torch.zeros(5, 3, dtype=DOUBLE)}, ValueError, r"^inner_lr: expected shape .*, got \(5, 3\)"),
        ({"batch": None}, TypeError, "^batch: expected TaskBatch, got NoneType"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        _call(**changes)


def test_ids_beyond_the_table_and_gradients_of_data_are_refused():
    with pytest.raises(IndexError, match=r"^support.items: ids must be in \[0, 3\), got \d+ at position"):
        _call(item_table=torch.zeros(3, 7, dtype=DOUBLE))
    draw = Draw(11)
    batch = draw.batch(weights=True)
    batch.support.weights.requires_grad_()
    with pytest.raises(ValueError, match="^support.weights: no gradient is taken of it"):
        _call(batch=batch)
    table = draw_tower(draw).item_table
    with pytest.raises(NotImplementedError, match="^item_table: derivatives in forward mode"):
        torch.func.jvp(lambda table: _call(item_table=table).loss, (table,), (table,))


@pytest.mark.cpu
def test_raw_calls_check_what_they_are_given():
    draw = Draw(12)
    tower, loop = draw_tower(draw, num_tasks=1), draw_loop(draw, 2)
    bad = Entries.unchecked(
        torch.tensor([70]), torch.zeros(1, dtype=DOUBLE), torch.tensor([0, 1]), max_size=1, max_item=0
    )
    fine = draw.entries((2,))
    with pytest.raises(RuntimeError, match=r"support_items: ids must be in \[0, 60\), got 70"):
        _mlp_ops.meta_step(tower, TaskBatch.unchecked(bad, fine), loop, SQUARED)
    tower.activation = "tanh"
    with pytest.raises(RuntimeError, match="activation: expected relu or gelu, got 'tanh'"):
        _mlp_ops.meta_step(tower, TaskBatch(fine, fine), loop, SQUARED)


@pytest.mark.cpu
def test_under_autocast_low_precision_comes_in_and_float32_goes_out():
    draw = Draw(13, torch.float32)
    tower, batch = draw_tower(draw), draw.batch()
    low = [value.bfloat16() for value in (tower.user_part, tower.item_table)]
    expected = F.mlp_meta_step(*(value.float() for value in low), tower.layers, batch)
    with torch.autocast("cpu", torch.bfloat16):
        actual = F.mlp_meta_step(*low, tower.layers, batch)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.grads["item_table"].rows, expected.grads["item_table"].rows)


@pytest.mark.cpu
def test_where_there_are_no_kernels_the_reference_runs(monkeypatch):
    draw = Draw(14)
    tower, batch = draw_tower(draw), draw.batch()
    arguments = tower.user_part, tower.item_table, tower.layers, batch
    expected = F.mlp_meta_step(*arguments), F.mlp_adapt_and_score(*arguments)
    monkeypatch.setattr(_library, "cpu", _library.Library("_C", False, "it was not built"))
    monkeypatch.delattr(_mlp_ops, "ops")
    torch.testing.assert_close(F.mlp_meta_step(*arguments).loss, expected[0].loss)
    torch.testing.assert_close(F.mlp_adapt_and_score(*arguments), expected[1])
