"""Factor models whose items are points, without uncertainty: by probabilistic PCA, by ALS, and from given vectors.

All alternate between users and items, each a ridge regression on the other; they differ in whether users are integrated
out, and in what may move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metarec_fast._segments import segments_of
from metarec_fast._variational import ITEM, SMALLEST_VARIANCE, USER, posterior, second_moments
from metarec_fast.data import Interactions
from metarec_fast.factor_model import FactorModel

_ITEM_BIAS_RIDGE, _USER_BIAS_RIDGE = 3.0, 4.0  # as of the baseline `Bias`


class PointEstimates:
    """Users' and items' ridge regressions on a log, for items (b, e, 1) [N, D + 2] and users (1, u, c) [U, D + 2]."""

    def __init__(self, log: Interactions, item_bias: Tensor | None, item_table: Tensor) -> None:
        self.of_users, self.of_items, self.offset = segments_of(log)
        if item_bias is None:
            item_bias = self.of_items.total(self.of_items.residuals) / (self.of_items.sizes + _ITEM_BIAS_RIDGE)
        self.items = torch.cat([item_bias[:, None], item_table, torch.ones(len(item_table), 1)], 1)
        self.squares = self.of_items.total(self.of_items.residuals.square())  # [N]
        residuals = self.of_users.residuals - item_bias[self.of_users.ids]
        self.noise = max(float(residuals.square().mean()), SMALLEST_VARIANCE)

    def users(self, noise: float, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [U, D + 2] and covariance [U, D + 1, D + 1] of users with prior covariances [D + 1, D + 1]."""
        moments = self.of_users.sum(self.items[:, :, None] * self.items[:, None, :])
        products = self.of_users.sum(self.items, self.of_users.residuals)
        return posterior(moments, products, _full(moments, 1 / noise), USER, torch.zeros_like(products[:, 1:]), prior)

    def items_given(self, users: Tensor, covariance: Tensor, noise: float, prior: Tensor | None) -> None:
        """Moves the items, if they have a prior, and estimates the noise."""
        moments = self.of_items.sum(second_moments(users, covariance, USER))
        products = self.of_items.sum(users, self.of_items.residuals)
        if prior is not None:
            zero = torch.zeros_like(products[:, 1:])
            self.items, _ = posterior(moments, products, _full(moments, 1 / noise), ITEM, zero, prior)
        second = self.items[:, :, None] * self.items[:, None, :]
        errors = self.squares - 2 * (self.items * products).sum(1) + (moments * second).sum((1, 2))
        self.noise = max(float(errors.clamp(min=0).sum() / self.of_items.sizes.sum()), SMALLEST_VARIANCE)

    def model(self, noise: float, bias_variance: float) -> FactorModel:
        """The items as they are for u ~ N(0, I) and c ~ N(0, τ²), in units in which both have variance τ²."""
        return FactorModel(
            offset=self.offset,
            item_bias=self.items[:, 0].clone(),
            item_table=self.items[:, 1:-1] / bias_variance**0.5,
            noise=noise,
            user_variance=bias_variance,
        )


def ppca(log: Interactions, dim: int, sweeps: int, ridge: float, seed: int) -> FactorModel:
    estimates = PointEstimates(log, None, _random_table(log, dim, seed))
    user_prior = torch.eye(dim + 1)
    user_prior[-1, -1] = 0.2 * estimates.noise
    for _ in range(sweeps):
        noise = estimates.noise
        users, covariance = estimates.users(noise, user_prior)
        estimates.items_given(users, covariance, noise, noise * _item_prior(dim, ridge))
        variance = users[:, -1].square().mean() + covariance[:, -1, -1].mean()
        user_prior[-1, -1] = variance.clamp(min=SMALLEST_VARIANCE)
    return estimates.model(estimates.noise, float(user_prior[-1, -1]))


def als(log: Interactions, dim: int, sweeps: int, user_ridge: float, item_ridge: float, seed: int) -> FactorModel:
    estimates = PointEstimates(log, None, _random_table(log, dim, seed))
    user_prior = torch.full((dim + 1,), 1 / user_ridge)
    user_prior[-1] = 1 / _USER_BIAS_RIDGE
    for _ in range(sweeps):
        users, covariance = estimates.users(1.0, user_prior.diag())
        estimates.items_given(users, torch.zeros_like(covariance), 1.0, _item_prior(dim, item_ridge))
    estimates.items[:, 1:-1] /= user_ridge**0.5  # for u ~ N(0, I)
    return estimates.model(1.0, 1 / _USER_BIAS_RIDGE)


def whitened(log: Interactions, item_table: Tensor, item_bias: Tensor | None, sweeps: int) -> FactorModel:
    """Learns noise and how users are distributed for item vectors that are given, and rotates and scales these."""
    estimates = PointEstimates(log, item_bias, item_table)
    width = item_table.shape[1]
    scale = item_table.square().mean().clamp(min=SMALLEST_VARIANCE)
    user_prior = torch.full((width + 1,), float(0.2 * estimates.noise / scale / width)).diag()
    user_prior[-1, -1] = 0.2 * estimates.noise
    for _ in range(sweeps):
        users, covariance = estimates.users(estimates.noise, user_prior)
        estimates.items_given(users, covariance, estimates.noise, None)
        latent = users[:, USER.free]
        user_prior = latent.T @ latent / len(latent) + covariance.mean(0) + SMALLEST_VARIANCE * torch.eye(width + 1)
    estimates.items[:, 1:-1] = estimates.items[:, 1:-1] @ torch.linalg.cholesky(user_prior[:-1, :-1])
    return estimates.model(estimates.noise, float(user_prior[-1, -1]))


def _random_table(log: Interactions, dim: int, seed: int) -> Tensor:
    return 0.1 * torch.randn(log.num_items, dim, generator=torch.Generator().manual_seed(seed))


def _item_prior(dim: int, ridge: float) -> Tensor:
    """Prior covariance of (b, e) in units of the noise, [D + 1, D + 1]."""
    variance = torch.full((dim + 1,), 1 / ridge)
    variance[0] = 1 / _ITEM_BIAS_RIDGE
    return variance.diag()


def _full(like: Tensor, value: float) -> Tensor:
    return torch.full((len(like),), value)
