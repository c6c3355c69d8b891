"""The simulator of CUDA threads finds the faults it is there for, and none where there is none."""

import pytest
import simulator

pytestmark = pytest.mark.skipif(bool(simulator.missing()), reason=simulator.missing())

BY_WARP, BY_BLOCK = 0, 1
RIGHT, WRONG, REFUSED = 0, 2, 3  # what self_test.cu returns
UNDEFINED, RACE = 1, 66

# In the order of `enum Fault` in self_test.cu: its kernel, and how it is found and by what
FAULTS = {
    "a warp barrier is missing": (BY_WARP, {"plain": WRONG, "thread": RACE}),
    "a block barrier is missing": (BY_BLOCK, {"plain": WRONG, "thread": RACE}),
    "a shuffle in a divergent branch": (BY_WARP, {"plain": REFUSED}),
    "an index past shared memory": (BY_WARP, {"plain": WRONG, "address": UNDEFINED}),
    "an index past global memory": (BY_BLOCK, {"address": UNDEFINED}),
    "a race across blocks": (BY_WARP, {"thread": RACE}),
    "a misaligned load of a vector": (BY_WARP, {"address": UNDEFINED}),
    "shared memory that nobody has written": (BY_BLOCK, {"plain": WRONG}),
    "lanes leave before their warp works together": (BY_WARP, {"plain": REFUSED}),
    "a mask without some of the lanes": (BY_WARP, {"plain": REFUSED}),
    "threads leave before a block barrier": (BY_BLOCK, {"plain": REFUSED}),
    "a product of indices in 32 bits": (BY_BLOCK, {"address": UNDEFINED}),
    "barriers in two branches": (BY_BLOCK, {"plain": REFUSED}),
    "a shuffle taken for a barrier": (BY_WARP, {"thread": RACE}),
    "more shared memory than there is": (BY_BLOCK, {"plain": REFUSED}),
}
CASES = [(name, kind) for name, (_, found_by) in FAULTS.items() for kind in found_by]


def run(kind, kernel, fault, schedule="forward"):
    return simulator.run(
        kind, simulator.build(kind, "self_test"), str(kernel), str(fault), schedule=schedule, TSAN_OPTIONS="exitcode=66"
    )


@pytest.mark.parametrize("schedule", simulator.SCHEDULES)
@pytest.mark.parametrize("kind", ["plain", "address", "thread"])
@pytest.mark.parametrize("kernel", [BY_WARP, BY_BLOCK])
def test_kernels_without_a_fault_pass(kernel, kind, schedule):
    done = run(kind, kernel, 0, schedule)
    assert (done.returncode, done.stdout) == (RIGHT, "")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_fault_is_found(name, kind):
    kernel, found_by = FAULTS[name]
    for schedule in simulator.SCHEDULES:
        done = run(kind, kernel, list(FAULTS).index(name) + 1, schedule)
        assert done.returncode == found_by[kind], done.stdout


def test_a_refusal_says_what_and_where():
    done = run("plain", BY_BLOCK, list(FAULTS).index("threads leave before a block barrier") + 1)
    assert "block_per_task, block 0,0,0: __syncthreads at " in done.stdout
    assert "self_test.cu" in done.stdout
    assert "reached by 64 threads after 64 have exited" in done.stdout


def test_a_schedule_that_does_not_exist_is_refused():
    done = run("plain", BY_BLOCK, 0, schedule="sideways")
    assert "METAREC_SCHEDULE: expected forward, reverse or random:SEED, got 'sideways'" in done.stdout
