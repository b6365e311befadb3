"""What a search looks for: one metric or the front of several, under constraints.

Tune's searcher for Optuna knows no constraints, Optuna itself does: its samplers prefer feasible trials to infeasible
ones and, among the latter, the lesser violation. ``searcher_class`` tells Optuna how far each trial is beyond each
limit. Nothing is penalised there; WSR and the rest stay what was measured. Only for ASHA, which knows one number and
nothing of Optuna, an infeasible trial's number is replaced (``judged``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from mea_ray.config import SearchConfig

JUDGED = "judged"
"""What ASHA compares: the first objective, or a number worse than any if the trial is infeasible."""
_WORST = 1e6


def violation(search: SearchConfig, numbers: Mapping[str, float]) -> float:
    """Return by how much a trial's numbers are beyond the constraints, summed; 0 if it is feasible, NaN if unknown."""
    beyond = [numbers[name] - limit for name, limit in search.constraints.items()]
    return math.nan if any(map(math.isnan, beyond)) else sum(max(0.0, each) for each in beyond)


def judged(search: SearchConfig, numbers: Mapping[str, float]) -> float:
    """Return the number that ASHA compares.

    Args:
        search: The search.
        numbers: Metrics of a rung.

    Returns:
        The first objective of a feasible trial. Infeasible ones are worse than every feasible one (metrics are far
        from +-1e6, queries included in any sweep that ends), the more the further they are beyond the limits.
    """
    metric, mode = search.objectives[0]
    beyond = violation(search, numbers)
    if math.isnan(beyond) or beyond > 0:
        worst = _WORST * (1 + (1 if math.isnan(beyond) else beyond))
        return -worst if mode == "max" else worst
    return numbers[metric]


def best(search: SearchConfig, trials: Sequence[Mapping[str, float]]) -> list[int]:
    """Return the positions of the best trials: feasible, and no other feasible one is as good in all objectives.

    Args:
        search: The search.
        trials: Metrics of each trial's last rung; one with a NaN among objectives or constraints is passed over.

    Returns:
        Positions by falling value of the first objective (rising for ``min``): one trial, or several with equal values,
        for one objective; the Pareto front for several.
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


@cache
def searcher_class() -> Any:
    """Return Tune's searcher for Optuna, with constraints; made when needed, for both are slow to import."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    class ConstrainedSearch(OptunaSearch):  # type: ignore[misc]
        """Optuna's TPE over one or several objectives, which is told of each trial how far it is beyond the limits."""

        def __init__(
            self,
            *,
            metric: list[str],
            mode: list[str],
            constraints: Mapping[str, float],
            **settings: Any,
        ) -> None:
            self.names, self.limits = metric, dict(constraints)
            single = len(metric) == 1
            super().__init__(metric=metric[0] if single else metric, mode=mode[0] if single else mode, **settings)

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Take a trial's last numbers; one that lacks some (it failed) teaches nothing."""
            beyond = self._beyond(result) if result else None
            if beyond is None:
                super().on_trial_complete(trial_id, None, error=True)
                return
            if trial_id not in self._completed_trials:
                for name, value in beyond.items():
                    self._ot_trials[trial_id].set_constraint(name, value)
            super().on_trial_complete(trial_id, result, error)

        def add_finished(self, point: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
            """Take a trial that finished before this search began."""
            beyond = self._beyond(numbers)
            told = {} if beyond is None else {"values": [numbers[name] for name in self.names], "constraints": beyond}
            state = optuna.trial.TrialState.FAIL if beyond is None else optuna.trial.TrialState.COMPLETE
            self._ot_study.add_trial(
                optuna.trial.create_trial(state=state, params=dict(point), distributions=self._space, **told)
            )

        def _beyond(self, numbers: Mapping[str, Any]) -> dict[str, float] | None:
            """Return value minus limit for each constraint; None if a number that is needed does not exist."""
            needed = [float(numbers.get(name, math.nan)) for name in (*self.names, *self.limits)]
            if any(map(math.isnan, needed)):
                return None
            return {name: float(numbers[name]) - limit for name, limit in self.limits.items()}

    return ConstrainedSearch
