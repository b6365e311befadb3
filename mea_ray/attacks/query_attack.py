"""The base class of most attacks: a generator chooses the queries, the base does everything else.

An attack subclasses ``QueryAttack`` and writes ``queries``, a generator that yields images and receives their answers.
The base class spends the budget, stores every answer, survives a kill, and trains a fresh substitute for each rung.

What the generator yields may depend on ``thief.seed`` and on the answers it received, and on nothing else. Then a
stored transfer set answers a restarted attack up to where it was killed, and the substitute of a budget depends only on
the queries within that budget, whatever larger budgets follow.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Container, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import numpy as np
import numpy.typing as npt
from torch import nn

from mea_ray.attacks.base import Attack, Curves, MakeModel, Means, Rung, Target
from mea_ray.attacks.learning import DistillationObjective, Learning
from mea_ray.attacks.queries import BudgetedQueries, check_remaining
from mea_ray.attacks.thief import Queries, Query, Thief
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import LearningConfig, TrainingConfig
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Answers, BlackBox, Images, Labels
from mea_ray.evaluation import metrics
from mea_ray.training.engine import TrainReport
from mea_ray.training.objective import Objective
from mea_ray.training.stack import Training, train_together

__all__ = ["Queries", "Query", "QueryAttack", "Thief"]


class QueryAttack(Attack):
    """An attack that fills a transfer set and trains a fresh substitute on each rung's prefix of it.

    A subclass writes ``queries``. It may also override the attributes below, ``pool_needed``, ``objective`` and
    ``substitute``.
    """

    training_overrides: Mapping[str, Any] = {}
    """Settings of a substitute's training that this attack needs instead of the thief's own."""
    default_temperature: float = 1.0
    """Temperature of the substitute's loss where ``thief.learning.temperature`` is null."""
    trains_online: bool = False
    """``queries`` trains the substitute itself: it must receive all answers of a budget before ``substitute``."""
    query_chunk: int = 1024
    """Images in a query at most."""

    @abstractmethod
    def queries(self, thief: Thief) -> Queries:
        """Yield what to query next, forever or until nothing is left to query; the base class stops at the budget.

        See ``thief.Queries`` for what may be yielded. ``answers = yield images`` receives float32 (N, classes).
        """

    def objective(self, learning: Learning, answers: Answers) -> Objective:
        """Make the objective of a substitute on its answers, float32 (N, classes)."""
        return DistillationObjective(learning, answers)

    def pool_needed(self, budgets: Sequence[int]) -> int:
        """Return how many images the thief's pool must hold at least."""
        return max(budgets)

    def first_training(self, pool_size: int, budgets: Sequence[int]) -> int:
        """Return how many images the first network is trained on, if that is before the first budget is spent."""
        return budgets[0]

    def learning(self, settings: LearningConfig) -> Learning:
        """Return the settings ``thief.learning`` with this attack's temperature where they have none."""
        learning = Learning(**dict(settings))
        return learning if learning.temperature is not None else learning.changed(temperature=self.default_temperature)

    def smallest_batch(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
    ) -> int:
        """Return the fewest images that a network is trained on at once; see ``Attack.smallest_batch``."""
        held_out = held_out_images(budgets[0], training, self.learning(learning))
        return min(budgets[0] - held_out, training.batch_size, self.first_training(pool_size, budgets))

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
        *,
        labelled: bool = True,
    ) -> None:
        """Refuse what ``run`` could not finish; see ``Attack.check``."""
        # The base class compares the pool with the budget, which not every attack fills from its pool.
        super().check(max(pool_size, *budgets) if budgets else pool_size, budgets, training, labelled=labelled)
        needed = self.pool_needed(budgets)
        if pool_size < needed:
            raise ConfigError(
                f"the thief's pool holds {pool_size} images, this attack needs {needed} for thief.budgets="
                f"{list(budgets)}; lower the budgets or give it more images (splits.thief_pool, "
                "splits.disjoint_fraction)"
            )
        chosen = self.learning(learning)
        if training.early_stop_patience is None:
            return
        if not chosen.validation_fraction:
            raise ConfigError(
                f"early_stop_patience={training.early_stop_patience} of the substitute needs held-out answers; set "
                "thief.learning.validation_fraction (e.g. 0.1) or thief.training.early_stop_patience=null"
            )
        for budget in budgets:
            held_out = held_out_images(budget, training, chosen)
            if held_out < 1 or held_out >= budget:
                raise ConfigError(
                    f"a budget of {budget} leaves {budget - held_out} images to train on and {held_out} to validate "
                    "with; raise thief.budgets or change thief.learning.validation_fraction"
                )

    @final
    def run(
        self,
        blackbox: BlackBox,
        pool: Images,
        *,
        budgets: Sequence[int],
        make_model: MakeModel,
        training: TrainingConfig,
        seed: int,
        transfer: TransferSet | None = None,
        skip: Container[int] = (),
        learning: LearningConfig = LearningConfig(),
        labels: Labels | None = None,
    ) -> Iterator[Rung]:
        """Spend the budget and yield one freshly trained substitute per rung; see ``Attack.run``."""
        means = Means(
            pool=pool,
            budgets=budgets,
            make_model=make_model,
            training=training,
            seed=seed,
            learning=learning,
            labels=labels,
        )
        thief, wanted = self._thief(Target(blackbox, transfer, skip), means)
        return self.rungs(thief, blackbox, budgets, wanted)

    @final
    def run_together(self, targets: Sequence[Target], means: Means) -> Iterator[tuple[int, Rung]]:
        """Steal several models; the substitutes of a budget are trained as ``training.stack`` says.

        See ``Attack.run_together``.
        """
        if not self.trains_apart():
            yield from super().run_together(targets, means)
            return
        thefts = [(*self._thief(target, means), target.blackbox) for target in targets]
        with contextlib.ExitStack() as stack:
            spending = [self._spend(thief, box, means.budgets, wanted) for thief, wanted, box in thefts]
            for each in spending:
                stack.callback(each.close)
            for budget in means.budgets:
                places = [place for place, (_, wanted, _) in enumerate(thefts) if budget in wanted]
                due: list[Substitute] = []
                for place in places:
                    next(spending[place])
                    substitute = self.prepare(thefts[place][0], budget)
                    due.append(substitute.sharing_images(due[0]) if due else substitute)
                reports = train_together([substitute.training for substitute in due])
                for place, substitute, report in zip(places, due, reports, strict=True):
                    yield place, substitute.rung(report)
            for thief, _, _ in thefts:
                thief.forget_snapshots()

    def trains_apart(self) -> bool:
        """Whether substitutes are trained once their budget is spent, as ``prepare`` says: several can be stacked."""
        own = type(self)
        return own.rungs is QueryAttack.rungs and own.substitute is QueryAttack.substitute

    def _thief(self, target: Target, means: Means) -> tuple[Thief, list[int]]:
        """Check what ``run`` was given; return the thief and the budgets whose substitutes are wanted."""
        budgets = means.budgets
        self.check(len(means.pool), budgets, means.training, means.learning, labelled=means.labels is not None)
        transfer = target.transfer if target.transfer is not None else TransferSet()
        wanted = [budget for budget in budgets if budget not in target.skip]
        if wanted:
            # What a kill lost was charged already, and querying it again is free: the query under way, and the answers
            # that waited for a file to be full.
            lost = 2 * self.query_chunk if transfer.path is not None else 0
            needed = self.query_cost(wanted) - self.answered_images(transfer, wanted)
            check_remaining(target.blackbox, needed, lost)
        learning = self.learning(means.learning)
        thief = Thief(
            means.pool,
            means.labels if self.uses_labels else None,
            target.blackbox.classes,
            target.blackbox.image_shape,
            transfer,
            learning,
            means.training,
            means.seed,
            means.make_model,
            first_wanted=min(wanted, default=None),
            objective=partial(self.objective, learning),
        )
        return thief, wanted

    def rungs(self, thief: Thief, blackbox: BlackBox, budgets: Sequence[int], wanted: Sequence[int]) -> Iterator[Rung]:
        """Spend up to each budget in turn, and yield the substitutes of those that are ``wanted``."""
        with contextlib.closing(self._spend(thief, blackbox, budgets, wanted)) as spending:
            for budget in spending:
                yield self.substitute(thief, budget)
        thief.forget_snapshots()

    def _spend(
        self, thief: Thief, blackbox: BlackBox, budgets: Sequence[int], wanted: Sequence[int]
    ) -> Generator[int, None, None]:
        """Spend up to each budget in turn, and yield those that are ``wanted`` once they are spent."""
        queries = BudgetedQueries(self.queries(thief), thief, blackbox, self.query_chunk)
        try:
            for budget in budgets:
                if budget > max(wanted, default=0):
                    break
                # A rung that is not wanted still cuts the queries: they must not depend on what is left to do.
                queries.spend(budget)
                if self.trains_online:
                    queries.advance()
                if budget in wanted:
                    yield budget
        finally:
            queries.close()

    def substitute(self, thief: Thief, budget: int) -> Rung:
        """Train the substitute of a rung from new weights, on all answers so far, at most ``budget``."""
        due = self.prepare(thief, budget)
        return due.rung(due.training.run())

    def prepare(self, thief: Thief, budget: int) -> Substitute:
        """Return the training of a rung's substitute, see ``substitute``."""
        images, answers = thief.training_set()
        if not len(images):
            raise DataError(
                f"a budget of {budget} leaves nothing to train on: all {thief.queries_spent} queries within it are "
                "probes, or the first query must be answered whole and is larger; raise thief.budgets"
            )
        trained_on = len(images) - held_out_images(len(images), thief.training, thief.learning)
        held_out, labels = images[trained_on:], answers[trained_on:].argmax(1)
        training = thief.prepare(
            thief.new_model("substitute", budget),
            images[:trained_on],
            answers[:trained_on],
            "training",
            budget,
            validate=partial(agreement, images=held_out, labels=labels) if len(held_out) else None,
            **self.training_overrides,
        )
        spent = thief.queries_spent
        return Substitute(training, budget, spent, thief.curves_within(spent))


