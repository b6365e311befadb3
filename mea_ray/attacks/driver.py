"""The one driver of attacks: it spends the budget, keeps every answer, and trains a fresh substitute for each rung.

An attack says which images to ask next, as a generator that yields an ``Ask`` and is sent its answers; everything else
is here. What such a generator yields may depend on its seed and on the answers it was sent, and on nothing else: then a
transfer set that was kept answers a restarted attack up to where it was killed, and a substitute of a budget depends on
the queries within that budget only, whatever larger budgets a run goes on to.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.attacks.asking import check_remaining, content_names, foreign, query
from mea_ray.attacks.base import Attack, Curves, MakeModel, Rung
from mea_ray.attacks.learning import Distil, Learning
from mea_ray.attacks.transfer import Indices, TransferSet
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Answers, BlackBox, FloatImages, Images, Labels
from mea_ray.data.statistics import channel_statistics
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.training.engine import TrainReport, train
from mea_ray.training.keep import Keep
from mea_ray.training.objective import Objective

QUERIES_PER_FILE = 16
"""Queries so much smaller than a chunk share a file of the transfer set; what waits is less than a chunk / this."""


@dataclass(frozen=True)
class Ask:
    """Images to ask next.

    Attributes:
        images: uint8 (N, C, H, W), or float32 in [0, 1]; N >= 1.
        indices: Their positions in the thief's pool, int64 (N,); None for images that the thief made.
        learn: Substitutes are trained on them; made images must then be uint8. False for probes, whose answers are
            kept (they were paid for, and a restart needs them) but not the images.
        whole: The answers are worth nothing by halves: if the budget does not reach for all, none is asked.

    Raises:
        DataError: There are no images, indices do not fit them, or made images cannot be learnt from.
    """

    images: Images | FloatImages
    indices: Indices | None = None
    learn: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not len(self.images):
            raise DataError(f"a query needs at least one image (N, C, H, W), the attack asks {self.images.shape}")
        if self.indices is not None and self.indices.shape != (len(self.images),):
            raise DataError(f"{len(self.images)} images of the pool need as many indices, got {self.indices.shape}")
        if self.learn and self.images.dtype != np.uint8:
            raise DataError(f"images to learn from must be uint8, got {self.images.dtype}; quantise them or probe")


Queries = Generator[Ask, Answers, None]
"""What an attack's ``queries`` returns: yields images, is sent float32 answers (N, classes) in their order."""


@dataclass
class Thief:
    """What an attack's queries may look at: the thief's own belongings, and never the victim.

    Attributes:
        pool: The thief's images, uint8 (N, C, H, W).
        labels: Labels of the pool, int64 (N,), as its publisher gave them; None unless the attack says
            ``uses_labels``. They are of the pool's classes, not of the victim's.
        classes: Number of classes in an answer.
        image_shape: (channels, height, width) that the victim takes.
        transfer: All answers so far.
        learning: How substitutes are trained on answers.
        training: Settings of ``mea_ray.training.engine.train``.
        seed: Seed of the attack.
        curves: What the attack logs of itself; see ``log``.
        online: What the queries of an attack that trains while it asks leave to its ``substitute``.
        objective: Makes the objective of a training on answers; None is ``Distil`` with ``learning``.
    """

    pool: Images
    labels: Labels | None
    classes: int
    image_shape: tuple[int, int, int]
    transfer: TransferSet
    learning: Learning
    training: dict[str, Any]
    seed: int
    make_model: MakeModel
    asked: int = 0
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    online: Any = None
    objective: Callable[[Answers], Objective] | None = None

    def from_pool(self, indices: npt.NDArray[np.integer]) -> Ask:
        """Ask images of the pool."""
        chosen = np.asarray(indices, np.int64)
        return Ask(np.ascontiguousarray(self.pool[chosen]), chosen)

    def shuffled(self) -> Indices:
        """Return the positions of the pool in the thief's random order: the same for every attack of a seed.

        So an attack's random control asks what distillation asks, image for image.
        """
        return numpy_generator(self.seed, "queries").permutation(len(self.pool))

    def pool_in_order(self, chunk: int) -> Queries:
        """Ask the whole pool in the thief's random order, ``chunk`` images at a time."""
        order = self.shuffled()
        for start in range(0, len(order), chunk):
            yield self.from_pool(order[start : start + chunk])

    def log(self, name: str, value: float) -> None:
        """Add a point to a curve: the queries so far, and ``value``. It lands in the results."""
        self.curves.setdefault(name, []).append((self.asked, float(value)))

    def curves_within(self, queries: int) -> Curves:
        """Return the points that were logged within a number of queries."""
        return {name: [point for point in points if point[0] <= queries] for name, points in self.curves.items()}

    def learnt(self) -> tuple[Images, Answers]:
        """Return images, uint8 (n, C, H, W), and answers of the queries so far, without probes."""
        _, answers = self.transfer.prefix(self.asked)
        return self.transfer.learnt_images(self.pool, self.asked), answers[self.transfer.is_learnt(self.asked)]

    def new_model(self, *names: str | int) -> nn.Module:
        """Build an untrained substitute from a named seed; the caller's random stream is left alone."""
        with torch.random.fork_rng([]):
            torch.manual_seed(derive(self.seed, *names))
            model = self.make_model()
        if isinstance(model, ImageModel) and self.learning.statistics == "pool":
            model.set_normalisation(*channel_statistics(self.pool))
        elif isinstance(model, ImageModel):
            model.set_normalisation([0.0] * model.shape[0], [1.0] * model.shape[0])
        return model

    def fit(
        self,
        model: nn.Module,
        images: Images,
        answers: Answers,
        *names: str | int,
        validate: Any = None,
        keep: Keep | None = None,
        **overrides: Any,
    ) -> TrainReport:
        """Train a model on answered images, in place; it ends on the CPU, in eval mode.

        Args:
            model: The network.
            images: uint8 (N, C, H, W).
            answers: float32 (N, classes).
            *names: Name of the random stream.
            validate: See the engine; None trains to the end.
            keep: See the engine.
            **overrides: Settings of the training engine in place of the thief's own.
        """
        settings = {**self.training, **({} if validate is not None else {"early_stop_patience": None}), **overrides}
        objective = self.objective(answers) if self.objective is not None else Distil(self.learning, answers)
        return train(
            model, images, None, objective, seed=derive(self.seed, *names), validate=validate, keep=keep, **settings
        )


