"""A recommender with several heads that share the user:  p_hi = m_h + b_hi + c_h + u·(s_h ∘ e_i).

To the operators it is a dot product as any other, of user vectors (u, c_1 … c_H) and rows (s_h ∘ e_i, one-hot h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metarec_fast._ids import faithful_array, plain
from metarec_fast.features import Features
from metarec_fast.heads import Head, pair_ids
from metarec_fast.models import DotRecommender, averages, check_probabilities, encoder_of

if TYPE_CHECKING:
    from metarec_fast.data import Interactions

MIXED = "mixed"
"""The loss of a model whose heads have different ones."""


class MultiTaskRecommender(DotRecommender):
    """What all users share, where several things are known of each: ratings and clicks, say.

    Heads see one item vector e_i through a scale s_h of its coordinates, and have biases of their own: m_h, of items
    b_hi, and of the user c_h. The user's vector adapts to the entries of all heads, his biases each to their own:

        L_S = Σ_h α_h L_S,h,   L_S,h = Σ_{s∈h} ℓ_h(p_s, y_s) / (|S_h| + n0)

    and so it is with the query and the outer weights, Σ_h α_h L_Q,h / Σ_h α_h over the heads that a user's query has.

    Give it to any learner and fit that on a log of `join_heads`. Item vectors do not adapt (`adapt="all"` is refused).

    Args:
        num_items: N, items of each head.
        dim: D, width of item vectors; users have D + H coordinates, the last of which are c_h.
        heads: By name, in the order of `join_heads`.
        sparse, user_features: As of `DotRecommender`.

    Raises:
        ValueError, TypeError: A size is below 1, or heads are not Heads by name.
    """

    offset: Any  # 0, for heads have their own
    user_bias_init: Any  # 0, for heads have their own

    def __init__(
        self,
        num_items: int,
        dim: int,
        heads: Mapping[str, Head],
        sparse: bool = False,
        user_features: Features | None = None,
    ) -> None:
        if not isinstance(heads, Mapping) or not heads:
            raise ValueError(f"heads: expected at least one Head by name, got {heads!r}")
        for name, head in heads.items():
            if not isinstance(name, str) or not isinstance(head, Head):
                raise TypeError(f"heads: expected Heads by name, got {name!r}: {head!r}")
        super().__init__(num_items, dim, sparse=sparse)
        self.heads, self.items_per_head, self.item_dim = dict(heads), self.num_items, self.dim
        self.num_items, self.dim = len(heads) * self.items_per_head, self.item_dim + len(heads)
        losses = {head.loss for head in heads.values()}
        self.loss = losses.pop() if len(losses) == 1 else MIXED

        self.item_bias = nn.Embedding(self.num_items, 1, sparse=self.sparse)  # b
        nn.init.zeros_(self.item_bias.weight)
        self.head_scale = nn.Parameter(torch.ones(len(heads), self.item_dim))  # s
        self.head_offset = nn.Parameter(torch.zeros(len(heads)))  # m
        self.user_init = nn.Parameter(torch.zeros(self.dim))  # u and c_h at the start
        for name in ("offset", "user_bias_init"):
            delattr(self, name)
            self.register_buffer(name, torch.zeros(()))
        self.user_encoder = encoder_of("user_features", user_features, self.dim)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, features apart, heads as dicts."""
        heads = {name: asdict(head) for name, head in self.heads.items()}
        return {"num_items": self.items_per_head, "dim": self.item_dim, "heads": heads, "sparse": self.sparse}

    def rows_of(self, head: str) -> slice:
        """Where the items of a head are among all, h N … (h + 1) N.

        Raises:
            ValueError: There is no such head; those that there are are listed.
        """
        if head not in self.heads:
            raise ValueError(f"head: expected one of {', '.join(map(repr, self.heads))}, got {head!r}")
        number = list(self.heads).index(head)
        return slice(number * self.items_per_head, (number + 1) * self.items_per_head)

    @torch.no_grad()
    def initialize(self, log: Interactions) -> None:
        """Sets offsets and item biases of each head to the damped averages of its ratings, or of their log-odds.

        Raises:
            ValueError: The log has no ratings, another number of items, or targets that do not fit a loss.
        """
        self.check_log(log)
        for number, (name, head) in enumerate(self.heads.items()):
            rows = self.rows_of(name)
            own = log.select_rows((log.items >= rows.start) & (log.items < rows.stop))
            if len(own):
                offset, biases = averages(own, head.loss)
                self.head_offset[number] = offset
                self.item_bias.weight[rows] = torch.from_numpy(biases[rows, None]).to(self.item_bias.weight)
        self.initialized.fill_(True)

    def check_log(self, log: Interactions) -> None:
        if log.num_items != self.num_items:
            raise ValueError(
                f"log: expected {len(self.heads)} · {self.items_per_head} items, a log of join_heads, "
                f"got {log.num_items}"
            )
        if len(log) == 0:
            raise ValueError("log: expected at least one rating, got none")
        self.check_targets("log.ratings", log.items, log.ratings)

    def check_targets(self, name: str, rows: NDArray[Any], targets: NDArray[Any]) -> None:
        """Raises ValueError unless the targets of logistic heads, whose items are in these rows, lie in [0, 1]."""
        logistic = np.array([head.loss == "logistic" for head in self.heads.values()])
        check_probabilities(name, np.where(logistic[rows // self.items_per_head], targets, 0))

    def lookup(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """What user vectors are multiplied with, [n, D + H], and biases [n], through the embeddings."""
        heads = items // self.items_per_head
        vectors = self.item_embedding(items % self.items_per_head) * self.head_scale[heads]
        own = nn.functional.one_hot(heads, len(self.heads)).to(vectors)
        return torch.cat([vectors, own], 1), self.item_bias(items).squeeze(1) + self.head_offset[heads]

    def tables(self) -> tuple[Tensor, Tensor]:
        """As `lookup` for all pairs of head and item, [H N, D + H] and [H N], for reading only."""
        return self.lookup(torch.arange(self.num_items, device=self.offset.device))

    def unknown_items(self, item_ids: Any) -> tuple[Tensor, Tensor]:
        """The mean of a head's rows, [n, D + H] and [n], for pairs of a head and an unknown item."""
        means = [tuple(each[self.rows_of(head)].mean(0) for each in self.tables()) for head, _ in item_ids]
        return torch.stack([vector for vector, _ in means]), torch.stack([bias for _, bias in means])

    def bind_items(self, item_ids: Any) -> None:
        """Raises ValueError unless the ids are those of `join_heads` for these heads."""
        pairs = pair_ids(self.heads, self.ids_of_one_head(item_ids))
        if list(item_ids) != list(pairs):
            raise ValueError(
                f"item_ids: expected pairs (head, item) of the heads {', '.join(map(repr, self.heads))} in this order, "
                "as of a log of join_heads"
            )

    def ids_of_one_head(self, item_ids: Any) -> NDArray[Any]:
        """The original ids of items, [N], from those of pairs."""
        try:
            return faithful_array([item for _, item in item_ids[: self.items_per_head]])
        except (TypeError, ValueError):
            raise ValueError(
                f"item_ids: expected pairs (head, item), as of a log of join_heads, got {plain(item_ids[0])!r}"
            ) from None
