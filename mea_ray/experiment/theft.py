"""What the thief does: opens accounts at the query service, spends its budget, and trains a substitute per budget."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import partial

from mea_ray.attacks.base import Attack, Rung
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.colluding import Colluding, CountingClient, account_names, account_share
from mea_ray.config import ExperimentConfig
from mea_ray.core.seeding import derive
from mea_ray.core.types import BlackBox, Splits
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


def run_attack(
    config: ExperimentConfig,
    data: Splits,
    blackbox: BlackBox,
    transfer: TransferSet | None = None,
    skip: Container[int] = (),
) -> Iterator[Rung]:
    """Steal the model behind ``blackbox``: one fresh substitute per budget that is not in ``skip``, smallest first.

    The attack gets the thief's pool and nothing else of the data: no test images, and of the pool's labels, which its
    publisher gave, only what an attack says it uses (Knockoff's adaptive policy).
    """
    attack: Attack = config.thief.attack.build()
    return attack.run(
        blackbox,
        data.thief_pool.images,
        budgets=config.thief.budgets,
        make_model=partial(build_network, config.thief.model, data.shape, data.classes),
        training=config.thief.training,
        seed=derive(config.seed, "thief"),
        transfer=transfer,
        skip=skip,
        learning=config.thief.learning,
        labels=pool_labels(data),
    )


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
