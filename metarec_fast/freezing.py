"""How fast each part of a learner is trained: not at all, at a rate of its own, or as ever.

Parts are named as `named_parameters` does, without what all names of a model begin with: "item_embedding.weight",
"tower.0.bias", "log_rates"; a pattern stands for several: "item_*".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metarec_fast._names import match_names

if TYPE_CHECKING:
    from metarec_fast.learner import Learner


def freeze(learner: Learner, parameters: str | Sequence[str]) -> None:
    """Keeps parameters as they are, to the bit, whatever trains the learner: they no longer require gradients.

    What adapts to a user still does, from where it is. `scale_lr(parameters, 1)` lets them be trained again. Make
    optimisers of your own afterwards.

    Args:
        parameters: Names or patterns of them, "item_*" for instance: as `named_parameters` has them, without
            "model." and "module.".

    Raises:
        ValueError: A name or pattern stands for none; those that there are are listed.
    """
    for name in _full_names(learner, parameters):
        learner.get_parameter(name).requires_grad_(False)


def scale_lr(learner: Learner, parameters: str | Sequence[str], factor: float) -> None:
    """Trains parameters at `factor` times the rate that `parameter_groups`, and so `fit`, would give them.

    Args:
        parameters: Names or patterns, as of `freeze`; what was frozen no longer is.
        factor: > 0; it takes the place of an earlier one.

    Raises:
        ValueError: The factor is not > 0, or a name or pattern stands for none; those that there are are listed.
    """
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise ValueError(f"factor: expected a number > 0 (`freeze` is for 0), got {factor!r}")
    _set(learner, dict.fromkeys(_full_names(learner, parameters), float(factor)))


def factors_of(learner: Learner) -> dict[str, float]:
    """The factors that are not 1 by full name, 0 for what is frozen; `set_factors` takes them."""
    found = {
        name: learner.lr_factors.get(name, 1.0) if parameter.requires_grad else 0.0
        for name, parameter in learner.named_parameters()
    }
    return {name: factor for name, factor in found.items() if factor != 1}


def set_factors(learner: Learner, factors: Mapping[str, float]) -> None:
    """Freezes and scales as `factors_of` said of such a learner."""
    known = dict(learner.named_parameters())
    _set(learner, {name: factor for name, factor in factors.items() if name in known})


def scaled_groups(learner: Learner, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of parameters without those that are frozen, divided where factors differ."""
    factors = {parameter: learner.lr_factors.get(name, 1.0) for name, parameter in learner.named_parameters()}
    divided: list[dict[str, Any]] = []
    for group in groups:
        by_factor: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.requires_grad:
                by_factor.setdefault(factors[parameter], []).append(parameter)
        divided += [{**group, "params": some, "lr": factor * group["lr"]} for factor, some in by_factor.items()]
    return divided


def short_name(name: str) -> str:
    """A name without what all names of a model begin with."""
    return name.removeprefix("model.").removeprefix("module.")


def _set(learner: Learner, factors: Mapping[str, float]) -> None:
    for name, factor in factors.items():
        learner.get_parameter(name).requires_grad_(factor > 0)
        learner.lr_factors[name] = factor or 1.0


def _full_names(learner: Learner, parameters: str | Sequence[str]) -> list[str]:
    names = {short_name(name): name for name, _ in learner.named_parameters()}
    return [names[name] for name in match_names("parameters", parameters, names, "the learner's parameters")]
