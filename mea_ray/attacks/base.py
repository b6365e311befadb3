"""What every extraction attack is: a budget spent on a black box, and a fresh substitute per rung of the budget.

Most attacks only choose images to query. They subclass ``query_attack.QueryAttack`` and write one generator. An attack
that fits no generator subclasses ``Attack`` and writes ``run``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import LearningConfig, TrainingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import BlackBox, Images, Labels

MakeModel = Callable[[], nn.Module]
"""Builds an untrained substitute from torch's global random generator; the attack seeds that first."""

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""What an attack logs about itself: for each name, (queries so far, value)."""


@dataclass(frozen=True)
class Rung:
    """One point of a robustness curve.

    Attributes:
        budget: Most images that the substitute's transfer set may hold.
        queries: Images that were charged for the substitute's transfer set, at most ``budget``.
        model: The trained substitute, on the CPU, in eval mode.
        epochs: Epochs of its training.
        seconds: Wall time of its training.
        curves: What the attack logged about itself within these queries (a policy, its rewards).
    """

    budget: int
    queries: int
    model: nn.Module
    epochs: int
    seconds: float
    curves: Curves = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A model that is stolen.

    Attributes:
        blackbox: The model, as its customers see it.
        transfer: Where answers are stored. If it holds answers already (a resumed trial), the run continues them.
        skip: Budgets whose substitutes are not needed, because their rung was finished before an interruption.
    """

    blackbox: BlackBox
    transfer: TransferSet | None = None
    skip: Container[int] = ()


@dataclass(frozen=True, kw_only=True)
class Means:
    """What a thief steals with; see ``Attack.run`` for each of them."""

    pool: Images
    budgets: Sequence[int]
    make_model: MakeModel
    training: TrainingConfig
    seed: int
    learning: LearningConfig = LearningConfig()
    labels: Labels | None = None


