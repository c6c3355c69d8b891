"""The CUDA operators, simulated, give the CPU's numbers in any order of threads, and break no rule on the way."""

import sys

import pytest
import simulator
from simulator import faults

pytestmark = pytest.mark.skipif(bool(simulator.missing()), reason=simulator.missing())


def exercise(kind, *arguments, schedule="forward"):
    done = simulator.run(kind, sys.executable, simulator.EXERCISE, faults.build(kind), *arguments, schedule=schedule)
    assert done.returncode == 0, done.stdout
    assert " cases, 0 wrong" in done.stdout


@pytest.mark.parametrize("schedule", simulator.SCHEDULES[1:])  # test_cuda_coverage.py has the first
def test_numbers_do_not_depend_on_the_order_of_threads(schedule):
    exercise("plain", "--brief", schedule=schedule)


def test_no_access_is_out_of_bounds_or_misaligned_and_no_index_overflows():
    exercise("address", "--brief")


def test_no_two_threads_race():
    exercise("thread", "--small")
