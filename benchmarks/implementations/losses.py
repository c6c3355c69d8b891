"""The losses of the workloads, their first and second derivatives in the score; BPR is that of a pair's difference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def loss(name: str, scores: Tensor, targets: Tensor) -> Tensor:
    return softplus(-scores) if name == "bpr" else (scores - targets) ** 2


def derivative(name: str, scores: Tensor, targets: Tensor) -> Tensor:
    return -torch.sigmoid(-scores) if name == "bpr" else 2 * (scores - targets)


def second_derivative(name: str, scores: Tensor) -> Tensor | float:
    if name != "bpr":
        return 2.0
    probability = torch.sigmoid(scores)
    return probability * (1 - probability)
