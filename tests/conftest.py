"""Runs the tests of the operators on another device:  pytest --device simulated tests/test_meta_step.py"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cpu", "simulated"),
        default="cpu",
        help="where operators run: simulated means the CUDA kernels, on the CPU (tests/simulator)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cpu: of what only the operators of the CPU do, such as looking at ids and threads"
    )
    if config.getoption("--device") == "simulated":
        import simulator

        simulator.use(simulator.build())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cpu") and item.config.getoption("--device") != "cpu":
        pytest.skip("only on the CPU")
