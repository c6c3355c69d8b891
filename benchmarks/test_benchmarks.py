"""The suite under pytest-benchmark: `pytest benchmarks`, with its options (`--benchmark-compare`, `-k user`).

Each implementation on the small workloads of `--quick`, compared with ours before it is timed; 1 thread.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure
from benchmarks.implementations import OURS, PEERS, Peer
from benchmarks.workloads import QUICK, Problem, Workload

pytest.importorskip("pytest_benchmark", reason="pip install 'metarec-fast[bench]'")

CASES = [
    pytest.param(work, peer, id=f"{work.name}: {peer.name}")
    for work in QUICK
    for peer in PEERS
    if peer.effort(work) == "quick" and not peer.compiles
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("work", "peer"), CASES)
def test_time(benchmark, work: Workload, peer: Peer):
    if peer.missing() is not None:
        pytest.skip(peer.missing())
    problem = Problem.draw(work)
    step = peer.prepare(problem)
    outputs = step()
    first = next(each for each in PEERS if each.effort(work) == "quick" and each.name != OURS)
    measure.check_equal(outputs, first.prepare(problem)(), work)
    benchmark.group = work.name
    benchmark(step)