class Attack(ABC):
    """An extraction attack. Its keyword-only constructor parameters, all with defaults, are its configuration.

    An attack never holds the victim. It gets a ``BlackBox``, images of its own, and a way to build a network.

    Raises:
        ConfigError: A method of a subclass cannot be called as the program calls it. Raised when the class is defined.
    """

    learns_from: Literal["probabilities", "features"] = "probabilities"
    """What the black box must answer with: a classifier's probabilities, or an encoder's features."""

    uses_labels: bool = False
    """The attack reads the labels that the thief's pool was published with."""

    compares_images: bool = False
    """The substitute's loss compares the images of a batch, so that it learns nothing from one alone."""

    needs_features: bool = False
    """The attack reads features of its own network, so that one without them cannot be its substitute."""

    keeps_images: bool = True
    """Images and answers are stored, so that a substitute can be trained on them after the attack."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_overrides(cls)

    def query_cost(self, budgets: Sequence[int]) -> int:
        """Return the most images that a run over ``budgets`` is charged: what its client must be allowed.

        The rungs share one transfer set, so this is the largest budget. An attack whose rungs share nothing overrides
        this.
        """
        return max(budgets)

    def answered_images(self, transfer: TransferSet, budgets: Sequence[int]) -> int:
        """Return how many answers ``transfer`` holds for a run over ``budgets``: what was charged already."""
        return len(transfer)

    def smallest_batch(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
    ) -> int:
        """Return the fewest images that a network is trained on at once; batch normalisation needs two.

        A last batch of a single image does not count: the engine leaves it out. The arguments are those of ``check``.
        """
        return min(*budgets, training.batch_size)

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: TrainingConfig,
        learning: LearningConfig = LearningConfig(),
        *,
        labelled: bool = True,
    ) -> None:
        """Refuse what ``run`` could not finish, before a victim is trained or an image queried.

        Args:
            pool_size: Images that the thief holds.
            budgets: See ``run``.
            training: See ``run``.
            learning: See ``run``.
            labelled: The thief's pool was published with labels.

        Raises:
            ConfigError: The budgets do not rise, the pool cannot fill the largest of them, or it lacks labels.
        """
        if not budgets or budgets[0] < 1 or any(a >= b for a, b in zip(budgets, budgets[1:], strict=False)):
            raise ConfigError(f"thief.budgets={list(budgets)} must be positive and strictly ascending")
        if pool_size < max(budgets):
            raise ConfigError(
                f"the thief's pool holds {pool_size} images, thief.budgets asks for {max(budgets)}; lower the budgets "
                "or give it more images (splits.thief_pool, splits.disjoint_fraction)"
            )
        if self.uses_labels and not labelled:
            raise ConfigError(
                "this attack reads the labels of the thief's pool, which has none; choose another thief.attack, or a "
                "labelled dataset as splits.thief_pool"
            )

    @abstractmethod
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
        """Spend the budget and yield one freshly trained substitute per rung, smallest first.

        Args:
            blackbox: The victim, as its customers see it.
            pool: The thief's images, uint8 (N, C, H, W).
            budgets: Rising budgets in images. Each rung uses the nested prefix of one transfer set.
            make_model: Builds an untrained substitute.
            training: How a substitute is trained.
            seed: Seed of the order of the queries, the initial weights and the batches.
            transfer: Where answers are stored. If it holds answers already (a resumed trial), the run continues them.
            skip: Budgets whose substitutes are not needed, because their rung was finished before an interruption.
            learning: How a substitute learns from answers.
            labels: Labels that the thief's own pool was published with, int64 (N,); most attacks ignore them.

        Raises:
            ConfigError: The pool, or what the black box leaves to the thief, cannot fill the largest budget. Raised by
                the call itself, before any query and before the first rung is asked for.
        """

    def run_together(self, targets: Sequence[Target], means: Means) -> Iterator[tuple[int, Rung]]:
        """Steal several models in the same way, each with its own budget; by default one after the other.

        Args:
            targets: The models.
            means: What the thief steals each of them with.

        Yields:
            The number of a target and one of its rungs; those of one target smallest first.
        """
        for place, target in enumerate(targets):
            rungs = self.run(
                target.blackbox,
                means.pool,
                budgets=means.budgets,
                make_model=means.make_model,
                training=means.training,
                seed=means.seed,
                transfer=target.transfer,
                skip=target.skip,
                learning=means.learning,
                labels=means.labels,
            )
            for rung in rungs:
                yield place, rung


def check_overrides(attack: type[Attack]) -> None:
    """Refuse an attack with a method that cannot be called as the method that it overrides.

    Args:
        attack: A subclass of ``Attack``.

    Raises:
        ConfigError: An argument that the program passes is missing, or one that it does not pass has no default.
    """
    for name, method in vars(attack).items():
        overridden = getattr(super(attack, attack), name, None)
        if name.startswith("_") or not inspect.isfunction(method) or not inspect.isfunction(overridden):
            continue
        own, program = inspect.signature(method), inspect.signature(overridden)
        keywords = [p.name for p in program.parameters.values() if p.kind is p.KEYWORD_ONLY]
        positional = len(program.parameters) - len(keywords)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in own.parameters.values())
        missing = [keyword for keyword in keywords if keyword not in own.parameters and not takes_any]
        problem = f"does not take {', '.join(f'{keyword}=' for keyword in missing)}" if missing else ""
        try:
            own.bind(*[None] * positional, **dict.fromkeys(keywords))
        except TypeError as error:
            problem = problem or f"cannot be called as the program calls it: {error}"
        if problem:
            short = ", or subclass mea_ray.attacks.query_attack.QueryAttack and write `queries` instead"
            where = f"{attack.__module__}:{attack.__qualname__}.{name}"
            remedy = f"it must be {name}{_without_types(program)}{short if name == 'run' else ''}"
            raise ConfigError(f"{where} {problem}; {remedy}")


def _without_types(signature: inspect.Signature) -> inspect.Signature:
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
