"""``mea-ray nulls``: the innocent models that a victim's suspects are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mea_ray import api
from mea_ray.config import ExperimentConfig, build
from mea_ray.config.overrides import overridden, split_override
from mea_ray.experiment.victim import Victim
from mea_ray.experiment.victim.nulls import budgets, innocent, read_nulls, stolen
from mea_ray.report.terminal import make_console


def with_overrides(victim: Victim, overrides: Sequence[str]) -> ExperimentConfig:
    """Return a victim's experiment with settings of the command line.

    Raises:
        ConfigError: A setting is unknown, or its value is wrong.
    """
    if not overrides:
        return victim.config
    tree, _ = overridden(ExperimentConfig, victim.config.resolved(), list(map(split_override, overrides)))
    return build(ExperimentConfig, tree)


def nulls(
    folder: Path, count: int, stolen: int, budgets: Sequence[int], overrides: Sequence[str], address: str | None
) -> None:
    """Train and measure null models of a victim.

    Args:
        folder: The victim's folder.
        count: Total number of null models.
        stolen: How many of them to steal as well.
        budgets: Budgets of these thefts; those of the victim's experiment if empty.
        overrides: Config paths to override: the thief's, or the location of the data.
        address: Ray cluster.
    """
    victim = Victim.load(folder)
    named = [f"thief.budgets=[{','.join(map(str, sorted(budgets)))}]"] if budgets else []
    config = with_overrides(victim, [*overrides, *named])
    victim = api.nulls(victim, count, stolen=stolen, config=config, address=address)
    show(victim)


def show(victim: Victim) -> None:
    """Print the number of null models, and the cost of the mark relative to them."""
    records, card = read_nulls(victim), victim.about.card
    console = make_console()
    own = [report.statistics.get("wsr", 0.0) for report in innocent(records)]
    console.print(f"null models   {len(own)}, WSR {100 * min(own):.1f}% to {100 * max(own):.1f}%", highlight=False)
    for budget in budgets(records):
        rates = [record.report.statistics.get("wsr", 0.0) for record in stolen(records, budget)]
        console.print(
            f"stolen        {len(rates)} with {budget:,} queries, WSR {100 * min(rates):.1f}% to "
            f"{100 * max(rates):.1f}%",
            highlight=False,
        )
    if card.accuracy_null is not None:
        console.print(
            f"accuracy      {100 * card.accuracy_null:.1f}% without the mark, {100 * card.accuracy:.1f}% with it",
            highlight=False,
        )
    if card.source_cost is not None:
        console.print(
            f"cost          {100 * card.source_cost:.1f} points on the classes that carry it", highlight=False
        )
    console.print(f"\nnext          mea-ray verify {victim.folder} --suspect FILE", soft_wrap=True, highlight=False)
