"""The losses that compare an item with negatives, bpr and softmax, inside and outside, equal the reference."""

import pytest
import torch
from problems import RAGGED, Draw, compare_with_reference, relative_error, tracked
from torch.library import opcheck

from metarec_fast import Entries, TaskBatch, _ops, reference
from metarec_fast import functional as F
from metarec_fast._arguments import InnerLoop

PAIRWISE = ("bpr", "softmax")
UNMOVED = ("user_bias_init", "offset")  # added to all scores of a user they change no difference


@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", PAIRWISE)
def test_every_gradient_equals_autograd_through_the_reference(loss, first_order, negatives):
    draw = Draw(1)
    loop = draw.loop(5, learned=True, num_tasks=6, loss=loss, first_order=first_order)
    batch = draw.batch(weights=True, negatives=negatives, log_q=loss == "softmax")
    compare_with_reference(draw.model(num_tasks=6), batch, loop, {loss: 1.0}, unmoved=UNMOVED)


@pytest.mark.parametrize("steps", [0, 1, 20])
@pytest.mark.parametrize("form", ["gram", "direct"])
@pytest.mark.parametrize("loss", PAIRWISE)
def test_every_form_agrees(loss, form, steps):
    draw = Draw(2)
    loop = draw.loop(steps, learned=True, form=form, loss=loss)
    if form == "gram":
        loop = InnerLoop(loop.inner_lr, steps, loop.preconditioner, None, loop.momentum, 1.5, loss, form="gram")
    compare_with_reference(
        draw.model(), draw.batch(RAGGED, weights=True, negatives=2), loop, {loss: 1.0}, unmoved=UNMOVED
    )


@pytest.mark.parametrize("loss", PAIRWISE)
@pytest.mark.parametrize("dim", [1, 16, 33, 64])
def test_rows_of_any_width_agree(loss, dim):
    draw = Draw(3)
    loop = draw.loop(3, dim=dim, learned=True, loss=loss)
    compare_with_reference(
        draw.model(dim=dim), draw.batch((3, 0, 17), (2, 1, 18), negatives=2), loop, {loss: 1.0}, unmoved=UNMOVED
    )


@pytest.mark.parametrize("loss", PAIRWISE)
def test_the_multi_step_loss_weighs_every_step(loss):
    draw = Draw(4)
    loop = draw.loop(4, learned=True, loss=loss)
    compare_with_reference(
        draw.model(), draw.batch(weights=True, negatives=2), loop, {loss: 1.0}, draw.uniform(5), unmoved=UNMOVED
    )


def test_outer_losses_of_both_kinds_add_up():
    draw = Draw(5)
    points, pairs = draw.batch(weights=True), draw.batch(weights=True, negatives=2, log_q=True)
    query = Entries(
        pairs.query.items, draw.uniform(len(pairs.query)), pairs.query.offsets, pairs.query.weights,
        pairs.query.negatives, pairs.query.log_q,
    )  # fmt: skip
    batch = TaskBatch(points.support, query, weights=points.weights)
    compare_with_reference(draw.model(), batch, draw.loop(3), {"squared": 0.5, "bpr": 0.3, "softmax": 0.2})


@pytest.mark.parametrize("loss", PAIRWISE)
def test_gradients_through_the_scores_equal_the_reference(loss):
    draw = Draw(6)
    batch = draw.batch(weights=True, negatives=2)
    leaves, model, batch, loop = tracked(draw.model(), batch, draw.loop(3, learned=True, loss=loss))
    query = batch.query.with_items(batch.query.items)
    query.negatives = None
    batch = TaskBatch(batch.support, query)
    results = []
    for run in (_ops.adapt_and_score, reference.adapt_and_score):
        fast, scores = run(model, batch, loop)
        results.append(torch.autograd.grad(scores.sin().sum() + fast.user.sum(), list(leaves.values())))
    for name, actual, expected in zip(leaves, *results, strict=True):
        assert relative_error(actual, expected) < 1e-10, name


