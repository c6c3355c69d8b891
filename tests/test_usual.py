"""Calls whose arguments only the operator looks at: the same results and the same errors as with a close look."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch
from problems import Draw
from torch.utils._python_dispatch import TorchDispatchMode

from metarec_fast import Entries, TaskBatch, _library, _usual, functional

T, N, D = 6, 60, 7
OPERATORS = ("adapt", "adapt_and_score", "meta_step", "reptile_step")
CLOSE_LOOKS = ("check_model", "check_inner_loop", "check_batch", "check_entries", "check_differentiation")


def arguments():
    draw = Draw(0)
    model = draw.model(N, D)
    return {"user_init": model.user_init, "item_table": model.item_table, "item_bias": model.item_bias}


def call(name, changes):
    """One of the functional operators, some of whose arguments are changed."""
    draw = Draw(1)
    batch = changes.get("batch", draw.batch())
    given = {**arguments(), **{key: value for key, value in changes.items() if key != "batch"}}
    if name in ("adapt", "reptile_step"):
        given["support"] = getattr(batch, "support", batch)
    else:
        given["batch"] = batch
    if name != "meta_step":
        given.pop("outer_loss", None), given.pop("step_weights", None)
    if name == "reptile_step":
        given.pop("first_order", None)
    return getattr(functional, name)(**given)


def loss(result):
    """The first tensor of what an operator returns."""
    return result if isinstance(result, torch.Tensor) else result[0]


def outcome(name, changes):
    try:
        return call(name, changes)
    except Exception as error:
        return type(error), str(error)


def part(entries, **changes):
    """Entries of which something is as no constructor lets it be."""
    return Entries.unchecked(
        **{
            **{name: getattr(entries, name) for name in ("items", "targets", "offsets", "weights", "negatives")},
            **{"log_q": entries.log_q, "max_size": entries.max_size, "max_item": entries.max_item},
            **changes,
        }
    )


class Special(torch.Tensor):
    """A tensor of which somebody wants to know what becomes of it."""


def negated(values):
    """These numbers, whose signs in memory are the other ones."""
    return torch._neg_view(-torch.tensor(values, dtype=torch.float64))


def unusual():
    """Arguments that are wrong, or that somebody has to convert or to look at."""
    draw = Draw(2)
    model, batch, pairs = draw.model(N, D, T), draw.batch(weights=True), draw.batch(negatives=2)
    support, query = batch.support, batch.query
    wide, single = torch.zeros(D, T, dtype=torch.float64), torch.zeros(D)
    yield from (
        {"user_init": model.user_init}, {"user_init": wide}, {"user_init": single}, {"user_init": 0.5},
        {"user_init": torch.zeros(T * D, dtype=torch.float64)}, {"user_bias_init": True}, {"user_bias_init": "0"},
        {"user_bias_init": model.user_bias_init}, {"user_bias_init": wide}, {"offset": torch.zeros(1).double()},
        {"item_table": model.item_table[0]}, {"item_table": None}, {"item_table": model.item_table.float()},
        {"item_bias": model.item_bias[:-1]}, {"item_bias": model.item_bias[0]}, {"item_bias": None},
        {"inner_lr": torch.full((5,), 0.1).double()}, {"inner_lr": torch.zeros(3).double()}, {"inner_lr": None},
        {"inner_steps": 1}, {"inner_steps": True}, {"inner_steps": 2}, {"inner_steps": 2.0},
        {"inner_steps": -1}, {"inner_steps": "all"}, {"inner_steps": 0},
        {"inner_steps": "exact"}, {"inner_steps": "exact", "prior_pull": torch.tensor(0.5).double()},
        {"prior_pull": 0.5}, {"prior_pull": -1.0}, {"prior_pull": float("nan")}, {"prior_pull": "0"},
        {"prior_pull": torch.ones(T).double()}, {"momentum": 0.3}, {"momentum": torch.tensor(0.3)}, {"momentum": "0"},
        {"extra_count": -1.0}, {"extra_count": float("nan")}, {"extra_count": "1"}, {"extra_count": 2},
        {"preconditioner": torch.ones(D).double()}, {"preconditioner": torch.ones(D + 1).double()},
        {"loss": "hinge"}, {"loss": None}, {"loss": "logistic"}, {"loss": "bpr"}, {"loss": "bpr", "batch": pairs},
        {"loss": "softmax", "batch": pairs, "outer_loss": "softmax"}, {"batch": pairs}, {"first_order": 1},
        {"adapt": "all"}, {"adapt": "items"}, {"adapt": "all", "momentum": torch.tensor(0.3).double()},
        {"outer_loss": "hinge"}, {"outer_loss": {"squared": 1, "absolute": 0.5}}, {"outer_loss": "bpr"},
        {"outer_loss": {"squared": True, "absolute": 0.5}}, {"outer_loss": {"squared": torch.tensor(2.0)}},
        {"outer_loss": {"squared": -1.0}}, {"outer_loss": {"squared": float("nan")}}, {"outer_loss": {"hinge": 1.0}},
        {"outer_loss": {}}, {"outer_loss": {"bpr": 2.0}}, {"outer_loss": ["squared"]}, {"outer_loss": None},
        {"outer_loss": {"bpr": 0.5, "softmax": 0.5}, "batch": pairs, "loss": "bpr"}, {"outer_loss": "squared=0.5"},
        {"outer_loss": MappingProxyType({"squared": 0.5})},
        {"outer_loss": {"squared": 1.0, "bpr": 1.0}, "batch": TaskBatch(support, pairs.query)},
        {"step_weights": torch.ones(6).double()}, {"step_weights": torch.ones(6)}, {"batch": batch},
        {"batch": TaskBatch(support)}, {"batch": 3}, {"batch": support}, {"batch": TaskBatch(pairs.support, query)},
        {"batch": TaskBatch(part(support, targets=None), part(query, targets=None))},
        {"batch": TaskBatch(part(support, targets=support.targets.float()), query, weights=batch.weights.float())},
        {"batch": TaskBatch(part(support, weights=support.weights.float()), query)},
        {"batch": TaskBatch(part(support, targets=support.targets[1:]), query)},
        {"batch": TaskBatch(part(support, items=support.items + N, max_item=2 * N), query)},
        {"batch": TaskBatch(part(support, targets=support.targets.clone().requires_grad_()), query)},
        {"batch": TaskBatch(support, part(query, weights=query.weights.clone().requires_grad_()))},
        {"batch": TaskBatch.unchecked(support, query, weights=batch.weights.clone().requires_grad_())},
        {"user_init": single.double().to("meta")}, {"offset": torch.zeros(()).double().to("meta")},
        {"user_init": single.double().to_sparse()}, {"item_bias": model.item_bias.as_subclass(Special)},
        {"user_init": single.double().as_subclass(Special)}, {"offset": negated(2.0)},
        {"user_init": negated([0.5] * D)}, {"inner_lr": negated(-0.2)}, {"item_bias": negated([0.1] * N)},
        {"item_table": model.item_table.t().clone().t()},
    )  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_whatever_is_unusual_comes_out_as_if_everything_were_looked_at(name, monkeypatch):
    for changes in unusual():
        found = outcome(name, changes)
        with monkeypatch.context() as patch:
            patch.setattr(_usual, name, lambda *_: None)
            expected = outcome(name, changes)
        if isinstance(expected, tuple) and isinstance(expected[0], type):
            assert found == expected, changes
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda text, of=changes: f"{of}: {text}")


@pytest.mark.parametrize("name", OPERATORS)
def test_the_usual_call_is_not_looked_at_closely(name, monkeypatch):
    if not arguments()["item_table"].is_cpu:
        pytest.skip("operators on a GPU cannot look at ids")
    for check in CLOSE_LOOKS:
        monkeypatch.setattr(functional, check, None)
    adapted = {"item_table": arguments()["item_table"].requires_grad_(name != "reptile_step")}
    for changes in ({}, {"user_bias_init": 0.3, "inner_lr": 0.2}, {"adapt": "all"}, {"offset": 1.5}, adapted):
        call(name, changes)
    call(name, {"outer_loss": {"squared": 0.5, "absolute": 0.5}})
    if name in ("adapt", "meta_step"):
        for outer_loss in ("bpr", {"bpr": 1.0}, {"bpr": 1, "softmax": 0.25}):
            call(name, {"loss": "bpr", "outer_loss": outer_loss, "batch": Draw(1).batch(negatives=2)})


def test_an_id_that_the_batch_says_nothing_of_is_named_by_the_operator():
    batch = Draw(1).batch()
    hidden = part(batch.support, items=batch.support.items + N)  # its largest id is said to be what it was
    with pytest.raises(RuntimeError, match=r"support_items: ids must be in \[0, 60\), got"):
        call("meta_step", {"batch": TaskBatch(hidden, batch.query)})


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("adapt", ["user", "all"])
def test_a_call_that_nobody_differentiates_gives_the_same(name, adapt):
    def result(asked):
        return call(name, {"adapt": adapt, "item_table": arguments()["item_table"].requires_grad_(asked)})

    plain, tracked = result(False), result(True)
    torch.testing.assert_close(plain, tracked, rtol=0, atol=0)
    assert not loss(plain).requires_grad
    assert loss(tracked).requires_grad == (name != "reptile_step")
    with torch.no_grad():
        assert not loss(result(True)).requires_grad


class Seen(TorchDispatchMode):
    """Notes down which operators are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPERATORS)
