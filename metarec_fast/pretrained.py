"""Parts of a learner from elsewhere: item vectors by their original ids, parts of another learner, or all of it on
another catalogue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metarec_fast import checkpoint
from metarec_fast._names import match_names
from metarec_fast.catalogue import Catalogue
from metarec_fast.data import Interactions
from metarec_fast.features import Features
from metarec_fast.freezing import short_name
from metarec_fast.mlp_recommender import MLPRecommender
from metarec_fast.models import DotRecommender, averages
from metarec_fast.multi_task import MultiTaskRecommender
from metarec_fast.tasks import Entries, TaskBatch

if TYPE_CHECKING:
    from metarec_fast.learner import Learner


class Given:
    """Which rows of which tensors came from elsewhere, so that initialising must leave them as they are."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor | EllipsisType] = {}

    def add(self, name: str, rows: Tensor | None = None) -> None:
        """Adds rows [n] of the tensor of this name; None for all of them."""
        before = self.rows.get(name)
        if rows is None or isinstance(before, EllipsisType):
            self.rows[name] = ...
        else:
            self.rows[name] = rows if before is None else torch.cat([before, rows]).unique()

    def holds(self, learner: Learner, name: str) -> bool:
        """Whether something of a parameter is given, or all of it frozen."""
        return name in self.rows or not learner.get_parameter(name).requires_grad

    @contextmanager
    def kept(self, learner: Learner) -> Iterator[None]:
        """What is given or frozen is afterwards what it was before, where it still has its shape."""
        frozen = {name: ... for name, value in learner.named_parameters() if not value.requires_grad}
        before = learner.state_dict()
        kept = {
            name: (before[name].shape, rows, before[name][rows].clone()) for name, rows in (self.rows | frozen).items()
        }
        yield
        after = learner.state_dict()
        for name, (shape, rows, values) in kept.items():
            if name in after and after[name].shape == shape:
                after[name][rows] = values


@torch.no_grad()
def load_items(learner: Learner, ids: Any, vectors: Any, biases: Any = None) -> int:
    """Takes item vectors from elsewhere, matched by original ids; other items keep theirs.

    On a learner that is not trained yet, what `fit` starts from is set around them: they stay, and MAML-R starts as
    MAML does, at step sizes that suit them. (`MAMLR.start_from(warm_start.given(...))` also rotates and scales vectors
    of all items so that users are distributed alike in all directions.) They are then trained as ever, unless
    `freeze("item_*")` or `scale_lr("item_*", factor)` says otherwise.

    Args:
        ids: Original ids, [n], each once; those that the learner does not know are left out.
        vectors: Their vectors [n, D], features included: as `learner.model.tables()` gives them.
        biases: Their biases [n], around the mean; by default biases stay, or start, as without this.

    Returns:
        How many of the learner's items are among them.

    Raises:
        ValueError: `learner.item_ids` are not known, no item is among them, a shape does not fit (vectors of another
            width than the model's are refused), a number is not finite, or an id comes twice.
        TypeError: The model is a module that has no item vectors known by name, or has several heads.
    """
    _refuse_heads(learner)
    names = _item_names(learner)
    given = Catalogue(ids, len(ids), name="ids")
    like = learner.get_parameter(names[0])
    table = _checked("vectors", vectors, (len(given.ids), like.shape[1]), like)
    bias = None if biases is None else _checked("biases", biases, (len(given.ids),), like)
    places = torch.from_numpy(given.find(learner.catalogue.ids))
    rows = (places >= 0).nonzero()[:, 0].to(like.device)
    if len(rows) == 0:
        expected, found = (values[:1].tolist() for values in (learner.catalogue.ids, given.ids))
        raise ValueError(f"ids: none is an item of the learner, whose ids are such as {expected}; got such as {found}")
    chosen, width, own = places[rows.cpu()].to(like.device), like.shape[1], learner.state_dict()
    added = _of_features(learner, rows)
    for name, values, columns in ((names[0], table, slice(width)), (names[1], bias, slice(width, None))):
        if values is not None:
            own[name][rows] = (values[chosen].view(len(rows), -1) - added[:, columns]).view(own[name][rows].shape)
            learner._given.add(name, rows)
    return len(rows)


