"""Tasks on a module within a limit of memory: as many at a time as fit, the same numbers, and what the system says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Draw
from torch import nn

import metarec_fast as mf
from metarec_fast._peak_memory import as_bytes, peak_memory

pytestmark = pytest.mark.cpu
WIDTH = 256


class Wide(nn.Module):
    """Each task has WIDTH² numbers of its own, a step."""

    def __init__(self):
        super().__init__()
        self.num_items = 50
        self.items = nn.Embedding(50, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, items):
        return self.head(self.items(items)).squeeze(-1)


def make_learner(**arguments):
    torch.manual_seed(0)
    return mf.MAML(mf.ModuleRecommender(Wide(), **arguments), adapt=["head.*"], inner_lr=0.01, inner_steps=3)


def make_batch(num_tasks=60):
    draw = Draw(0, torch.float32)
    sizes = tuple(1 + t % 9 for t in range(num_tasks))
    return draw.batch(sizes, sizes[::-1], 50)


def sizes_of_chunks(learner, batch):
    seen = []
    run = learner.tasks._run
    learner.tasks._run = lambda *arguments: seen.append(arguments[2]) or run(*arguments)
    loss = learner(batch)
    loss.backward()
    learner.tasks._run = run
    return [tasks.stop - tasks.start for tasks in seen], loss


def test_as_many_tasks_run_at_once_as_fit():
    batch = make_batch()
    counts = {}
    for limit in ("30MB", "60MB", "120MB"):
        learner = make_learner(memory_limit=limit)
        with_measuring, loss = sizes_of_chunks(learner, batch)
        assert with_measuring[:2] == [1, 2]
        again, _ = sizes_of_chunks(learner, batch)
        assert again == with_measuring[2:]
        counts[limit] = again[0]
    assert 1 < counts["30MB"] < counts["60MB"] / 1.9 < counts["120MB"] / 3.6
    expected = make_learner(chunk_size=7)
    torch.testing.assert_close(expected(batch), loss)
    expected(batch).backward()
    for one, other in zip(learner.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad / 2, other.grad, rtol=1e-4, atol=1e-6)  # sums in another order
    torch.testing.assert_close(learner.predict(batch), expected.predict(batch))


def test_less_than_one_task_takes_is_one_task_at_a_time():
    learner, batch = make_learner(memory_limit=1), make_batch(5)
    assert sizes_of_chunks(learner, batch)[0] == [1, 2, 1, 1, 1, 1, 1]
    assert sizes_of_chunks(learner, make_batch(1))[0] == [1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how much memory was used")
def test_the_system_says_that_it_stays_within_the_limit():
    kilobytes = {
        settings: int(subprocess.run([sys.executable, __file__, *settings.split()], capture_output=True, text=True,
                                     check=True, timeout=120).stdout.split()[-1])
        for settings in ("chunk_size 60", "memory_limit 40000000")
    }  # fmt: skip
    # Gradients summed up take 0.6 MB; products need some memory for themselves.
    assert kilobytes["memory_limit 40000000"] < 42e3 < 80e3 < kilobytes["chunk_size 60"]
    assert kilobytes["memory_limit 40000000"] > 20e3  # tasks are smaller than the power of two that was measured


def test_measuring_counts_what_exists_at_once_and_draws_no_random_numbers():
    def run():
        first = torch.rand(1000)  # 4000 bytes
        second = first.view(10, 100) * 2  # 8000
        del first
        second.add_(torch.rand(10, 100))  # 8000
        return second.view(-1)

    torch.manual_seed(0)
    assert peak_memory(run, torch.device("cpu")) == 8000
    one = torch.rand(1)
    torch.manual_seed(0)
    assert torch.rand(1) == one


def test_a_limit_is_a_number_of_bytes_or_a_size():
    sizes = (5, "7B", "2GB", "1.5 kb", "512MiB")
    assert [as_bytes("memory_limit", size) for size in sizes] == [5, 7, 2_000_000_000, 1500, 2**29]
    for value, error, message in (
        (
            "much",
            ValueError,
            '^memory_limit: expected a number of bytes or a size such as "2GB" or "512MiB", got',
        ),
        (0, ValueError, "^memory_limit: must be > 0, got 0"),
        (1.5, TypeError, "^memory_limit: expected a number of bytes or a size"),
    ):
        with pytest.raises(error, match=message):
            mf.ModuleRecommender(Wide(), memory_limit=value)


def main(name, value):
    """Prints the kB that a step takes more than there was before."""
    learner, batch = make_learner(**{name: int(value)}), make_batch()
    learner(batch).backward()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    learner(batch).backward()
    print(resident("VmHWM") - before)


def resident(mark):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(mark)).split()[1])


if __name__ == "__main__":
    import ctypes

    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    main(*sys.argv[1:])
