"""Optimisers of touched rows: the operators beside their reference, and the classes beside torch's own."""

import copy

import pytest
import torch
from problems import DEVICE, Draw
from torch import nn
from torch.library import opcheck

import metarec_fast as mf
from metarec_fast import _ops, optim, reference
from metarec_fast import functional as F
from metarec_fast.results import SparseRows

NUM_ROWS = 30
ops = _ops.ops

# How many tables each operator changes, and its numbers.
RULES = {
    "sparse_adam": (3, {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 3}),
    "sparse_adagrad": (2, {"lr": 0.1, "eps": 1e-8}),
    "sparse_sgd": (1, {"lr": 0.1}),
}
# Ours and torch's.
PAIRS = {
    "adam": (mf.SparseAdam, torch.optim.SparseAdam),
    "adagrad": (mf.SparseAdagrad, torch.optim.Adagrad),
    "sgd": (mf.SparseSGD, torch.optim.SGD),
}


def make_tables(count, shape, dtype=torch.float64, seed=0):
    draw = Draw(seed, dtype)
    return [draw.normal(*shape)] + [draw.uniform(*shape) for _ in range(count - 1)]


def make_rows(n, shape, dtype=torch.float64, seed=1, num_rows=NUM_ROWS):
    draw = Draw(seed, dtype)
    return SparseRows(draw.integers(0, num_rows, n), draw.normal(n, *shape))


def arguments(name, tables, gradient):
    """Those of the operator, for one parameter and its states."""
    return (*([table] for table in tables), gradient.ids, [gradient.rows], *RULES[name][1].values())


def run(name, tables, gradient):
    """What the operator and the reference make of the tables."""
    _, numbers = RULES[name]
    results = [[table.clone() for table in tables] for _ in range(2)]
    getattr(ops, name)(*arguments(name, results[0], gradient))
    getattr(reference, name)(*results[1], gradient, **numbers)
    return results


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (7,), (16,), (64,), (100,)])
@pytest.mark.parametrize("n", [0, 1, 200])
def test_operators_equal_the_reference(name, dtype, shape, n):
    tables = make_tables(RULES[name][0], (NUM_ROWS, *shape), dtype)
    actual, expected = run(name, tables, make_rows(n, shape, dtype))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(actual[0], tables[0]) == (n == 0)


@pytest.mark.parametrize("name", RULES)
def test_only_rows_of_the_batch_change(name):
    tables = make_tables(RULES[name][0], (NUM_ROWS, 5))
    gradient = make_rows(9, (5,))
    actual, _ = run(name, tables, gradient)
    touched = torch.zeros(NUM_ROWS, dtype=torch.bool)
    touched[gradient.ids] = True
    for before, after in zip(tables, actual, strict=True):
        assert torch.equal((before != after).any(1), touched)


@pytest.mark.parametrize("name", RULES)
def test_non_contiguous_rows_and_ids_are_read_right(name):
    tables = make_tables(RULES[name][0], (NUM_ROWS, 6))
    wide = make_rows(40, (6,))
    gradient = SparseRows(wide.ids.repeat_interleave(2)[::2], wide.rows.T.contiguous().T)
    assert not gradient.rows.is_contiguous()
    assert not gradient.ids.is_contiguous()
    for one, other in zip(run(name, tables, gradient)[0], run(name, tables, wide)[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.cpu
@pytest.mark.parametrize("name", RULES)
def test_the_same_bits_for_any_number_of_threads(name):
    num_rows = 5000
    tables = make_tables(RULES[name][0], (num_rows, 9), torch.float32)
    gradient = make_rows(100_000, (9,), torch.float32, num_rows=num_rows)
    gradient.ids[:30_000] = 17  # one id whose entries more than one thread meets
    threads = torch.get_num_threads()
    seen = []
    try:
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            results = [table.clone() for table in tables]
            getattr(ops, name)(*arguments(name, results, gradient))
            seen.append([*results, *F.coalesce_rows(gradient), ops.sum_rows(*gradient, num_rows)])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(one, two) for one, two in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (3,), (64,)])
