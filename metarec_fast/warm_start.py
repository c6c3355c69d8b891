"""Where meta-learning may start: factor models of the training users, or item vectors from elsewhere.

Each function returns a `FactorModel`, which folds new users in by itself, and from which `MAMLR` starts:

    learner = mf.MAMLR(model, warm_start="ppca")                  # fitted by `fit`, on its training users
    learner.start_from(warm_start.given(vectors, split.train))    # or any other
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metarec_fast import _point_estimates
from metarec_fast._threads import threads_for
from metarec_fast._variational import ITEM, Inference
from metarec_fast.data import Interactions
from metarec_fast.factor_model import FactorModel
from metarec_fast.features import Features


def variational(
    log: Interactions,
    *,
    dim: int = 16,
    sweeps: int = 20,
    seed: int = 0,
    choices: bool = True,
    user_features: Features | None = None,
    item_features: Features | None = None,
) -> FactorModel:
    """A Bayesian matrix factorisation, by `sweeps` rounds of variational EM; the same seed gives the same model.

    Items keep their whole posterior covariance: a point estimate overfits as the width grows, the posterior does not,
    and a rarely rated item shrinks to where items are that similar users rated. (Lim and Teh 2007, variational Bayes
    for the Netflix problem; noise of items and of users after Lakshminarayanan et al. 2011; the prior over users is
    normalised in every sweep as in the parameter-expanded EM of Liu, Rubin and Wu 1998, which takes fewer sweeps.)

    Args:
        log: The ratings, U users and N items. An item without ratings gets the prior mean.
        dim: Width D of the item vectors, ≥ 1.
        sweeps: Rounds of EM, ≥ 1.
        seed: Of the random start.
        choices: Learn also from which items users rated, whatever the ratings. Turn it off where users do not choose.
        user_features, item_features: What else is known of them, found by original ids: where their vectors are
            expected to be, by a regression that learns how much each column tells.

    Raises:
        ValueError: dim or sweeps is below 1, or the log holds no rating.
    """
    _check(log, dim=dim, sweeps=sweeps)
    of_users = None if user_features is None else user_features.matrix.select(user_features.find(log.user_ids))
    of_items = None if item_features is None else item_features.matrix.select(item_features.find(log.item_ids))
    with threads_for(len(log)):
        inference = Inference(log, dim, seed, choices=choices, user_features=of_users, item_features=of_items)
        inference.run(sweeps)

    # In units in which u and c have the same prior variance τ².
    deviation = inference.bias_variance**0.5
    scale = torch.full((dim + 1,), 1 / deviation)  # of (b, e)
    scale[0] = 1
    rows = inference.items[:, ITEM.free] * scale
    start_scale = torch.full((dim + 1,), deviation)  # of (u, c)
    start_scale[-1] = 1
    user_weights, item_weights = inference.user_weights * start_scale, inference.item_weights * scale
    known = 0 if of_users is None else of_users.width
    return FactorModel(
        offset=inference.offset,
        item_bias=rows[:, 0].clone(),
        item_table=rows[:, 1:].clone(),
        item_covariance=inference.item_covariance * scale * scale[:, None],
        item_noise=inference.item_noise,
        noise=inference.noise,
        user_variance=inference.bias_variance,
        user_start=inference.directions @ user_weights[known:] if choices else None,
        user_weights=None if of_users is None else user_weights[:known],
        item_weights=None if of_items is None else item_weights[: of_items.width].roll(-1, 1),
    )


def ppca(log: Interactions, *, dim: int = 4, sweeps: int = 20, ridge: float = 40.0, seed: int = 0) -> FactorModel:
    """Probabilistic PCA of what biases leave, by EM: users are integrated out, items are points (Tipping and Bishop
    1999, with missing values; a ridge on the items, without which sparse ones overfit).

    Args:
        log: The ratings, U users and N items.
        dim: Width D of the item vectors, ≥ 1; wider ones overfit soon.
        sweeps: Rounds of EM, ≥ 1.
        ridge: Ratings of average noise that hold an item's vector at 0, > 0.
        seed: Of the random start.

    Raises:
        ValueError: A number is out of range, or the log holds no rating.
    """
    _check(log, dim=dim, sweeps=sweeps)
    _check_positive(ridge=ridge)
    with threads_for(len(log)):
        return _point_estimates.ppca(log, dim, sweeps, ridge, seed)


def als(
    log: Interactions,
    *,
    dim: int = 8,
    sweeps: int = 20,
    user_ridge: float = 20.0,
    item_ridge: float = 10.0,
    seed: int = 0,
) -> FactorModel:
    """Alternating least squares (Koren, Bell and Volinsky 2009): users and items are points.

        min Σ (r − m − b_i − c_u − u·e_i)² + user_ridge |u|² + item_ridge |e|² + 4 c² + 3 b²

    Args:
        log: The ratings, U users and N items.
        dim: Width D of the item vectors, ≥ 1.
        sweeps: Rounds of users and items, ≥ 1.
        user_ridge, item_ridge: Strength of the ridges, > 0.
        seed: Of the random start.

    Raises:
        ValueError: A number is out of range, or the log holds no rating.
    """
    _check(log, dim=dim, sweeps=sweeps)
    _check_positive(user_ridge=user_ridge, item_ridge=item_ridge)
    with threads_for(len(log)):
        return _point_estimates.als(log, dim, sweeps, user_ridge, item_ridge, seed)


def given(item_table: Tensor, log: Interactions, *, item_bias: Tensor | None = None, sweeps: int = 10) -> FactorModel:
    """Item vectors from elsewhere: embeddings of texts or images, or another model's factors.

    Scores stay linear in them; from the log come the offset, the biases, the noise and the distribution of users, for
    which vectors are rotated and scaled so that users are N(0, τ² I).

    Args:
        item_table: Item vectors [N, D], in the order of `log.item_ids`, finite.
        log: The ratings, U users and N items.
        item_bias: Item biases [N] around the mean rating; by default damped means.
        sweeps: Rounds of EM for the users' distribution, ≥ 1.

    Raises:
        ValueError: A shape does not fit, a number is not finite, sweeps is below 1, or the log holds no rating.
        TypeError: item_table or item_bias is no tensor.
    """
    _check(log, sweeps=sweeps)
    table = _check_tensor("item_table", item_table, (log.num_items, None))
    bias = None if item_bias is None else _check_tensor("item_bias", item_bias, (log.num_items,))
    with threads_for(len(log)):
        return _point_estimates.whitened(log, table, bias, sweeps)


METHODS: dict[str, Callable[..., FactorModel]] = {"variational": variational, "ppca": ppca, "als": als}
"""By the names that `MAMLR(warm_start=...)` takes; each is called with log, dim and seed."""


def _check(log: Interactions, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: must be ≥ 1, got {value}")
    if len(log) == 0:
        raise ValueError("log: expected at least one rating, got none")


def _check_positive(**strengths: float) -> None:
    for name, value in strengths.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: must be > 0 and finite, got {value}")


def _check_tensor(name: str, value: Any, shape: tuple[int | None, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        size in (None, found) for size, found in zip(shape, value.shape, strict=True)
    )
    if not fits or (value.dim() > 1 and value.shape[1] == 0):
        expected = "[" + ", ".join("D" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {int((~value.isfinite()).sum())} that are not")
    return value.detach().float().cpu()
