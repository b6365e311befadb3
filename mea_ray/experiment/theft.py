"""What the thief does: opens accounts at the query service, spends its budget, and trains a substitute per budget."""

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
    """Return the images that the thief may be charged in all: the largest budget, unless its rungs share nothing."""
    attack: Attack = config.thief.attack.build()
    return attack.query_cost(config.thief.budgets)


def answers_received(config: ExperimentConfig, transfer: TransferSet) -> int:
    """Return how many answers of an interrupted theft its transfer set holds."""
    attack: Attack = config.thief.attack.build()
    return attack.answered_images(transfer, config.thief.budgets)


def answers_stored(transfer: TransferSet) -> int | None:
    """Return how many answers a transfer set holds, with those of rungs that have one of their own in its folder.

    None for an empty one in memory: an attack that queries in every step stores nothing there.
    """
    if transfer.path is None:
        return len(transfer) or None
    own = [TransferSet(folder) for folder in sorted(transfer.path.iterdir()) if folder.is_dir()]
    return len(transfer) + sum(map(len, own))


def account_budgets(config: ExperimentConfig, client: str) -> dict[str, int]:
    """Return the thief's accounts, named after ``client``, with the images that each may be charged."""
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
    """Return what the thief queries: its account, or all of its accounts as one.

    Args:
        config: The experiment.
        client: What the accounts are named after, see ``account_budgets``.
        transfer: The answers received so far.
        open_account: Opens the account of a name that has asked so many images before.
        at_once: The accounts may be asked at the same time.
    """
    names, asked = account_names(client, config.thief.accounts), answers_received(config, transfer)
    opened = [open_account(name, account_share(index, len(names), asked)) for index, name in enumerate(names)]
    if len(opened) == 1:
        return opened[0]
    return Colluding(opened, budget=total_budget(config), start_at=asked, at_once=at_once)


@dataclass(frozen=True)
class Theft:
    """All that a thief starts with: settings of its own, and images of its own.

    Nothing else of an experiment is in here, so that this is what an attack's process is given: no test images, and of
    the settings no seed and no watermark.

    Attributes:
        settings: The ``thief`` section.
        seed: The thief's own seed, from which the experiment's does not follow.
        shape: (channels, height, width) that the victim takes.
        classes: Classes of the data.
        pool: The thief's images, uint8 (N, C, H, W).
        labels: Labels that the pool was published with, int64 (N,); None if it has none. An attack gets them only if it
            says that it uses them (Knockoff's adaptive policy).
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
        """Steal models in this process, all in the same way, see ``Attack.run_together``.

        Yields:
            The number of a target and one fresh substitute of it per budget that is not skipped; those of one target
            smallest budget first.
        """
        attack: Attack = self.settings.attack.build()
        return attack.run_together(targets, self.means())

    def means(self) -> Means:
        """Return what the attack gets."""
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
"""Carries out a theft, as ``Theft.run`` does in this process and ``apart.process.steal`` in another one."""


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
