"""Variational EM for the factor model r_ui = m + b_i + c_u + u_u·e_i + noise of variance σ² a_i d_u.

One sweep: beliefs about users given those about items, beliefs about items given those about users, noise, priors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metarec_fast._choices import leading_directions
from metarec_fast._prior_mean import PriorMean
from metarec_fast._segments import segments_of
from metarec_fast.data import Interactions
from metarec_fast.feature_matrix import FeatureMatrix, only_numbers

_ITEM_NOISE_STRENGTH = 50.0  # an item's own noise counts like this many ratings of average noise
_USER_NOISE_STRENGTH = 10.0
_NOISE_FROM_SWEEP = 3  # before, the factors are still too rough to tell noise from signal
SMALLEST_VARIANCE = 1e-6  # where all ratings are alike nothing would be left to divide by
_DIRECTIONS = 50  # of who rated what


class Layout(NamedTuple):
    """Which coordinates of a vector of width K = D + 2 are inferred, and which one is known to be 1."""

    free: slice
    known: int


USER = Layout(free=slice(1, None), known=0)  # (1, u, c)
ITEM = Layout(free=slice(0, -1), known=-1)  # (b, e, 1)


class Inference:
    """The state of EM: beliefs about users and items, their priors, the noise.

    A score is the product of the user's (1, u, c) and the item's (b, e, 1), vectors of width K = D + 2 that each have
    one known coordinate: the two half-steps of a sweep are the same computation with the roles exchanged.
    Within EM (u, c) ~ N(user_prior_mean, diag(1, …, 1, τ²)) and (b, e) ~ N(item_prior_mean, item_prior_covariance);
    these means depend on features, and with `choices` on which items a user rated and on which users rated an item.

    Args:
        user_features, item_features: Features of the log's users and items, [U, F] and [N, F'], where there are any.
    """

    def __init__(
        self,
        log: Interactions,
        dim: int,
        seed: int,
        *,
        choices: bool,
        user_features: FeatureMatrix | None = None,
        item_features: FeatureMatrix | None = None,
    ) -> None:
        self.of_users, self.of_items, self.offset = segments_of(log)
        num_users, num_items = log.num_users, log.num_items
        self.counts = self.of_items.sizes  # [N]
        residuals = self.of_users.residuals
        bias = self.of_items.total(self.of_items.residuals) / (self.counts + 5)
        table = 0.1 * torch.randn(num_items, dim, generator=torch.Generator().manual_seed(seed))

        self.items = torch.cat([bias[:, None], table, torch.ones(num_items, 1)], 1)  # [N, K]
        self.item_covariance = (0.01 * torch.eye(dim + 1)).repeat(num_items, 1, 1)  # [N, D + 1, D + 1]
        self.item_prior_mean = torch.zeros(num_items, dim + 1)
        self.item_prior_covariance = 0.1 * torch.eye(dim + 1)
        self.user_prior_mean = torch.zeros(num_users, dim + 1)
        self.item_noise, self.user_noise = torch.ones(num_items), torch.ones(num_users)  # a, d
        self.noise = max(float((residuals - bias[self.of_users.ids]).square().mean()), SMALLEST_VARIANCE)
        self.bias_variance = 0.2 * self.noise  # τ²

        width = _DIRECTIONS if choices else 0
        self.directions, of_users = leading_directions(self.of_users, self.of_items, width, seed)
        _, of_items = leading_directions(self.of_items, self.of_users, width, seed)
        seen = self.counts > 0
        # An item that nobody rated may be one that hardly anyone takes, or a new one that ratings will be about: it
        # counts as halfway between the average item and the item of the average rating.
        weight = self.counts.sqrt()
        of_items[~seen] = (weight / weight.sum()) @ of_items
        self.user_features, groups = _beside(user_features, of_users)
        self.user_regression = PriorMean(self.user_features, groups)
        self.item_features, groups = _beside(item_features, of_items)
        self.item_regression = PriorMean(self.item_features.select(seen.nonzero()[:, 0]), groups)
        self.user_weights = torch.zeros(self.user_features.width, dim + 1)  # [F, D + 1], of features and directions
        self.item_weights = torch.zeros(self.item_features.width, dim + 1)  # [F', D + 1], of (b, e)

    def run(self, sweeps: int) -> None:
        for sweep in range(sweeps):
            self.sweep(learn_noise=sweep >= _NOISE_FROM_SWEEP)

    def sweep(self, *, learn_noise: bool) -> None:
        """One round of EM: users, then items, then noise and priors."""
        precision = 1 / (self.noise * self.item_noise)  # [N], of a rating by an average user
        weights = precision[self.of_users.ids]
        moments = self.of_users.sum(second_moments(self.items, self.item_covariance, ITEM), weights)
        products = self.of_users.sum(self.items, weights * self.of_users.residuals)
        users, covariance = posterior(
            moments, products, 1 / self.user_noise, USER, self.user_prior_mean, self._user_prior_covariance()
        )
        if learn_noise:
            squares = self.of_users.total(weights * self.of_users.residuals.square())
            errors = _expected_errors(squares, users, covariance, moments, products, USER)
            self.user_noise = _shrink(errors, self.of_users.sizes, _USER_NOISE_STRENGTH)

        weights = 1 / self.user_noise[self.of_items.ids]
        moments = self.of_items.sum(second_moments(users, covariance, USER), weights)
        products = self.of_items.sum(users, weights * self.of_items.residuals)
        self.items, self.item_covariance = posterior(
            moments, products, precision, ITEM, self.item_prior_mean, self.item_prior_covariance
        )
        squares = self.of_items.total(weights * self.of_items.residuals.square())
        errors = _expected_errors(squares, self.items, self.item_covariance, moments, products, ITEM)
        self.noise = max(float((errors / self.item_noise).sum() / self.counts.sum()), SMALLEST_VARIANCE)
        if learn_noise:
            self.item_noise = _shrink(errors / self.noise, self.counts, _ITEM_NOISE_STRENGTH)

        self._update_user_prior(users, covariance)
        self._update_item_prior()

    def _user_prior_covariance(self) -> Tensor:
        variance = torch.ones(self.items.shape[1] - 1)
        variance[-1] = self.bias_variance
        return variance.diag()

    def _update_user_prior(self, users: Tensor, covariance: Tensor) -> None:
        """Learns the users' prior mean, and moves its intercept and the covariance of u into the items, so that
        u ~ N(y-part, I) and c ~ N(y-part, τ²) again."""
        latent = users[:, USER.free]
        coefficients, mean = self.user_regression.regress(latent, self._user_prior_covariance())
        centred = latent - mean - self.user_features @ coefficients
        spread = centred.T @ centred / len(latent) + covariance.mean(0)  # [D + 1, D + 1]
        self.bias_variance = max(float(spread[-1, -1]), SMALLEST_VARIANCE)

        # With u = ū + L u′: b + c + u·e = (b + ū·e + c̄) + c′ + u′·Lᵀe.
        root = torch.linalg.cholesky(spread[:-1, :-1])
        change = torch.eye(len(mean))
        change[0, 1:] = mean[:-1]
        change[1:, 1:] = root.T
        self.items[:, ITEM.free] = self.items[:, ITEM.free] @ change.T
        self.items[:, 0] += mean[-1]
        self.item_covariance = change @ self.item_covariance @ change.T
        latent_coefficients = torch.linalg.solve_triangular(root, coefficients[:, :-1].T, upper=False).T
        self.user_weights = torch.cat([latent_coefficients, coefficients[:, -1:]], 1)
        self.user_prior_mean = self.user_features @ self.user_weights

    def _update_item_prior(self) -> None:
        seen = self.counts > 0
        latent, covariance = self.items[seen, ITEM.free], self.item_covariance[seen].mean(0)
        self.item_weights, intercept = self.item_regression.regress(latent, self.item_prior_covariance)
        self.item_prior_mean = intercept + self.item_features @ self.item_weights
        centred = latent - self.item_prior_mean[seen]
        self.item_prior_covariance = centred.T @ centred / len(latent) + covariance
        self.items[~seen, ITEM.free] = self.item_prior_mean[~seen]
        self.item_covariance[~seen] = self.item_prior_covariance


def _beside(features: FeatureMatrix | None, directions: Tensor) -> tuple[FeatureMatrix, Tensor]:
    """Features and, behind them, the directions; and the group of each column: categories, numbers, directions."""
    if features is None:
        return only_numbers(directions), torch.zeros(directions.shape[1], dtype=torch.int64)
    numbers = torch.full((features.dense.shape[1],), features.known.shape[1])
    groups = torch.cat([features.column_of, numbers, torch.full((directions.shape[1],), features.known.shape[1] + 1)])
    return features.with_dense(directions), groups.unique(return_inverse=True)[1]


def second_moments(vectors: Tensor, covariance: Tensor, layout: Layout) -> Tensor:
    """Expectation of v vᵀ for each row's v, [R, K, K]."""
    moments = vectors[:, :, None] * vectors[:, None, :]
    moments[:, layout.free, layout.free] += covariance
    return moments


