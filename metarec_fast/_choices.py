"""What it says about users and items that these users rated these items, whatever the ratings.

The matrix C of who rated what is scaled to rows of length about 1, C_ui = (n_u + 1)^(−1/2). Its leading singular
directions are features of users and of items, from which `_prior_mean` predicts their vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast._segments import Segments

_OVERSAMPLING = 8
_ROUNDS = 3  # of subspace iteration; more change nothing that validation users would notice


def leading_directions(rows: Segments, columns: Segments, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of the rows of C from a truncated singular value decomposition (Halko et al. 2011, algorithm 4.4).

    Args:
        rows, columns: The ratings grouped by what is described, R of them, and by the other side, M of them.
        width: How many directions; no more than min(R, M) are found.
        seed: Of the random start.

    Returns:
        V [M, width], orthonormal directions times a scale at which the features' rows C V have a mean square of 1, and
        these features [R, width]: Σ_j V_j / √(n + 1) over the ratings of each row.
    """
    num_rows, num_columns = len(rows.sizes), len(columns.sizes)
    width = min(width, num_rows, num_columns)
    scale = (rows.sizes + 1.0).rsqrt()[:, None]

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(num_columns, min(width + _OVERSAMPLING, num_rows, num_columns), generator=generator)
    basis = torch.linalg.qr(start).Q
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(columns.sum(scale * rows.sum(basis) * scale)).Q
    features = scale * rows.sum(basis)
    rotation = torch.linalg.eigh(features.T @ features).eigenvectors.flip(1)[:, :width]
    size = (features @ rotation).square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return basis @ rotation / size, features @ rotation / size