class TransferAttack(Attack):
    """An attack that fills a transfer set and trains a fresh substitute on each rung's prefix of it.

    A subclass writes ``queries``; it may override what follows, ``pool_needed``, ``objective`` and ``substitute``.
    """

    overrides: Mapping[str, Any] = {}
    """Settings of a substitute's training that this attack needs otherwise than the thief's own."""

    default_temperature: float = 1.0
    """Temperature of the substitute's loss where ``thief.learning.temperature`` is null."""
    uses_labels: bool = False
    """The attack wants the labels that the thief's pool was published with."""
    settles: bool = False
    """``queries`` must have seen all answers within a budget before ``substitute`` is called (it trains online)."""
    query_chunk: int = 1024
    """Images in a query at most."""

    @abstractmethod
    def queries(self, thief: Thief) -> Queries:
        """Yield what to ask next, forever or until there is nothing left to ask; the driver stops at the budget."""

    def objective(self, learning: Learning, answers: Answers) -> Objective:
        """Make the objective of a substitute on its answers."""
        return Distil(learning, answers)

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return how many images the thief's pool must hold at least."""
        return max(budgets)

    def learning(self, settings: Mapping[str, Any] | None) -> Learning:
        """Check the section ``thief.learning`` and fill in this attack's temperature.

        Raises:
            ConfigError: A value is out of its range.
        """
        learning = Learning(**(settings or {}))
        return learning if learning.temperature is not None else replace(learning, temperature=self.default_temperature)

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: Mapping[str, Any],
        learning: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        # A pool that need not fill the budget is not held against it.
        super().check(max(pool_size, *budgets) if budgets else pool_size, budgets, training)
        needed = self.pool_needed(budgets)
        if pool_size < needed:
            raise ConfigError(
                f"the thief's pool holds {pool_size} images, this attack needs {needed} for thief.budgets="
                f"{list(budgets)}; lower the budgets or give it more images (splits.thief_pool, "
                "splits.disjoint_fraction)"
            )
        fraction = self.learning(learning).validation_fraction
        if training.get("early_stop_patience") is None:
            return
        if not fraction:
            raise ConfigError(
                f"early_stop_patience={training['early_stop_patience']} of the substitute needs held-out answers; set "
                "thief.learning.validation_fraction (e.g. 0.1) or thief.training.early_stop_patience=null"
            )
        for budget in budgets:
            held_out = round(fraction * budget)
            if held_out < 1 or held_out >= budget:
                raise ConfigError(
                    f"a budget of {budget} leaves {budget - held_out} images to train on and {held_out} to validate "
                    "with; raise thief.budgets or change thief.learning.validation_fraction"
                )

    def run(
        self,
        blackbox: BlackBox,
        pool: Images,
        *,
        budgets: Sequence[int],
        make_model: MakeModel,
        training: Mapping[str, Any],
        seed: int,
        transfer: TransferSet | None = None,
        skip: Container[int] = (),
        learning: Mapping[str, Any] | None = None,
        labels: Labels | None = None,
    ) -> Iterator[Rung]:
        """Spend the budget and yield one freshly trained substitute per rung; see ``Attack.run``."""
        self.check(len(pool), budgets, training, learning)
        if self.uses_labels and labels is None:
            raise ConfigError("this attack needs the labels of the thief's pool; give it `labels`")
        transfer = transfer if transfer is not None else TransferSet()
        wanted = [budget for budget in budgets if budget not in skip]
        if wanted:
            # What was answered but not kept before a kill is charged already, and asking it again is free: one query,
            # and the answers that waited for a file to be full.
            lost = 2 * self.query_chunk if transfer.path is not None else 0
            check_remaining(blackbox, self.query_cost(wanted) - self.answered_images(transfer, wanted), lost)
        chosen = self.learning(learning)
        thief = Thief(
            pool,
            labels if self.uses_labels else None,
            blackbox.classes,
            blackbox.image_shape,
            transfer,
            chosen,
            dict(training),
            seed,
            make_model,
            objective=partial(self.objective, chosen),
        )
        return self.rungs(thief, blackbox, budgets, wanted)

    def rungs(self, thief: Thief, blackbox: BlackBox, budgets: Sequence[int], wanted: Sequence[int]) -> Iterator[Rung]:
        """Spend up to each budget in turn, and yield the substitutes of those that are ``wanted``."""
        purse = _Purse(self.queries(thief), thief, blackbox, self.query_chunk)
        try:
            for budget in budgets:
                if budget > max(wanted, default=0):
                    break
                # A rung that is not wanted cuts the queries all the same: they must not depend on what is left to do.
                purse.spend(budget)
                if self.settles:
                    purse.advance()
                if budget in wanted:
                    yield self.substitute(thief, budget)
        finally:
            purse.close()

    def substitute(self, thief: Thief, budget: int) -> Rung:
        """Train the substitute of a rung on the answers so far, at most ``budget``, from weights of its own."""
        images, answers = thief.learnt()
        if not len(images):
            raise DataError(
                f"a budget of {budget} leaves nothing to learn from: all {thief.asked} queries within it are probes, "
                "or the first query must be answered whole and is larger; raise thief.budgets"
            )
        held_out = 0
        if thief.training.get("early_stop_patience") is not None:
            held_out = round(thief.learning.validation_fraction * len(images))
        kept = len(images) - held_out
        model = thief.new_model("substitute", budget)
        validate = partial(agreement, images=images[kept:], said=answers[kept:].argmax(1)) if held_out else None
        path = thief.transfer.path
        keep = Keep(path.with_name(f"substitute-{budget}.state")) if path is not None else None
        report = thief.fit(
            model, images[:kept], answers[:kept], "training", budget, validate=validate, keep=keep, **self.overrides
        )
        return Rung(budget, thief.asked, model, report.epochs, report.seconds, thief.curves_within(thief.asked))


