"""What all plots share: the colours of predictors, and Matplotlib where it is installed, drawing into files."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any

from metarec_fast.baselines import is_baseline

_STRONG = ("#000000", "#c1121f", "#1d3fbb", "#0f7b3f", "#7b2cbf")
_PALE = (
    "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#e6b820", "#ff9da7", "#9c755f", "#e15759", "#a0a0a0",
)  # fmt: skip


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each predictor: strong ones for learners, paler ones for baselines."""
    strong, pale = cycle(_STRONG), cycle(_PALE)
    return {name: next(pale if is_baseline(name) else strong) for name in names}


def pyplot() -> Any:
    """`matplotlib.pyplot`, which never opens a window.

    Raises:
        ImportError: Matplotlib (the extra `plots`) is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need Matplotlib: pip install 'metarec-fast[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
