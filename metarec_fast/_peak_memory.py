"""How much memory tensors take: limits as people write them, and what something really makes."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def as_bytes(name: str, value: int | str) -> int:
    """A number of bytes, or a number and its unit ("2GB", "512 MiB").

    Raises:
        ValueError, TypeError: It is neither, or not > 0; `name` says what it is.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'{name}: expected a number of bytes or a size such as "2GB", got {value!r}')
    number, unit = str(value), "B"
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", value, re.IGNORECASE)
        if parts is None:
            raise ValueError(f'{name}: expected a number of bytes or a size such as "2GB" or "512MiB", got {value!r}')
        number, unit = parts.groups()
    size = int(float(number) * _UNITS[unit.upper()])
    if size < 1:
        raise ValueError(f"{name}: must be > 0, got {value!r}")
    return size


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of the most tensors that exist at once, of those that `run` makes, its result included. What an operation
    needs for itself does not count. Random numbers drawn meanwhile are drawn again later."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _Counting() as counting:
        run()
    most: int = counting.peak
    return most


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}  # bytes of a storage, by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given: set[int] = set()  # what is returned may be a view of it
        tree_map_only(Tensor, lambda tensor: given.add(tensor.untyped_storage()._cdata), (args, kwargs))
        tree_map_only(Tensor, lambda tensor: self._count(tensor.untyped_storage(), given), result)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address = storage._cdata
        if address not in given and address not in self._alive:
            self._alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._alive.pop(address)
