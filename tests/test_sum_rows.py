"""Sums of the rows of equal ids: the operators coalesce_rows, coalesce_rows_padded and sum_rows.

Those for CUDA cut ids with many entries into chunks of 64; the numbers of entries here lie around their edges.
"""

import pytest
import torch
from problems import Draw
from torch.library import opcheck

from metarec_fast import _ops, reference
from metarec_fast import functional as F
from metarec_fast.results import SparseRows

SHAPES = [(), (1,), (3,), (64,), (100,), (260,)]
LONG = {
    "one id": [300],
    "many multiples": [64, 64, 128, 192, 64],
    "around a chunk": [63, 65, 1, 127, 129, 191, 193],
    "a long id between short ones": [1, 2, 700, 1, 3, 1, 90, 1],
    "more parts than groups of lanes": [5, 64 * 300 + 17, 2],
}


def gradient_of(sizes, shape, dtype=torch.float64, seed=0):
    """Ids that come as often as `sizes` say, in disorder."""
    draw = Draw(seed, dtype)
    ids = torch.repeat_interleave(3 * torch.arange(len(sizes)) + 1, torch.tensor(sizes, dtype=torch.int64))
    ids = ids[draw.permutation(ids.numel())]
    return SparseRows(ids, draw.normal(ids.numel(), *shape))


def bits(gradient, num_rows):
    """Whatever the operators make of a gradient."""
    (ids, rows), count = F.coalesce_rows_padded(gradient)
    return [*F.coalesce_rows(gradient), ids, rows, count, F.sum_rows(gradient, num_rows)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", list(LONG.values())[:-1], ids=list(LONG)[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ids_with_many_entries_are_summed(sizes, shape, dtype):
    gradient = gradient_of(sizes, shape, dtype)
    expected = SparseRows(gradient.ids, gradient.rows.double()).to_dense(3 * len(sizes))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * expected.abs().max()
    dense = F.sum_rows(gradient, 3 * len(sizes))
    assert (dense - expected).abs().max() <= tolerance
    tidy = F.coalesce_rows(gradient)
    assert tidy.ids.tolist() == [3 * i + 1 for i in range(len(sizes))]
    assert torch.equal(tidy.rows, dense[tidy.ids])


@pytest.mark.parametrize("shape", [(), (7,)])
def test_one_id_has_most_entries(shape):
    sizes = LONG["more parts than groups of lanes"]
    gradient = gradient_of(sizes, shape)
    torch.testing.assert_close(F.sum_rows(gradient, 3 * len(sizes)), gradient.to_dense(3 * len(sizes)))


@pytest.mark.parametrize("shape", SHAPES)
def test_up_to_a_chunk_of_entries_is_summed_first_to_last(shape):
    gradient = gradient_of([1, 2, 3, 4, 5, 8, 33, 64, 64, 63], shape, torch.float32)
    expected = gradient.rows.new_zeros(30, *shape)
    for i, row in zip(gradient.ids.tolist(), gradient.rows, strict=True):
        expected[i] += row
    assert torch.equal(F.sum_rows(gradient, 30), expected)
    assert torch.equal(F.coalesce_rows(gradient).rows, expected[1::3])


@pytest.mark.parametrize("shape", [(), (3,), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_every_time(shape, dtype, monkeypatch):
    gradient = gradient_of(LONG["a long id between short ones"], shape, dtype)
    first = bits(gradient, 30)
    for schedule in ("forward", "reverse", "random:7"):  # in which the simulator runs threads and blocks
        monkeypatch.setenv("METAREC_SCHEDULE", schedule)
        assert all(torch.equal(one, other) for one, other in zip(first, bits(gradient, 30), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [[], [1], [4], [1, 1, 1], [70, 1, 200]])
def test_padded_results_are_those_of_coalescing_followed_by_nothing(sizes, shape):
    gradient = gradient_of(sizes, shape)
    (ids, rows), count = F.coalesce_rows_padded(gradient)
    tidy = F.coalesce_rows(gradient)
    assert count.shape == ()
    assert count.item() == tidy.ids.numel()
    assert ids.shape == gradient.ids.shape
    assert rows.shape == gradient.rows.shape
    assert torch.equal(ids[:count], tidy.ids)
    assert torch.equal(rows[:count], tidy.rows)
    assert (ids[count:] == -1).all()
    assert (rows[count:] == 0).all()
    (expected_ids, expected_rows), expected_count = reference.coalesce_rows_padded(gradient)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(count, expected_count)
    torch.testing.assert_close(rows, expected_rows)


def test_rows_without_columns_and_unaligned_rows_are_taken():
    ids = torch.tensor([5, 2, 5])
    tidy = F.coalesce_rows(SparseRows(ids, torch.zeros(3, 0)))
    assert tidy.ids.tolist() == [2, 5]
    assert tidy.rows.shape == (2, 0)
    wide = Draw(0, torch.float32).normal(3 * 64 + 1)[1:].view(3, 64)  # 4 bytes off
    torch.testing.assert_close(F.sum_rows(SparseRows(ids, wide), 6), SparseRows(ids, wide).to_dense(6))


def test_opcheck_finds_nothing_in_the_padded_form():
    opcheck(_ops.ops.coalesce_rows_padded, (torch.tensor([3, 1, 3]), torch.ones(3, 2)))


def test_bad_arguments_are_named():
    with pytest.raises(RuntimeError, match=r"rows: expected shape \[n\] or \[n, D\] with n = 1"):
        F.coalesce_rows_padded(SparseRows(torch.tensor([1]), torch.ones(2)))
    with pytest.raises(RuntimeError, match=r"ids: expected int64 \[n\]"):
        F.sum_rows(SparseRows(torch.tensor([1.0]), torch.ones(1)), 3)
    with pytest.raises(RuntimeError, match="num_rows: must be ≥ 0, got -1"):
        F.sum_rows(SparseRows(torch.tensor([1]), torch.ones(1)), -1)
    with pytest.raises(RuntimeError, match="expected dtype float32 or float64, got Half"):
        F.sum_rows(SparseRows(torch.tensor([1]), torch.ones(1).half()), 3)
