"""What `fit` does for a GPU, as far as it shows without one: batches in one block, losses read late."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metarec_fast import MAML, DotRecommender, Interactions, TaskSampler, _known_gradients
from metarec_fast._transfer import Carrier, move_as_one


def make_log():
    rng = np.random.default_rng(0)
    return Interactions.from_arrays(rng.integers(0, 50, 900), rng.integers(0, 40, 900), rng.random(900))


def tensors_of(batch):
    found = []
    batch._map(lambda tensor: (found.append(tensor), tensor)[1])
    return found


@pytest.mark.parametrize(("query", "negatives"), [("rest", 0), ("rest", 3), (None, 0)])
def test_a_batch_moved_as_one_is_the_same_in_one_block_of_memory(query, negatives):
    for batch in TaskSampler(make_log(), (1, 9), query, 16, negatives=negatives):
        moved, block = move_as_one(batch, torch.device("cpu"), pin=False)
        originals, copies = tensors_of(batch), tensors_of(moved)
        assert len(originals) == len(copies) >= 5
        for original, copy in zip(originals, copies, strict=True):
            assert original.dtype == copy.dtype
            assert torch.equal(original, copy)
            assert copy.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
            assert copy.data_ptr() % 64 == block.data_ptr() % 64
        for part in ("support", "query"):
            entries = getattr(moved, part)
            if entries is not None:
                assert (entries.max_size, entries.max_item) == (
                    getattr(batch, part).max_size,
                    getattr(batch, part).max_item,
                )
        unique, local = moved.localize()
        assert torch.equal(unique[local.support.items], batch.support.items)
        assert local.support.targets is moved.support.targets


def test_a_batch_without_entries_can_be_moved_as_one():
    batch = TaskSampler(make_log(), (1, 9), "rest", 16).batch(0)
    empty = batch.support.with_items(batch.support.items[:0])
    empty = type(empty).unchecked(empty.items, None, torch.zeros(17, dtype=torch.int64), max_size=0, max_item=-1)
    moved, _ = move_as_one(type(batch)(empty), torch.device("cpu"), pin=False)
    assert moved.support.items.shape == (0,)
    assert moved.num_tasks == 16


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_sampler_delivers_to_the_device_that_was_asked_for(prefetch):
    sampler = TaskSampler(make_log(), 5, "rest", 16, device="meta", prefetch=prefetch)
    for batch in (*sampler, sampler.batch(0)):
        assert all(tensor.device.type == "meta" for tensor in tensors_of(batch))
        assert batch.support.max_size == 5


def test_batches_on_the_cpu_are_handed_on_as_they_are():
    batch = TaskSampler(make_log(), 5, "rest", 16).batch(0)
    carrier = Carrier(torch.device("cpu"))
    assert carrier.receive(carrier.send(batch)) is batch


class Products(TorchDispatchMode):
    """Shapes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_backward_of_fit_multiplies_no_gradient_of_the_table_by_one(sparse, monkeypatch):
    batch = TaskSampler(make_log(), 5, "rest", 16).batch(0)
    gradients = []
    for backward in (torch.Tensor.backward, _known_gradients.backward):
        torch.manual_seed(0)
        learner = MAML(DotRecommender(40, 8, sparse=sparse))
        loss = learner(batch)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU, nobody looks at the factor
        with Products() as products:
            backward(loss)
        monkeypatch.undo()
        gradients.append([parameter.grad for parameter in learner.parameters()])
        assert any(len(shape) == 2 for shape in products.shapes) == (backward is torch.Tensor.backward)
    for own, usual in zip(*gradients, strict=True):
        torch.testing.assert_close(own, usual, rtol=0, atol=0)
