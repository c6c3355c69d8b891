"""Faults planted in the CUDA sources are found, each by the build that is there for it: see simulator/faults.py."""

import re
import sys
from functools import cache

import pytest
import simulator
from simulator import faults
from simulator.faults import FAULTS

pytestmark = pytest.mark.skipif(bool(simulator.missing()), reason=simulator.missing())

# How a run may end in which a fault was found, and what it says.
FOUND = {
    "plain": ((2, 3), "apart|other integers|waits at|divergent|mask|exited"),
    "address": ((1,), "ERROR: AddressSanitizer|runtime error"),
    "thread": ((66,), "WARNING: ThreadSanitizer: data race"),
}


@cache
def endings(kind):
    """How the runs ended for the faults of one kind, and what they said: by number, 0 for the run without one."""
    planted = [(number, fault.case) for number, fault in enumerate(FAULTS, 1) if fault.found_by == kind]
    arguments = [word for number, case in planted for word in ("--fault", str(number), case)]
    arguments += [word for case in sorted({case for _, case in planted}) for word in ("--fault", "0", case)]
    done = simulator.run(kind, sys.executable, simulator.EXERCISE, faults.build(kind), *arguments)
    assert done.returncode == 0, done.stdout
    found = re.findall(r"^fault (\d+)\n(.*?)^ended (-?\d+)\n", done.stdout, re.MULTILINE | re.DOTALL)
    assert len(found) == len(arguments) // 3
    return [(int(number), said, int(code)) for number, said, code in found]


@pytest.mark.parametrize("kind", FOUND)
def test_nothing_is_found_where_no_fault_is_chosen(kind):
    clean = [(said, code) for number, said, code in endings(kind) if number == 0]
    assert clean
    assert clean == [("", 0)] * len(clean)


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=[fault.name for fault in FAULTS])
def test_a_planted_fault_is_found(number):
    kind = FAULTS[number - 1].found_by
    ((said, code),) = [(said, code) for planted, said, code in endings(kind) if planted == number]
    codes, words = FOUND[kind]
    assert code in codes, said
    assert re.search(words, said), said
