"""A Bayesian matrix factorisation, by variational EM: r_ui = m + b_i + c_u + u_u·e_i + noise of variance σ² a_i.

Users are drawn from (u, c) ~ N(0, τ² I), item rows (b_i, e_i) from one learned Gaussian. Items keep their whole
posterior covariance: a point estimate overfits as the width grows, the posterior does not, and a rarely rated item
shrinks to the prior mean. (Lim and Teh 2007, variational Bayes for the Netflix problem; the prior over users is
normalised in every sweep as in the parameter-expanded EM of Liu, Rubin and Wu 1998, which converges in fewer sweeps.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from metarec_fast._ragged import pad

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.tasks import Entries, TaskBatch

_NOISE_STRENGTH = 50.0  # an item's own noise counts like this many ratings of average noise
_NOISE_FROM_SWEEP = 3  # before, the factors are still too rough to tell noise from signal
_SMALLEST_VARIANCE = 1e-6  # where all ratings are alike nothing would be left to divide by


@dataclass(frozen=True, eq=False)
class FactorModel:
    """Item vectors, what is known of their accuracy, and the prior from which users are drawn.

    `fit` makes one. A user's score of item i is `offset + item_bias[i] + c + u · item_table[i]`; `fold_in` finds
    (u, c) of a user by ridge regression on his support entries, the fixed point of the inner loop that starts at
    (u, c) = 0 with entry weights `support_weights` and pull `pull`.
    """

    offset: float  # m
    item_bias: Tensor  # [N]
    item_table: Tensor  # [N, D]
    item_covariance: Tensor  # [N, D + 1, D + 1], posterior covariance of (b_i, e_i)
    item_noise: Tensor  # [N], a_i, about 1
    noise: float  # σ², variance of a rating's noise
    user_variance: float  # τ², prior variance of each coordinate of (u, c)

    @classmethod
    def fit(cls, log: Interactions, dim: int = 16, sweeps: int = 10, seed: int = 0) -> FactorModel:
        """Fits the model to a log of ratings by `sweeps` rounds of EM; the same seed gives the same model.

        Args:
            log: The ratings, U users and N items. An item without ratings gets the prior mean.
            dim: Width D of the item vectors, ≥ 1.
            sweeps: Rounds of EM, ≥ 1.
            seed: Of the random start of the item vectors.

        Raises:
            ValueError: dim or sweeps is below 1, or the log holds no rating.
        """
        for name, value in (("dim", dim), ("sweeps", sweeps)):
            if value < 1:
                raise ValueError(f"{name}: must be ≥ 1, got {value}")
        if len(log) == 0:
            raise ValueError("log: expected at least one rating, got none")

        inference = _Inference(log, dim, seed)
        for sweep in range(sweeps):
            inference.sweep(learn_item_noise=sweep >= _NOISE_FROM_SWEEP)
        return inference.model()

    @property
    def dim(self) -> int:
        return self.item_table.shape[1]

    @property
    def num_items(self) -> int:
        return self.item_table.shape[0]

    @property
    def support_weights(self) -> Tensor:
        """How far a rating of each item can be trusted, [N]: w_i = 1/(a_i + (posterior variance of its score)/σ²)."""
        variance = self.item_covariance.diagonal(dim1=1, dim2=2)
        score_variance = variance[:, 0] + self.user_variance * variance[:, 1:].sum(1)
        return 1 / (self.item_noise + score_variance / self.noise)

    @property
    def pull(self) -> float:
        """λ = σ²/τ² of the ridge (Xᵀ W X + λ I) φ = Xᵀ W (y − p0), X the support rows with a 1 appended."""
        return self.noise / self.user_variance

    def fold_in(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Each task's user vector and bias given its support entries: the ridge of `pull`, in closed form.

        Args:
            batch: Tasks with rated support entries, item ids in [0, N). An empty support gives zeros, the prior mean.

        Returns:
            User vectors [T, D] and user biases [T].

        Raises:
            ValueError: The support entries carry no targets.
            IndexError: An id lies outside the table.
        """
        support = batch.support
        if support.targets is None:
            raise ValueError("support.targets: expected ratings to fold in, got None")
        check_ids("support.items", support, self.num_items)

        items, targets = support.items, support.targets.to(self.item_table.dtype)
        weights = self.support_weights[items]
        if support.weights is not None:
            weights = weights * support.weights.to(weights.dtype)
        ones = self.item_table.new_ones(len(support), 1)
        rows = torch.cat([self.item_table[items], ones, (targets - self.offset - self.item_bias[items])[:, None]], 1)

        # [T, S, D + 2], padded with zeros: one batched product gives Xᵀ W X and, in the last column, Xᵀ W (y − p0).
        padded = pad(rows, support.offsets)
        products = (padded * pad(weights[:, None], support.offsets))[:, :, :-1].mT @ padded
        ridge = products[:, :, :-1] + self.pull * torch.eye(self.dim + 1)
        solution = torch.cholesky_solve(products[:, :, -1:], torch.linalg.cholesky(ridge)).squeeze(2)
        return solution[:, :-1], solution[:, -1]


