"""The thief's side: open a black box, spend a budget, train substitutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mea_ray.api import progress as bars
from mea_ray.api.settings import Component, network
from mea_ray.attacks.base import Attack
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import AttackChoice, ModelChoice, TrainingConfig, build
from mea_ray.core.types import BlackBox, Images, Labels
from mea_ray.experiment.answers import service_policy
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.data import load_owners_part
from mea_ray.experiment.victim import Victim


@dataclass(frozen=True)
class Stolen:
    """A substitute.

    Attributes:
        model: The network, on the CPU, in eval mode.
        budget: Its query budget, in images.
        queries: Images that were answered and charged for it.
        seconds: Wall time of its training.
    """

    model: nn.Module
    budget: int
    queries: int
    seconds: float


def open_blackbox(victim: Victim | str | Path, *, budget: int | None = None, client: str = "thief") -> BlackBox:
    """Put a victim behind its query API in this process: only answers, under its policy and charged to a ledger.

    Args:
        victim: A victim or its folder.
        budget: Query budget of the client in images; None for no limit.
        client: Name of the client.
    """
    owned = victim if isinstance(victim, Victim) else Victim.load(victim)
    ledger = Ledger(None)
    ledger.register(client, budget)
    policy = service_policy(owned.config, load_owners_part(owned.config), owned.model, owned.key)
    return LocalBlackBox(owned.model, policy, ledger, client)


def steal(
    blackbox: BlackBox,
    images: Images,
    *,
    budgets: Sequence[int],
    attack: Component = "knockoff",
    model: str | Mapping[str, Any] | type[nn.Module] = "vgg_like",
    training: Mapping[str, Any] | None = None,
    labels: Labels | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Stolen]:
    """Steal the model behind a black box, once for each budget.

    Args:
        blackbox: The black box, from ``open_blackbox`` or any object with ``query``.
        images: The thief's images, uint8 (N, C, H, W).
        budgets: Query budgets in images, ascending. Transfer sets are nested; each substitute is trained from scratch.
        attack: The attack by name or with its options.
        model: The substitute's network.
        training: Settings of its training.
        labels: Class indices of the images, for attacks that use labels.
        seed: Seed of the attack.
        progress: Show a bar.

    Returns:
        The substitutes, smallest budget first.

    Raises:
        ConfigError: The attack cannot be run with these images and budgets; nothing was queried.
        OverBudget: The black box grants fewer images.
    """
    chosen: Attack = build(AttackChoice, _named(attack)).build()
    choice = build(ModelChoice, _named(network(model)))
    section = build(TrainingConfig, dict(training or {}))
    wanted = tuple(budgets)
    chosen.check(len(images), wanted, section, labelled=labels is not None)
    stolen: list[Stolen] = []
    with bars.bar(progress) as update:
        update(f"stealing with {wanted[0]:,} queries", 0, len(wanted))
        for rung in chosen.run(
            blackbox,
            images,
            budgets=wanted,
            make_model=lambda: build_network(choice, blackbox.image_shape, blackbox.classes),
            training=section,
            seed=seed,
            labels=labels,
        ):
            stolen.append(Stolen(rung.model, rung.budget, rung.queries, rung.seconds))
            update("stealing", len(stolen), len(wanted))
    return stolen


def _named(component: Component) -> dict[str, Any]:
    return {"name": component} if isinstance(component, str) else dict(component)
