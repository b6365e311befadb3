"""The plan of a sweep and its cost, computed before anything runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mea_ray.config import ExperimentConfig, SweepConfig
from mea_ray.config.class_names import loaded_once
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment.data import Contents, splits_key
from mea_ray.experiment.names import Names, trial_name
from mea_ray.results.points import label
from mea_ray.storage.files import write_whole
from mea_ray.sweep.space import Point, axes, experiment_at, points, probes

PLAN_SCHEMA = 2


@dataclass(frozen=True)
class Draft:
    """One point of a sweep as an experiment, before its data were read.

    Attributes:
        point: Config paths that the sweep sets, and their values.
        config: The experiment.
    """

    point: Point
    config: ExperimentConfig

    def name(self, contents: Contents) -> str:
        """Return the name of its trial."""
        return trial_name(self.config, contents.of(self.config))

    def __str__(self) -> str:
        return label(self.point, seeds=True) if self.point else "the base"


@dataclass(frozen=True)
class PlannedTrial:
    """One trial before it runs.

    Attributes:
        names: Names of the trial, its victim, its null models and its data.
        point: Config paths that the sweep sets, and their values.
        config: Its experiment.
        splits: ``data.splits_key`` of its data.
        queries: Maximum number of images charged.
    """

    names: Names
    point: Point
    config: ExperimentConfig
    splits: str
    queries: int

    @classmethod
    def of(cls, config: ExperimentConfig, point: Mapping[str, Any], contents: Contents) -> PlannedTrial:
        """Plan one experiment."""
        from mea_ray.experiment.theft import total_budget

        return cls(
            names=Names.of(config, contents.of(config)),
            point=dict(point),
            config=config,
            splits=splits_key(config),
            queries=total_budget(config),
        )

    @property
    def name(self) -> str:
        """Name of the trial."""
        return self.names.trial

    @property
    def victim(self) -> str:
        """Name of the victim artifact that it attacks."""
        return self.names.victim

    @property
    def nulls(self) -> tuple[str, ...]:
        """Names of the null models that it is judged against."""
        return self.names.nulls


@dataclass(frozen=True)
class PlannedVictim:
    """One distinct victim: the trials that attack it, and their cost in images."""

    name: str
    config: ExperimentConfig
    trials: int
    queries: int


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    Attributes:
        name: The sweep's name.
        trials: All trials, grouped by victim. For an adaptive search (``optuna``) these are only the
            probes that were validated, and the totals are upper limits.
        adaptive: Whether the search chooses its points while it runs.
        trial_count: Number of trials that will run.
        queries: Maximum total number of queries, in images.
        victims: Distinct victims by name; for an adaptive search those of the probes.
        victim_count: Maximum number of distinct victims to train.
        null_count: Maximum number of distinct null models to train.
        duplicates: Number of points that repeat the experiment of another point; they are not run twice.
        nulls: Null models by name, each with an experiment that uses it and its index.
        contents: Fingerprints of the datasets by their settings.
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
    contents: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the trials' names and points, with which ``--resume`` compares."""
        body = {
            "schema_version": PLAN_SCHEMA,
            "name": self.name,
            "adaptive": self.adaptive,
            "trial_count": self.trial_count,
            "queries": self.queries,
            "victims": {v.name: {"trials": v.trials, "queries": v.queries} for v in self.victims.values()},
            "nulls": sorted(self.nulls),
            "data": [
                {"settings": json.loads(key), "fingerprint": fingerprint} for key, fingerprint in self.contents.items()
            ],
            "trials": []
            if self.adaptive
            else [
                {"name": t.name, "point": t.point, "victim": t.victim, "nulls": list(t.nulls), "queries": t.queries}
                for t in self.trials
            ],
        }
        write_whole(path, json.dumps(body, indent=1))


