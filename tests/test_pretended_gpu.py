"""Where there is no GPU: on tensors that only say they are on one, no tensor of the CPU slips in, and nobody waits."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pretended_gpu
import pytest

TESTS = Path(__file__).parent
BEYOND = "not captured and not stream and not compiled and not indexed and not resumed and not page"

pytestmark = pytest.mark.skipif(pretended_gpu.why_not() is not None, reason=str(pretended_gpu.why_not()))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        return pretended_gpu.build(tmp_path_factory.mktemp("pretended_gpu"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this torch's headers are others: {error.stderr.splitlines()[0]}")


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent)))
    environment = {**os.environ, pretended_gpu.LIBRARY: str(library), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize(
    ("module", "which", "least"),
    [
        ("test_cuda", BEYOND, 30),
        ("test_tower_on_gpu", BEYOND, 15),
        ("test_learners", "not compile", 80),
        ("test_serving", "", 20),
        ("test_autocast", "not compiled", 15),
        ("test_heads", "", 30),
        ("test_pretrained", "", 50),
    ],
)
def test_learners_and_operators_work_where_only_tensors_of_the_gpu_do(module, which, least, library):
    done = run(library, "--device", "cuda", str(TESTS / f"{module}.py"), "-k", which)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-3000:]
    assert passed is not None
    assert int(passed[1]) >= least


def test_what_it_is_there_for_is_found(library, tmp_path):
    (tmp_path / "test_faults.py").write_text(FAULTS)
    done = run(library, "--rootdir", str(tmp_path), str(tmp_path / "test_faults.py"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "3 passed" in done.stdout


FAULTS = """
import pytest, torch
from metarec_fast import Entries, functional as F

def test_a_tensor_of_the_cpu_is_found():
    there = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="found cuda:0 and cpu"):
        there + torch.ones(3)

def test_waiting_is_found():
    there = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    waits = lambda: there.sum().item(), lambda: bool(there.all()), there.cpu, there.nonzero, lambda: there[there > 0]
    for wait in waits:
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait()
    torch.cuda.set_sync_debug_mode("default")

def test_numbers_are_right_and_have_gradients():
    there = torch.arange(3.0, device="cuda").requires_grad_()
    (there * there).sum().backward()
    assert there.grad.device.type == "cuda"
    assert there.grad.tolist() == [0, 2, 4]
"""
