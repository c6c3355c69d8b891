"""The operator reptile_step: where tasks end up, averaged, equals the reference."""

import pytest
import torch
from problems import Draw, relative_error
from torch.library import opcheck

from metarec_fast import _ops, reference
from metarec_fast import functional as F
from metarec_fast._arguments import InnerLoop
from metarec_fast.results import SparseRows

FEW = 12
SIZES = (3, 0, 1, 13, 40, 5)


@pytest.mark.parametrize("per_task", [False, True])
@pytest.mark.parametrize("loss", ["squared", "logistic"])
@pytest.mark.parametrize("adapt", ["user", "all"])
def test_loss_and_moves_equal_the_reference(adapt, loss, per_task):
    draw = Draw(1)
    model = draw.model(FEW, num_tasks=len(SIZES) if per_task else None)
    support, weights = draw.entries(SIZES, FEW, weights=True), draw.uniform(len(SIZES))
    loop = draw.loop(4, adapt=adapt, loss=loss)
    actual = _ops.reptile_step(model, support, weights, loop)
    expected = reference.reptile_step(model, support, weights, loop)
    assert relative_error(actual.loss, expected.loss) < 1e-12
    assert actual.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():
        assert relative_error(actual.grads[name], gradient) < 1e-12, name


@pytest.mark.parametrize("dim", [1, 16, 33])
def test_rows_of_any_width_in_float32(dim):
    draw = Draw(2, torch.float32)
    model, support = draw.model(FEW, dim), draw.entries((5, 20), FEW)
    actual = _ops.reptile_step(model, support, None, InnerLoop(torch.tensor(0.1), 3, adapt="all"))
    expected = reference.reptile_step(model, support, None, InnerLoop(torch.tensor(0.1), 3, adapt="all"))
    torch.testing.assert_close(actual.grads["item_table"].rows, expected.grads["item_table"].rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(actual.grads["user_init"], expected.grads["user_init"], rtol=1e-4, atol=1e-6)


def test_a_full_step_along_the_gradient_is_where_one_task_ends():
    draw = Draw(3)
    model, support = draw.model(FEW), draw.entries((7,), FEW)
    arguments = (model.user_init, model.item_table, model.item_bias, support)
    grads = F.reptile_step(*arguments, inner_steps=3).grads
    fast = F.adapt(*arguments, inner_steps=3, adapt="all")
    torch.testing.assert_close(model.user_init - grads["user_init"], fast.user[0])
    moved = model.item_table - grads["item_table"].to_dense(FEW)
    torch.testing.assert_close(moved[support.items], fast.items.rows)


def test_without_tasks_or_support_nothing_moves():
    draw = Draw(4)
    model = draw.model(FEW)
    for sizes in ((), (0, 0)):
        result = F.reptile_step(model.user_init, model.item_table, model.item_bias, draw.entries(sizes, FEW))
        assert float(result.loss) == 0
        assert not result.grads["user_init"].any()


def test_tasks_without_weight_move_nothing():
    draw = Draw(4)
    model, support = draw.model(FEW), draw.entries(SIZES, FEW)
    weights = torch.tensor([0.0 if size else 1.0 for size in SIZES], dtype=torch.float64)
    arguments = (model.user_init, model.item_table, model.item_bias, support)
    result = F.reptile_step(*arguments, task_weights=weights)
    assert result.loss == 0
    assert all(not (grad.rows if isinstance(grad, SparseRows) else grad).any() for grad in result.grads.values())


def test_opcheck_finds_nothing():
    draw = Draw(5)
    model, support, loop = draw.model(FEW), draw.entries(SIZES, FEW, weights=True), draw.loop(2, adapt="all")
    opcheck(torch.ops.metarec_fast.reptile_step, (*_ops._inputs(model, support), None, *_ops._loop(loop)))


@pytest.mark.cpu
def test_the_same_bits_for_any_number_of_threads():
    draw = Draw(6, torch.float32)
    model, support = draw.model(300, 16), draw.entries((7, 0, 30, 4) * 80, 300)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        grads = F.reptile_step(model.user_init, model.item_table, model.item_bias, support).grads
        results.append((grads["user_init"], grads["item_table"].rows, grads["item_bias"].rows))
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "bpr"}, "loss: Reptile adapts on a loss of single scores, got 'bpr'"),
        ({"task_weights": torch.ones(2).double()}, r"task_weights: expected shape \[T\] = \(6,\), got \(2,\)"),
        ({"task_weights": -torch.ones(6).double()}, "task_weights: must be finite and ≥ 0"),
        ({"momentum": 0.5}, "adapt='all' cannot be combined with momentum"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    draw = Draw(7)
    model = draw.model(FEW)
    with pytest.raises(ValueError, match=message):
        F.reptile_step(model.user_init, model.item_table, model.item_bias, draw.entries(SIZES, FEW), **changes)
