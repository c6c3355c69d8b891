"""Entries and TaskBatch: checked once, when made."""

import pytest
import torch

from metarec_fast.tasks import Entries, TaskBatch

ITEMS, TARGETS, OFFSETS = torch.tensor([4, 2, 4]), torch.ones(3), torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"items": [1, 2, 3]}, TypeError, "items: expected a tensor [n], got list"),
        ({"items": ITEMS.int()}, TypeError, "items: expected dtype torch.int64, got torch.int32"),
        ({"items": ITEMS[None]}, ValueError, "items: expected shape [n], got (1, 3)"),
        ({"items": torch.tensor([4, -2, 4])}, IndexError, "items: ids must be ≥ 0, got -2 at position 1"),
        ({"targets": TARGETS[:2]}, ValueError, "targets: expected 3 entries, one per item, got 2"),
        ({"targets": torch.tensor([1.0, 2.0, float("nan")])}, ValueError, "got nan at position 2"),
        ({"targets": ITEMS}, TypeError, "targets: expected dtype torch.float32 or"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, "offsets: must run from 0 to 3, the number of items, got 0 to"),
        ({"offsets": torch.tensor([0, 4, 2, 3])}, ValueError, "must not decrease, got 4 then 2 at position 1"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, ValueError, "offsets: expected shape [T + 1]"),
        ({"offsets": OFFSETS.float()}, TypeError, "offsets: expected dtype torch.int64"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "weights: must be > 0, got 0.0 at position 1"),
        ({"negatives": torch.tensor([1, 2, -3])}, IndexError, "negatives: ids must be ≥ 0, got -3 at position 2"),
        ({"log_q": torch.zeros(3, 2)}, ValueError, "log_q: expected shape [n, 1 + M] beside negatives"),
    ],
)
def test_bad_entries_are_named(changes, error, message):
    arguments = {"items": ITEMS, "targets": TARGETS, "offsets": OFFSETS, **changes}
    with pytest.raises(error) as raised:
        Entries(**arguments)
    assert message in str(raised.value)


def test_bad_batches_are_named():
    entries = Entries(ITEMS, TARGETS, OFFSETS)
    other = Entries(ITEMS, TARGETS, torch.tensor([0, 3]))
    for arguments, error, message in (
        ((ITEMS,), TypeError, "support: expected Entries, got Tensor"),
        ((entries, other), ValueError, "query: expected 2 tasks, like support, got 1"),
        ((entries, entries, torch.zeros(3)), ValueError, r"users: expected shape \[2\], one per task"),
        ((entries, entries, None, -torch.ones(2)), ValueError, "weights: must be finite and ≥ 0"),
    ):
        with pytest.raises(error, match=message):
            TaskBatch(*arguments)


def test_local_ids_point_at_the_distinct_items():
    query = Entries(torch.tensor([9, 2]), None, torch.tensor([0, 1, 2]), negatives=torch.tensor([[4, 7], [0, 9]]))
    batch = TaskBatch(Entries(ITEMS, TARGETS, OFFSETS), query)
    unique, local = batch.localize()
    assert unique.tolist() == [0, 2, 4, 7, 9]
    assert torch.equal(unique[local.support.items], ITEMS)
    assert torch.equal(unique[local.query.items], query.items)
    assert torch.equal(unique[local.query.negatives], query.negatives)


def test_a_copy_in_another_dtype_keeps_ids_and_converts_values():
    batch = TaskBatch(Entries(ITEMS, TARGETS, OFFSETS, weights=TARGETS), weights=torch.ones(2)).to("cpu", torch.float64)
    assert batch.support.items.dtype == torch.int64
    assert {batch.support.targets.dtype, batch.support.weights.dtype, batch.weights.dtype} == {torch.float64}
    assert batch.support.task_ids().tolist() == [0, 0, 1]
    assert batch.support.sizes().tolist() == [2, 1]
