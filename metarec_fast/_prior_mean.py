"""The mean of vectors given features of users or items: a linear regression that learns how much each kind tells."""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast.feature_matrix import FeatureMatrix

_FIRST_VARIANCE = 0.03


class PriorMean:
    """Vectors around X B with B ~ N(0, β Σ), a β for each group of columns of X, learned from the data.

    Σ is the vectors' covariance around that mean (empirical Bayes; MacKay 1992, section 4; with a β for each group, of
    which those that tell nothing go to 0, MacKay 1994, automatic relevance determination).

    Args:
        features: X [R, F], the rows that regression learns from.
        groups: The group of each column, int64 [F], 0 … G − 1.
    """

    def __init__(self, features: FeatureMatrix, groups: Tensor) -> None:
        self.features, self.groups = features, groups
        count = features.num_rows
        self.centre = features.transposed_product(torch.ones(count, 1))[:, 0] / count
        self.products = features.gram() - count * torch.outer(self.centre, self.centre)  # [F, F], centred
        self.sizes = groups.bincount()
        self.variances = torch.full((len(self.sizes),), _FIRST_VARIANCE)  # β [G]

    def regress(self, vectors: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients B [F, K] and intercept [K] for vectors [R, K] of covariance [K, K]; moves β one EM step."""
        mean = vectors.mean(0)
        posterior = torch.linalg.inv(self.products + (1 / self.variances[self.groups]).diag())
        coefficients = posterior @ self.features.transposed_product(vectors - mean)
        scaled = (coefficients @ torch.linalg.inv(covariance) * coefficients).sum(1) / len(covariance)
        totals = torch.zeros_like(self.variances).index_add_(0, self.groups, scaled + posterior.diagonal())
        self.variances = (totals / self.sizes).clamp(min=1e-12)
        return coefficients, mean - self.centre @ coefficients
