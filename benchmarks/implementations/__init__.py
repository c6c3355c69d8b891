"""All implementations, ours first. Each module has `PEERS`; a peer prepares a problem and gives a step to call."""

from __future__ import annotations

from benchmarks.implementations import (
    hand_adjoint,
    hand_adjoint_full,
    hand_batched,
    hand_reptile,
    higher,
    jax_jit,
    learn2learn,
    metarec_fast,
    mlp,
    python_loop,
    serving,
    torch_func,
    torchopt,
    training,
)
from benchmarks.implementations.blocks import Outputs, Peer, Step

OURS = "metarec_fast"
MODULES = (
    metarec_fast, serving, training, hand_adjoint, hand_adjoint_full, hand_reptile, hand_batched, torch_func, jax_jit,
    torchopt, higher, learn2learn, python_loop, mlp,
)  # fmt: skip
PEERS: tuple[Peer, ...] = tuple(peer for module in MODULES for peer in module.PEERS)

__all__ = ["OURS", "PEERS", "Outputs", "Peer", "Step"]
