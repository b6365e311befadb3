"""Schedulers, searchers and callbacks of Ray Tune, or a user's own, given by import path: ``package.module:Class``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mea_ray.config import SweepConfig
from mea_ray.core import plugins
from mea_ray.core.errors import ConfigError
from mea_ray.sweep.objective import JUDGED
from mea_ray.sweep.reports import EPOCHS, LOSS
from mea_ray.sweep.space import axes

_CHANGE_TRIALS = ("PopulationBasedTraining", "PB2", "PopulationBasedTrainingReplay")
"""Schedulers of Tune that copy one trial's state into another and change its settings in the process."""


def check(sweep: SweepConfig) -> None:
    """Import and build the classes that the sweep names, before anything is trained.

    Raises:
        ConfigError: A name cannot be imported, is of the wrong kind, or rejects its parameters.
    """
    if plugins.is_path(sweep.scheduler.name):
        made = scheduler(sweep)
        if waits_for_groups(made) and sweep.max_concurrent_trials is not None:
            raise ConfigError(
                f"max_concurrent_trials={sweep.max_concurrent_trials} counts trials that {type(made).__name__} has "
                "paused until others have come as far, so that those others may never start; leave it out, and limit "
                "the trials that run by resources.trial"
            )
    if plugins.is_path(sweep.search.name):
        searcher(sweep)
    callbacks(sweep)


def scheduler(sweep: SweepConfig) -> Any:
    """Return a new scheduler of the class that ``scheduler.name`` names.

    It gets the metrics of each rung. Unless its parameters set them, ``metric`` and ``mode`` are those of the search,
    with infeasible trials below all others, and ``time_attr`` counts rungs. With ``reports: epoch`` it also gets
    ``Reports`` of epochs; the defaults are then the training loss, ``min``, and epochs.

    Raises:
        ConfigError: See ``check``.
    """
    from ray.tune.schedulers import TrialScheduler

    scheduler_class = _imported("scheduler.name", sweep.scheduler.name, TrialScheduler)
    if {base.__name__ for base in scheduler_class.__mro__} & set(_CHANGE_TRIALS):
        raise ConfigError(
            f"scheduler.name={sweep.scheduler.name} copies the state of one trial into another and changes its "
            f"settings in the process. A trial of mea_ray has fixed settings and trains a new substitute for each "
            "rung, so there is no state to copy. Use one that stops or pauses trials, e.g. "
            "ray.tune.schedulers:HyperBandScheduler or ray.tune.schedulers:MedianStoppingRule, or search.name=optuna"
        )
    given = {"metric": JUDGED, "mode": sweep.search.objectives[0][1], "time_attr": "training_iteration"}
    if sweep.scheduler.reports == "epoch":
        given = {"metric": LOSS, "mode": "min", "time_attr": EPOCHS}
    return _built("scheduler", scheduler_class, given, sweep.scheduler.params)


def waits_for_groups(scheduler: object) -> bool:
    """Return whether a scheduler pauses a trial until a whole group of trials has come as far, as HyperBand does."""
    from ray.tune.schedulers import HyperBandScheduler

    return isinstance(scheduler, HyperBandScheduler)


def searcher(sweep: SweepConfig) -> Any:
    """Return a new searcher of the class that ``search.name`` names.

    Raises:
        ConfigError: See ``check``.
    """
    from ray.tune.search import SearchAlgorithm, Searcher

    searcher_class = _imported("search.name", sweep.search.name, (Searcher, SearchAlgorithm))
    return _built(
        "search", searcher_class, {"metric": JUDGED, "mode": sweep.search.objectives[0][1]}, sweep.search.params
    )


def space(sweep: SweepConfig) -> dict[str, Any]:
    """Return the sweep's space in Tune's terms, for a searcher: listed values by their index.

    Raises:
        ConfigError: The space is empty, or is not valid.
    """
    from ray import tune

    values: dict[str, Any] = {}
    for place, axis in enumerate(axes(sweep)):
        if not axis.is_range:
            values[f"p{place}"] = tune.choice(list(range(len(axis.values))))
            continue
        low, high = axis.values
        if axis.whole:
            draw = tune.lograndint if axis.kind == "loguniform" else tune.randint
            values[f"p{place}"] = draw(low, high + 1)
        else:
            draw = tune.loguniform if axis.kind == "loguniform" else tune.uniform
            values[f"p{place}"] = draw(float(low), float(high))
    if not values:
        raise ConfigError(f"search.name={sweep.search.name} needs a space; add config paths under `space`")
    return values


def callbacks(sweep: SweepConfig) -> list[Any]:
    """Return new callbacks of the classes that ``callbacks`` names.

    Raises:
        ConfigError: See ``check``.
    """
    from ray.tune import Callback

    return [
        _built(f"callbacks.{place}", _imported(f"callbacks.{place}", name, Callback), {}, {})
        for place, name in enumerate(sweep.callbacks)
    ]


def _imported(where: str, name: str, kinds: type | tuple[type, ...]) -> Any:
    loaded = plugins.load(where, name)
    if not (inspect.isclass(loaded) and issubclass(loaded, kinds)):
        wanted = " or ".join(each.__name__ for each in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ConfigError(f"{where}={name} is not a class that derives from Ray Tune's {wanted}")
    return loaded


def _built(where: str, kind: Any, given: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
    """Build a class from a user's parameters, with our defaults for those that it accepts and the user did not set."""
    known = inspect.signature(kind).parameters
    ours = {name: value for name, value in given.items() if name in known}
    try:
        return kind(**{**ours, **params})
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        accepted = ", ".join(name for name, each in known.items() if each.kind is not inspect.Parameter.VAR_KEYWORD)
        raise ConfigError(
            f"{where}.params={dict(params)!r}: {kind.__name__} rejects it ({type(error).__name__}: {error}); it takes "
            f"{accepted or 'nothing'}"
        ) from error
