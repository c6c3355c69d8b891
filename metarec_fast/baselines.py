"""What a meta-learner has to beat: averages, biases, popularity, chance, neighbours, and fold-ins on factor models.

Each is fitted on the log of the training users and then serves users never seen before, from their support entries:

    baselines = fit_baselines(split.train)
    scores = baselines["bias"].predict(batch)

The default settings were chosen on validation users of MovieLens (100,000 ratings, ten per user to adapt on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import warm_start
from metarec_fast._neighbours import EASE, ItemKNN
from metarec_fast._simple_baselines import Baseline, Bias, Factors, GlobalMean, ItemMean, Popularity, Random
from metarec_fast.factor_model import FactorModel

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.tasks import TaskBatch


class FoldIn(Factors):
    """Ridge fold-in of the user on a factor model. Subclasses say which, with defaults of `metarec_fast.warm_start`.

    Args:
        dim: Width of the item vectors.
        sweeps: Rounds of EM, or of least squares.
    """

    method: Callable[..., FactorModel]
    default_dim: int
    model: FactorModel

    def __init__(self, *, dim: int | None = None, sweeps: int = 20, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.dim, self.sweeps = self.default_dim if dim is None else dim, sweeps

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        self.model = type(self).method(log, dim=self.dim, sweeps=self.sweeps, seed=self.seed)
        self.item_table = self.model.item_table
        scores: NDArray[np.float64] = (self.model.offset + self.model.item_bias).double().numpy()
        return scores

    def _fold_in(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        return self.model.fold_in(batch)


class VariationalFoldIn(FoldIn):
    """The variational factor model alone: where MAML-R starts, without the meta step."""

    name = "vb-fold-in"
    method, default_dim = staticmethod(warm_start.variational), 16


class PPCAFoldIn(FoldIn):
    """Ridge fold-in on probabilistic PCA."""

    name = "ppca-fold-in"
    method, default_dim = staticmethod(warm_start.ppca), 4


class ALSFoldIn(FoldIn):
    """Ridge fold-in on alternating least squares."""

    name = "als-fold-in"
    method, default_dim = staticmethod(warm_start.als), 8


BASELINES: dict[str, type[Baseline]] = {
    baseline.name: baseline
    for baseline in (
        GlobalMean, ItemMean, Bias, ItemKNN, EASE, PPCAFoldIn, ALSFoldIn, VariationalFoldIn, Popularity, Random,
    )
}  # fmt: skip


def fit_baselines(log: Interactions, names: Iterable[str] | None = None, seed: int = 0) -> dict[str, Baseline]:
    """Fits baselines, all of `BASELINES` or those named, on the log of the training users.

    Raises:
        ValueError: There is no baseline of such a name, or the log holds no rating.
    """
    names = list(BASELINES if names is None else names)
    for name in names:
        if name not in BASELINES:
            raise ValueError(f"names: expected some of {', '.join(BASELINES)}, got {name!r}")
    return {name: BASELINES[name](seed=seed).fit(log) for name in names}
