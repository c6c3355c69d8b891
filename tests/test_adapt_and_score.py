"""The operators adapt and adapt_and_score: equal to the reference, with all their gradients."""

import pytest
import torch
from problems import RAGGED, Draw, relative_error, tracked
from torch.library import opcheck

from metarec_fast import _ops, reference
from metarec_fast import functional as F
from metarec_fast._arguments import InnerLoop, Model
from metarec_fast.tasks import Entries, TaskBatch

FORMS = ("gram", "direct", "normal")
LOSSES = ("squared", "logistic")


def settings_of(form: str, loss: str) -> dict[str, object] | None:
    if form == "normal" and loss == "logistic":
        return None
    # With a preconditioner and a pull at once the Gram form would not be exact, and refuses.
    return {"form": form, "loss": loss, **({"prior_pull": None} if form == "gram" else {})}


CASES = [(form, loss) for form in FORMS for loss in LOSSES if settings_of(form, loss) is not None]


def keywords(model: Model, loop: InnerLoop) -> dict[str, object]:
    """The problem as functional's keyword arguments."""
    return {
        "user_bias_init": model.user_bias_init,
        "offset": model.offset,
        "inner_lr": loop.inner_lr,
        "inner_steps": loop.inner_steps,
        "preconditioner": loop.preconditioner,
        "prior_pull": 0.0 if loop.prior_pull is None else loop.prior_pull,
        "momentum": loop.momentum,
        "extra_count": loop.extra_count,
        "loss": loop.loss,
        "first_order": loop.first_order,
    }


def compare_with_reference(model: Model, batch: TaskBatch, loop: InnerLoop) -> None:
    """Scores, fast weights and every gradient within 1e-10 of autograd through the reference."""
    results = []
    for run in (_ops.adapt_and_score, reference.adapt_and_score):
        leaves, *problem = tracked(model, batch, loop)
        fast, scores = run(*problem)
        outputs, draw = [scores, fast.user, fast.bias], Draw(99)
        total = sum((output * draw.normal(*output.shape)).sum() for output in outputs)
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        results.append([*outputs, *gradients])
    names = ["scores", "user", "bias", *leaves]
    for name, actual, expected in zip(names, *results, strict=True):
        assert relative_error(actual, expected) < 1e-10, name


@pytest.mark.parametrize(("form", "loss"), CASES)
@pytest.mark.parametrize("steps", [0, 1, 5, 50])
@pytest.mark.parametrize("first_order", [False, True])
def test_every_form_equals_autograd_through_the_reference(form, loss, steps, first_order):
    draw = Draw(steps)
    loop = draw.loop(steps, learned=True, num_tasks=6, first_order=first_order, **settings_of(form, loss))
    compare_with_reference(draw.model(num_tasks=6), draw.batch(weights=True), loop)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33, 200])
@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_support_sizes_from_1_to_200_agree(size, form):
    draw = Draw(size)
    loop = draw.loop(5, learned=True, **(settings_of(form, "squared") or {}))
    compare_with_reference(draw.model(), draw.batch((size, 0, 1), (3, 2, 1), weights=True), loop)


@pytest.mark.parametrize("sizes", [RAGGED, (1,), (7,), (8,), (9,), (200, 3)])
@pytest.mark.parametrize("per_task", [False, True])
def test_the_exact_form_equals_autograd_through_the_ridge(sizes, per_task):
    draw = Draw(3)
    num_tasks = len(sizes) if per_task else None
    pull = draw.uniform(len(sizes)) + 0.5 if per_task else draw.uniform() + 0.5
    loop = InnerLoop(draw.uniform(), "exact", prior_pull=pull, extra_count=2.5)
    compare_with_reference(draw.model(num_tasks=num_tasks), draw.batch(sizes, weights=True), loop)


@pytest.mark.parametrize("dim", [1, 7, 8, 16, 17, 64])
@pytest.mark.parametrize("form", FORMS)
def test_any_width_works_whole_registers_or_not(dim, form):
    draw = Draw(dim)
    loop = draw.loop(4, dim=dim, learned=True, **(settings_of(form, "squared") or {}))
    compare_with_reference(draw.model(dim=dim), draw.batch(weights=True), loop)


