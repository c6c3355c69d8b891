"""What is timed: problems of one size and kind, drawn from one seed, the same for every implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from metarec_fast import Entries, TaskBatch

Kind = Literal["gradient", "dense", "reptile", "mlp", "train", "serve"]


@dataclass(frozen=True)
class Workload:
    """T tasks of S support and Q query entries, K inner steps, over N items of width D; float32.

    Kinds: "gradient" is one meta-gradient; "dense" the same, its rows of items summed into whole tables; "reptile" the
    mean move of the adapted parameters; "mlp" one meta-gradient of a tower D + D → hidden → 1, all of which adapts;
    "train" a whole training step, sampling and optimiser included; "serve" adapts one user and finds the ten best items
    of the catalogue.
    """

    name: str
    kind: Kind = "gradient"
    num_tasks: int = 256  # T
    num_items: int = 100_000  # N
    dim: int = 64  # D
    support: int | tuple[int, int] = 16  # S, or the range that each task draws it from
    query: int = 16  # Q
    steps: int = 5  # K
    loss: Literal["squared", "bpr"] = "squared"
    adapt: Literal["user", "all"] = "user"
    first_order: bool = False
    inner_lr: float = 0.1
    hidden: tuple[int, int] = (64, 64)  # of "mlp"
    prior_pull: float = 0.0  # of "serve", which solves for the limit of many steps

    @property
    def group(self) -> str:
        """The name without the size: what `--workload` takes, and what one chart shows."""
        return self.name.partition("-")[0]

    @property
    def max_support(self) -> int:
        return self.support if isinstance(self.support, int) else self.support[1]

    @property
    def sizes(self) -> str:
        """The sizes as tables print them."""
        support = self.support if isinstance(self.support, int) else "{}…{}".format(*self.support)
        if self.kind == "serve":
            return f"T=1 N={self.num_items:,} D={self.dim} S={support}"
        hidden = " hidden={}-{}".format(*self.hidden) if self.kind == "mlp" else ""
        return f"T={self.num_tasks} N={self.num_items:,} D={self.dim} S={support} Q={self.query} K={self.steps}{hidden}"


CANONICAL = Workload("user")
MLP = Workload("mlp", "mlp", inner_lr=0.02)
WORKLOADS = (
    CANONICAL,
    replace(CANONICAL, name="user_bpr", loss="bpr"),
    replace(CANONICAL, name="full", adapt="all"),
    Workload("small", num_tasks=32, num_items=10_000, dim=32, support=10, query=10, steps=1),
    replace(CANONICAL, name="large", num_tasks=4096, num_items=1_000_000),
    replace(CANONICAL, name="ragged", support=(3, 90)),
    replace(CANONICAL, name="first_order", first_order=True),
    replace(CANONICAL, name="reptile", kind="reptile", query=0),
    replace(CANONICAL, name="reptile_all", kind="reptile", query=0, adapt="all"),
    *(replace(CANONICAL, name=f"deep-{steps}", steps=steps) for steps in (1, 5, 10, 20, 50)),
    *(replace(CANONICAL, name=f"tasks-{tasks}", num_tasks=tasks) for tasks in (16, 64, 256, 1024, 4096, 16384)),
    *(replace(CANONICAL, name=f"items-{items}", num_items=items) for items in (10_000, 100_000, 1_000_000, 10_000_000)),
    *(
        Workload(f"train-{tasks}", "train", num_tasks=tasks, num_items=1_000_000, support=16, query=16)
        for tasks in (256, 4096)
    ),
    Workload("serve", "serve", num_tasks=1, num_items=1_000_000, query=0, prior_pull=0.1),
    MLP,
    replace(MLP, name="mlp-large", num_tasks=4096),
    replace(MLP, name="mlp-wide", hidden=(128, 64)),
    replace(MLP, name="mlp-long", support=100, query=100),
    replace(MLP, name="mlp-deep", steps=20),
    replace(MLP, name="mlp-small", num_tasks=32, dim=32, support=10, query=10, steps=1),
)
ON_A_GPU = (
    CANONICAL,
    replace(CANONICAL, name="tasks-4096", num_tasks=4096),
    replace(CANONICAL, name="tasks-65536", num_tasks=65_536),
    replace(CANONICAL, name="items-1000000", num_tasks=4096, num_items=1_000_000),
    replace(CANONICAL, name="items-10000000", num_tasks=4096, num_items=10_000_000),
    replace(CANONICAL, name="large", num_tasks=65_536, num_items=10_000_000),
    *(
        replace(CANONICAL, num_tasks=4096, **changes)
        for changes in (
            {"name": "user_bpr", "loss": "bpr"},
            {"name": "full", "adapt": "all"},
            {"name": "first_order", "first_order": True},
            {"name": "ragged", "support": (3, 90)},
            {"name": "deep-20", "steps": 20},
            {"name": "dense", "kind": "dense"},
        )
    ),
    MLP,
    replace(MLP, name="mlp-large", num_tasks=4096),
    *(Workload(f"train-{tasks}", "train", num_tasks=tasks, num_items=1_000_000) for tasks in (256, 4096)),
    Workload("serve", "serve", num_tasks=1, num_items=1_000_000, query=0, prior_pull=0.1),
)
"""What `benchmarks.gpu` times, in the order of their importance."""
QUICK = (
    CANONICAL,
    *(each for each in WORKLOADS if each.name in ("user_bpr", "full", "small", "ragged", "first_order", "reptile")),
    *(each for each in WORKLOADS if each.name in ("deep-1", "deep-50")),
    replace(CANONICAL, name="large", num_tasks=1024),
    Workload("train-256", "train", num_items=100_000),
    Workload("serve", "serve", num_tasks=1, num_items=100_000, query=0, prior_pull=0.1),
    MLP,
)


@dataclass(frozen=True)
class Tower:
    """What a tower has beside items."""

    user_part: Tensor  # [T, D]
    layers: list[tuple[Tensor, Tensor]]  # W_l [out, in], b_l [out]

    @staticmethod
    def draw(workload: Workload, generator: torch.Generator, dtype: torch.dtype) -> Tower:
        """Weights as of He's initialisation."""
        kind, dim = {"generator": generator, "dtype": dtype}, workload.dim
        widths = (2 * dim, *workload.hidden, 1)
        layers = [
            (torch.randn(out, width, **kind) * (2 / width) ** 0.5, 0.1 * torch.randn(out, **kind))
            for width, out in pairwise(widths)
        ]
        return Tower(torch.randn(workload.num_tasks, dim, **kind) / dim**0.5, layers)


