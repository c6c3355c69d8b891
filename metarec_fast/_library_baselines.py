"""Baselines of other libraries, imported when one of them is made: ALS of implicit, ALS and item kNN of LensKit.

Each is trained by its library, and so is each new user folded in, on `torch.get_num_threads()` threads.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metarec_fast._simple_baselines import Baseline, Factors, ratings_of

if TYPE_CHECKING:
    from metarec_fast.data import Interactions
    from metarec_fast.tasks import Entries, TaskBatch


class LibraryBaseline(Baseline):
    """A baseline that needs a library, which is an extra of the same name.

    Raises:
        ImportError: The library is not installed.
    """

    library: ClassVar[str]

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        if not self.installed():
            raise ImportError(f"{self.name} needs {self.library}: pip install 'metarec-fast[{self.library}]'")

    @classmethod
    def installed(cls) -> bool:
        """Whether the library is there; it is not imported."""
        return find_spec(cls.library) is not None


class ImplicitALS(LibraryBaseline, Factors):
    """ALS on which items a user rated, whatever the rating (Hu, Koren and Volinsky 2008), by `implicit`.

        min Σ_ui c_ui (p_ui − u·e_i)² + ridge (Σ |u|² + Σ |e|²),    p = 1 and c = confidence where rated, else 0 and 1

    A new user is the exact minimum given the items (`recalculate_user`); nothing known gives the vector 0.

    Args:
        dim: Width of the vectors.
        confidence: Weight of a rated item beside one not rated.
        ridge: Pull of the vectors to 0.
        sweeps: Rounds of least squares.
    """

    name = "implicit-als"
    library = "implicit"
    predicts_ratings = False
    model: Any  # implicit.cpu.als.AlternatingLeastSquares

    def __init__(
        self, *, dim: int = 64, confidence: float = 3.0, ridge: float = 30.0, sweeps: int = 15, seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        self.dim, self.sweeps = _count("dim", dim), _count("sweeps", sweeps)
        self.confidence, self.ridge = _positive("confidence", confidence), _positive("ridge", ridge)

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        from implicit.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):  # as the library asks for: its own threads do the work
            self.model = AlternatingLeastSquares(
                factors=self.dim, regularization=self.ridge, alpha=self.confidence, iterations=self.sweeps,
                num_threads=torch.get_num_threads(), random_state=self.seed, use_gpu=False,
            )  # fmt: skip
            self.model.fit(_rated(log.items, log.offsets, log.num_items), show_progress=False)
        self.item_table = torch.from_numpy(self.model.item_factors)
        return np.zeros(log.num_items)

    def _fold_in(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        support = batch.support
        rated = _rated(support.items.numpy(), support.offsets.numpy(), len(self.item_ids))
        users = self.model.recalculate_user(np.arange(batch.num_tasks), rated)
        return torch.from_numpy(users), torch.zeros(batch.num_tasks)


class LenskitALS(LibraryBaseline, Factors):
    """Biased matrix factorisation by ALS (Zhou et al. 2008), by LensKit.

    p = m + b_i + c + u·e_i; c is the damped mean of what m + b leave of a new user's n ratings, and u the ridge of what
    is left then, with n times `ridge`.

    Args:
        dim: Width of the vectors.
        ridge: Pull of the vectors to 0, for each rating.
        damping: How many ratings without bias count beside those of an item or user.
        sweeps: Rounds of least squares.
    """

    name = "lenskit-als"
    library = "lenskit"
    scorer: Any  # lenskit.als.BiasedMFScorer

    def __init__(
        self, *, dim: int = 32, ridge: float = 0.2, damping: float = 3.0, sweeps: int = 10, seed: int = 0
    ) -> None:
        super().__init__(seed=seed)
        self.dim, self.sweeps = _count("dim", dim), _count("sweeps", sweeps)
        self.ridge, self.damping = _positive("ridge", ridge), _positive("damping", damping)

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        _start_lenskit()
        from lenskit.als import BiasedMFScorer
        from lenskit.training import TrainingOptions

        self.scorer = BiasedMFScorer(
            embedding_size=self.dim, epochs=self.sweeps, regularization=self.ridge, damping=self.damping
        )
        self.scorer.train(_dataset(log), TrainingOptions(rng=self.seed))
        self.item_table = torch.from_numpy(self.scorer.item_embeddings)
        item_scores: NDArray[np.float64] = self.scorer.bias.global_bias + self.scorer.bias.item_biases.astype("float64")
        return item_scores

    def _fold_in(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        users, biases = torch.empty(batch.num_tasks, self.dim), torch.empty(batch.num_tasks)
        for task, known in enumerate(_item_lists(batch.support, self.scorer.items)):
            vector, bias = self.scorer.new_user_embedding(None, known)
            users[task], biases[task] = torch.from_numpy(vector), float(bias)
        return users, biases


class LenskitItemKNN(LibraryBaseline):
    """Item kNN on ratings less the items' means (Deshpande and Karypis 2004), by LensKit; one user after the other.

    Where none of an item's neighbours is known, its score is that of LensKit's biases.

    Args:
        most: How many of the user's items a score is made of, the most similar ones.
        least: Of how many at least.
        damping: Of the biases, as in `LenskitALS`.
    """

    name = "lenskit-item-knn"
    library = "lenskit"
    scorer: Any  # lenskit.knn.ItemKNNScorer
    fallback: Any  # lenskit.basic.BiasScorer

    def __init__(self, *, most: int = 20, least: int = 1, damping: float = 5.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.most, self.least = _count("most", most), _count("least", least)
        self.damping = _positive("damping", damping)

    def _fit(self, log: Interactions) -> NDArray[np.float64]:
        _start_lenskit()
        from lenskit.basic import BiasScorer
        from lenskit.knn import ItemKNNScorer

        data = _dataset(log)
        self.scorer = ItemKNNScorer(max_nbrs=self.most, min_nbrs=self.least)
        self.scorer.train(data)
        self.fallback = BiasScorer(damping=self.damping)
        self.fallback.train(data)
        bias = self.fallback.model_
        item_scores: NDArray[np.float64] = bias.global_bias + bias.item_biases.astype("float64")
        return item_scores

    def predict(self, batch: TaskBatch) -> Tensor:
        query = self._query(batch)
        scores = torch.empty(len(query.items))
        asked = query.items.split(query.sizes().tolist())
        places = scores.split(query.sizes().tolist())
        for known, items, place in zip(_item_lists(batch.support, self.scorer.items), asked, places, strict=True):
            place.copy_(self._scores(known, items))
        return scores

    def score_catalogue(self, batch: TaskBatch) -> Tensor:
        self._check(batch)
        scores = torch.empty(batch.num_tasks, len(self.item_ids))
        for task, known in enumerate(_item_lists(batch.support, self.scorer.items)):
            scores[task] = self._scores(known, torch.arange(len(self.item_ids)))
        return scores

    def _scores(self, known: Any, items: Tensor) -> Tensor:
        from lenskit.data import ItemList

        asked = ItemList(item_nums=items.numpy(), vocabulary=self.scorer.items)
        scores, biases = self.scorer(known, asked).scores(), self.fallback(known, asked).scores()
        return torch.from_numpy(np.where(np.isnan(scores), biases, scores))


def _rated(items: NDArray[Any], offsets: NDArray[Any], num_items: int) -> Any:
    """1 for each item that a row has, CSR [T, N]."""
    from scipy.sparse import csr_matrix

    ones = np.ones(len(items), dtype=np.float32)
    return csr_matrix((ones, items.astype(np.int32), offsets.astype(np.int32)), shape=(len(offsets) - 1, num_items))


def _dataset(log: Interactions) -> Any:
    """The log as LensKit takes it, users and items by number; items that nobody rated are there too."""
    import pandas
    from lenskit.data import DatasetBuilder

    users = np.repeat(np.arange(log.num_users), log.sizes())
    ratings = pandas.DataFrame({"user_id": users, "item_id": log.items.astype(np.int64), "rating": log.ratings})
    builder = DatasetBuilder()
    builder.add_entities("item", np.arange(log.num_items))
    builder.add_interactions("rating", ratings, entities=["user", "item"], missing="insert", default=True)
    return builder.build()


def _item_lists(support: Entries, vocabulary: Any) -> Iterator[Any]:
    """The items and ratings of each task as LensKit takes them."""
    from lenskit.data import ItemList

    sizes = support.sizes().tolist()
    for items, ratings in zip(support.items.split(sizes), ratings_of(support).split(sizes), strict=True):
        yield ItemList(item_nums=items.numpy(), vocabulary=vocabulary, rating=ratings.float().numpy())


@cache
def _start_lenskit() -> None:
    """Gives LensKit as many threads as PyTorch has, once in a process; left alone it would take every core.

    NumPy's BLAS gets as many, if no environment variable says otherwise, and so do PyTorch's threads between operators,
    unless they are at work; the rest of PyTorch stays as it is.
    """
    import lenskit.parallel

    threads, sharing = torch.get_num_threads(), torch.multiprocessing.get_sharing_strategy()
    messages = logging.getLogger("lenskit.parallel.config")
    level = messages.level
    messages.setLevel(logging.ERROR)  # threads between operators that are at work are no news
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "failed to set interop threads", RuntimeWarning)
        lenskit.parallel.initialize(threads=threads, backend_threads=threads)
    messages.setLevel(level)
    torch.multiprocessing.set_sharing_strategy(sharing)


def _count(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}: must be ≥ 1, got {value}")
    return value


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: must be > 0 and finite, got {value}")
    return value
