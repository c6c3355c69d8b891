"""A matrix factorisation that knows how sure it is: r_ui = m + b_i + c_u + u_u·e_i + noise of variance σ² a_i.

Users are drawn from (u, c) ~ N(W x + (|S| + 1)^(−1/2) Σ_{j∈S} y_j, τ² I), x what is known of them and S the items that
they rated; a new user's (u, c) is the mean of the posterior given the ratings. `metarec_fast.warm_start` has the ways
to fit one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from metarec_fast._ragged import pad

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.feature_matrix import FeatureMatrix
    from metarec_fast.tasks import Entries, TaskBatch


@dataclass(frozen=True, eq=False)
class FactorModel:
    """Item vectors, what is known of their accuracy, and the prior from which users are drawn.

    A user's score of item i is `offset + item_bias[i] + c + u · item_table[i]`; `fold_in` finds (u, c) of a user by
    ridge regression on his support entries, the fixed point of the inner loop that starts at `start_of(support)` with
    entry weights `support_weights` and pull `pull`.
    """

    offset: float  # m
    item_bias: Tensor  # [N]
    item_table: Tensor  # [N, D]
    noise: float  # σ², variance of a rating's noise
    user_variance: float  # τ², prior variance of each coordinate of (u, c)
    item_noise: Tensor | None = None  # [N], a_i, about 1; None for 1
    item_covariance: Tensor | None = None  # [N, D + 1, D + 1], posterior covariance of (b_i, e_i); None for 0
    user_start: Tensor | None = None  # [N, D + 1], y_i, the bias last; None for 0
    user_weights: Tensor | None = None  # [F, D + 1], W of the features of users, the bias last; None without features
    item_weights: Tensor | None = None  # [F, D + 1], the share of (e_i, b_i) that features of items explain

    @classmethod
    def fit(
        cls, log: Interactions, dim: int = 16, sweeps: int = 20, seed: int = 0, *, choices: bool = True
    ) -> FactorModel:
        """The variational model of a log of ratings: `metarec_fast.warm_start.variational`."""
        from metarec_fast.warm_start import variational

        return variational(log, dim=dim, sweeps=sweeps, seed=seed, choices=choices)

    @property
    def dim(self) -> int:
        return self.item_table.shape[1]

    @property
    def num_items(self) -> int:
        return self.item_table.shape[0]

    @property
    def support_weights(self) -> Tensor:
        """How far a rating of each item can be trusted, [N]: w_i = 1/(a_i + (posterior variance of its score)/σ²)."""
        item_noise = torch.ones_like(self.item_bias) if self.item_noise is None else self.item_noise
        if self.item_covariance is None:
            return 1 / item_noise
        variance = self.item_covariance.diagonal(dim1=1, dim2=2)
        score_variance = variance[:, 0] + self.user_variance * variance[:, 1:].sum(1)
        return 1 / (item_noise + score_variance / self.noise)

    @property
    def pull(self) -> float:
        """λ = σ²/τ² of the ridge (Xᵀ W X + λ I) φ = Xᵀ W (y − p0), X the support rows with a 1 appended."""
        return self.noise / self.user_variance

    def start_of(self, support: Entries, users: FeatureMatrix | None = None) -> Tensor:
        """Where users start before their ratings are looked at, given which items they rated and their features
        [T, F], if these are known: [T, D + 1]."""
        start = self.item_table.new_zeros(support.num_tasks, self.dim + 1)
        if users is not None and self.user_weights is not None:
            start = users @ self.user_weights
        if self.user_start is None:
            return start
        sums = embedding_bag(support.items, self.user_start, support.offsets, mode="sum", include_last_offset=True)
        return start + sums * (support.sizes() + 1.0).rsqrt()[:, None]

    def fold_in(self, batch: TaskBatch, users: FeatureMatrix | None = None) -> tuple[Tensor, Tensor]:
        """Each task's user vector and bias given its support entries: the ridge of `pull`, in closed form.

        Args:
            batch: Tasks with rated support entries, item ids in [0, N). An empty support gives the start.
            users: Features of the tasks' users, [T, F], if they are known.

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
        start = self.start_of(support, users)  # φ_0
        inputs = torch.cat([self.item_table[items], self.item_table.new_ones(len(support), 1)], 1)  # [n, D + 1]
        scores = self.offset + self.item_bias[items] + (inputs * start[support.task_ids()]).sum(1)
        rows = torch.cat([inputs, (targets - scores)[:, None]], 1)

        # [T, S, D + 2], padded with zeros: one batched product gives Xᵀ W X and, in the last column, Xᵀ W (y − p0).
        padded = pad(rows, support.offsets)
        products = (padded * pad(weights[:, None], support.offsets))[:, :, :-1].mT @ padded
        ridge = products[:, :, :-1] + self.pull * torch.eye(self.dim + 1)
        solution = torch.cholesky_solve(products[:, :, -1:], torch.linalg.cholesky(ridge)).squeeze(2)
        user = start + solution
        return user[:, :-1], user[:, -1]


def check_ids(name: str, entries: Entries, num_items: int) -> None:
    """Raises IndexError where an id of the entries lies outside [0, num_items)."""
    if entries.max_item >= num_items:
        where = int((entries.items >= num_items).nonzero()[0])
        found = int(entries.items[where])
        raise IndexError(f"{name}: ids must be in [0, {num_items}), got {found} at position {where}")
