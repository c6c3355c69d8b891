"""Runs the tests of operators and learners elsewhere: pytest --device cuda, pytest --device simulated tests/test_…"""

import os

import problems
import pytest
import torch

OPERATORS_AND_LEARNERS = {
    "test_adapt_and_score", "test_atomics", "test_autocast", "test_checkpoint", "test_freezing",
    "test_full_adaptation", "test_heads", "test_learners", "test_meta_step", "test_mlp_adapt_and_score",
    "test_mlp_meta_step", "test_mlp_pairs", "test_models", "test_optim", "test_pairwise_learners",
    "test_pairwise_losses", "test_pretrained", "test_reptile_step", "test_score_top_k", "test_serving",
    "test_sum_rows", "test_training",
}  # fmt: skip
"""Modules whose tests make their tensors on the device; all others are about something on the CPU, and stay there."""
DEVICE_FIRST = OPERATORS_AND_LEARNERS | {
    "test_cuda",
    "test_tower_on_gpu",
    "test_compile",
    "test_transfer",
    "test_library",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "simulated", "cuda"),
        default="cpu",
        help="where operators run: simulated means the CUDA kernels, on the CPU (tests/simulator)",
    )
    parser.addoption(
        "--about", choices=("device", "rest"), help="only tests of what runs on devices, or all others (default: both)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, and is skipped where there is none")
    config.addinivalue_line(
        "markers", "cpu: of what only the operators of the CPU do, such as looking at ids and threads"
    )
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # they share the processors
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    device = config.getoption("--device")
    if device == "simulated":
        import simulator

        simulator.use(simulator.build())
    if device == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no GPU that it can use")
        problems.DEVICE = "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device, about = config.getoption("--device"), config.getoption("--about")
    if about is not None:
        others = [item for item in items if (item.path.stem in DEVICE_FIRST) != (about == "device")]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)
    for item in items:
        if item.get_closest_marker("cpu") is not None and device != "cpu":
            item.add_marker(pytest.mark.skip(reason="about what only the operators of the CPU do"))
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none that it can use"))


@pytest.fixture(autouse=True)
def made_on_the_device(request: pytest.FixtureRequest):
    """Tensors that a test makes without saying where are on the device under test."""
    if problems.DEVICE == "cpu" or request.node.path.stem not in OPERATORS_AND_LEARNERS:
        yield
        return
    with torch.device(problems.DEVICE):
        yield


@pytest.fixture
def patience():
    """Waiting for the GPU is an error inside the test, once everything has been called and loaded."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