@pytest.mark.parametrize("sizes", [[400], [70, 1, 300, 2, 63]])
def test_ids_with_many_entries_are_updated_once_and_the_same_every_time(name, shape, sizes, monkeypatch):
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    draw = Draw(1)
    gradient = SparseRows(ids[draw.permutation(ids.numel())], draw.normal(ids.numel(), *shape))
    tables = make_tables(RULES[name][0], (NUM_ROWS, *shape))
    first, expected = run(name, tables, gradient)
    for one, other in zip(first, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for schedule in ("forward", "reverse", "random:7"):  # in which the simulator runs threads and blocks
        monkeypatch.setenv("METAREC_SCHEDULE", schedule)
        again, _ = run(name, tables, gradient)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("name", RULES)
def test_opcheck_finds_nothing(name):
    tables = make_tables(RULES[name][0], (NUM_ROWS, 4))
    opcheck(getattr(ops, name), arguments(name, tables, make_rows(20, (4,))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"ids": torch.tensor([0, NUM_ROWS])},
            rf"ids: must be in \[0, {NUM_ROWS}\), got {NUM_ROWS} at position 1",
            marks=pytest.mark.cpu,
        ),
        pytest.param(
            {"ids": torch.tensor([-1, 0])},
            rf"ids: must be in \[0, {NUM_ROWS}\), got -1 at position 0",
            marks=pytest.mark.cpu,
        ),
        ({"ids": torch.tensor([0, 1], dtype=torch.int32)}, r"ids: expected int64 \[n\]"),
        ({"rows": torch.zeros(3, 4).double()}, r"rows: expected shape \[n\] or \[n, D\] with n = 2"),
        ({"rows": torch.zeros(2, 5).double()}, r"rows: expected shape \[n\] or \[n, D\], like param"),
        ({"rows": torch.zeros(2, 4)}, "rows: expected dtype Double, got Float"),
        ({"state": torch.zeros(NUM_ROWS - 1, 4).double()}, "sum: expected the shape of param"),
        ({"state": torch.zeros(4, NUM_ROWS).double().T}, "sum: expected to be contiguous"),
    ],
)
def test_bad_arguments_of_an_operator_are_named(change, message):
    good = {"param": make_tables(1, (NUM_ROWS, 4))[0], "state": torch.zeros(NUM_ROWS, 4).double(),
            "ids": torch.tensor([0, 1]), "rows": torch.zeros(2, 4).double()}  # fmt: skip
    param, state, ids, rows = (value.to(DEVICE) for value in {**good, **change}.values())
    with pytest.raises(RuntimeError, match=message):
        ops.sparse_adagrad([param], [state], ids, [rows], 0.1, 1e-8)


def test_as_many_states_and_rows_as_parameters_are_expected():
    (param,), (ids, rows) = make_tables(1, (NUM_ROWS, 4)), make_rows(2, (4,))
    with pytest.raises(RuntimeError, match="rows: expected 1, one per parameter"):
        ops.sparse_sgd([param], ids, [rows, rows], 0.1)
    with pytest.raises(RuntimeError, match="sum: expected 1, one per parameter"):
        ops.sparse_adagrad([param], [], ids, [rows], 0.1, 1e-8)
    with pytest.raises(RuntimeError, match="param: expected dtype Double, got Float"):
        ops.sparse_sgd([param, param.float()], ids, [rows, rows.float()], 0.1)
    ops.sparse_sgd([], ids, [], 0.1)


@pytest.mark.parametrize("name", RULES)
def test_parameters_that_share_ids_are_updated_as_each_alone(name):
    count = RULES[name][0]
    shapes = (NUM_ROWS, 6), (NUM_ROWS + 2, 1), (NUM_ROWS,)
    tables = [make_tables(count, shape) for shape in shapes]
    gradients = [make_rows(50, shape[1:]) for shape in shapes]
    together = [[table.clone() for table in part] for part in tables]
    rows = [gradient.rows for gradient in gradients]
    getattr(ops, name)(*map(list, zip(*together, strict=True)), gradients[0].ids, rows, *RULES[name][1].values())
    for part, gradient, results in zip(tables, gradients, together, strict=True):
        alone, _ = run(name, part, gradient)
        assert all(torch.equal(one, other) for one, other in zip(alone, results, strict=True))


def test_steps_count_from_one():
    tables = make_tables(3, (NUM_ROWS, 4))
    with pytest.raises(RuntimeError, match="step: must be ≥ 1, got 0"):
        ops.sparse_adam(*([table] for table in tables), torch.tensor([0]), [torch.zeros(1, 4).double()],
                        0.1, 0.9, 0.99, 1e-8, 0)  # fmt: skip


@pytest.mark.parametrize("ids", [[], [7], [3, 3, 3], [5, 0, 5, 2, 0], [2**62, 1, 2**62, 2**40]])
def test_coalescing_sums_rows_of_equal_ids_in_ascending_order(ids):
    gradient = SparseRows(torch.tensor(ids, dtype=torch.int64), Draw(0).normal(len(ids), 3))
    for rows in (gradient.rows, gradient.rows[:, 0]):
        tidy = F.coalesce_rows(SparseRows(gradient.ids, rows))
        assert torch.equal(tidy.ids, gradient.ids.unique())
        expected = [rows[gradient.ids == i].sum(0) for i in tidy.ids]
        torch.testing.assert_close(tidy.rows, torch.stack(expected) if ids else rows)


