"""The tests of the operators pass on the CUDA kernels too, which run on the simulator."""

import subprocess
import sys
from pathlib import Path

import pytest
import simulator

pytestmark = pytest.mark.skipif(bool(simulator.missing()), reason=simulator.missing() or "nothing is missing")

MODULES = (
    "meta_step", "adapt_and_score", "full_adaptation", "pairwise_losses", "reptile_step", "sum_rows", "score_top_k",
    "optim",
)  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_the_tests_of_an_operator_pass_on_the_simulated_kernels(module):
    file = Path(__file__).parent / f"test_{module}.py"
    command = [sys.executable, "-m", "pytest", "--device", "simulated", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