@torch.no_grad()
def load_from(
    learner: Learner, source: Learner | str | os.PathLike[str], parameters: str | Sequence[str] = "*"
) -> list[str]:
    """Takes parameters from another learner: rows of items by original ids, everything else as it is.

        learner.load_from("runs/big", "tower.*")                     # the tower's start
        learner.load_from(other, ["item_embedding.*", "item_bias.*"])

    Items that the source does not know keep their rows. As after `load_items`, `fit` starts around what was taken.

    Args:
        source: A learner, or the directory of a saved one.
        parameters: Names or patterns, as of `freeze`, of what both have; buffers such as a tower's "item_average" too.

    Returns:
        The names of what was taken.

    Raises:
        ValueError: A pattern stands for none that both have, shapes differ, a table of features has other columns, or
            item ids are not known.
        TypeError: A model has several heads.
    """
    if not isinstance(source, nn.Module):
        source = checkpoint.load(source)
    for each in (learner, source):
        _refuse_heads(each)
    own, other = learner.state_dict(), source.state_dict()
    both = {short_name(name): name for name in own if name in other and name != "model.initialized"}
    taken = match_names("parameters", parameters, both, "what both learners have")
    per_item = _per_item(learner) & _per_item(source)
    for short in taken:
        name, mine, theirs = both[short], own[both[short]], other[both[short]]
        _check_columns(learner, source, short)
        first = 1 if name in per_item else 0  # dimension that has to be the same
        if mine.shape[first:] != theirs.shape[first:]:
            expected, found = (f"{tuple(each.shape[first:])}{' a row' * first}" for each in (mine, theirs))
            raise ValueError(f"{short}: expected shape {expected}, as this learner has it, got {found}")

    for name in map(both.__getitem__, taken):
        if name in per_item:
            places = torch.from_numpy(source.catalogue.find(learner.catalogue.ids))
            rows = (places >= 0).nonzero()[:, 0]
            found_rows = other[name][places[rows].to(other[name].device)]
            own[name][rows.to(own[name].device)] = found_rows.to(own[name])
            learner._given.add(name, rows.to(own[name].device))
        else:
            own[name].copy_(other[name])
            learner._given.add(name)
    return taken


@torch.no_grad()
def transfer(
    learner: Learner,
    log: Interactions,
    *,
    user_features: Features | None = None,
    item_features: Features | None = None,
    module: nn.Module | None = None,
) -> Learner:
    """A learner of the same kind for another catalogue, which goes on from what this one has learned.

    What all items share is carried over: where users start, weights of features, towers, step sizes, pulls, momentum.
    So are the rows of items that both catalogues have, by original id, and nothing changes in how these are scored.
    Other items start where the learner scores items that it does not know: at the mean row, moved by their features,
    with biases from the log's damped averages of what that leaves. `fit` then trains on; nothing is frozen.

    Args:
        log: Whose items the new catalogue has, and from whose ratings, if there are any, biases of new items start.
        user_features, item_features: Tables of the same columns that also know the new users and items (as
            `Features.extended` makes them); by default those that the learner has.
        module: Where the model is a module other than an `MLPRecommender`: one for the new number of items.

    Raises:
        ValueError: The learner is not trained, tables have other columns, or shapes differ in more than items.
        TypeError: The model has several heads.
    """
    _refuse_heads(learner)
    if not bool(learner.model.initialized):
        raise ValueError("learner: expected one that is initialised or trained, got a new one")
    tables: dict[str, Any] = {f"{name}_features": table for name, table in learner.model.feature_tables().items()}
    for name, table in (("user_features", user_features), ("item_features", item_features)):
        if table is not None:
            tables[name] = table
    like = learner.model.offset
    model = checkpoint.make_model(learner, num_items=log.num_items, tables=tables, module=module)
    new: Learner = type(learner)(model, **learner.hyperparameters).to(like.device, like.dtype)
    new.item_ids = log.item_ids
    state, before = new.state_dict(), learner.state_dict()
    for name in _per_item(new) & _per_item(learner):
        state[name].copy_(before[name].mean(0))
    load_from(new, learner)
    new.model.initialized.fill_(True)
    new.rating_range = learner.rating_range
    _start_biases(new, log, np.asarray(learner.catalogue.find(log.item_ids)) < 0)
    return new


