"""Any nn.Module as a model: what maps items, and perhaps what is known of a user, to scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metarec_fast._arguments import INNER_LOSSES
from metarec_fast._columns import as_int
from metarec_fast._peak_memory import as_bytes
from metarec_fast.features import Features
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.models import averages, check_log

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.feature_matrix import FeatureMatrix


class ModuleRecommender(nn.Module):
    """A module whose parameters, those that a learner names, adapt to each user.

        score of item i = offset + module(items)[i], or module(items, x) with user features

    Args:
        module: Maps item row numbers, int64 [n], to scores [n] of one user. With `user_features` it also gets x [F],
            centred and scaled as `Features` does. It is called under `torch.func.vmap`: no in-place change of what
            comes in or stays, no batch statistics, no branch on values.
        num_items: N, size of the catalogue; by default the module's `num_items`.
        loss: "squared", "logistic", "bpr" or "softmax", as of `DotRecommender`.
        user_features: What is known of users, found by `TaskBatch.user_ids`; by default the module's `user_features`.
        chunk_size: Tasks at a time: memory grows with it, and with the largest task among them.
        memory_limit: Bytes, or a size such as "2GB": what tasks at a time may take at most, instead of a `chunk_size`.
            What one task and two take is measured, for each power of two of the sizes of tasks. Tensors that a chunk
            makes count: parameters of each task, activations, gradients. Parameters, batches, gradients summed up and
            what an operation needs for itself do not. One task at a time is the least.
        compile: Train by `torch.compile`: a minute or so for each power of two of the sizes of tasks. Where that cannot
            be done, tasks run as they do without, and a warning says why.

    Raises:
        ValueError, TypeError: An argument does not fit, or the module does what tasks cannot do apart from each other.
    """

    initialized: Tensor  # bool, whether the parameters mean something already
    offset: Tensor  # what scores are when the module says 0

    def __init__(
        self,
        module: nn.Module,
        num_items: int | None = None,
        loss: str | None = None,
        user_features: Features | None = None,
        chunk_size: int = 64,
        memory_limit: int | str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"model: expected a DotRecommender or any nn.Module, got {type(module).__name__}")
        num_items = getattr(module, "num_items", None) if num_items is None else num_items
        if num_items is None:
            raise ValueError("num_items: expected the size of the catalogue, here or as an attribute of the module")
        loss = getattr(module, "loss", "squared") if loss is None else loss
        if loss not in INNER_LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(INNER_LOSSES)}, got {loss!r}")
        self.num_items, self.chunk_size = as_int("num_items", num_items), as_int("chunk_size", chunk_size)
        self.memory_limit = None if memory_limit is None else as_bytes("memory_limit", memory_limit)
        self.loss, self.compiled = loss, bool(compile)
        for name in ("num_items", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be ≥ 1, got {getattr(self, name)}")
        _check_module(module)
        self.module = module
        self.user_features = getattr(module, "user_features", None) if user_features is None else user_features
        kind = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("offset", torch.zeros((), dtype=kind.dtype, device=kind.device))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The constructor's arguments, features apart; of modules, only an `MLPRecommender` can be made anew."""
        mlp = {"mlp": self.module.hyperparameters} if isinstance(self.module, MLPRecommender) else {}
        settings = {"chunk_size": self.chunk_size, "memory_limit": self.memory_limit, "compile": self.compiled}
        return {"num_items": self.num_items, "loss": self.loss, **settings, **mlp}

    def forward(self, items: Tensor, user: Tensor | None = None) -> Tensor:
        """Scores [n] of items [n] for the user with features x [F]."""
        scores: Tensor = self.module(items) if user is None else self.module(items, user)
        if scores.shape != items.shape:
            raise ValueError(f"module: expected scores of shape {list(items.shape)}, got {list(scores.shape)}")
        return self.offset + scores

    def choose(self, adapt: str | Sequence[str]) -> list[str]:
        """The names of the module's parameters that names or patterns ("tower.*") stand for; "all" for all of them,
        "user" for those that the module itself names in `adapts`.

        Raises:
            ValueError: A pattern stands for none; those that there are are listed.
        """
        names = [name for name, _ in self.module.named_parameters()]
        patterns = [adapt] if isinstance(adapt, str) else list(adapt)
        if adapt == "all":
            patterns = ["*"]
        elif adapt == "user":
            patterns = list(getattr(self.module, "adapts", patterns))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"adapt: expected names of the module's parameters or patterns of them, got {pattern!r}; "
                    f"they are {', '.join(names)}"
                )
        return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

    def users(self, user_ids: Any, num_tasks: int) -> Tensor | None:
        """Features of the users with these original ids, [T, F]; zeros for unknown ones; None without features."""
        if self.user_features is None:
            return None
        rows = torch.full((num_tasks,), -1) if user_ids is None else self.user_features.find(user_ids)
        return self.encoded(self.user_features.matrix.select(rows))

    def user_row(self, features: Mapping[str, Any] | None, user: Any) -> Tensor | None:
        """Features of one user, [1, F], from what is given of him, or found under his id."""
        if features is None:
            return self.users(None if user is None else [user], 1)
        if self.user_features is None:
            raise ValueError("features: the learner's model has no user features")
        return self.encoded(self.user_features.encode(features))

    def encoded(self, rows: FeatureMatrix) -> Tensor:
        """Rows of features written out, [n, F], where the module is."""
        return rows.to_dense().to(self.offset)

    @torch.no_grad()
    def initialize(self, log: Interactions) -> None:
        """Sets the offset to the mean rating (for "logistic" its log-odds), and lets the module initialise itself if it
        has a method `initialize`."""
        self.check_log(log)
        self.offset.fill_(averages(log, self.loss)[0])
        if callable(getattr(self.module, "initialize", None)):
            self.module.initialize(log)  # type: ignore[operator]
        self.initialized.fill_(True)

    def check_log(self, log: Interactions) -> None:
        """Raises ValueError unless the log has ratings, this model's number of items, and targets for its loss."""
        check_log(log, self.num_items, self.loss)

    def feature_tables(self) -> dict[str, Features]:
        """The tables of features that there are, of "user" and "item"."""
        tables = {"user": self.user_features, "item": getattr(self.module, "item_features", None)}
        return {name: table for name, table in tables.items() if isinstance(table, Features)}

    def bind_items(self, item_ids: Any) -> None:
        """Tells the module the original ids of its items, if it has a method `bind_items`."""
        if callable(getattr(self.module, "bind_items", None)):
            self.module.bind_items(item_ids)  # type: ignore[operator]


def _check_module(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            raise ValueError(
                f"model: {name or 'it'} is a {type(part).__name__} that keeps running statistics, which tasks cannot "
                "have each for themselves; LayerNorm has none"
            )
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise ValueError(f"model: {name or 'it'} has sparse gradients, which torch.func does not; set sparse=False")
