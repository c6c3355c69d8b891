"""One million ratings drawn from a factor model of ML-1M's shape: how far from knowing the true item vectors?

    r = 3.5 + b_i + c_u + u·e_i + noise,   u ~ N(0, I), e ~ N(0, 0.5²/D I), b ~ N(0, 0.4²), c ~ N(0, 0.3²), noise 0.8

Popularity of items is Zipf-like and users rate 20 to some 900 of them. Beside the learner stand two ridges that know
the noise and the distribution of users: one with the true item vectors, and one with the best estimate that these
ratings allow even if the vectors of all training users were known, which no learner can expect to beat.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import metarec_fast as mf
from metarec_fast._segments import Segments
from metarec_fast.factor_model import FactorModel
from metarec_fast.tasks import TaskBatch

NUM_USERS, NUM_ITEMS, NUM_RATINGS, NUM_NEWCOMERS = 6040, 3706, 1_000_000, 1000
DIM, ITEM_SCALE, ITEM_BIAS, USER_BIAS, NOISE, OFFSET = 8, 0.5, 0.4, 0.3, 0.8, 3.5
KNOWN = (5, 10, 30)


class World:
    """The true vectors, and ratings that users with these vectors give."""

    def __init__(self, seed: int, num_ratings: int = NUM_RATINGS) -> None:
        rng = np.random.default_rng(seed)
        count = NUM_USERS + NUM_NEWCOMERS
        self.items = rng.normal(0, ITEM_SCALE / DIM**0.5, (NUM_ITEMS, DIM))
        self.item_bias = rng.normal(0, ITEM_BIAS, NUM_ITEMS)
        self.users = rng.normal(size=(count, DIM))
        self.user_bias = rng.normal(0, USER_BIAS, count)
        self.log = self._rate(rng, num_ratings / NUM_USERS)
        self.train = self.log.select_users(np.arange(NUM_USERS))
        self.test = self.log.select_users(np.arange(NUM_USERS, count))

    def _rate(self, rng: np.random.Generator, mean_size: float) -> mf.Interactions:
        activity = rng.lognormal(0, 1, len(self.users))
        sizes = np.minimum(20 + activity * (mean_size - 20) / activity.mean(), NUM_ITEMS // 4).astype(int)
        attraction = -0.8 * np.log(np.arange(1, NUM_ITEMS + 1) + 20)
        users, items = [], []
        for user, size in enumerate(sizes):  # `size` items without replacement, by attraction (Gumbel top-k)
            keys = attraction + rng.gumbel(size=NUM_ITEMS)
            items.append(np.argpartition(-keys, size)[:size])
            users.append(np.full(size, user))
        user, item = np.concatenate(users), np.concatenate(items)
        scores = OFFSET + self.item_bias[item] + self.user_bias[user] + (self.users[user] * self.items[item]).sum(1)
        log = mf.Interactions.from_arrays(user, item, scores + rng.normal(0, NOISE, len(user)))
        return log.align_items(np.arange(NUM_ITEMS))[0]

    def true_model(self) -> FactorModel:
        """The ridge with the true item vectors."""
        return _model(self.items, self.item_bias, None)

    def best_estimate(self) -> FactorModel:
        """The ridge with the posterior of item vectors given the ratings and the true vectors of training users."""
        log = self.train
        users = np.repeat(np.arange(NUM_USERS), log.sizes())
        by_item = np.argsort(log.items, kind="stable")
        residuals = log.ratings[by_item] - OFFSET - self.user_bias[users[by_item]]
        segments = Segments(
            torch.from_numpy(users[by_item]), torch.from_numpy(residuals).float(),
            torch.from_numpy(np.bincount(log.items, minlength=NUM_ITEMS)),
        )  # fmt: skip
        inputs = torch.from_numpy(np.c_[np.ones(NUM_USERS), self.users[:NUM_USERS]]).float()  # (1, u)
        moments = segments.sum(inputs[:, :, None] * inputs[:, None, :]) / NOISE**2
        products = segments.sum(inputs, segments.residuals) / NOISE**2
        prior = torch.tensor([1 / ITEM_BIAS**2] + [DIM / ITEM_SCALE**2] * DIM).diag()
        covariance = torch.linalg.inv(moments + prior)
        mean = (covariance @ products[:, :, None]).squeeze(2).double().numpy()
        return _model(mean[:, 1:], mean[:, 0], covariance)


def judge(threads: int, seed: int = 0, num_ratings: int = NUM_RATINGS) -> dict[str, Any]:
    """Trains with defaults, and prints seconds and errors beside those of the two ridges."""
    world = World(seed, num_ratings)
    split = mf.split_users(world.train, valid=0.1, test=0.0, seed=seed)
    begin = time.perf_counter()
    learner = mf.MAMLR(mf.DotRecommender(NUM_ITEMS, 16))
    learner.fit(split.train, split.valid, seed=seed, progress=False)
    seconds = time.perf_counter() - begin
    print(f"\n{world.train}, true width {DIM}: trained in {seconds:.1f} s on {threads} threads, width 16\n")

    ridges = {"ridge, true items": world.true_model(), "ridge, best estimate of items": world.best_estimate()}
    results: dict[str, dict[str, float]] = {name: {} for name in ("maml-r", *ridges)}
    for known in KNOWN:
        batch = next(iter(mf.TaskSampler(world.test, known, batch_size=NUM_NEWCOMERS, seed=seed, shuffle=False)))
        predictions = {"maml-r": learner.predict(batch), **{name: _predict(r, batch) for name, r in ridges.items()}}
        for name, scores in predictions.items():
            assert batch.query is not None
            assert batch.query.targets is not None
            errors = scores - batch.query.targets
            results[name][f"{known} known"] = float(errors.double().square().mean().sqrt())
    best = results["ridge, true items"]
    print(f"{'rmse':30}" + "".join(f"{column:>22}" for column in best))
    for name, row in results.items():
        cells = (f"{value:.4f} ({100 * (value / best[column] - 1):+.2f} %)" for column, value in row.items())
        print(f"{name:30}" + "".join(f"{cell:>22}" for cell in cells))
    return {"seconds": seconds, "results": results}


def _model(items: NDArray[np.float64], item_bias: NDArray[np.float64], covariance: Tensor | None) -> FactorModel:
    # In units in which u and c have the same variance, USER_BIAS²; covariance is of (b, e).
    scale = torch.tensor([1.0] + [1 / USER_BIAS] * DIM)
    return FactorModel(
        offset=OFFSET,
        item_bias=torch.from_numpy(item_bias).float(),
        item_table=torch.from_numpy(items / USER_BIAS).float(),
        noise=NOISE**2,
        user_variance=USER_BIAS**2,
        item_covariance=None if covariance is None else covariance * scale * scale[:, None],
    )


def _predict(model: FactorModel, batch: TaskBatch) -> Tensor:
    user, bias = model.fold_in(batch)
    assert batch.query is not None
    tasks, items = batch.query.task_ids(), batch.query.items
    return model.offset + model.item_bias[items] + bias[tasks] + (user[tasks] * model.item_table[items]).sum(1)
