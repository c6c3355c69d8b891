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
    if config.getoption("--device") == "simulated":
        import simulator

        simulator.use(simulator.build())