def test_whoever_watches_operators_sees_them(name):
    call(name, {})
    with Seen() as mode:
        call(name, {})
    assert f"metarec_fast::{name}" in mode.names
    with torch.profiler.profile() as profile:
        call(name, {})
    assert f"metarec_fast::{name}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_transform_is_told_what_it_would_be_told_otherwise(name, monkeypatch):
    users = torch.stack([arguments()["user_init"], torch.zeros(D, dtype=torch.float64)])

    def mapped():
        def one(user):
            return loss(call(name, {"user_init": user}))

        try:
            return torch.func.vmap(one)(users)
        except Exception as error:
            return type(error), str(error)

    found = mapped()
    monkeypatch.setattr(_usual, name, lambda *_: None)
    expected = mapped()
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


@pytest.mark.parametrize("name", OPERATORS)
def test_nothing_is_kept_of_a_call_whether_it_succeeds_or_not(name):
    model, batch = arguments(), Draw(1).batch()
    hidden = TaskBatch(part(batch.support, items=batch.support.items + N), batch.query)
    given = [*model.values(), batch.support.items, batch.support.targets, batch.query.items]
    before = [tensor._use_count() for tensor in given]
    for _ in range(10):
        result = call(name, {**model, "batch": batch})
        with pytest.raises(RuntimeError, match="support_items"):
            call(name, {**model, "batch": hidden})
    assert [tensor._use_count() for tensor in given] == before
    assert loss(result)._use_count() == 1