def _start_biases(learner: Learner, log: Interactions, is_new: NDArray[np.bool_]) -> None:
    """Moves the biases of new items, [N], by damped averages of what the start of users leaves of the log."""
    part = log.select_rows(is_new[log.items])
    if len(part) == 0 or (not isinstance(learner.model, DotRecommender) and not _is_tower(learner)):
        return
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    nobody = TaskBatch(Entries(nothing, nothing.float(), nothing.new_zeros(2)))
    scores = learner.score_catalogue(nobody)[0].double().cpu().numpy()
    loss = learner.model.loss
    if loss == "squared":
        part = replace(part, ratings=(part.ratings - scores[part.items]).astype(np.float32))
    mean, biases = averages(part, loss)
    moves = mean + biases - (0 if loss == "squared" else scores)
    own = learner.state_dict()[_item_names(learner)[1]]
    own += torch.from_numpy(np.where(is_new, moves, 0.0)).to(own).view(own.shape)


def _item_names(learner: Learner) -> tuple[str, str]:
    """The full names of the item vectors and of the item biases."""
    if isinstance(learner.model, DotRecommender):
        return "model.item_embedding.weight", "model.item_bias.weight"
    if _is_tower(learner):
        return "model.module.item_embedding.weight", "model.module.item_average"
    kind = type(learner.model.module).__name__
    raise TypeError(f"model: {kind} has item vectors of its own making; load_from, or set them yourself")


def _of_features(learner: Learner, rows: Tensor) -> Tensor:
    """What features add to the vectors of items [n] and, in the last column, to their biases, [n, D + 1]."""
    model = learner.model
    if not isinstance(model, DotRecommender):
        tower = model.module
        return nn.functional.pad(tower.item_part(rows) - tower.item_embedding(rows), (0, 1))
    if model.item_encoder is None:
        return model.user_init.new_zeros(len(rows), model.dim + 1)
    added: Tensor = model.item_encoder(model.item_encoder.bound_rows(rows))
    return added


def _refuse_heads(learner: Learner) -> None:
    if isinstance(learner.model, MultiTaskRecommender):
        raise TypeError("model: parts are not moved between models with several heads; copy their tensors yourself")


def _is_tower(learner: Learner) -> bool:
    return isinstance(getattr(learner.model, "module", None), MLPRecommender)


def _per_item(learner: Learner) -> set[str]:
    """The full names of tensors with a row for each item."""
    tables = (nn.Embedding, nn.EmbeddingBag)
    names = {
        f"{name}.weight"
        for name, part in learner.named_modules()
        if isinstance(part, tables) and part.num_embeddings == learner.model.num_items
    }
    return names | {"model.module.item_average"} if _is_tower(learner) else names


def _check_columns(learner: Learner, source: Learner, name: str) -> None:
    """Raises ValueError if the parameter multiplies features that mean something else in the source."""
    for side in ("user", "item"):
        if name in (f"{side}_encoder.weight", f"{side}_weight"):
            own, other = (each.model.feature_tables()[side] for each in (learner, source))
            if not own.has_columns_of(other):
                raise ValueError(
                    f"{side}_features: expected the columns, values and scales of the source, got others; "
                    "`Features.extended` keeps them"
                )


def _checked(name: str, values: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The values as a tensor of this shape, finite, like another."""
    tensor = torch.as_tensor(values).to(like)
    if tuple(tensor.shape) != shape:
        more = "; reduce them first (torch.pca_lowrank), or give them as features" if len(shape) == 2 else ""
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}{more}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {int((~tensor.isfinite()).sum())} that are not")
    return tensor