@dataclass(frozen=True)
class Substitute:
    """A substitute that is ready to be trained: its training, and what its ``Rung`` says beside."""

    training: Training
    budget: int
    queries: int
    curves: Curves

    def sharing_images(self, other: Substitute) -> Substitute:
        """Return this one with the other's array of images, if they are equal: most thefts query the same images."""
        images = other.training.images
        if not np.array_equal(images, self.training.images):
            return self
        return replace(self, training=replace(self.training, images=images))

    def rung(self, report: TrainReport) -> Rung:
        """Return the rung of the trained substitute."""
        return Rung(self.budget, self.queries, self.training.model, report.epochs, report.seconds, self.curves)


def held_out_images(images: int, training: TrainingConfig, learning: Learning) -> int:
    """Return how many of the answered images a substitute is validated with, for its early stop."""
    return round(learning.validation_fraction * images) if training.early_stop_patience is not None else 0


def agreement(model: nn.Module, *, images: Images, labels: npt.NDArray[np.int64]) -> float:
    """Return the fraction of images, uint8 (N, C, H, W), on which a model predicts the victim's labels (N,)."""
    return metrics.fidelity(metrics.predictions(model, images), labels)


def refuse_unlean(learning: Learning, why: str) -> None:
    """Refuse a cleaning that needs all answers at once, for an attack that never has them.

    Raises:
        ConfigError: ``thief.learning.answers`` is ``unlean``.
    """
    if learning.answers == "unlean":
        raise ConfigError(
            f"thief.learning.answers=unlean needs all answers at once, but {why}; choose argmax or sharpen"
        )
