"""What torch.compile is to do with functions, said without `torch._dynamo`, whose import takes longer than all of ours:
it is left to whoever compiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def left_uncompiled(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `torch.compiler.disable`: what is compiled calls the function as it is."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        disabled: list[Callable[P, R]] = []

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        return run

    return decorate


def constant(function: Callable[[], R]) -> Callable[[], R]:
    """As `torch.compiler.assume_constant_result`: the result is part of what is compiled, which is done anew where it
    has changed."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
