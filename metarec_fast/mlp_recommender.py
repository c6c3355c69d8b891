"""A tower on a user's and an item's vector, as in MeLU (Lee et al. 2019): score = item average + tower([user ; item]).

    user part  u + W x      the same start for all, moved by features
    item part  e_i + W z_i  a vector of its own, moved by features

The weights of the tower adapt to each user; vectors and W are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metarec_fast._arguments import INNER_LOSSES
from metarec_fast._columns import as_int
from metarec_fast.features import Features
from metarec_fast.models import averages

if TYPE_CHECKING:
    from metarec_fast.data import Interactions

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
_TABLE_SCALE = 0.1  # standard deviation of a new item vector's coordinates


class MLPRecommender(nn.Module):
    """What all users share of a tower's inputs, and the tower from which each starts.

    Give it to any learner: `mf.MAML(mf.MLPRecommender(num_items, 16))`. By default the whole tower adapts;
    `adapt=["tower.4.*"]` for its last layer alone (ANIL, Raghu et al. 2020).

    Args:
        num_items: N, size of the catalogue.
        dim: D, width of the user part and of the item part.
        hidden: Widths of the hidden layers; () for a linear tower.
        activation: "relu" or "gelu", which is smooth, so that second derivatives are not only those of the loss.
        loss: "squared", "logistic", "bpr" or "softmax", as of `DotRecommender`.
        user_features, item_features: What is known of users and items, as of `DotRecommender`.

    Raises:
        ValueError, TypeError: A size is below 1, or a name is unknown.
    """

    adapts = ("tower.*",)
    item_inputs: Tensor  # [N, F], features of the items written out
    item_average: Tensor  # [N], around the mean; what the tower need not find out

    def __init__(
        self,
        num_items: int,
        dim: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        loss: str = "squared",
        user_features: Features | None = None,
        item_features: Features | None = None,
    ) -> None:
        super().__init__()
        widths = [as_int("hidden", width) for width in hidden]
        for name, value in (("num_items", num_items), ("dim", dim), *(("hidden", width) for width in widths)):
            if as_int(name, value) < 1:
                raise ValueError(f"{name}: must be ≥ 1, got {value}")
        for name, choice, known in (("activation", activation, ACTIVATIONS), ("loss", loss, INNER_LOSSES)):
            if choice not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {choice!r}")
        self.num_items, self.dim, self.activation, self.loss = int(num_items), int(dim), activation, loss
        self.hidden = tuple(widths)
        self.user_features, self.item_features = user_features, item_features

        self.register_buffer("item_average", torch.zeros(self.num_items))
        self.item_embedding = nn.Embedding(self.num_items, self.dim)  # e
        nn.init.normal_(self.item_embedding.weight, std=_TABLE_SCALE)
        self.user_init = nn.Parameter(torch.zeros(self.dim))  # u
        self.user_weight = self.item_weight = None
        if user_features is not None:
            self.user_weight = nn.Parameter(torch.zeros(user_features.width, self.dim))
        if item_features is not None:
            self.item_weight = nn.Parameter(torch.zeros(item_features.width, self.dim))
            self.register_buffer("item_inputs", torch.zeros(self.num_items, item_features.width), persistent=False)

        layers: list[nn.Module] = []
        width = 2 * self.dim
        for size in self.hidden:
            layers += [nn.Linear(width, size), ACTIVATIONS[activation]()]
            width = size
        self.tower = nn.Sequential(*layers, nn.Linear(width, 1))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, features apart."""
        return {
            "num_items": self.num_items, "dim": self.dim, "hidden": list(self.hidden), "activation": self.activation,
            "loss": self.loss,
        }  # fmt: skip

    def forward(self, items: Tensor, user: Tensor | None = None) -> Tensor:
        """Scores [n] of items [n] for the user with features x [F]."""
        item_part = self.item_part(items)
        inputs = torch.cat([self.user_part(user).expand(item_part.shape), item_part], -1)
        scores: Tensor = self.item_average[items] + self.tower(inputs).squeeze(-1)
        return scores

    def item_part(self, items: Tensor) -> Tensor:
        """What the tower gets of items [n]: [n, D]."""
        part: Tensor = self.item_embedding(items)
        return part if self.item_weight is None else part + self.item_inputs[items] @ self.item_weight

    def user_part(self, user: Tensor | None) -> Tensor:
        """What the tower gets of users with features x [..., F]: [..., D]."""
        return self.user_init if user is None or self.user_weight is None else self.user_init + user @ self.user_weight

    def linear_layers(self) -> list[nn.Linear]:
        """The layers of the tower that have weights."""
        return [layer for layer in self.tower if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def initialize(self, log: Interactions) -> None:
        """Takes the damped averages of the items from the log."""
        _, item_biases = averages(log, self.loss)
        self.item_average.copy_(torch.from_numpy(item_biases))

    @torch.no_grad()
    def bind_items(self, item_ids: Any) -> None:
        """Finds the features of the items, given their original ids [N]."""
        if self.item_features is not None:
            self.item_features.warn_if_unknown("item_features", item_ids)
            self.item_inputs.copy_(self.item_features.matrix.select(self.item_features.find(item_ids)).to_dense())
