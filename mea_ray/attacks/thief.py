"""The thief's side of an attack: its images, answers and networks, and the queries that it may make."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.attacks.base import Curves, MakeModel
from mea_ray.attacks.learning import DistillationObjective, Learning
from mea_ray.attacks.transfer import Indices, TransferSet
from mea_ray.config import TrainingConfig
from mea_ray.core.errors import DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Answers, FloatImages, Images, Labels
from mea_ray.data.statistics import channel_statistics
from mea_ray.models.base import ImageModel
from mea_ray.training.engine import TrainReport
from mea_ray.training.objective import Objective
from mea_ray.training.snapshot import SUFFIX, SnapshotFile
from mea_ray.training.stack import Training


@dataclass(frozen=True)
class Query:
    """Images to query next.

    Attributes:
        images: uint8 (N, C, H, W), or float32 in [0, 1]; N >= 1.
        indices: Their positions in the thief's pool, int64 (N,); None for images that the thief made.
        learn: Substitutes are trained on them; images that the thief made must then be uint8. False for probes: their
            answers are stored (they were paid for, and a resumed run needs them) but not the images.
        whole: Query all or none: if the budget does not cover all, none is queried, because a part is useless.

    Raises:
        DataError: There are no images, the indices do not fit them, or made images cannot be trained on.
    """

    images: Images | FloatImages
    indices: Indices | None = None
    learn: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not len(self.images):
            raise DataError(f"a query needs at least one image (N, C, H, W), the attack yields {self.images.shape}")
        if self.indices is not None and self.indices.shape != (len(self.images),):
            raise DataError(f"{len(self.images)} images of the pool need as many indices, got {self.indices.shape}")
        if self.learn and self.images.dtype != np.uint8:
            raise DataError(f"images to train on must be uint8, got {self.images.dtype}; quantise them or probe")


Queries: TypeAlias = Generator["Query | npt.NDArray[Any]", Answers, None]
"""What an attack's ``queries`` returns: it yields queries, and each ``yield`` returns their float32 answers (N, K).