def test_one_learned_number_serves_all_steps_and_tasks():
    draw = Draw(5)
    loop = InnerLoop(0.1 * draw.uniform(), 6, prior_pull=draw.uniform(), momentum=0.3 * draw.uniform())
    compare_with_reference(draw.model(), draw.batch(weights=True), loop)


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_float32_agrees_with_float64(form):
    draw = Draw(1)
    loop = draw.loop(5, form=form)
    model, batch = draw.model(), draw.batch()
    _, exact = _ops.adapt_and_score(model, batch, loop)
    single = Model(*(value.float() for value in vars(model).values()))
    _, scores = _ops.adapt_and_score(
        single, batch.to(exact.device, torch.float32), InnerLoop(loop.inner_lr.float(), 5, form=form)
    )
    torch.testing.assert_close(scores, exact.float())


def test_many_steps_with_a_pull_reach_the_exact_solution():
    draw = Draw(2)
    model, batch = draw.model(), draw.batch((3, 30, 1), (5, 5, 5))
    pull = draw.uniform() + 0.5
    _, limit = _ops.adapt_and_score(model, batch, InnerLoop(draw.uniform(), "exact", prior_pull=pull))
    for form in ("direct", "gram", "normal"):
        loop = InnerLoop(torch.tensor(0.2, dtype=torch.float64), 2000, prior_pull=pull, form=form)
        _, scores = _ops.adapt_and_score(model, batch, loop)
        torch.testing.assert_close(scores, limit, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [3, 30])
def test_exact_is_the_closed_form_ridge(size):
    draw = Draw(size)
    model, batch = draw.model(), draw.batch((size,), (4,), weights=True)
    pull, support = draw.uniform() + 0.5, batch.support
    fast = _ops.adapt(model, support, InnerLoop(draw.uniform(), "exact", prior_pull=pull, extra_count=1.5))

    inputs = torch.cat([model.item_table[support.items], torch.ones(size, 1, dtype=torch.float64)], dim=1)
    start = torch.cat([model.user_init, model.user_bias_init[None]])
    first_scores = model.offset + model.item_bias[support.items] + inputs @ start
    ridge = pull * (size + 1.5) / 2 * torch.eye(8, dtype=torch.float64)
    weighted = inputs.T * support.weights
    moved = torch.linalg.inv(weighted @ inputs + ridge) @ weighted @ (support.targets - first_scores)
    adapted = torch.cat([fast.user[0], fast.bias])
    assert relative_error(adapted, start + moved) < 1e-10


def gradcheck_problem(**settings):
    draw = Draw(4)
    return tracked(
        draw.model(num_items=9, dim=3),
        draw.batch((3, 0, 6), (2, 1, 3), num_items=9, weights=True),
        draw.loop(3, dim=3, learned=True, **settings),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_in_double_precision(loss):
    leaves, model, batch, loop = gradcheck_problem(loss=loss)

    def scores(*values):
        return F.adapt_and_score(model.user_init, model.item_table, model.item_bias, batch, **keywords(model, loop))

    assert torch.autograd.gradcheck(scores, tuple(leaves.values()))
    assert torch.autograd.gradcheck(
        lambda *values: F.adapt(
            model.user_init, model.item_table, model.item_bias, batch.support, **keywords(model, loop)
        )[:2],
        tuple(leaves.values()),
    )


def test_opcheck_finds_nothing():
    _, model, batch, loop = gradcheck_problem()
    inputs, query = _ops._inputs(model, batch.support), batch.query
    opcheck(torch.ops.metarec_fast.adapt, (*inputs, *_ops._loop(loop)))
    args = (*inputs, query.items, query.offsets, *_ops._loop(loop))
    opcheck(torch.ops.metarec_fast.adapt_and_score, args)
    grads = (torch.ones(3, 3).double(), torch.ones(3).double(), torch.ones(len(query)).double())
    detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
    opcheck(torch.ops.metarec_fast.adapt_and_score_backward, (*grads, *detached, 127))


def test_it_compiles_into_one_graph_with_the_same_numbers():
    leaves, model, batch, loop = gradcheck_problem()

    def loss(user_init, table):
        scores = F.adapt_and_score(user_init, table, model.item_bias, batch, **keywords(model, loop))
        return (scores**2).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True)):
        value = run(model.user_init, model.item_table)
        results.append([value, *torch.autograd.grad(value, list(leaves.values()))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 2, "exact"])