class _Purse:
    """Runs an attack's queries up to a budget. Queries are cut at every rung, so that no rung sees beyond its own."""

    def __init__(self, queries: Queries, thief: Thief, blackbox: BlackBox, chunk: int) -> None:
        self.queries, self.thief, self.blackbox, self.chunk = queries, thief, blackbox, chunk
        self.ask: Ask | None = None
        self.answers: list[Answers] = []
        self.exhausted = False

    def spend(self, limit: int) -> None:
        """Ask until ``limit`` images are answered, or the attack has nothing left to ask."""
        while self.thief.asked < limit and self.advance():
            assert self.ask is not None
            done = sum(map(len, self.answers))
            left = len(self.ask.images) - done
            affordable = limit - self.thief.asked
            if self.ask.whole and left > affordable:
                break
            count = min(left, affordable, self.chunk)
            self.answers.append(self._answer(self.ask, done, done + count))
        self.thief.transfer.flush()

    def advance(self) -> bool:
        """Send the answers of a query that is done, and take the next; False if there is none."""
        if self.exhausted or (self.ask is not None and sum(map(len, self.answers)) < len(self.ask.images)):
            return not self.exhausted
        try:
            self.ask = self.queries.send(np.concatenate(self.answers)) if self.ask is not None else next(self.queries)
        except StopIteration:
            self.exhausted = True
        self.answers = []
        return not self.exhausted

    def close(self) -> None:
        """Write what was answered."""
        self.queries.close()
        self.thief.transfer.flush()

    def _answer(self, ask: Ask, start: int, stop: int) -> Answers:
        """Answer a part of a query: from the transfer set as far as it goes, then by the black box."""
        thief, transfer = self.thief, self.thief.transfer
        images: Images | FloatImages = np.ascontiguousarray(ask.images[start:stop])  # type: ignore[assignment]
        # A probe of the pool is named as a made image, or substitutes would be trained on it.
        of_pool = ask.indices is not None and ask.learn
        names = ask.indices[start:stop] if ask.indices is not None and of_pool else content_names(images)
        known = min(max(len(transfer) - thief.asked, 0), len(images))
        parts = []
        if known:
            held = slice(thief.asked, thief.asked + known)
            learnt = transfer.is_learnt(held.stop)[held]
            if not np.array_equal(transfer.indices[held], names[:known]) or not (learnt == ask.learn).all():
                raise foreign(transfer)
            parts.append(transfer.answers[held])
        if known < len(images):
            answers = query(self.blackbox, images[known:])
            made = images[known:].astype(np.uint8) if ask.learn and not of_pool else None
            transfer.append(names[known:], answers, made=made, at_once=False)
            # A file for each query, unless an attack asks image by image.
            if transfer.unwritten * QUERIES_PER_FILE >= self.chunk:
                transfer.flush()
            parts.append(answers)
        thief.asked += len(images)
        return np.concatenate(parts)


def agreement(model: nn.Module, *, images: Images, said: npt.NDArray[np.int64]) -> float:
    """Part of the images on which a model agrees with what the victim said."""
    return metrics.fidelity(metrics.predictions(model, images), said)
