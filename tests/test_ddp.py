"""DistributedDataParallel over two processes gives the gradient of one process with all the tasks."""

import gc
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import metarec_fast as mf

NUM_ITEMS = 20
SUPPORT = [(3, 9), (1, 0)]  # entries of each process' two tasks
QUERY = [(4, 2), (6, 1)]
LEARNERS = {"maml": mf.MAML, "meta-sgd": mf.MetaSGD, "maml-r": mf.MAMLR, "maml with features": mf.MAML}
USERS = [[7, 8], None]  # of whom something is known in the first process only


def make_entries(generator, sizes):
    n = sum(sizes)
    items = torch.randint(NUM_ITEMS, (n,), generator=generator)
    targets = torch.randint(1, 6, (n,), generator=generator).double()
    return mf.Entries(items, targets, torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]))


def make_batches():
    """The tasks of each process."""
    generator = torch.Generator().manual_seed(0)
    return [
        mf.TaskBatch(make_entries(generator, support), make_entries(generator, query), user_ids=users)
        for support, query, users in zip(SUPPORT, QUERY, USERS, strict=True)
    ]


def make_learner(name, sparse):
    torch.manual_seed(0)
    features = {}
    if name == "maml with features":
        features["user_features"] = mf.Features.from_frame({"id": [7, 8, 9], "x": ["a", "b", "a"]})
        features["item_features"] = mf.Features.from_frame({"id": range(NUM_ITEMS), "x": ["a", "b"] * 10})
    learner = LEARNERS[name](mf.DotRecommender(NUM_ITEMS, 3, sparse=sparse, **features).double())
    torch.nn.init.normal_(learner.model.item_embedding.weight)
    learner.item_ids = range(NUM_ITEMS)
    return learner


def gradients_of(learner):
    return {name: parameter.grad.to_dense() for name, parameter in learner.named_parameters()}


def train_one_step(rank, rendezvous, results):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found = {}
    for name in LEARNERS:
        for sparse in (False, True):
            learner = make_learner(name, sparse)
            parallel = DistributedDataParallel(learner)
            assert len(parallel.modules_buffers) == 1  # not the tables of features, in each step
            parallel(make_batches()[rank]).backward()
            found[name, sparse] = gradients_of(learner)
    if rank == 0:
        torch.save(found, results)
    del parallel
    gc.collect()  # a module still around would keep the group's threads running into the end of the process
    dist.barrier()
    dist.destroy_process_group()


def joined(parts):
    return mf.Entries(
        torch.cat([part.items for part in parts]),
        torch.cat([part.targets for part in parts]),
        torch.cat([parts[0].offsets, parts[1].offsets[1:] + len(parts[0])]),
    )


@pytest.fixture(scope="module")
def distributed_gradients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(train_one_step, (folder / "rendezvous", folder / "gradients.pt"), nprocs=2)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_two_processes_give_the_gradient_of_one(distributed_gradients, name, sparse):
    batches = make_batches()
    support, query = (joined([getattr(batch, part) for batch in batches]) for part in ("support", "query"))
    whole = mf.TaskBatch(support, query, user_ids=[7, 8, -1, -1])
    learner = make_learner(name, sparse)
    learner(whole).backward()
    expected = gradients_of(learner)
    found = distributed_gradients[name, sparse]
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            found[parameter], gradient, msg=lambda text, parameter=parameter: f"{parameter}: {text}"
        )
    assert expected["model.item_embedding.weight"].any()