def posterior(
    moments: Tensor,  # [R, K, K], Σ v vᵀ over a row's ratings, v the vectors of the other side
    products: Tensor,  # [R, K], Σ (r − m) v
    precision: Tensor,  # [R], what both are to be multiplied by
    layout: Layout,
    prior_mean: Tensor,  # [R, K − 1]
    prior_covariance: Tensor,  # [K − 1, K − 1]
) -> tuple[Tensor, Tensor]:
    """Mean [R, K], the known coordinate included, and covariance [R, K − 1, K − 1] of each row's vector."""
    free, known = layout
    prior_precision = torch.linalg.inv(prior_covariance)
    inverse = torch.addcmul(prior_precision, moments[:, free, free], precision[:, None, None])
    identity = torch.eye(prior_mean.shape[1]).expand_as(inverse)
    root = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse), identity, upper=False)
    covariance = root.mT @ root

    evidence = (products[:, free] - moments[:, free, known]) * precision[:, None] + prior_mean @ prior_precision
    mean = torch.ones_like(products)
    mean[:, free] = (covariance @ evidence[:, :, None]).squeeze(2)
    return mean, covariance


def _expected_errors(
    squares: Tensor, vectors: Tensor, covariance: Tensor, moments: Tensor, products: Tensor, layout: Layout
) -> Tensor:
    """Expectation of Σ (r − m − v·w)² over each row's ratings, weighted as the sums are, [R]."""
    second = second_moments(vectors, covariance, layout)
    errors = squares - 2 * (vectors * products).sum(1) + (moments * second).sum((1, 2))
    return errors.clamp(min=0)  # rounding may have gone below


def _shrink(errors: Tensor, counts: Tensor, strength: float) -> Tensor:
    """Mean error of each row as if it had `strength` more ratings, of error 1; never far below that share."""
    return (strength + errors) / (strength + counts)
