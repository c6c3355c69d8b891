"""Is one predictor better than another, or were these users kind to it? A paired bootstrap over users."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from metarec_fast import _random

_LARGEST_COUNTS = 1 << 22  # numbers in the counts of a block of resamples: 32 MiB


class Comparison(NamedTuple):
    """How a figure of one predictor differs from that of a baseline on the same users.

    Attributes:
        difference: The figure less that of the baseline, as reported.
        low, high: Its 95% interval.
        p_value: Two-sided, of no difference: twice the share of resamples in which the sign turns, at least
            2/(resamples + 1).
    """

    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
    *,
    root: bool,
    resamples: int,
    seed: int,
) -> Comparison:
    """The percentile bootstrap (Efron and Tibshirani 1993, ch. 13) of the difference of two weighted means over users.

    The figure is Σ w v / Σ w, or its square root. Users are drawn with replacement, each with both predictions and all
    its ratings: ratings of one user are not independent, and users whom all find hard are hard for both.

    Args:
        values: A metric of each user, for the predictor and for the baseline, [2, U], U ≥ 1.
        weights: How much each user counts, [U], > 0.
        root: Whether the figure is a square root, as rmse is.
        resamples: How often the users are drawn.
        seed: Which draws.
    """
    num_users = len(weights)
    columns = np.stack([weights * values[0], weights * values[1], weights], axis=1)  # [U, 3]

    def differences(counts: NDArray[np.int64]) -> NDArray[np.float64]:  # [r, U] → [r]
        sums = counts @ columns
        figures = sums[:, :2] / sums[:, 2:]
        figures = np.sqrt(figures) if root else figures
        result: NDArray[np.float64] = figures[:, 0] - figures[:, 1]
        return result

    key = _random.key_of(seed, _random.RESAMPLES)
    block = max(1, _LARGEST_COUNTS // num_users)
    parts = []
    for begin in range(0, resamples, block):
        keys = _random.at(key, np.arange(begin, min(begin + block, resamples)))[:, None]
        drawn = _random.below(_random.at(keys, np.arange(num_users)), num_users)  # [r, U]
        flat = drawn + np.arange(len(keys))[:, None] * num_users
        parts.append(differences(np.bincount(flat.ravel(), minlength=flat.size).reshape(flat.shape)))
    resampled = np.concatenate(parts)

    low, high = np.quantile(resampled, (0.025, 0.975)).tolist()
    turned = min(int((resampled <= 0).sum()), int((resampled >= 0).sum()))
    p_value = min(1.0, 2 * (turned + 1) / (resamples + 1))
    return Comparison(float(differences(np.ones((1, num_users), np.int64))[0]), low, high, p_value)
