"""The theft: opens accounts at the query service, spends the budget, and trains a substitute per budget."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from mea_ray.attacks.base import Attack, Means, Rung, Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.colluding import Colluding, CountingClient, account_names, account_share
from mea_ray.config import ExperimentConfig, ThiefConfig
from mea_ray.core.seeding import derive
from mea_ray.core.types import BlackBox, Images, Labels, Splits
from mea_ray.experiment.checks import build_network, pool_labels
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport, RungResult
from mea_ray.training.checkpoint import weights_digest


def total_budget(config: ExperimentConfig) -> int:
    """Return the thief's total budget in images: the largest budget, or their sum if the rungs share no answers."""
    attack: Attack = config.thief.attack.build()
    return attack.query_cost(config.thief.budgets)


def answers_received(config: ExperimentConfig, transfer: TransferSet) -> int:
    """Return the number of answers in the transfer set of an interrupted theft."""
    attack: Attack = config.thief.attack.build()
    return attack.answered_images(transfer, config.thief.budgets)


def answers_stored(transfer: TransferSet) -> int | None:
    """Return the number of answers in a transfer set, including the separate transfer sets of rungs in its folder.

    None for an empty one in memory: an attack that queries in every step stores no answers.
    """
    if transfer.path is None:
        return len(transfer) or None
    own = [TransferSet(folder) for folder in sorted(transfer.path.iterdir()) if folder.is_dir()]
    return len(transfer) + sum(map(len, own))


def account_budgets(config: ExperimentConfig, client: str) -> dict[str, int]:
    """Return the thief's accounts, named after ``client``, with the budget of each in images."""
    names, budget = account_names(client, config.thief.accounts), total_budget(config)
    return {name: account_share(index, len(names), budget) for index, name in enumerate(names)}


def open_blackbox(
    config: ExperimentConfig,
    client: str,
    transfer: TransferSet,
    open_account: Callable[[str, int], CountingClient],
    *,
    at_once: bool = False,
) -> BlackBox:
    """Return the thief's black box: its account, or all of its accounts as one.

    Args:
        config: The experiment.
        client: Base of the accounts' names, see ``account_budgets``.
        transfer: The answers received so far.
        open_account: Opens an account, given its name and the number of images that it has already queried.
        at_once: The accounts can be queried at the same time.
    """
    names, asked = account_names(client, config.thief.accounts), answers_received(config, transfer)
    opened = [open_account(name, account_share(index, len(names), asked)) for index, name in enumerate(names)]
    if len(opened) == 1:
        return opened[0]
    return Colluding(opened, budget=total_budget(config), start_at=asked, at_once=at_once)


@dataclass(frozen=True)
class Theft:
    """Everything that a thief has: its settings and its images.

    This is all that an attack's process gets of an experiment: no test images, no seed of the experiment, no watermark.

    Attributes:
        settings: The ``thief`` section.
        seed: The thief's own seed, from which the experiment's cannot be derived.
        shape: (channels, height, width) of the victim's input.
        classes: Number of classes of the data.
        pool: The thief's images, uint8 (N, C, H, W).
        labels: Labels that the pool was published with, int64 (N,); None without any. Only an attack that declares to
            use them gets them (Knockoff's adaptive policy).
        snapshot_every_s: See ``resources.snapshot_every_s``.
    """

    settings: ThiefConfig
    seed: int
    shape: tuple[int, int, int]
    classes: int
    pool: Images
    labels: Labels | None
    snapshot_every_s: float | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, data: Splits) -> Theft:
        """Return the theft of an experiment."""
        pool, seed = data.thief_pool.images, derive(config.seed, "thief")
        every_s = config.resources.snapshot_every_s
        return cls(config.thief, seed, data.shape, data.classes, pool, pool_labels(data), every_s)

    def run(self, targets: Sequence[Target]) -> Iterator[tuple[int, Rung]]:
        """Steal several models in this process with the same attack, see ``Attack.run_together``.

        Yields:
            The index of a target and one newly trained substitute per budget that is not skipped; per target, smallest
            budget first.
        """
        attack: Attack = self.settings.attack.build()
        return attack.run_together(targets, self.means())

    def means(self) -> Means:
        """Return the inputs of the attack."""
        settings = self.settings
        return Means(
            pool=self.pool,
            budgets=settings.budgets,
            make_model=partial(build_network, settings.model, self.shape, self.classes),
            training=settings.training,
            seed=self.seed,
            learning=settings.learning,
            labels=self.labels,
        )


Steal = Callable[[Theft, Sequence[Target]], Iterator[tuple[int, Rung]]]
"""Carries out a theft: ``Theft.run`` in this process, ``attack_process.parent.steal`` in another one."""


def run_attack(
    config: ExperimentConfig,
    data: Splits,
    blackbox: BlackBox,
    transfer: TransferSet | None = None,
    skip: Container[int] = (),
) -> Iterator[Rung]:
    """Carry out the theft of an experiment in this process, see ``Theft.run``."""
    return (rung for _, rung in Theft.of(config, data).run([Target(blackbox, transfer, skip)]))


def rung_result(rung: Rung, report: ModelReport) -> RungResult:
    """Return one point of the robustness curve."""
    return RungResult(
        budget=rung.budget,
        queries=rung.queries,
        report=report,
        epochs=rung.epochs,
        seconds=rung.seconds,
        curves={name: list(points) for name, points in rung.curves.items()},
        weights_sha256=weights_digest(rung.model) if isinstance(rung.model, ImageModel) else None,
    )