@pytest.mark.parametrize("loss", PAIRWISE)
def test_gradcheck_in_double_precision(loss):
    draw = Draw(7)
    leaves, model, batch, loop = tracked(
        draw.model(num_items=9, dim=3),
        draw.batch((3, 0, 2), (2, 1, 3), num_items=9, weights=True, negatives=2),
        draw.loop(2, dim=3, learned=True, loss=loss),
    )
    assert torch.autograd.gradcheck(
        lambda *values: _ops.meta_step(model, batch, loop, {loss: 1.0}, None).loss, tuple(leaves.values())
    )


def test_opcheck_finds_nothing():
    draw = Draw(8)
    _, model, batch, loop = tracked(
        draw.model(), draw.batch(weights=True, negatives=2, log_q=True), draw.loop(3, learned=True, loss="softmax")
    )
    arguments = (
        *_ops._inputs(model, batch.support), *_ops.judged_query(batch), *_ops._loop(loop),
        "bpr=0.5,softmax=0.5", None, 127,
    )  # fmt: skip
    opcheck(torch.ops.metarec_fast.meta_step, arguments)


@pytest.mark.parametrize("loss", PAIRWISE)
def test_scores_far_apart_give_finite_losses_and_gradients(loss):
    table = torch.tensor([[300.0], [-300.0], [1.0]])
    entries = Entries(torch.tensor([1]), None, torch.tensor([0, 1]), negatives=torch.tensor([0]))
    arguments = (torch.ones(1), table, torch.zeros(3), TaskBatch(entries, entries))
    result = F.meta_step(*arguments, loss=loss, outer_loss=loss, inner_lr=0.0, inner_steps=1)
    torch.testing.assert_close(result.loss, torch.tensor(600.0))
    assert result.grads["item_table"].rows.isfinite().all()


def test_one_negative_is_the_same_for_both_losses():
    draw = Draw(9)
    model, batch = draw.model(), draw.batch(negatives=1)
    arguments = (model.user_init, model.item_table, model.item_bias, batch)
    one, other = (F.meta_step(*arguments, loss=loss, outer_loss=loss) for loss in PAIRWISE)
    torch.testing.assert_close(one.loss, other.loss)
    dense = [result.grads["item_table"].to_dense(60) for result in (one, other)]
    torch.testing.assert_close(*dense)


@pytest.mark.parametrize(
    ("loss", "outer", "change", "message"),
    [
        ("bpr", "bpr", {"support": {"negatives": None}},
         "support.negatives: the loss 'bpr' compares with them, got None"),
        ("squared", "softmax", {"query": {"negatives": None}, "support": {"negatives": None}},
         "query.negatives: the loss 'softmax' compares with them, got None"),
        ("squared", "bpr", {}, "support.negatives: the pointwise loss 'squared' has no use for them"),
        ("bpr", "bpr", {"support": {"log_q": torch.zeros(56, 3).double()}},
         "support.log_q: only the loss 'softmax' has a use for it, got bpr"),
        ("bpr", "squared", {}, "query.targets: expected a tensor"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(loss, outer, change, message):
    draw = Draw(10)
    model, batch = draw.model(), draw.batch((50, 6), (3, 3), negatives=2)
    batch.support.targets = draw.uniform(len(batch.support))
    for part, values in change.items():
        for name, value in values.items():
            setattr(getattr(batch, part), name, value)
    with pytest.raises(ValueError, match=message):
        F.meta_step(model.user_init, model.item_table, model.item_bias, batch, loss=loss, outer_loss=outer)
    with pytest.raises(ValueError, match="adapt='all' cannot be combined with loss='bpr'"):
        F.adapt(model.user_init, model.item_table, model.item_bias, batch.support, loss="bpr", adapt="all")


@pytest.mark.parametrize("run", ["kernels", "reference"])
def test_a_query_with_negatives_and_no_entries_has_no_scores(run, monkeypatch):
    if run == "reference":
        monkeypatch.setattr("metarec_fast._library.loaded_for", lambda tensor: False)
    draw = Draw(11)
    model, batch = draw.model(), draw.batch((3, 2), (0, 0), negatives=3)
    scores = F.adapt_and_score(model.user_init, model.item_table, model.item_bias, batch, loss="bpr")
    assert scores.shape == (0, 4)