def test_a_second_differentiation_is_refused_by_name(first_order, steps):
    if steps == "exact" and first_order:
        return
    draw = Draw(0)
    model, batch = draw.model(), draw.batch()
    table = model.item_table.requires_grad_()
    start = model.user_init.requires_grad_()
    settings = {"inner_steps": steps, "first_order": first_order, "prior_pull": 0.5}
    fast = F.adapt(start, table, model.item_bias, batch.support, **settings)
    scores = F.adapt_and_score(start, table, model.item_bias, batch, **settings)
    for name, output in (("adapt", fast.user), ("adapt_and_score", scores)):
        (gradient,) = torch.autograd.grad(output.sum(), table if name != "adapt" else start, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name} cannot be differentiated twice"):
            gradient.sum().backward()


def test_no_task_and_empty_tasks_give_the_start():
    draw = Draw(0)
    model = draw.model()
    nothing = Entries(torch.empty(0, dtype=torch.int64), torch.empty(0).double(), torch.zeros(1, dtype=torch.int64))
    fast = F.adapt(model.user_init, model.item_table, model.item_bias, nothing)
    assert fast.user.shape == (0, 7)
    scores = F.adapt_and_score(model.user_init, model.item_table, model.item_bias, TaskBatch(nothing, nothing))
    assert scores.shape == (0,)
    empty = draw.entries((0, 0))
    for steps in (5, "exact"):
        fast = F.adapt(model.user_init, model.item_table, model.item_bias, empty, inner_steps=steps, prior_pull=0.1)
        assert torch.equal(fast.user, model.user_init.expand(2, -1))


def test_non_contiguous_arguments_give_the_same_numbers():
    draw = Draw(0)
    model, batch = draw.model(num_tasks=6), draw.batch()
    expected = F.adapt_and_score(model.user_init, model.item_table, model.item_bias, batch)
    wide = torch.stack([model.item_table, model.item_table], dim=2)[:, :, 0]
    spread = torch.stack([model.item_bias, model.item_bias], dim=1)[:, 0]
    assert torch.equal(F.adapt_and_score(model.user_init.T.contiguous().T, wide, spread, batch), expected)


def test_negatives_of_the_query_are_scored_beside_its_items():
    draw = Draw(0)
    model, batch = draw.model(), draw.batch((3, 2), (2, 1))
    query = batch.query
    negatives = torch.randint(60, (3, 4))
    asked = Entries(query.items, None, query.offsets, negatives=negatives)
    scores = F.adapt_and_score(model.user_init, model.item_table, model.item_bias, TaskBatch(batch.support, asked))
    assert scores.shape == (3, 5)
    torch.testing.assert_close(
        scores[:, 0], F.adapt_and_score(model.user_init, model.item_table, model.item_bias, batch)
    )
    swapped = Entries(negatives[:, 2].contiguous(), None, query.offsets)
    torch.testing.assert_close(
        scores[:, 3],
        F.adapt_and_score(model.user_init, model.item_table, model.item_bias, TaskBatch(batch.support, swapped)),
    )


def test_all_weights_of_autocast_meet_in_the_dtype_of_the_table():
    draw = Draw(0, torch.float32)
    model, batch = draw.model(), draw.batch()
    with torch.autocast(model.item_bias.device.type, torch.bfloat16):
        scores = F.adapt_and_score(model.user_init.bfloat16(), model.item_table, model.item_bias, batch)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_full_adaptation_equals_the_reference(loss):
    draw = Draw(6)
    model, batch = draw.model(num_items=20), draw.batch(num_items=20, weights=True)
    loop = draw.loop(4, loss=loss, adapt="all", extra_count=1.0)
    (fast, scores), (expected_fast, expected) = (
        run(model, batch, loop) for run in (_ops.adapt_and_score, reference.adapt_and_score)
    )
    assert relative_error(scores, expected) < 1e-10
    assert relative_error(fast.user, expected_fast.user) < 1e-10
    adapted = reference.adapt(model, batch.support, loop)
    for actual, wanted in zip(_ops.adapt(model, batch.support, loop).items, adapted.items, strict=True):
        assert relative_error(actual, wanted) < 1e-10


