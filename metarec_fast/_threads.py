"""As many threads as the work is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_RATINGS_PER_THREAD = 250_000


@contextmanager
def threads_for(num_ratings: int) -> Iterator[None]:
    """One thread for each quarter of a million ratings meanwhile, and no more than there are.

    Thousands of small operations wait for each other at the end of each, and where others keep a processor busy, every
    such wait takes as long as theirs: 100,000 ratings took 24 seconds with two threads and 1.9 with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, num_ratings // _RATINGS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