def test_rows_are_summed_into_a_table_with_zeros_where_there_are_none():
    gradient = make_rows(50, (3,), num_rows=NUM_ROWS // 2)
    gradient.ids.add_(5)
    torch.testing.assert_close(ops.sum_rows(*gradient, NUM_ROWS), gradient.to_dense(NUM_ROWS))
    assert torch.equal(ops.sum_rows(*make_rows(0, (3,)), 4), torch.zeros(4, 3).double())


def make_model(dtype=torch.float64):
    """An embedding and a bias table with sparse gradients, starting alike every time."""
    torch.manual_seed(0)
    return nn.ModuleList([nn.Embedding(NUM_ROWS, 6, sparse=True), nn.Embedding(NUM_ROWS, 1, sparse=True)]).to(dtype)


def backward(model, seed):
    ids = Draw(seed).integers(0, NUM_ROWS, 25)
    loss = (model[0](ids).sum(1) * model[1](ids).squeeze(1).exp()).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for seed in steps:
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's Adagrad
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_steps_equal_those_of_torch(pair, dtype):
    models = [make_model(dtype), make_model(dtype)]
    for model, algorithm in zip(models, PAIRS[pair], strict=True):
        train(model, algorithm(model.parameters(), lr=0.05), range(5))
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not same(models[0], make_model(dtype))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_adagrad_can_start_its_sums_above_zero():
    models = [make_model(), make_model()]
    for model, algorithm in zip(models, PAIRS["adagrad"], strict=True):
        train(model, algorithm(model.parameters(), lr=0.05, initial_accumulator_value=0.3), range(3))
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("pair", PAIRS)
def test_where_no_binary_loads_the_reference_gives_the_same(pair, monkeypatch):
    fast, slow = make_model(), make_model()
    train(fast, PAIRS[pair][0](fast.parameters(), lr=0.05), range(3))
    monkeypatch.setattr("metarec_fast.optim._can_run", lambda table, rows: False)
    train(slow, PAIRS[pair][0](slow.parameters(), lr=0.05), range(3))
    torch.testing.assert_close(fast[0].weight, slow[0].weight)


@pytest.mark.parametrize("pair", PAIRS)
def test_parameters_that_kernels_do_not_take_are_trained_too(pair):
    for table in (torch.zeros(4, NUM_ROWS).T, torch.zeros(NUM_ROWS, 4, dtype=torch.bfloat16)):
        parameter = nn.Parameter(table)
        gradient = make_rows(8, (4,), table.dtype)
        parameter.grad = torch.sparse_coo_tensor(gradient.ids[None], gradient.rows, table.shape, check_invariants=False)
        PAIRS[pair][0]([parameter]).step()
        assert torch.equal((parameter != 0).any(1).nonzero().squeeze(1), gradient.ids.unique())


@pytest.mark.parametrize("pair", PAIRS)
def test_a_saved_state_goes_on_bit_for_bit(pair, tmp_path):
    ours = PAIRS[pair][0]
    whole = make_model()
    optimizer = ours(whole.parameters(), lr=0.05)
    train(whole, optimizer, range(3))
    torch.save((whole.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    train(whole, optimizer, range(3, 6))

    resumed = make_model()
    optimizer = ours(resumed.parameters(), lr=1.0)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, range(3, 6))
    assert same(whole, resumed)


def test_a_state_of_torchs_sparse_adam_can_be_gone_on_with():
    ours, theirs = make_model(), make_model()
    before = torch.optim.SparseAdam(theirs.parameters(), lr=0.05)
    train(theirs, before, range(2))
    ours.load_state_dict(theirs.state_dict())
    after = mf.SparseAdam(ours.parameters())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(theirs, before, range(2, 4))
    train(ours, after, range(2, 4))
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)


def test_groups_have_rates_of_their_own_and_parameters_without_gradient_stay():
    model = make_model()
    unused = nn.Parameter(torch.ones(3))
    groups = [{"params": [model[0].weight], "lr": 0.5}, {"params": [model[1].weight, unused]}]
    optimizer = mf.SparseSGD(groups, lr=0.25)
    backward(model, 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    for parameter, start, rate in zip(model.parameters(), before, (0.5, 0.25), strict=True):
        torch.testing.assert_close(parameter.detach(), start - rate * parameter.grad.to_dense())
    assert torch.equal(unused, torch.ones(3))


def test_a_closure_is_called_with_gradients_and_its_loss_returned():
    model = make_model()
    optimizer = mf.SparseAdam(model.parameters())

    def closure():
        optimizer.zero_grad()
        return backward(model, 0)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss.detach()) > 0
    assert not same(model, make_model())


def test_learning_rate_schedulers_work():
    model = make_model()
    optimizer = mf.SparseSGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    backward(model, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_parameter_changed_behind_a_graph_is_noticed():
    model = make_model()
    product = (model[0].weight * model[0].weight).sum()
    backward(model, 0)
    mf.SparseSGD(model.parameters()).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("pair", PAIRS)
def test_dense_gradients_are_refused_by_the_parameters_name(pair):
    ours = PAIRS[pair][0]
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    expected = f"{ours.__name__} expects a gradient sparse in its first dimension, .* got a dense one"
    with pytest.raises(TypeError, match=rf"param_groups\[0\]\['params'\]\[0\]: {expected}"):
        ours([parameter]).step()
    with pytest.raises(TypeError, match=f"table: {expected}"):
        ours([("table", parameter)]).step()
    model = make_model()
    optimizer = ours([*model.parameters(), parameter])
    backward(model, 0)
    with pytest.raises(TypeError, match=expected):
        optimizer.step()
    assert same(model, make_model())  # nothing was changed before the refusal
    assert not optimizer.state
    parameter.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(TypeError, match="got 2 sparse dimensions"):
        ours([parameter]).step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: mf.SparseAdam(p, lr=0.0), "lr: must be > 0 and finite, got 0.0"),
        (lambda p: mf.SparseAdam(p, betas=(0.9, 1.0)), r"betas\[1\]: must be in \[0, 1\), got 1.0"),
        (lambda p: mf.SparseAdam(p, betas=(0.9, 0.9, 0.9)), r"betas: expected two numbers, got \(0.9, 0.9, 0.9\)"),
        (lambda p: mf.SparseAdam(p, eps=-1.0), "eps: must be > 0 and finite, got -1.0"),
        (lambda p: mf.SparseAdagrad(p, lr=float("inf")), "lr: must be > 0 and finite, got inf"),
        (lambda p: mf.SparseAdagrad(p, initial_accumulator_value=-1.0), "initial_accumulator_value: must be ≥ 0"),
        (lambda p: mf.SparseSGD(p, lr=float("nan")), "lr: must be > 0 and finite, got nan"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(3, 2))])


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_clipping_bounds_the_norm_of_the_coalesced_gradient(limit):
    model = make_model()
    dense = nn.Parameter(torch.ones(3).double())
    dense.grad = torch.full((3,), 2.0).double()
    backward(model, 0)
    parameters = [*model.parameters(), dense]
    before = [parameter.grad.to_dense().clone() for parameter in parameters]
    expected = torch.cat([gradient.flatten() for gradient in before]).norm()
    norm = optim.clip_grad_norm_(parameters, limit)
    torch.testing.assert_close(norm, expected)
    factor = min(1.0, limit / (float(expected) + 1e-6))
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), factor * gradient)
    assert model[0].weight.grad.is_coalesced()


