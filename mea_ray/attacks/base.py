"""What every extraction attack is: a budget spent through a black box, and a fresh substitute per rung."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from mea_ray.attacks.transfer import TransferSet
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import BlackBox, Images, Labels

MakeModel = Callable[[], nn.Module]
"""Builds an untrained substitute; the attack seeds torch before it calls this."""

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""What an attack logs of itself: for each name, (queries so far, value)."""


@dataclass(frozen=True)
class Rung:
    """One point of a robustness curve.

    Attributes:
        budget: Images the substitute's transfer set may hold at most.
        queries: Images that were charged for this substitute's transfer set.
        model: The trained substitute, on the CPU, in eval mode.
        epochs: Epochs it was trained.
        seconds: Wall time of its training.
        curves: What the attack logged of itself within these queries (a policy, its rewards).
    """

    budget: int
    queries: int
    model: nn.Module
    epochs: int
    seconds: float
    curves: Curves = field(default_factory=dict)


class Attack(ABC):
    """An extraction attack. Keyword-only constructor parameters, all with defaults, are its configuration.

    An attack never holds the victim: only a ``BlackBox``, unlabelled images of its own, and a way to build a network.
    """

    learns_from: Literal["probabilities", "features"] = "probabilities"
    """What its black box must answer with: a classifier's probabilities, or an encoder's features."""

    keeps_images: bool = True
    """Whether images and their answers are kept when it is done, so that the substitute can be trained on later."""

    def query_cost(self, budgets: Sequence[int]) -> int:
        """Return the images that a run over ``budgets`` is charged at most: what its client must be registered with.

        The rungs share one transfer set, so this is the largest budget; an attack whose rungs share nothing overrides.
        """
        return max(budgets)

    def answered_images(self, transfer: TransferSet, budgets: Sequence[int]) -> int:
        """Return how many answers a run over ``budgets`` finds in ``transfer``: what it was charged for already."""
        return len(transfer)

    def check(
        self,
        pool_size: int,
        budgets: Sequence[int],
        training: Mapping[str, Any],
        learning: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what ``run`` could not finish, before a victim is trained or a query asked.

        Args:
            pool_size: Images that the thief holds.
            budgets: See ``run``.
            training: See ``run``.
            learning: See ``run``.

        Raises:
            ConfigError: The budgets do not rise, or the pool cannot fill the largest of them.
        """
        if not budgets or budgets[0] < 1 or any(a >= b for a, b in zip(budgets, budgets[1:], strict=False)):
            raise ConfigError(f"thief.budgets={list(budgets)} must be positive and strictly rising")
        if pool_size < max(budgets):
            raise ConfigError(
                f"the thief's pool holds {pool_size} images, thief.budgets asks for {max(budgets)}; lower the budgets "
                "or give it more images (splits.thief_pool, splits.disjoint_fraction)"
            )

    @abstractmethod
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
        """Spend the budget and yield one freshly trained substitute per rung, smallest first.

        Args:
            blackbox: The victim, as its customers see it.
            pool: The thief's images, uint8 (N, C, H, W).
            budgets: Rising budgets in images; each rung uses the nested prefix of one transfer set.
            make_model: Builds an untrained substitute.
            training: Settings of ``mea_ray.training.engine.train``.
            seed: Seed of the order of the queries, the initial weights and the batches.
            transfer: Where answers are cached; one that holds answers already (a resumed trial) is continued.
            skip: Budgets whose substitutes are not needed (their rung finished before an interruption).
            learning: How a substitute learns from answers: fields of ``attacks.learning.Learning``.
            labels: Labels that the thief's own pool was published with, int64 (N,); most attacks ignore them.

        Raises:
            ConfigError: The pool, or what the black box leaves to the thief, cannot fill the largest budget. Raised by
                the call itself, before any query and before the first rung is asked for.
        """
