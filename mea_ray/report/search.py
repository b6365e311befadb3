"""The outcome of a search: the best feasible trial, or the front of several objectives, and the infeasible trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mea_ray.config import SearchConfig, build, load_tree
from mea_ray.core.errors import ConfigError
from mea_ray.report import tables
from mea_ray.report.verdict import last_rung
from mea_ray.results.numbers import trial_metrics
from mea_ray.results.points import label
from mea_ray.results.records import TrialResult
from mea_ray.sweep.objective import best, violation

MAX_LINES = 20
_WHOLE = {"queries"}


@dataclass(frozen=True)
class SearchOutcome:
    """The outcome of a search, as display texts.

    Attributes:
        title: The objective, and the number of trials.
        headings: Columns: setting, objectives, constraints.
        lines: The best trials, best first.
    """

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def search_of(folder: Path) -> SearchConfig | None:
    """Return the search of a sweep's folder; None for grid and random, or if its file is missing."""
    try:
        search = build(SearchConfig, load_tree(folder / "sweep.yaml").get("search") or {})
    except ConfigError:
        return None
    return search if search.adaptive or search.constraints else None


def outcome(search: SearchConfig, results: Sequence[TrialResult]) -> SearchOutcome | None:
    """Return the best trials by their last rung; None without a finished rung."""
    ended = [(result, rung) for result in results if (rung := last_rung(result)) is not None]
    if not ended:
        return None
    # A trial was stopped by the scheduler because it lagged; its last rung has a smaller budget.
    full = [(result, rung) for result, rung in ended if result.status == "finished"] or ended
    numbers = [trial_metrics(result, rung) for result, rung in full]
    infeasible = sum(violation(search, each) != 0 for each in numbers)
    places = best(search, numbers)
    names = list(dict.fromkeys([*(name for name, _ in search.objectives), *search.constraints]))
    goal = " and ".join(f"{name} ({mode})" for name, mode in search.objectives)
    limits = ", ".join(f"{name} <= {limit:g}" for name, limit in search.constraints.items())
    title = f"Best by {goal}{f' with {limits}' if limits else ''}: {len(places)} of {len(full)} trials"
    held_out = ended[0][0].config.get("splits", {}).get("held_out", "test")
    title += ", on validation images" if held_out == "validation" else ", on test images: report other seeds"
    if search.constraints:
        title += f"; {infeasible} out of bounds"
    return SearchOutcome(
        title=title,
        headings=("Setting", *names),
        lines=tuple(
            (label(full[place][0].point, seeds=True), *(_text(name, numbers[place][name]) for name in names))
            for place in places[:MAX_LINES]
        ),
    )


def _text(name: str, value: float) -> str:
    if math.isnan(value):
        return tables.DASH
    if name == "p_value":
        return tables.p_text(value)
    return f"{value:,.0f}" if name in _WHOLE else tables.percent(value)
