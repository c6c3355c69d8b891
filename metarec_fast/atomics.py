"""Sums on a GPU in any order, if one asks for it: without sorting, but not the same bits every time."""

from __future__ import annotations

import torch

from metarec_fast import _library, _ops


class allow_atomics:
    """Lets operators on CUDA add rows of equal ids by atomics, as a call or inside a `with` block. Off at the start.

        mf.allow_atomics()          # from now on
        with mf.allow_atomics(): …  # until the end of the block

    Additions come in whatever order the GPU runs them, so the last bits differ from run to run. This is so in dense
    gradients [N, D] of item tables (`functional.adapt_and_score`, `adapt`, `meta_step(…).loss.backward()`, those of the
    tower, `sum_rows`) and in `SparseSGD`. All else keeps its order, `SparseAdam` and `SparseAdagrad` too: they need the
    whole sum of an id before they take a root. Where very many entries have one id, they wait for each other.

    It holds for the whole process, threads of backward passes included, and for what `torch.compile` has compiled
    already; inside of what is compiled it cannot be changed, and a CUDA graph does what it did when it was captured.
    It does nothing on the CPU, nor while `torch.are_deterministic_algorithms_enabled()`.

    Args:
        mode: Whether to allow it.

    Raises:
        TypeError: `mode` is no bool.
        RuntimeError: It is called while `torch.compile` compiles.
    """

    def __init__(self, mode: bool = True) -> None:
        if not isinstance(mode, bool):
            raise TypeError(f"mode: expected a bool, got {mode!r}")
        if torch.compiler.is_compiling():
            raise RuntimeError("allow_atomics: expected to be called outside of what torch.compile compiles")
        self._before = _set(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        _set(self._before)


def atomics_allowed() -> bool:
    """Whether operators on CUDA form sums in any order now: allowed, and no deterministic algorithms asked for."""
    return _library.cpu.loaded and bool(_ops.ops.atomics_allowed())


def _set(mode: bool) -> bool:
    """What it was before."""
    return _library.cpu.loaded and bool(_ops.ops.allow_atomics(mode))


__all__ = ["allow_atomics", "atomics_allowed"]