def check_ids(name: str, entries: Entries, num_items: int) -> None:
    """Raises IndexError where an id of the entries lies outside [0, num_items)."""
    if entries.max_item >= num_items:
        where = int((entries.items >= num_items).nonzero()[0])
        found = int(entries.items[where])
        raise IndexError(f"{name}: ids must be in [0, {num_items}), got {found} at position {where}")


class _Inference:
    """The state of EM: beliefs about users and items, their priors, the noise.

    A score is the product of the user's (1, u, c) and the item's (b, e, 1), vectors of width K = D + 2 that each have
    one known coordinate: the two half-steps of a sweep are the same computation with the roles exchanged.
    Within EM u ~ N(0, I), c ~ N(0, τ²) and (b, e) ~ N(item_prior_mean, item_prior_covariance).
    """

    def __init__(self, log: Interactions, dim: int, seed: int) -> None:
        items, ratings = torch.from_numpy(log.items).long(), torch.from_numpy(log.ratings).double()
        sizes = torch.from_numpy(log.offsets).diff()
        users = torch.arange(log.num_users).repeat_interleave(sizes)
        by_item = items.argsort(stable=True)
        self.counts = items.bincount(minlength=log.num_items)  # [N]
        self.offset = float(ratings.mean())
        residuals = ratings - self.offset
        self.squares = torch.bincount(items, residuals.square(), minlength=log.num_items).float()  # [N]
        totals = torch.bincount(items, residuals, minlength=log.num_items).float()  # [N]
        residuals = residuals.float()
        self.of_users = _Segments(items, residuals, sizes)
        self.of_items = _Segments(users[by_item], residuals[by_item], self.counts)

        bias = totals / (self.counts + 5)
        table = 0.1 * torch.randn(log.num_items, dim, generator=torch.Generator().manual_seed(seed))
        self.items = torch.cat([bias[:, None], table, torch.ones(log.num_items, 1)], 1)  # [N, K]
        self.item_covariance = (0.01 * torch.eye(dim + 1)).repeat(log.num_items, 1, 1)  # [N, D + 1, D + 1]
        self.item_prior_mean = torch.zeros(dim + 1)
        self.item_prior_covariance = 0.1 * torch.eye(dim + 1)
        self.item_noise = torch.ones(log.num_items)
        self.noise = max(float((residuals - bias[items]).square().mean()), _SMALLEST_VARIANCE)
        self.bias_variance = 0.2 * self.noise  # τ²

    def sweep(self, *, learn_item_noise: bool) -> None:
        """One round of EM: users, then items, then noise and priors."""
        precision = 1 / (self.noise * self.item_noise)  # [N], of a rating
        weights = precision[self.of_users.ids]
        moments = self.of_users.sum(_second_moments(self.items, self.item_covariance, _ITEM), weights)
        products = self.of_users.sum(self.items, weights * self.of_users.residuals)
        variance = torch.ones(self.items.shape[1] - 1)
        variance[-1] = self.bias_variance
        users, user_covariance = _posterior(
            moments, products, torch.ones(len(moments)), _USER, torch.zeros_like(variance), variance.diag()
        )

        moments = self.of_items.sum(_second_moments(users, user_covariance, _USER))
        products = self.of_items.sum(users, self.of_items.residuals)
        self.items, self.item_covariance = _posterior(
            moments, products, precision, _ITEM, self.item_prior_mean, self.item_prior_covariance
        )

        self._update_noise(moments, products, learn_item_noise)
        self._normalise_users(users, user_covariance)
        self._update_item_prior()

    def _update_noise(self, moments: Tensor, products: Tensor, learn_item_noise: bool) -> None:
        """σ² and a from the expected squared errors: Σ (r − m)² − 2 Σ (r − m) v·w + Σ (v·w)², per item."""
        second = _second_moments(self.items, self.item_covariance, _ITEM)
        errors = self.squares - 2 * (self.items * products).sum(1) + (moments * second).sum((1, 2))
        errors = errors.clamp(min=0)  # [N], rounding may have gone below
        self.noise = max(float((errors / self.item_noise).sum() / self.counts.sum()), _SMALLEST_VARIANCE)
        if learn_item_noise:
            self.item_noise = (_NOISE_STRENGTH + errors / self.noise) / (_NOISE_STRENGTH + self.counts)

    def _normalise_users(self, users: Tensor, covariance: Tensor) -> None:
        """Moves the users' mean and the covariance of u into the items, so that u ~ N(0, I) and c ~ N(0, τ²) again."""
        latent = users[:, _USER.free]
        mean = latent.mean(0)
        spread = (latent - mean).T @ (latent - mean) / len(latent) + covariance.mean(0)  # [D + 1, D + 1]
        self.bias_variance = max(float(spread[-1, -1]), _SMALLEST_VARIANCE)

        # With u = ū + L u′: b + c + u·e = (b + ū·e + c̄) + c′ + u′·Lᵀe.
        change = torch.eye(len(mean))
        change[0, 1:] = mean[:-1]
        change[1:, 1:] = torch.linalg.cholesky(spread[:-1, :-1]).T
        self.items[:, _ITEM.free] = self.items[:, _ITEM.free] @ change.T
        self.items[:, 0] += mean[-1]
        self.item_covariance = change @ self.item_covariance @ change.T

    def _update_item_prior(self) -> None:
        seen = self.counts > 0
        latent = self.items[seen, _ITEM.free]
        self.item_prior_mean = latent.mean(0)
        centred = latent - self.item_prior_mean
        self.item_prior_covariance = centred.T @ centred / len(latent) + self.item_covariance[seen].mean(0)
        self.items[~seen, _ITEM.free] = self.item_prior_mean
        self.item_covariance[~seen] = self.item_prior_covariance

    def model(self) -> FactorModel:
        """What was learned, in units in which u and c have the same prior variance τ²."""
        scale = torch.full((self.items.shape[1] - 1,), self.bias_variance**-0.5)
        scale[0] = 1
        rows = self.items[:, _ITEM.free] * scale
        return FactorModel(
            offset=self.offset,
            item_bias=rows[:, 0].clone(),
            item_table=rows[:, 1:].clone(),
            item_covariance=self.item_covariance * scale * scale[:, None],
            item_noise=self.item_noise,
            noise=self.noise,
            user_variance=self.bias_variance,
        )