def test_results_of_a_call_live_as_long_as_somebody_has_them():
    results = [call("meta_step", {"offset": float(i)}) for i in range(20)]
    again = [call("meta_step", {"offset": float(i)}) for i in range(20)]
    torch.testing.assert_close(results, again, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_calls_from_several_threads_do_not_disturb_each_other(name):
    expected = call(name, {})
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: call(name, {}), range(200)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_without_the_compiled_module_every_call_is_looked_at(monkeypatch):
    assert _usual.library.loaded
    with monkeypatch.context() as patch:
        patch.setattr(_usual, "_calls", None)
        patch.setattr(_library, "compiled_module", lambda name: _library.Library(name, False, "it was not built"))
        assert _usual._enable() == _library.Library("_calls", False, "it was not built")
    with monkeypatch.context() as patch:
        patch.delattr(torch._C, "_get_tracing_state")
        assert not _usual._enable().loaded
        assert "_get_tracing_state" in _usual._enable().reason
    with monkeypatch.context() as patch:
        patch.setattr(torch._C._aoti, "unsafe_alloc_void_ptrs_from_tensors", lambda tensors: [0 for _ in tensors])
        assert "capsules, got list of int" in _usual._enable().reason
    monkeypatch.setattr(_usual, "library", _library.Library("_calls", False, "it was not built"))
    assert _usual._usual("adapt")(1, 2, 3) is None