def test_clipping_takes_gradients_without_rows():
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.empty(0, dtype=torch.int64)).sum().backward()
    assert optim.clip_grad_norm_(embedding.parameters(), 1.0) == 0


@pytest.mark.cpu
def test_many_entries_of_one_id_are_summed_in_time_that_grows_with_their_number():
    gradient = SparseRows(torch.full((1_000_000,), 3), torch.ones(1_000_000, dtype=torch.float64))
    ids, rows = F.coalesce_rows(gradient)  # took seconds when every range looked for the end of the id
    assert ids.tolist() == [3]
    assert rows.tolist() == [1_000_000]


@pytest.mark.cpu
def test_a_refused_step_is_not_counted():
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = mf.SparseAdam([weight])
    weight.grad = torch.sparse_coo_tensor(torch.tensor([[7]]), torch.ones(1, 2), (3, 2), check_invariants=False)
    with pytest.raises(RuntimeError, match=r"ids: must be in \[0, 3\), got 7"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(3, 2))
    assert optimizer.state[weight]["step"] == 0


def test_added_groups_are_checked_and_refused_whole():
    optimizer = mf.SparseAdam([nn.Parameter(torch.ones(3, 2))])
    with pytest.raises(ValueError, match="lr: must be > 0 and finite, got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_large_tables_keep_their_values_when_they_move_to_huge_pages():
    table = torch.arange(3 << 20).float()
    expected = table.clone()
    ops.use_huge_pages(table)
    ops.use_huge_pages(table[:0])
    assert torch.equal(table, expected)
    parameter = nn.Parameter(table)
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[5]]), torch.ones(1), table.shape, check_invariants=False)
    mf.SparseAdam([parameter], lr=1.0).step()
    assert (parameter.detach() != expected).nonzero().tolist() == [[5]]
