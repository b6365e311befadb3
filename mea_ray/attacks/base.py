"""What every extraction attack is: a budget spent through a black box, and a fresh substitute per rung."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mea_ray.attacks.transfer import TransferSet
from mea_ray.types import BlackBox, Images

MakeModel = Callable[[], nn.Module]
"""Builds an untrained substitute; the attack seeds torch before it calls this."""


@dataclass(frozen=True)
class Rung:
    """One point of a robustness curve.

    Attributes:
        budget: Images the substitute's transfer set may hold at most.
        queries: Images that were charged for this substitute's transfer set.
        model: The trained substitute, on the CPU, in eval mode.
        epochs: Epochs it was trained.
        seconds: Wall time of its training.
    """

    budget: int
    queries: int
    model: nn.Module
    epochs: int
    seconds: float


class Attack(ABC):
    """An extraction attack. Keyword-only constructor parameters, all with defaults, are its configuration.

    An attack never holds the victim: only a ``BlackBox``, unlabelled images of its own, and a way to build a network.
    """

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

        Raises:
            ConfigError: The pool cannot fill the largest budget.
        """
