"""Counter-based random numbers: pure functions of a seed and a path of counters, the same in NumPy and in C++.

    at(key, i)      = the i-th output of SplitMix64 seeded with `key` (Steele, Lea, Flood 2014): mix(key + (i + 1) γ)
    below(bits, n)  = ⌊(bits ≫ 32) n / 2³²⌋, in 0 … n−1 for n < 2³², its bias below n / 2³²

A path is walked by using one output as the next key. The sampler's paths, with k = at(at(seed, epoch), purpose):

    purpose ORDER      at(k, user)                    users of an epoch stand in ascending order of it
            SUPPORT    at(k, user)                    the size of a user's support set
            QUERY      at(k, user)                    the size of a user's query set
            ROWS       at(at(k, user), j)             the j-th swap of the partial Fisher–Yates shuffle of a user's rows
            NEGATIVES  at(at(at(k, user), j), tries)  the j-th negative of a user, support entries first
            UNRATED    at(at(k, user), item)          what `evaluate` samples of a user's unrated items, in draw "epoch"

and others, with k = at(seed, purpose):

            SPLIT      at(k, user)                    `split_users` orders users by it
            ITEMS      at(k, item)                    `split_quadrants` orders items by it
            HELD_OUT   at(at(k, user), item)          and a user's ratings
            RESAMPLES  at(at(k, r), j)                the j-th user of the r-th resample of a bootstrap

Nothing depends on what was drawn before, so results do not depend on the number of threads, on the order of batches, or
on which implementation drew them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER, SUPPORT, QUERY, ROWS, NEGATIVES, SPLIT, RESAMPLES, ITEMS, HELD_OUT, UNRATED = range(10)

_GAMMA = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def at(key: int | NDArray[np.uint64], index: int | NDArray[Any]) -> NDArray[np.uint64]:
    """64 random bits for each index (broadcast against the keys), uint64."""
    position = np.atleast_1d(np.asarray(index)).astype(np.uint64) + np.uint64(1)
    start = np.uint64(key & _WORD) if isinstance(key, int) else key
    bits: NDArray[np.uint64] = start + position * np.uint64(_GAMMA)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@lru_cache(maxsize=64)  # asked for with every batch of an epoch
def key_of(seed: int, *path: int) -> int:
    """The key at the end of a path of counters."""
    key = seed & _WORD
    for index in path:
        key = int(at(key, index)[0])
    return key


def below(bits: NDArray[np.uint64], bound: int | NDArray[Any]) -> NDArray[np.int64]:
    """Integers in 0 … bound−1, int64; bound < 2³²."""
    limit = np.asarray(bound).astype(np.uint64)
    return (((bits >> np.uint64(32)) * limit) >> np.uint64(32)).astype(np.int64)
