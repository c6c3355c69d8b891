"""Under torch.autocast the operators take low precision and compute in float32."""

import pytest
import torch
from problems import Draw

from metarec_fast import MAML, DotRecommender, MetaSGD, _ops
from metarec_fast import functional as F
from metarec_fast.results import SparseRows

LOW = (torch.bfloat16, torch.float16)


def low(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def as_float(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def raw_arguments():
    draw = Draw(0, torch.float32)
    model, batch, loop = draw.model(), draw.batch(weights=True), draw.loop(3)
    inputs, settings = _ops._inputs(model, batch.support), _ops._loop(loop)
    query = (batch.query.items, batch.query.offsets)
    rows = (batch.query.items, draw.normal(len(batch.query), 7))
    users = draw.normal(6, 7)
    return {
        "adapt": (*inputs, *settings),
        "adapt_and_score": (*inputs, *query, *settings),
        "meta_step": (*inputs, *_ops.judged_query(batch), *settings, "squared", None, 127),
        "reptile_step": (*inputs, None, *settings),
        "score_top_k": (users, users[:, 0], model.item_table, model.item_bias, 5, None, None),
        "coalesce_rows": rows,
        "sum_rows": (*rows, 60),
    }


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", raw_arguments())
def test_a_raw_operator_takes_low_precision_and_gives_float32(name, dtype):
    op, arguments = getattr(_ops.ops, name), [low(value, dtype) for value in raw_arguments()[name]]
    table_is_stored_so = name not in ("coalesce_rows", "sum_rows")
    expected = op(*map(as_float, arguments))
    with torch.autocast(arguments[0].device.type, dtype):
        actual = op(*arguments)
    pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else zip(actual, expected, strict=True)
    for one, other in pairs:
        if one is None and other is None:  # not wanted
            continue
        assert one.dtype == other.dtype
        # A bfloat16 table is widened as it is read: the same numbers, added up in another order.
        torch.testing.assert_close(one, other, atol=1e-5 if table_is_stored_so else 0, rtol=1e-5)


@pytest.mark.parametrize("dtype", LOW)
def test_inputs_that_other_operations_left_in_low_precision_have_gradients_of_their_own_dtype(dtype):
    draw = Draw(0, torch.float32)
    model, batch = draw.model(), draw.batch(weights=True)
    start, table, bias = (low(value, dtype) for value in (model.user_init, model.item_table, model.item_bias))
    results = []
    with torch.autocast(start.device.type, dtype):
        for values in ((start, table, bias), (start.float(), table.float(), bias.float())):
            leaves = [value.clone().requires_grad_() for value in values]
            result = F.meta_step(*leaves, batch)
            assert result.loss.dtype == torch.float32
            rows = result.grads["item_table"]
            assert isinstance(rows, SparseRows)
            assert rows.rows.dtype == torch.float32
            result.loss.backward()
            assert [leaf.grad.dtype for leaf in leaves] == [value.dtype for value in values]
            scores = F.adapt_and_score(*leaves, batch)
            results.append([result.loss.detach(), scores.detach(), *(leaf.grad.float() for leaf in leaves)])
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, atol=1e-2, rtol=torch.finfo(dtype).eps)


def test_targets_stay_in_float32_beside_biases_in_low_precision():
    draw = Draw(0, torch.float32)
    model, batch = draw.model(), draw.batch()
    with torch.autocast(model.item_bias.device.type, torch.bfloat16):
        narrow = F.meta_step(model.user_init, model.item_table, torch.zeros_like(model.item_bias).bfloat16(), batch)
    wide = F.meta_step(model.user_init, model.item_table, torch.zeros_like(model.item_bias), batch)
    assert torch.equal(narrow.loss, wide.loss)


def test_a_bfloat16_table_is_not_widened_as_a_whole(monkeypatch):
    draw = Draw(0, torch.float32)
    model, batch = draw.model(), draw.batch()
    seen = []
    widened = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: (seen.append(self.shape), widened(self))[1])
    with torch.autocast(model.item_bias.device.type, torch.bfloat16):
        F.meta_step(model.user_init.bfloat16(), model.item_table.bfloat16(), model.item_bias, batch)
    assert model.item_table.shape not in seen


@pytest.mark.parametrize("cls", [MAML, MetaSGD])
def test_a_learner_trains_under_autocast_as_without_it(cls):
    results = []
    for enabled in (True, False):
        torch.manual_seed(0)
        batch = Draw(0, torch.float32).batch()
        learner = cls(DotRecommender(60, 7)).to(batch.support.items.device)
        with torch.autocast(batch.support.items.device.type, torch.bfloat16, enabled=enabled):
            loss = learner(batch)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in learner.parameters())])
    for with_autocast, without in zip(*results, strict=True):
        assert torch.equal(with_autocast, without)


def test_autocast_inside_a_compiled_function_is_the_same():
    draw = Draw(0, torch.float32)
    model, batch = draw.model(), draw.batch()

    def scores(start):
        with torch.autocast(start.device.type, torch.bfloat16):
            return F.adapt_and_score(start.bfloat16(), model.item_table, model.item_bias, batch)

    # Inductor would leave the rounding to bfloat16 and back out.
    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(model.user_init), scores(model.user_init))
