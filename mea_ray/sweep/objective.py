"""The objective of a search: one metric or the front of several, under constraints.

Optuna handles constraints itself (`optuna_search`). ASHA compares a single number, so for ASHA only, the number of an
infeasible trial is replaced by one worse than any feasible trial's (``judged``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from mea_ray.config import SearchConfig

JUDGED = "judged"
"""The metric for ASHA: the first objective, or a number worse than any if the trial is infeasible."""
_WORST = 1e6


def violation(search: SearchConfig, numbers: Mapping[str, float]) -> float:
    """Return the total constraint violation of a trial's numbers; 0 if it is feasible, NaN if unknown."""
    beyond = [numbers[name] - limit for name, limit in search.constraints.items()]
    return math.nan if any(map(math.isnan, beyond)) else sum(max(0.0, each) for each in beyond)


def judged(search: SearchConfig, numbers: Mapping[str, float]) -> float:
    """Return the number that ASHA compares.

    Args:
        search: The search.
        numbers: Metrics of a rung.

    Returns:
        The first objective of a feasible trial. Infeasible ones get a value worse than every feasible one (metrics are
        far from +-1e6, queries included in any realistic sweep), increasing with the violation.
    """
    metric, mode = search.objectives[0]
    beyond = violation(search, numbers)
    if math.isnan(beyond) or beyond > 0:
        worst = _WORST * (1 + (1 if math.isnan(beyond) else beyond))
        return -worst if mode == "max" else worst
    return numbers[metric]


def best(search: SearchConfig, trials: Sequence[Mapping[str, float]]) -> list[int]:
    """Return the indices of the best trials: feasible, and not dominated by another feasible one.

    Args:
        search: The search.
        trials: Metrics of each trial's last rung; one with NaN among objectives or constraints is skipped.

    Returns:
        Indices, best value of the first objective first: for one objective one trial, or several with equal values; for
        several objectives the Pareto front.
    """
    signs = {name: 1.0 if mode == "max" else -1.0 for name, mode in search.objectives}
    points = {
        place: tuple(sign * numbers[name] for name, sign in signs.items())
        for place, numbers in enumerate(trials)
        if violation(search, numbers) == 0 and not any(math.isnan(numbers[name]) for name in signs)
    }
    front = [place for place, own in points.items() if not _dominated(own, points.values())]
    return sorted(front, key=lambda place: points[place], reverse=True)


def _dominated(own: tuple[float, ...], others: Iterable[tuple[float, ...]]) -> bool:
    return any(other != own and all(o >= m for o, m in zip(other, own, strict=True)) for other in others)
