"""The benchmark suite: every implementation computes the same, and a run leaves tables; times are nobody's test."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import floors, measure, memory, run
from benchmarks.implementations import OURS, PEERS
from benchmarks.workloads import QUICK, WORKLOADS, Problem, Workload
from metarec_fast import SparseRows

TINY = Workload("user", num_tasks=4, num_items=80, dim=6, support=7, query=4, steps=3)
CASES = {
    "user": TINY,
    "dense": replace(TINY, kind="dense"),
    "one step": replace(TINY, steps=1),
    "many steps": replace(TINY, steps=12),
    "bpr": replace(TINY, loss="bpr"),
    "full": replace(TINY, adapt="all"),
    "ragged": replace(TINY, support=(2, 7)),
    "ragged bpr": replace(TINY, support=(2, 7), loss="bpr"),
    "ragged full": replace(TINY, support=(2, 7), adapt="all"),
    "first order": replace(TINY, first_order=True),
    "first order bpr": replace(TINY, first_order=True, loss="bpr"),
    "reptile": replace(TINY, kind="reptile", query=0),
    "ragged reptile": replace(TINY, kind="reptile", query=0, support=(2, 7)),
    "reptile of all": replace(TINY, kind="reptile", query=0, adapt="all"),
    "serve": Workload("serve", "serve", num_tasks=1, num_items=80, dim=6, support=7, query=0, prior_pull=0.1),
    "mlp": replace(TINY, kind="mlp", hidden=(9, 4), inner_lr=0.02),
    "train": replace(TINY, kind="train", num_tasks=2, num_items=400),
}


@pytest.fixture(autouse=True)
def threads_stay_as_they_are():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("work", CASES.values(), ids=CASES.keys())
def test_all_eager_implementations_agree(work):
    problem = Problem.draw(work)
    expected, compared = None, 0
    for peer in PEERS:
        if peer.effort(work) is None or peer.compiles or peer.missing() is not None:
            continue
        outputs = peer.prepare(problem)()
        if expected is None:
            expected = outputs
        else:
            measure.check_equal(outputs, expected, work)
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("loss", ["squared", "bpr"])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_hand_written_adjoint_equals_autograd_in_float64(form, loss, first_order):
    from benchmarks.implementations import hand_adjoint, hand_batched
    from benchmarks.implementations.blocks import gathered_step

    work = replace(TINY, loss=loss, first_order=first_order, support=(2, 7))
    problem = Problem.draw(work, dtype=torch.float64)
    expected = gathered_step(problem, hand_batched.make(work))()
    for fused in (False, True):
        function = hand_adjoint.gradient_function(work, form, fused)
        if loss == "bpr":
            function = hand_adjoint.pairs_function(function)
        actual = gathered_step(problem, hand_adjoint.for_blocks(work, function))()
        for name in ("user_init", "user_bias_init"):
            torch.testing.assert_close(actual[name], expected[name])
        for name in ("item_table", "item_bias"):
            dense = [sum(rows.to_dense(work.num_items) for rows in each[name]) for each in (actual, expected)]
            torch.testing.assert_close(*dense)


def test_a_wrong_gradient_is_refused_by_name():
    right = {"loss": torch.ones(()), "item_table": [SparseRows(torch.tensor([3, 3]), torch.ones(2, 4))]}
    measure.check_equal({**right, "item_table": [SparseRows(torch.tensor([3]), torch.full((1, 4), 2.0))]}, right, TINY)
    wrong = {**right, "item_table": [SparseRows(torch.tensor([3]), torch.full((1, 4), 2.01))]}
    with pytest.raises(AssertionError, match="item_table: differs by 1.00e-02, where the largest number is 2.00e"):
        measure.check_equal(wrong, right, TINY)
    few = {**right, "item_table": [SparseRows(torch.tensor([3]), torch.tensor([[2.01, 2.0, 2.0, 2.0]]))]}
    with pytest.raises(AssertionError, match="item_table: differs by 1.00e-02, where the norm is 4.00e"):
        measure.check_equal(few, right, CASES["mlp"])
    with pytest.raises(AssertionError, match="outputs"):
        measure.check_equal({"loss": torch.ones(())}, right, TINY)


def test_items_are_distinct_inside_a_task():
    problem = Problem.draw(replace(TINY, num_items=30, num_tasks=50, loss="bpr"))
    support, query = problem.batch.support, problem.batch.query
    parts = [support.items.view(50, -1), support.negatives.view(50, -1)]
    parts += [query.items.view(50, -1), query.negatives.view(50, -1)]
    for row in torch.cat(parts, 1):
        assert len(row.unique()) == len(row)


def test_every_quick_workload_is_one_of_the_full_run():
    names = [work.name for work in WORKLOADS]
    assert len(set(names)) == len(names)
    assert {work.name for work in QUICK} <= set(names)


def test_the_floor_adds_moving_and_computing():
    problem = Problem.draw(TINY)
    machine = floors.Machine(copy=10.0, read=10.0, multiply_adds=10.0)
    floor = floors.floor_of(problem, machine, bandwidth=5.0)
    # 44 entries: a row and a bias of 7 floats read and written, an id of 8 bytes and a target of 4.
    assert floors.bytes_once(problem) == 44 * (2 * 7 * 4 + 12)
    expected = 1e3 * (floors.bytes_once(problem) / 5e9 + floors.count_multiply_adds(problem) / 1e10)
    assert floor.milliseconds == pytest.approx(expected)


def test_a_run_writes_tables_and_names_what_it_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "QUICK", (replace(TINY, name="small"), CASES["serve"]))
    monkeypatch.setattr(run.environment, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(run, "measure_machine", lambda **_: floors.Machine(10.0, 10.0, 10.0))
    compiled_too_long = "compiles too long for --quick"
    run.main(["--quick", "--threads", "1", "--seconds", "0.05", "--peer", "hand", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert compiled_too_long in printed
    report = json.loads((tmp_path / "results.json").read_text())
    assert [each["name"] for each in report["workloads"]] == ["small", "serve"]
    peers = {peer["name"]: peer for peer in report["workloads"][0]["peers"]}
    assert {OURS, "hand adjoint", "hand-batched autograd"} <= set(peers)
    assert peers[OURS]["ratio_to_ours"] == 1
    assert peers[OURS]["min_ms"] <= peers[OURS]["median_ms"]
    table = (tmp_path / "results.md").read_text()
    assert "| hand adjoint |" in table
    assert compiled_too_long in table


def test_a_faster_peer_is_said_to_win():
    from benchmarks import tables

    peers = [{"name": OURS, "min_ms": 3.0}, {"name": "other", "min_ms": 2.0}]
    assert tables.verdict({"peers": peers, "skipped": {}}) == f"A PEER WINS: other, 1.50 times as fast as {OURS}."
    peers[1]["min_ms"] = 6.0
    assert tables.verdict({"peers": peers, "skipped": {}}).startswith(f"{OURS} is 2.00 times as fast as other")


def test_times_of_a_busy_machine_are_called_noisy():
    from benchmarks import tables

    peer = {"name": "other", "min_ms": 1.0, "median_ms": 1.4, "ratio_to_floor": 2.0}
    quiet = {"peers": [peer], "load": 1.0, "cpus": 2}
    assert tables.noise(quiet) == ""
    assert "medians above 3 minima (other)" in tables.noise({**quiet, "peers": [{**peer, "median_ms": 4.0}]})
    assert "load 3.0 on 2 CPUs" in tables.noise({**quiet, "load": 3.0})
    assert "times below the floor" in tables.noise({**quiet, "peers": [{**peer, "ratio_to_floor": 0.4}]})


def test_an_unknown_workload_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(run.environment, "keep_freed_memory", lambda: True)
    with pytest.raises(SystemExit, match="--workload: expected one of user, .* got 'nonsense'"):
        run.main(["--quick", "--workload", "nonsense", "--out", str(tmp_path)])


def test_memory_of_a_step_is_measured_in_a_fresh_process():
    peak = memory.peak_megabytes("small", OURS, threads=1, quick=True)
    assert peak is None or 0 <= peak < 100