@dataclass(frozen=True)
class Problem:
    """The tensors of a workload. Items are distinct inside a task, as a user rates an item once."""

    workload: Workload
    user: Tensor  # [D]
    user_bias: Tensor  # scalar
    item_table: Tensor  # [N, D]
    item_bias: Tensor  # [N]
    batch: TaskBatch
    tower: Tower | None = None  # of "mlp"

    @staticmethod
    def draw(
        workload: Workload, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Problem:
        """Ids uniform; rows of length 0.8, with which the inner steps are stable; ratings in 1 … 5."""
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device(device):
            table = torch.empty(workload.num_items, workload.dim, dtype=dtype).normal_(generator=generator)
            table *= 0.8 / workload.dim**0.5
            bias = 0.1 * torch.randn(workload.num_items, generator=generator, dtype=dtype)
            user = torch.randn(workload.dim, generator=generator, dtype=dtype)
            user_bias, batch = torch.full((), 0.1, dtype=dtype), _batch(workload, generator, dtype)
            tower = Tower.draw(workload, generator, dtype) if workload.kind == "mlp" else None
        return Problem(workload, user, user_bias, table, bias, batch, tower)

    @property
    def device(self) -> torch.device:
        return self.user.device


def _batch(workload: Workload, generator: torch.Generator, dtype: torch.dtype) -> TaskBatch:
    tasks, pairs = workload.num_tasks, 2 if workload.loss == "bpr" else 1
    width = workload.max_support + workload.query
    ids = _distinct(tasks, pairs * width, workload.num_items, generator)
    positive, negative = ids[:, :width], ids[:, width:]  # [T, S + Q]; no negatives: [T, 0]
    targets = torch.ones(tasks, width, dtype=dtype)
    if workload.loss != "bpr":
        targets += 4 * torch.rand(tasks, width, generator=generator, dtype=dtype)
    sizes = torch.full((tasks,), workload.max_support)
    if not isinstance(workload.support, int):
        sizes = torch.randint(workload.support[0], workload.support[1] + 1, (tasks,), generator=generator)

    def entries(first: int, sizes: Tensor, longest: int) -> Entries:
        kept = torch.arange(longest) < sizes[:, None]  # [T, S]
        columns = slice(first, first + longest)
        offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        negatives = negative[:, columns][kept] if workload.loss == "bpr" else None
        return Entries(positive[:, columns][kept], targets[:, columns][kept], offsets, negatives=negatives)

    support = entries(0, sizes, workload.max_support)
    if workload.query == 0:
        return TaskBatch(support)
    return TaskBatch(support, entries(workload.max_support, torch.full((tasks,), workload.query), workload.query))


def _distinct(rows: int, width: int, num_items: int, generator: torch.Generator) -> Tensor:
    """Ids [rows, width], uniform, distinct inside a row: rows that repeat one are drawn again, if they are rare."""
    if width**2 > num_items:
        return torch.rand(rows, num_items, generator=generator).argsort(1)[:, :width]
    ids = torch.randint(num_items, (rows, width), generator=generator)
    while True:
        repeated = (ids.sort(1).values.diff(dim=1) == 0).any(1)
        if not repeated.any():
            return ids
        ids[repeated] = torch.randint(num_items, (int(repeated.sum()), width), generator=generator)