def test_full_adaptation_has_second_order_gradients():
    draw = Draw(6)
    model, batch = draw.model(num_items=9, dim=3), draw.batch((3, 0, 5), (2, 1, 3), num_items=9)
    values = (model.user_init, model.item_table, model.item_bias)
    assert torch.autograd.gradcheck(
        lambda *leaves: F.adapt_and_score(*leaves, batch, adapt="all", inner_steps=2),
        tuple(value.requires_grad_() for value in values),
    )


def test_a_form_that_would_be_wrong_is_refused():
    draw = Draw(0)
    model, batch = draw.model(), draw.batch()
    with pytest.raises(RuntimeError, match="form 'gram' is not exact with a preconditioner and a prior_pull at once"):
        _ops.adapt_and_score(model, batch, draw.loop(3, learned=True, form="gram"))
    with pytest.raises(RuntimeError, match="form 'normal' exists for the squared loss only"):
        _ops.adapt_and_score(model, batch, draw.loop(3, form="normal", loss="logistic"))


def bits(tensors):
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    draw = Draw(8, dtype)
    sizes = tuple(int(size) for size in draw.integers(0, 40, 300))
    problem = tracked(draw.model(), draw.batch(sizes, weights=True), draw.loop(5, learned=True, num_tasks=300))
    leaves, model, batch, loop = problem
    threads = torch.get_num_threads()
    try:
        seen = []
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            fast, scores = _ops.adapt_and_score(model, batch, loop)
            gradients = torch.autograd.grad(scores.sum(), list(leaves.values()))
            step = _ops.meta_step(model, batch, loop, {"squared": 1.0}, None)
            rows = [step.grads.pop(name).rows for name in ("item_table", "item_bias")]
            seen.append(bits([scores, fast.user, *gradients, step.loss, *rows, *step.grads.values()]))
    finally:
        torch.set_num_threads(threads)
    assert seen[1:] == seen[:1] * 3