class _Layout(NamedTuple):
    """Which coordinates of a vector of width D + 2 are inferred, and which one is known to be 1."""

    free: slice
    known: int


_USER = _Layout(free=slice(1, None), known=0)  # (1, u, c)
_ITEM = _Layout(free=slice(0, -1), known=-1)  # (b, e, 1)


def _second_moments(vectors: Tensor, covariance: Tensor, layout: _Layout) -> Tensor:
    """Expectation of v vᵀ for each row's v, [R, K, K]."""
    moments = vectors[:, :, None] * vectors[:, None, :]
    moments[:, layout.free, layout.free] += covariance
    return moments


def _posterior(
    moments: Tensor,  # [R, K, K], Σ v vᵀ over a row's ratings, v the vectors of the other side
    products: Tensor,  # [R, K], Σ (r − m) v
    precision: Tensor,  # [R], what both are to be multiplied by
    layout: _Layout,
    prior_mean: Tensor,  # [K − 1]
    prior_covariance: Tensor,  # [K − 1, K − 1]
) -> tuple[Tensor, Tensor]:
    """Mean [R, K], the known coordinate included, and covariance [R, K − 1, K − 1] of each row's vector."""
    free, known = layout
    prior_precision = torch.linalg.inv(prior_covariance)
    inverse = torch.addcmul(prior_precision, moments[:, free, free], precision[:, None, None])
    identity = torch.eye(len(prior_mean)).expand_as(inverse)
    root = torch.linalg.solve_triangular(torch.linalg.cholesky(inverse), identity, upper=False)
    covariance = root.mT @ root

    evidence = (products[:, free] - moments[:, free, known]) * precision[:, None] + prior_precision @ prior_mean
    mean = torch.ones_like(products)
    mean[:, free] = (covariance @ evidence[:, :, None]).squeeze(2)
    return mean, covariance


class _Segments:
    """Ratings grouped by user or by item: the ids on the other side and the residuals, one group after the other."""

    def __init__(self, ids: Tensor, residuals: Tensor, sizes: Tensor) -> None:
        self.ids, self.residuals = ids, residuals
        self.offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    def sum(self, table: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums rows of a table [M, ...], times a weight for each rating, over every group: [R, ...]."""
        sums = embedding_bag(
            self.ids, table.flatten(1), self.offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        return sums.view(-1, *table.shape[1:])
