import numpy as np
from numpy.typing import NDArray

_Entries = tuple[
    NDArray[np.int64],
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.int64] | None,
    NDArray[np.int64],
    NDArray[np.int64] | None,
    int,
    int,
]

class Sampler:
    """What `_numpy_sampler.Sampler` does, in C++."""

    def __init__(
        self,
        offsets: NDArray[np.int64],
        items: NDArray[np.int32],
        ratings: NDArray[np.float32],
        num_items: int,
        support: tuple[int, int],
        query: tuple[int, int],
        by_time: bool,
        negatives: int,
    ) -> None: ...
    def sample(self, users: NDArray[np.int64], key: int) -> tuple[NDArray[np.int64], _Entries, _Entries | None]: ...
