"""What a meta-learner has to beat: averages, biases, popularity, chance, neighbours, and fold-ins on factor models.

Each is fitted on the log of the training users and then serves users never seen before, from their support entries:

    baselines = fit_baselines(split.train)
    scores = baselines["bias"].predict(batch)

The default settings were chosen on validation users of MovieLens (100,000 ratings, ten per user to adapt on).
`fit_baselines(log, "all")` adds those of other libraries that are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast import warm_start
from metarec_fast._library_baselines import ImplicitALS, LenskitALS, LenskitItemKNN, LibraryBaseline
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

LIBRARY_BASELINES: dict[str, type[LibraryBaseline]] = {
    baseline.name: baseline for baseline in (ImplicitALS, LenskitALS, LenskitItemKNN)
}


def is_baseline(name: str) -> bool:
    """Whether a predictor of this name is a baseline, so that charts draw it paler than a learner."""
    return name in BASELINES or name in LIBRARY_BASELINES


def fit_baselines(
    log: Interactions, names: Iterable[str] | Literal["all"] | None = None, seed: int = 0
) -> dict[str, Baseline]:
    """Fits baselines on the log of the training users.

    Args:
        log: What to learn from.
        names: Which, of `BASELINES` and `LIBRARY_BASELINES`. None takes all of `BASELINES`, which need no other
            library; "all" adds those of `LIBRARY_BASELINES` whose library is installed.
        seed: Of what is random in them.

    Raises:
        ValueError: There is no baseline of such a name, or the log holds no rating.
        ImportError: The library of a baseline that is named is not installed.
    """
    known: dict[str, type[Baseline]] = {**BASELINES, **LIBRARY_BASELINES}
    if names is None:
        names = BASELINES
    elif names == "all":
        names = [*BASELINES, *(name for name, baseline in LIBRARY_BASELINES.items() if baseline.installed())]
    names = list(names)
    for name in names:
        if name not in known:
            raise ValueError(f"names: expected some of {', '.join(known)}, got {name!r}")
    baselines = {name: known[name](seed=seed) for name in names}  # those that cannot be made say so before any work
    return {name: baseline.fit(log) for name, baseline in baselines.items()}
