"""The tests of the operators pass on the CUDA kernels too, which run on the simulator."""

import subprocess
import sys
from pathlib import Path

import pytest
import simulator

pytestmark = pytest.mark.skipif(bool(simulator.missing()), reason=simulator.missing() or "nothing is missing")

MODULES = (
    "meta_step", "adapt_and_score", "full_adaptation", "pairwise_losses", "reptile_step", "sum_rows", "score_top_k",
    "optim", "atomics", "mlp_meta_step", "mlp_adapt_and_score", "mlp_pairs",
)  # fmt: skip
LONG = {
    "mlp_meta_step": "not opcheck and not of_any_size and not rate_of_its_own and not near_to and not every_gradient",
    "mlp_adapt_and_score": "not opcheck",
    "mlp_pairs": "not opcheck and not every_gradient and not float32",
}
"""Which tests of a module are left out here: minutes on the simulator, and exercise.py has such cases."""


@pytest.mark.parametrize("module", MODULES)
def test_the_tests_of_an_operator_pass_on_the_simulated_kernels(module):
    file = Path(__file__).parent / f"test_{module}.py"
    command = [sys.executable, "-m", "pytest", "--device", "simulated", str(file), "-k", LONG.get(module, "test")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:]