def draft(sweep: SweepConfig) -> list[Draft]:
    """Resolve and validate the points of a sweep without reading data; for an adaptive search, its probes.

    Raises:
        ConfigError: A path of the space is unknown, or some point is no valid experiment.
    """
    drafts = probes(axes(sweep)) if sweep.search.adaptive else points(sweep)
    with loaded_once():
        return [Draft(point, experiment_at(sweep, point)) for point in drafts]


def plan(sweep: SweepConfig, contents: Contents | None = None, drafts: Sequence[Draft] | None = None) -> Plan:
    """Plan a whole sweep; nothing is trained, queried or written.

    Args:
        sweep: The sweep.
        contents: Fingerprints of its data; unknown data are loaded in this process.
        drafts: Its ``draft``; made when None.

    Returns:
        Its trials and their cost.

    Raises:
        ConfigError: A path of the space is unknown, or some point is no valid experiment.
        DataError: A dataset cannot be loaded.
    """
    contents = contents if contents is not None else Contents()
    adaptive = sweep.search.adaptive
    drafted = draft(sweep) if drafts is None else drafts
    trials: dict[str, PlannedTrial] = {}
    for each in drafted:
        trial = PlannedTrial.of(each.config, each.point, contents)
        trials.setdefault(trial.name, trial)
    first_seen = {victim: place for place, victim in reversed(list(enumerate(t.victim for t in trials.values())))}
    # Grouped by victim, trials find its service still running.
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
        duplicates=0 if adaptive else len(drafted) - len(ordered),
        nulls=nulls,
        contents=dict(contents.known),
    )


def recorded_contents(path: Path) -> Contents:
    """Return the fingerprints in ``plan.json`` of the data with which a sweep was started.

    Raises:
        ArtifactError: The file is damaged.
    """
    return Contents({json.dumps(d["settings"], sort_keys=True): d["fingerprint"] for d in _read(path)["data"]})


def check_same(path: Path, now: Plan) -> None:
    """Compare a plan with the one that a sweep's folder was started with.

    Args:
        path: ``plan.json`` of the folder.
        now: The plan from the current sweep file and data.

    Raises:
        ConfigError: The data or the sweep file were changed in between.
        ArtifactError: ``plan.json`` is damaged.
    """
    body = _read(path)
    check_contents(path, now.contents)
    before = {trial["name"] for trial in body["trials"]}
    after = set() if now.adaptive else {trial.name for trial in now.trials}
    if bool(body["adaptive"]) != now.adaptive or before != after:
        raise ConfigError(
            f"{path} was made from another sweep: {len(before - after)} of its {len(before)} trials are no longer in "
            f"it, {len(after - before)} are new; resume with {path.with_name('sweep.yaml')}, or change `name`"
        )


def check_contents(path: Path, now: Mapping[str, str]) -> None:
    """Compare the content of datasets with the content at the start of a sweep.

    Args:
        path: ``plan.json`` of the sweep's folder.
        now: Fingerprints by ``data.dataset_key``.

    Raises:
        ConfigError: A dataset has another content now.
        ArtifactError: ``plan.json`` is damaged.
    """
    before = recorded_contents(path).known
    for key, fingerprint in now.items():
        if before.get(key, fingerprint) != fingerprint:
            settings = json.loads(key)
            origin = f"data.path={settings['path']}" if "path" in settings else f"data={settings['name']}"
            raise ConfigError(
                f"the data behind {origin} have changed since this sweep was started: other images, labels or class "
                f"names were read at the start (see {path}); restore them and resume, or start a sweep of another name "
                "(name=...), which trains its own models"
            )


def _read(path: Path) -> dict[str, Any]:
    """Read ``plan.json`` and check that it is complete."""
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if body["schema_version"] != PLAN_SCHEMA:
            raise ValueError(f"it has schema version {body['schema_version']}, not {PLAN_SCHEMA}")
        for trial in body["trials"]:
            str(trial["name"])
        for data in body["data"]:
            str(data["settings"]), str(data["fingerprint"])
        bool(body["adaptive"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; start the sweep under another name") from error
    return body
