"""What a sweep will cost, worked out before anything runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mea_ray.config import ExperimentConfig, SweepConfig, digest, identity
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment.artifacts import null_id, prepared_id, victim_id
from mea_ray.storage.files import write_whole
from mea_ray.sweep.space import Point, axes, experiment_at, points, probes

PLAN_SCHEMA = 1
_NOT_IN_NAME = ("storage", "tracking", "resources")


def trial_name(config: ExperimentConfig) -> str:
    """Name a trial by its config, without where it runs and where its results go."""
    return digest({key: value for key, value in identity(config).items() if key not in _NOT_IN_NAME})


@dataclass(frozen=True)
class PlannedTrial:
    """One trial before it runs.

    Attributes:
        name: Digest of its config.
        point: Config paths that the sweep sets, and their values.
        config: Its experiment.
        victim: Name of the victim artifact that it attacks.
        nulls: Names of the null models that it is judged against.
        data: Name of the data that it needs loaded.
        queries: Images that it may be charged, at most.
    """

    name: str
    point: Point
    config: ExperimentConfig
    victim: str
    nulls: tuple[str, ...]
    data: str
    queries: int

    @classmethod
    def of(cls, config: ExperimentConfig, point: Mapping[str, Any]) -> PlannedTrial:
        """Plan one experiment."""
        from mea_ray.experiment.run import budget_to_register

        return cls(
            name=trial_name(config),
            point=dict(point),
            config=config,
            victim=victim_id(config),
            nulls=tuple(null_id(config, index) for index in range(config.verification.null_models)),
            data=prepared_id(config),
            queries=budget_to_register(config),
        )


@dataclass(frozen=True)
class PlannedVictim:
    """One distinct victim: who attacks it, and what that costs in images."""

    name: str
    config: ExperimentConfig
    trials: int
    queries: int


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    Attributes:
        name: The sweep's name.
        trials: Every trial, those of one victim side by side. For an adaptive search (``optuna``) these are only the
            probes that were validated, and the totals are upper limits.
        adaptive: The search chooses its points while it runs.
        trial_count: Trials that will run.
        queries: Images that will be asked in all, at most.
        victims: Distinct victims by name; for an adaptive search those of the probes.
        victim_count: Distinct victims that will be trained, at most.
        null_count: Distinct null models that will be trained, at most.
        duplicates: Points that came out as an experiment that was there already, and are not run again.
    """

    name: str
    trials: tuple[PlannedTrial, ...]
    adaptive: bool
    trial_count: int
    queries: int
    victims: dict[str, PlannedVictim]
    victim_count: int
    null_count: int
    duplicates: int = 0
    nulls: dict[str, tuple[ExperimentConfig, int]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the trials' names and points; ``--resume`` compares against them."""
        body = {
            "schema_version": PLAN_SCHEMA,
            "name": self.name,
            "adaptive": self.adaptive,
            "trial_count": self.trial_count,
            "queries": self.queries,
            "victims": {v.name: {"trials": v.trials, "queries": v.queries} for v in self.victims.values()},
            "nulls": sorted(self.nulls),
            "trials": []
            if self.adaptive
            else [
                {"name": t.name, "point": t.point, "victim": t.victim, "nulls": list(t.nulls), "queries": t.queries}
                for t in self.trials
            ],
        }
        write_whole(path, json.dumps(body, indent=1))


def plan(sweep: SweepConfig) -> Plan:
    """Resolve and validate a whole sweep; nothing is trained, asked or written.

    Args:
        sweep: The sweep.

    Returns:
        Its trials and their cost.

    Raises:
        ConfigError: A path of the space is unknown, or some point is no valid experiment.
    """
    adaptive = sweep.search.name == "optuna"
    found = probes(axes(sweep)) if adaptive else points(sweep)
    trials: dict[str, PlannedTrial] = {}
    for point in found:
        trial = PlannedTrial.of(experiment_at(sweep, point), point)
        trials.setdefault(trial.name, trial)
    first_seen = {victim: place for place, victim in reversed(list(enumerate(t.victim for t in trials.values())))}
    # Side by side, trials of one victim find its service still running.
    ordered = tuple(sorted(trials.values(), key=lambda trial: first_seen[trial.victim]))
    victims = {}
    for name, group in itertools.groupby(ordered, key=lambda trial: trial.victim):
        of_one = list(group)
        victims[name] = PlannedVictim(name, of_one[0].config, len(of_one), sum(trial.queries for trial in of_one))
    nulls = {name: (trial.config, index) for trial in ordered for index, name in enumerate(trial.nulls)}
    count = sweep.search.samples if adaptive else len(ordered)
    most = max((t.queries for t in ordered), default=0)
    same_victim, same_nulls = len(victims) == 1, len({t.nulls for t in ordered}) == 1
    most_nulls = max((len(t.nulls) for t in ordered), default=0)
    return Plan(
        name=sweep.name,
        trials=ordered,
        adaptive=adaptive,
        trial_count=count,
        queries=count * most if adaptive else sum(t.queries for t in ordered),
        victims=victims,
        victim_count=count if adaptive and not same_victim else len(victims),
        null_count=count * most_nulls if adaptive and not same_nulls else len(nulls),
        duplicates=0 if adaptive else len(found) - len(ordered),
        nulls=nulls,
    )


def check_same(path: Path, now: Plan) -> None:
    """Compare a plan with the one that a sweep's folder was started with.

    Args:
        path: ``plan.json`` of the folder.
        now: What the sweep file says today.

    Raises:
        ConfigError: The sweep file was changed in between.
        ArtifactError: ``plan.json`` is damaged.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        before = {trial["name"] for trial in body["trials"]}
        adaptive = bool(body["adaptive"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; start the sweep under another name") from error
    after = set() if now.adaptive else {trial.name for trial in now.trials}
    if adaptive != now.adaptive or before != after:
        raise ConfigError(
            f"{path} was made from another sweep: {len(before - after)} of its {len(before)} trials are no longer "
            f"asked for, {len(after - before)} are new; resume with {path.with_name('sweep.yaml')}, or change `name`"
        )
