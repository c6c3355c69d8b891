"""The script for a GPU, as far as it runs without one: its Python on the CPU with tiny sizes, its stages by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import metarec_fast as mf
from benchmarks import clock, gpu, gpu_check, ncu, tables
from benchmarks.implementations import OURS
from benchmarks.workloads import ON_A_GPU, Problem

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
STAGES = (
    "check",
    "build",
    "exercise",
    "tests",
    "benchmark",
    "memcheck racecheck synccheck initcheck",
    "profile",
    "others",
)


@pytest.fixture(autouse=True)
def threads_stay_as_they_are():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})  # fmt: skip


def test_a_run_times_all_workloads_compares_first_and_writes_tables(tmp_path, capsys):
    status = gpu.main(
        ["--device", "cpu", "--tiny", "--seconds", "60", "--seconds-each", "0.001", "--peer", "hand adjoint",
         "--workload", "user,full,ragged,dense,mlp,serve,train-256", "--out", str(tmp_path)]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    report = json.loads((tmp_path / "results.json").read_text())
    assert [each["name"] for each in report["workloads"]] == [
        "user",
        "full",
        "ragged",
        "dense",
        "mlp",
        "mlp-large",
        "train-256",
        "serve",
    ]
    user = report["workloads"][0]
    peers = {peer["name"]: peer for peer in user["peers"]}
    assert {OURS, "hand adjoint"} <= set(peers)
    moved = 1e6 * user["floor"]["megabytes"]
    for peer in peers.values():
        assert peer["achieved_gb_s"] == pytest.approx(moved / peer["min_ms"] / 1e6)
        assert peer["share_of_copy"] == pytest.approx(peer["achieved_gb_s"] / report["machine"]["copy"])
        assert peer["min_ms"] <= peer["median_ms"]
    assert min(peer["ratio_to_ours"] for peer in user["peers"] if peer["name"].startswith(OURS)) == 1
    table = (tmp_path / "table.md").read_text()
    assert "| one after the other ms |" in table
    assert "| of copying |" in table
    assert f"| {OURS} |" in table


def test_what_compiles_comes_last_and_is_named_where_the_time_does_not_reach(tmp_path, capsys, monkeypatch):
    arguments = ["--device", "cpu", "--tiny", "--workload", "user", "--out", str(tmp_path), "--seconds-each", "0.001"]
    assert gpu.main([*arguments, "--seconds", "0"]) == 1
    assert "FAILED: user: not reached in the time given" in capsys.readouterr().out
    extend = gpu.extend

    def out_of_time(run, compiles, options, end):
        return extend(run, compiles, options, 0 if compiles else end)

    monkeypatch.setattr(gpu, "extend", out_of_time)
    assert gpu.main([*arguments, "--peer", "compiled"]) == 0
    assert "left out, not reached in the time given: hand adjoint, direct form, compiled" in capsys.readouterr().out


def test_a_wrong_peer_fails_the_run_and_one_that_raises_is_left_out_with_its_reason(tmp_path, capsys, monkeypatch):
    from benchmarks.implementations import Peer

    def wrong(problem):
        step = gpu.metarec_fast.prepare(problem)
        return lambda: {**step(), "loss": torch.zeros(())}

    def broken(problem):
        raise NotImplementedError("no kernel for this")

    def able(work):
        return "quick" if work.kind == "gradient" else None

    monkeypatch.setattr(
        gpu, "PEERS", (*gpu.metarec_fast.PEERS, Peer("hand wrong", wrong, able), Peer("hand broken", broken, able))
    )
    status = gpu.main(
        ["--device", "cpu", "--tiny", "--workload", "user", "--seconds-each", "0.001", "--out", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    assert status == 1
    assert "FAILED: user: hand wrong is not equal: loss: differs by" in printed
    assert "left out, NotImplementedError: no kernel for this: hand broken" in printed


def test_an_unknown_workload_is_named():
    with pytest.raises(SystemExit, match="--workload: expected some of user, .* got 'nonsense'"):
        gpu.main(["--device", "cpu", "--tiny", "--workload", "nonsense"])


def test_dense_gradients_are_timed_by_atomics_too(monkeypatch):
    work = next(gpu.tiny(work) for work in ON_A_GPU if work.kind == "dense")
    peers, allowed = {peer.name: peer for peer in gpu._able(work, None)}, []
    sum_rows = gpu.metarec_fast.F.sum_rows

    def watched(gradient, num_rows):
        allowed.append(mf.atomics_allowed())
        return sum_rows(gradient, num_rows)

    monkeypatch.setattr(gpu.metarec_fast.F, "sum_rows", watched)
    for name in (OURS, f"{OURS}, atomics"):
        peers[name].prepare(Problem.draw(work))()
    assert allowed == [False, False, True, True]


def test_what_is_profiled_runs():
    gpu.profile(torch.device("cpu"), gpu.tiny(ON_A_GPU[0]))


def test_the_workloads_reach_the_sizes_that_are_quoted():
    assert {work.num_tasks for work in ON_A_GPU} >= {256, 4096, 65_536}
    assert {work.num_items for work in ON_A_GPU} >= {100_000, 1_000_000, 10_000_000}
    assert len({work.name for work in ON_A_GPU}) == len(ON_A_GPU)


def test_a_problem_is_the_same_wherever_the_default_device_is():
    work = gpu.tiny(ON_A_GPU[0])
    here = Problem.draw(work)
    with torch.device("meta"):
        there = Problem.draw(work)
    assert there.device.type == "cpu"
    assert torch.equal(here.item_table, there.item_table)
    assert torch.equal(here.batch.support.items, there.batch.support.items)


def test_times_are_of_single_calls_and_of_calls_one_after_the_other():
    calls = []
    times = clock.Clock(torch.device("cpu")).times(lambda: calls.append(0), seconds=0, most=5)
    assert len(times.cold) == 3
    assert len(calls) == 1 + 3 + 3
    assert 0 <= times.minimum <= times.median
    assert times.back_to_back >= 0


def test_the_fastest_of_ours_is_compared_with_the_fastest_peer():
    peers = [
        {"name": OURS, "min_ms": 3.0},
        {"name": f"{OURS}, CUDA graph", "min_ms": 1.0},
        {"name": "other", "min_ms": 2},
    ]
    verdict = tables.verdict({"peers": peers, "skipped": {}})
    assert verdict == f"{OURS}, CUDA graph is 2.00 times as fast as other, the fastest peer."


PROFILE = '''==PROF== Connected
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","void metarec_fast::cuda::meta_kernel<float>(Call<float>)","SpeedOfLight","Duration","us","81.5"
"0","7","void metarec_fast::cuda::meta_kernel<float>(Call<float>)","SpeedOfLight","DRAM Throughput","%","84.2"
"1","7","metarec_fast::cuda::top_kernel(int, float *)","SpeedOfLight","Duration","us","9.25"
"1","7","metarec_fast::cuda::top_kernel(int, float *)","Occupancy","Achieved Occupancy","%","50"
'''  # fmt: skip


def test_a_profile_becomes_a_line_for_each_kernel(tmp_path, capsys):
    file = tmp_path / "ncu.csv"
    file.write_text(PROFILE)
    assert ncu.main(str(file)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| kernel | time | DRAM | occupancy |",
        "| --- | --- | --- | --- |",
        "| meta_kernel<float> | 81.5 us | 84.2 % |  |",
        "| top_kernel | 9.25 us |  | 50 % |",
    ]
    file.write_text("==ERROR== no permission to read counters\n")
    assert ncu.main(str(file)) == 1
    assert "no permission to read counters" in capsys.readouterr().out


def test_what_the_machine_lacks_is_said_with_what_follows(monkeypatch):
    monkeypatch.setattr(gpu_check, "_installed", lambda name: name != "pytest")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "ncu" else name)
    assert gpu_check.missing() == [
        "pytest: not installed, tests do not run",
        "ncu: not on the PATH, kernels are not profiled",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_called_so(capsys):
    assert gpu_check.check() == 1
    said = capsys.readouterr().out
    assert "torch was built without CUDA: install one with it" in said or "torch finds no GPU" in said


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_is_bash_and_says_which_stages_there_are():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    said = script("--dry-run").stdout
    assert [line.split(", ")[0] for line in said.splitlines() if ", at most " in line or ", side by" in line] == list(
        STAGES
    )
    only = script("--dry-run", "--only", "check,benchmark").stdout
    assert [line.split(", ")[0] for line in only.splitlines()] == ["check", "benchmark"]
    taken = script("--dry-run", "--binaries", "elsewhere", "--only", "build").stdout
    assert "cp -f 'elsewhere'/*.so" in taken
    assert "cmake" not in taken
    assert script("--nonsense").returncode == 2


@pytest.mark.skipif(shutil.which("bash") is None or torch.cuda.is_available(), reason="needs bash, and no GPU")
def test_a_stage_that_fails_is_reported_and_the_next_one_runs(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *gpu_check*) echo "no GPU here"; exit 1;; *exercise*) sleep 3;; esac\n')
    stub.chmod(0o755)
    done = script(
        "--only", "check,exercise,benchmark", PYTHON=str(stub), OUT=str(tmp_path / "out"), SECONDS_IN_ALL="12"
    )
    assert done.returncode == 1
    assert "no GPU here" in done.stdout
    summary = (tmp_path / "out" / "summary.md").read_text().splitlines()[2:]
    assert summary[0].startswith("| check | FAILED: exit status 1 |")
    assert summary[1].startswith("| exercise | ok |")
    assert summary[2].startswith("| benchmark | FAILED: took longer than it may |")
    assert (tmp_path / "out" / "logs.tar.gz").exists()


def test_every_operator_can_be_exercised_on_a_device():
    import exercise_gpu

    assert exercise_gpu.main(["--device", "cpu", "--small", "--only", "sum_rows"]) == 0