def broken(**changes):
    draw = Draw(0)
    model, batch = draw.model(), draw.batch((3, 2), (1, 1))
    arguments = {
        "user_init": model.user_init, "item_table": model.item_table, "item_bias": model.item_bias, "batch": batch,
    }  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"user_init": torch.zeros(3).double()}, ValueError, r"user_init: expected shape .* got \(3,\)"),
        ({"user_init": torch.zeros(7)}, TypeError, "user_init: expected dtype torch.float64"),
        ({"user_init": [0.0] * 7}, TypeError, "user_init: expected a tensor"),
        ({"item_table": torch.zeros(7)}, ValueError, "item_table: expected a tensor"),
        ({"item_table": torch.zeros(60, 7, dtype=torch.int64)}, TypeError, "item_table: expected dtype float32"),
        pytest.param(
            {"item_table": torch.zeros(2, 7).double(), "item_bias": torch.zeros(2).double()}, IndexError,
            r"support.items: ids must be in \[0, 2\), got \d+ at position \d", marks=pytest.mark.cpu),
        ({"item_bias": torch.zeros(5).double()}, ValueError, "item_bias: expected shape"),
        ({"batch": "batch"}, TypeError, "batch: expected TaskBatch, got str"),
        ({"user_bias_init": torch.zeros(5).double()}, ValueError, "user_bias_init: expected shape"),
        ({"offset": torch.zeros(5).double()}, ValueError, "offset: expected shape a scalar"),
        ({"inner_lr": torch.zeros(4).double()}, ValueError, r"inner_lr: expected shape .*\(5,\), got \(4,\)"),
        ({"inner_steps": -1}, ValueError, "inner_steps: must be ≥ 0, got -1"),
        ({"inner_steps": 2.5}, TypeError, "inner_steps: expected an int or 'exact', got 2.5"),
        ({"preconditioner": torch.ones(7).double()}, ValueError, r"preconditioner: expected shape \[D \+ 1\]"),
        ({"preconditioner": 2.0}, ValueError, r"preconditioner: expected a tensor \[D \+ 1\], got 2.0"),
        ({"prior_pull": -1.0}, ValueError, "prior_pull: must be ≥ 0"),
        ({"extra_count": -1.0}, ValueError, "extra_count: must be ≥ 0"),
        ({"momentum": torch.zeros(3).double()}, ValueError, "momentum: expected shape"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of squared, logistic, bpr, softmax, got 'hinge'"),
        ({"adapt": "items"}, ValueError, "adapt: expected 'user' or 'all', got 'items'"),
        ({"inner_steps": "exact"}, ValueError, "inner_steps='exact' cannot be combined with prior_pull=0"),
        ({"inner_steps": "exact", "prior_pull": 1.0, "loss": "logistic"}, ValueError, "cannot be combined with loss"),
        ({"inner_steps": "exact", "prior_pull": 1.0, "momentum": 0.1}, ValueError, "combined with momentum"),
        ({"inner_steps": "exact", "prior_pull": 1.0, "first_order": True}, ValueError, "combined with first_order"),
        ({"inner_steps": "exact", "prior_pull": 1.0, "adapt": "all"}, ValueError, "combined with adapt='all'"),
        pytest.param(
            {"inner_steps": "exact", "prior_pull": torch.tensor(0.0).double()}, RuntimeError,
            "prior_pull: must be > 0 with inner_steps='exact', got 0", marks=pytest.mark.cpu),
        ({"adapt": "all", "momentum": 0.1}, ValueError, "adapt='all' cannot be combined with momentum"),
        ({"adapt": "all", "prior_pull": 0.1}, ValueError, "adapt='all' cannot be combined with prior_pull"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        F.adapt_and_score(**broken(**changes))


def test_a_batch_without_query_or_targets_is_named():
    draw = Draw(0)
    support = draw.entries((3, 2))
    silent = Entries(support.items, None, support.offsets)
    with pytest.raises(ValueError, match="batch.query: expected Entries, got None"):
        F.adapt_and_score(**broken(batch=TaskBatch(support)))
    with pytest.raises(ValueError, match="support.targets: expected a tensor"):
        F.adapt_and_score(**broken(batch=TaskBatch(silent, support)))
    pairs = Entries(support.items, support.targets, support.offsets, negatives=support.items)
    with pytest.raises(ValueError, match="support.negatives: the pointwise loss 'squared' has no use for them"):
        F.adapt_and_score(**broken(batch=TaskBatch(pairs, support)))


@pytest.mark.cpu
def test_raw_operators_check_ids_and_offsets_themselves():
    draw = Draw(0)
    model, support = draw.model(), draw.entries((3, 2))
    loop = _ops._loop(draw.loop(2))
    for items, offsets, message in (
        (support.items + 60, support.offsets, r"support_items: ids must be in \[0, 60\)"),
        (support.items - 60, support.offsets, r"support_items: ids must be in \[0, 60\)"),
        (support.items, torch.tensor([0, 9, 5]), "support_offsets: must not decrease, got 9 then 5"),
        (support.items, torch.tensor([0, 3, 6]), "support_offsets: must run from 0 to 5"),
    ):
        inputs = [*_ops._inputs(model, support)]
        inputs[5], inputs[7] = items, offsets
        with pytest.raises(RuntimeError, match=message):
            torch.ops.metarec_fast.adapt(*inputs, *loop)


def test_a_module_that_adapts_and_scores_can_be_exported():
    draw = Draw(20)
    model, batch = draw.model(), draw.batch((3, 5), (2, 4))

    class Scores(torch.nn.Module):
        def forward(self, user, table, bias, items, targets):
            support = batch.support
            entries = type(support).unchecked(items, targets, support.offsets, max_size=5, max_item=59)
            return F.adapt_and_score(user, table, bias, TaskBatch(entries, batch.query), inner_steps=3)

    arguments = (model.user_init, model.item_table, model.item_bias, batch.support.items, batch.support.targets)
    exported = torch.export.export(Scores(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), Scores()(*arguments))
