"""Operators under `torch.autocast`: arithmetic stays float32, however low the precision of their inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DEVICE_TYPES = ("cpu", "cuda")
_LOW = (torch.bfloat16, torch.float16)
_keep_alive: list[torch.library.Library] = []


def fragment(namespace: str) -> torch.library.Library:
    """Where kernels can be added to the operators of a namespace, for good."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _keep_alive.append(library)
    return library


def register(namespace: str, names: Iterable[str]) -> None:
    """Gives operators that change nothing in place their kernels under autocast."""
    library = fragment(namespace)
    for name in names:
        for device_type in DEVICE_TYPES:
            _register(library, getattr(getattr(torch.ops, namespace), name).default, device_type)


def _register(library: torch.library.Library, op: Any, device_type: str) -> None:
    """As `torch.library.register_autocast`, which would widen a bfloat16 table, that is a copy of it.

    The operators read such a table as it is.
    """
    key = torch._C.DispatchKey.__members__[f"Autocast{device_type.upper()}"]
    narrow = [argument.name == "item_table" for argument in op._schema.arguments]

    def run(*args: Any) -> Any:
        widened = [
            arg if keeps and isinstance(arg, Tensor) and arg.dtype is torch.bfloat16 else _widened(arg)
            for arg, keeps in zip(args, narrow, strict=False)  # what is left out has a default
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*widened)

    op.py_impl(key)(run)
    library.impl(op, lambda _, *args: run(*args), key.name, with_keyset=True)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _LOW else value
