"""An Optuna study as a searcher of Tune: one or several objectives with constraints, through ``ask`` and ``tell``.

Tune's own searcher for Optuna does not support constraints. Optuna's samplers do: they prefer feasible trials to
infeasible ones and, among the latter, the smaller violation. The objectives themselves are not penalised.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from ray.tune.search import Searcher


class OptunaSearch(Searcher):
    """Optuna's TPE sampler as a searcher of Ray Tune.

    Args:
        space: The distribution of each parameter.
        objectives: Metrics and the direction of each; several are searched for their Pareto front.
        constraints: ``{metric: largest value allowed}``.
        seed: Seed of the sampler.
        first: Points that are suggested before any other.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        objectives: Sequence[tuple[str, Literal["max", "min"]]],
        constraints: Mapping[str, float],
        *,
        seed: int,
        first: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.names = [name for name, _ in objectives]
        modes = [mode for _, mode in objectives]
        super().__init__(metric=self.names[0], mode=modes[0])  # Tune itself uses one; the study uses all
        self.space, self.limits = dict(space), dict(constraints)
        self.study = optuna.create_study(
            directions=["maximize" if mode == "max" else "minimize" for mode in modes],
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        self.running: dict[str, optuna.Trial] = {}
        for point in first:
            self.study.enqueue_trial(dict(point))

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the parameters of a new trial."""
        self.running[trial_id] = self.study.ask(self.space)
        return dict(self.running[trial_id].params)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the last metrics of a trial; one that failed, or lacks a metric, counts as failed."""
        trial = self.running.pop(trial_id, None)
        if trial is None:  # already completed
            return
        excess = None if error or result is None else self._excess(result)
        if result is None or excess is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        for name, value in excess.items():
            trial.set_constraint(name, value)
        self.study.tell(trial, [float(result[name]) for name in self.names])

    def add_finished(self, point: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Add a trial that finished before this search began.

        Args:
            point: Its parameters, within the space.
            metrics: Its last metrics; if a required one is missing or NaN, it counts as failed.
        """
        self.study.add_trial(self._finished(dict(point), metrics))

    def _finished(self, point: dict[str, Any], metrics: Mapping[str, float]) -> FrozenTrial:
        excess = self._excess(metrics)
        if excess is None:
            return create_trial(state=TrialState.FAIL, params=point, distributions=self.space)
        values = [metrics[name] for name in self.names]
        return create_trial(params=point, distributions=self.space, values=values, constraints=excess)

    def save(self, checkpoint_path: str) -> None:
        """Write the state of the search; Tune calls this for its own checkpoints."""
        Path(checkpoint_path).write_bytes(pickle.dumps((self.study, self.running)))

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote."""
        state = pickle.loads(Path(checkpoint_path).read_bytes())  # noqa: S301 - written by this very process
        self.study, self.running = cast("tuple[optuna.Study, dict[str, optuna.Trial]]", state)

    def _excess(self, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Return value minus limit for each constraint; None if a required metric is missing."""
        needed = [float(metrics.get(name, math.nan)) for name in (*self.names, *self.limits)]
        if any(map(math.isnan, needed)):
            return None
        return {name: float(metrics[name]) - limit for name, limit in self.limits.items()}