It may yield positions in the pool, int64 (N,); made images to train on, uint8 (N, C, H, W); made images that only probe
the victim, float32 (N, C, H, W) in [0, 1]; or a ``Query``.
"""


@dataclass
class Thief:
    """What an attack's queries may read: the thief's own data and settings, never the victim.

    Attributes:
        pool: The thief's images, uint8 (N, C, H, W).
        labels: Labels of the pool, int64 (N,), as its publisher gave them; None unless the attack says
            ``uses_labels``. They are of the pool's classes, not of the victim's.
        classes: Number of classes in an answer.
        image_shape: (channels, height, width) that the victim takes.
        transfer: All answers so far.
        learning: How substitutes are trained on answers.
        training: How a substitute is trained.
        seed: Seed of the attack.
        make_model: Builds an untrained substitute; see ``new_model``.
        queries_spent: Images answered so far.
        first_wanted: Smallest budget whose substitute is still wanted; None if that is not known.
        curves: What the attack logs about itself; see ``log``.
        online: State that an attack which trains while it queries leaves to its ``substitute``.
        objective: Makes the objective of a training on answers; None is ``DistillationObjective`` with ``learning``.
    """

    pool: Images
    labels: Labels | None
    classes: int
    image_shape: tuple[int, int, int]
    transfer: TransferSet
    learning: Learning
    training: TrainingConfig
    seed: int
    make_model: MakeModel
    queries_spent: int = 0
    first_wanted: int | None = None
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    online: Any = None
    objective: Callable[[Answers], Objective] | None = None

    def query(self, query: Query | npt.NDArray[Any]) -> Query:
        """Complete what an attack yielded, see ``Queries``.

        Raises:
            DataError: It is neither a query, nor positions in the pool, nor images.
        """
        if isinstance(query, Query):
            return query
        if not isinstance(query, np.ndarray):
            raise DataError(
                f"`queries` yielded {type(query).__name__}; yield positions in the pool (an integer array), images "
                "(N, C, H, W), or a Query"
            )
        if query.ndim == 1 and np.issubdtype(query.dtype, np.integer):
            if len(query) and not 0 <= int(query.min()) <= int(query.max()) < len(self.pool):
                raise DataError(
                    f"`queries` yielded positions {int(query.min())} to {int(query.max())}; the pool has images 0 to "
                    f"{len(self.pool) - 1}"
                )
            positions = query.astype(np.int64)
            return Query(np.ascontiguousarray(self.pool[positions]), positions)
        if query.ndim == 4 and query.dtype in (np.uint8, np.float32):
            return Query(query, learn=query.dtype == np.uint8)
        raise DataError(
            f"`queries` yielded an array of {query.dtype} {query.shape}; yield positions in the pool (N,), made images "
            "uint8 (N, C, H, W), or probes float32 (N, C, H, W)"
        )

    def random_order(self) -> Indices:
        """Return the positions of the pool in the thief's random order, int64 (N,), the same for all attacks of a seed.

        So the random baseline of an attack queries the same images as distillation does, one for one.
        """
        return numpy_generator(self.seed, "queries").permutation(len(self.pool))

    def query_pool(self, chunk: int) -> Queries:
        """Query the whole pool in the thief's random order, ``chunk`` images at a time."""
        order = self.random_order()
        for start in range(0, len(order), chunk):
            yield order[start : start + chunk]

    def log(self, name: str, value: float) -> None:
        """Add a point to a curve of the results: the queries so far, and ``value``."""
        self.curves.setdefault(name, []).append((self.queries_spent, float(value)))

    def curves_within(self, queries: int) -> Curves:
        """Return the points that were logged within a number of queries."""
        return {name: [point for point in points if point[0] <= queries] for name, points in self.curves.items()}

    def training_set(self) -> tuple[Images, Answers]:
        """Return images, uint8 (n, C, H, W), and answers, float32 (n, K), of the queries so far, without probes.

        The answers are cleaned as ``thief.learning.answers`` says.
        """
        _, answers = self.transfer.prefix(self.queries_spent)
        images = self.transfer.training_images(self.pool, self.queries_spent)
        return images, self.learning.clean(answers[self.transfer.for_training(self.queries_spent)])

    def new_model(self, *names: str | int) -> nn.Module:
        """Build an untrained substitute from a named seed, leaving torch's global random generator as it was."""
        with torch.random.fork_rng([]):
            torch.manual_seed(derive(self.seed, *names))
            model = self.make_model()
        if isinstance(model, ImageModel) and self.learning.statistics == "pool":
            model.set_normalisation(*channel_statistics(self.pool))
        elif isinstance(model, ImageModel):
            model.set_normalisation([0.0] * model.shape[0], [1.0] * model.shape[0])
        return model

    def snapshots(self, *names: str | int) -> SnapshotFile | None:
        """Return the file of a training's snapshots, beside the answers that it learns from; None in memory."""
        folder = self.transfer.path
        if folder is None:
            return None
        # Hidden, as what is half-written is: it does not travel to a remote storage.
        path = folder / f".{'-'.join(map(str, names))}{SUFFIX}"
        return SnapshotFile(path, self.transfer.snapshot_every_s, keep=True, notify=self.transfer.notify)

    def forget_snapshots(self) -> None:
        """Remove the snapshots of all trainings: their substitutes are stored by now."""
        self.transfer.forget_snapshots()

    def prepare(
        self,
        model: nn.Module,
        images: Images,
        answers: Answers,
        *names: str | int,
        validate: Callable[[nn.Module], float] | None = None,
        resumes: bool = True,
        **overrides: Any,
    ) -> Training:
        """Return the training of a model on answered images, to be run by itself or with others; see ``fit``."""
        fixed = {} if validate is not None else {"early_stop_patience": None}
        objective = (
            self.objective(answers) if self.objective is not None else DistillationObjective(self.learning, answers)
        )
        listener = self.transfer.on_epoch
        return Training(
            model,
            images,
            None,
            objective,
            self.training.changed(**{**fixed, **overrides}),
            seed=derive(self.seed, *names),
            validate=validate,
            on_epoch=None
            if listener is None
            else lambda record: listener(record["epoch"], record["epochs"], record["loss"]),
            snapshots=self.snapshots(*names) if resumes else None,
        )

    def fit(
        self,
        model: nn.Module,
        images: Images,
        answers: Answers,
        *names: str | int,
        validate: Callable[[nn.Module], float] | None = None,
        resumes: bool = True,
        **overrides: Any,
    ) -> TrainReport:
        """Train a model on answered images, in place; it ends on the CPU, in eval mode.

        Args:
            model: The network.
            images: uint8 (N, C, H, W).
            answers: float32 (N, K).
            *names: Name of the random stream.
            validate: See the engine; None trains to the end.
            resumes: Whether another process continues it after a kill; not where many trainings are short.
            **overrides: Settings of the training engine that replace the thief's own.
        """
        return self.prepare(model, images, answers, *names, validate=validate, resumes=resumes, **overrides).run()
