"""Calls whose arguments only the operator looks at: the same results and the same errors as with a close look."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch
from problems import Draw

from metarec_fast import Entries, TaskBatch, _usual, functional

T, N, D = 6, 60, 7
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
        given.pop("outer_loss", None), given.pop("step_weights", None)
    else:
        given["batch"] = batch
    if name == "reptile_step":
        given.pop("first_order", None)
    return getattr(functional, name)(**given)


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
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adapt", "adapt_and_score", "meta_step", "reptile_step"])
def test_whatever_is_unusual_comes_out_as_if_everything_were_looked_at(name, monkeypatch):
    for changes in unusual():
        found = outcome(name, changes)
        with monkeypatch.context() as patch:
            patch.setattr(_usual, "attempt", lambda *_: None)
            expected = outcome(name, changes)
        if isinstance(expected, tuple) and isinstance(expected[0], type):
            assert found == expected, changes
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=lambda text, of=changes: f"{of}: {text}")


@pytest.mark.parametrize("name", ["adapt", "meta_step", "reptile_step"])
def test_the_usual_call_is_not_looked_at_closely(name, monkeypatch):
    if not arguments()["item_table"].is_cpu:
        pytest.skip("operators on a GPU cannot look at ids")
    for check in CLOSE_LOOKS:
        monkeypatch.setattr(functional, check, None)
    adapted = {"item_table": arguments()["item_table"].requires_grad_(name != "reptile_step")}
    for changes in ({}, {"user_bias_init": 0.3, "inner_lr": 0.2}, {"adapt": "all"}, {"offset": 1.5}, adapted):
        call(name, changes)
    if name != "reptile_step":
        call(name, {"outer_loss": {"squared": 0.5, "absolute": 0.5}})
        for outer_loss in ("bpr", {"bpr": 1.0}, {"bpr": 1, "softmax": 0.25}):
            call(name, {"loss": "bpr", "outer_loss": outer_loss, "batch": Draw(1).batch(negatives=2)})


def test_an_id_that_the_batch_says_nothing_of_is_named_by_the_operator():
    batch = Draw(1).batch()
    hidden = part(batch.support, items=batch.support.items + N)  # its largest id is said to be what it was
    with pytest.raises(RuntimeError, match=r"support_items: ids must be in \[0, 60\), got"):
        call("meta_step", {"batch": TaskBatch(hidden, batch.query)})


@pytest.mark.parametrize("name", ["adapt", "adapt_all", "meta_step", "reptile_step", "mlp_meta_step"])
def test_beside_an_operator_is_one_that_autograd_passes_by(name):
    op, beside = (getattr(torch.ops.metarec_fast, each).default for each in (name, f"_{name}"))
    assert str(beside._schema) == str(op._schema).replace("::", "::_")
    for key in ("CPU", "Meta", "AutocastCPU", "AutocastCUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(beside.name(), key), key


@pytest.mark.parametrize("name", ["adapt", "meta_step", "reptile_step"])
@pytest.mark.parametrize("adapt", ["user", "all"])
def test_a_call_that_nobody_differentiates_gives_the_same(name, adapt):
    def result(asked):
        return call(name, {"adapt": adapt, "item_table": arguments()["item_table"].requires_grad_(asked)})

    plain, tracked = result(False), result(True)
    torch.testing.assert_close(plain, tracked, rtol=0, atol=0)
    assert not plain[0].requires_grad
    assert tracked[0].requires_grad == (name != "reptile_step")
    with torch.no_grad():
        assert not result(True)[0].requires_grad
