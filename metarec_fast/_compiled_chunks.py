"""Functions of many tasks at once by `torch.compile`, padded so that a few compilations serve all batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

_MOST_SIZES = 64  # of which a function is compiled; torch gives up after eight


class CompiledChunks:
    """`function(*settings, mapped)`, whose result is [t, ...] for the t tasks of `mapped`, compiled.

    Tensors of `mapped`, [t, ...], and of dictionaries in it, [t, s, ...], are filled up with zeros to powers of two of
    t and s. Where compiling fails, the function runs as it is from then on, with one warning.

    Args:
        function: What runs. Tasks and entries of zeros must not change what is found of others.
        name: What warnings call it.
    """

    def __init__(self, function: Callable[..., Tensor], name: str) -> None:
        self.function, self.name, self.fails = function, name, False

    @cached_property
    def compiled(self) -> Callable[..., Tensor]:
        """The function, when it is first asked for: most are not."""
        return torch.compile(self.function, dynamic=False, fullgraph=True)

    def __call__(self, *settings: Any, mapped: Mapping[str, Any], num_tasks: int) -> Tensor:
        if self.fails:
            return self.function(*settings, mapped)
        padded = {
            name: _filled_up(part, 1) if isinstance(part, Tensor) else {n: _filled_up(p, 2) for n, p in part.items()}
            for name, part in mapped.items()
        }
        try:
            # Chunks share a part of their graph, which is kept, so no buffer may be given away.
            with (
                warnings.catch_warnings(),
                torch._dynamo.config.patch(recompile_limit=_MOST_SIZES),
                torch._functorch.config.patch(donated_buffer=False),
            ):
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch's own
                return self.compiled(*settings, padded)[:num_tasks]
        except Exception as error:
            found = self.function(*settings, mapped)  # which says what is wrong, if it was no compiler
            self.fails = True
            reason = str(error).strip().split("\n")[0]
            message = f"compile: {self.name} runs as it is, for it could not be compiled: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return found


def _filled_up(tensor: Tensor, dims: int) -> Tensor:
    """Zeros at the end of the first dimensions, up to powers of two."""
    grown = [(1 << max(0, size - 1).bit_length()) - size for size in tensor.shape[:dims]]
    pads = [0, 0] * (tensor.dim() - dims)
    for zeros in reversed(grown):
        pads += [0, zeros]
    return nn.pad(tensor, pads)
