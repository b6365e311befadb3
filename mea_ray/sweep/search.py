"""Translates a sweep's search and scheduler to Ray Tune's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mea_ray.config import SweepConfig
from mea_ray.core import plugins
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.words import nearest_and_known
from mea_ray.results.numbers import METRICS, trial_metrics
from mea_ray.results.portable import portable_point
from mea_ray.results.records import TrialResult
from mea_ray.sweep import tune_classes
from mea_ray.sweep.objective import JUDGED
from mea_ray.sweep.reports import EPOCHS, LOSS
from mea_ray.sweep.space import Axis, Point, axes

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from ray.tune.schedulers import TrialScheduler

    from mea_ray.sweep.optuna_search import OptunaSearch


def check_metric(sweep: SweepConfig) -> None:
    """Reject metrics that no trial reports.

    Raises:
        ConfigError: One is unknown.
    """
    search = sweep.search
    named = [("search.metric", name) for name, _ in search.objectives]
    named += [("search.constraints", name) for name in search.constraints]
    named += [("stop", name) for name in sweep.stop if name != "training_iteration"]
    if sweep.select is not None:
        named += [("select.metric", sweep.select.metric)]
        named += [("select.constraints", name) for name in sweep.select.constraints]
    for where, metric in named:
        if metric not in METRICS:
            raise ConfigError(f"{where}={metric!r} is not a metric{nearest_and_known(metric, list(METRICS))}")


def scheduler(sweep: SweepConfig) -> TrialScheduler:
    """Return Tune's scheduler; its unit of time is one rung of the budget, or one epoch of training."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if plugins.is_path(sweep.scheduler.name):
        built: TrialScheduler = tune_classes.scheduler(sweep)
        return built
    if sweep.scheduler.name == "fifo":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    if sweep.scheduler.reports == "epoch":
        base = sweep.base
        return ASHAScheduler(
            time_attr=EPOCHS,
            metric=LOSS,
            mode="min",
            # Some trials can train longer than the base; the scheduler then ignores their last epochs.
            max_t=base.victim.training.epochs + len(base.thief.budgets) * base.thief.training.epochs,
            grace_period=sweep.scheduler.grace_epochs,
            reduction_factor=sweep.scheduler.reduction_factor,
            stop_last_trials=False,
        )
    return ASHAScheduler(
        time_attr="training_iteration",
        # Infeasible trials rank below all others: they are stopped at the first rung.
        metric=JUDGED,
        mode=sweep.search.objectives[0][1],
        # The scheduler ignores the last rungs of trials with more rungs than the base.
        max_t=max(len(sweep.base.thief.budgets), sweep.scheduler.grace_rungs),
        grace_period=sweep.scheduler.grace_rungs,
        reduction_factor=sweep.scheduler.reduction_factor,
    )


def point_of(sweep: SweepConfig, suggestion: Mapping[str, Any]) -> Point:
    """Translate a suggestion of Optuna into a point of the space: listed values are suggested by their index."""
    return {
        axis.path: suggestion[f"p{place}"] if axis.is_range else axis.values[suggestion[f"p{place}"]]
        for place, axis in enumerate(axes(sweep))
    }


def suggestion_of(all_axes: Sequence[Axis], point: Mapping[str, Any]) -> dict[str, Any] | None:
    """Translate a point back; None if it is not in the space."""
    values: dict[str, Any] = {}
    for place, axis in enumerate(all_axes):
        if axis.path not in point:
            return None
        value = point[axis.path]
        if axis.is_range:
            if not isinstance(value, (int, float)) or not axis.values[0] <= value <= axis.values[1]:
                return None
            values[f"p{place}"] = value
        else:
            texts = [_text(listed) for listed in axis.values]
            if _text(value) not in texts:
                return None
            values[f"p{place}"] = texts.index(_text(value))
    return values


def _text(value: Any) -> str:
    return json.dumps(portable_point({"": value}), sort_keys=True, default=str)


def optuna_search(sweep: SweepConfig, finished: Iterable[TrialResult], begun: Iterable[Point]) -> OptunaSearch:
    """Return an Optuna searcher that knows the earlier trials.

    Args:
        sweep: The sweep.
        finished: Earlier results; Optuna learns from them and they are not run again.
        begun: Points that were started and not finished; they are suggested first.

    Raises:
        ConfigError: The space is empty.
    """
    import optuna

    from mea_ray.sweep.optuna_search import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it writes to the terminal regardless of Python's settings
    all_axes = axes(sweep)
    if not all_axes:
        raise ConfigError("search.name=optuna needs a space; add config paths under `space`, or use search.name=grid")
    suggestions = [(suggestion_of(all_axes, result.point), result) for result in finished]
    known = [(point, result) for point, result in suggestions if point is not None]
    searcher = OptunaSearch(
        {f"p{place}": _distribution(axis) for place, axis in enumerate(all_axes)},
        sweep.search.objectives,
        sweep.search.constraints,
        # Another seed after an interruption: the same one would suggest the same points again.
        seed=derive(sweep.search.seed, "optuna", len(known)) % 2**32,
        first=[point for each in begun if (point := suggestion_of(all_axes, each)) is not None],
    )
    for point, result in known:
        if result.rungs:
            searcher.add_finished(point, trial_metrics(result, result.rungs[-1]))
    return searcher


def _distribution(axis: Axis) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not axis.is_range:
        return CategoricalDistribution(list(range(len(axis.values))))
    low, high = axis.values
    log = axis.kind == "loguniform"
    return IntDistribution(low, high, log=log) if axis.whole else FloatDistribution(float(low), float(high), log=log)
