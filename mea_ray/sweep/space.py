"""The search space: config paths and their values, resolved into points before anything runs."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mea_ray.config import ExperimentConfig, SweepConfig, Tree, build, merge
from mea_ray.config.sweep import MAX_POINTS
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.words import nearest_and_known
from mea_ray.results.points import label

Point = dict[str, Any]
"""Config paths that the sweep sets, and their values."""
Kind = Literal["grid", "choice", "uniform", "loguniform"]
KINDS: tuple[Kind, ...] = ("grid", "choice", "uniform", "loguniform")


@dataclass(frozen=True)
class Axis:
    """One config path and its values.

    Attributes:
        path: Config path in the experiment, e.g. ``victim.watermark.evasion_weight``.
        kind: ``grid`` and ``choice`` hold values, ``uniform`` and ``loguniform`` two ends, both included.
        values: The values, or the two ends.
        whole: Whether draws are integers: the path's value in the base is one, or is unset and both ends are.
    """

    path: str
    kind: Kind
    values: tuple[Any, ...]
    whole: bool = False

    @property
    def is_range(self) -> bool:
        """Whether it has two ends, not a list of values."""
        return self.kind in {"uniform", "loguniform"}

    def draw(self, generator: np.random.Generator) -> Any:
        """Draw one value; values of a list are equally likely."""
        if not self.is_range:
            return self.values[int(generator.integers(len(self.values)))]
        low, high = self.values
        if self.whole:  # every integer gets the unit interval around it
            low, high = low - 0.5, high + 0.5
        if self.kind == "loguniform":
            value = math.exp(generator.uniform(math.log(low), math.log(high)))
        else:
            value = generator.uniform(low, high)
        if self.whole:
            return min(max(round(value), self.values[0]), self.values[1])
        return float(value)


def axes(sweep: SweepConfig) -> list[Axis]:
    """Read the sweep's space.

    Raises:
        ConfigError: An entry is not ``{kind: [...]}``, its values do not fit its kind, its kind does not fit
            ``search.name``, or a path is unknown; every problem in one message.
    """
    result, problems = [], []
    base = sweep.base.resolved()
    for path in sweep.seed_points[0]:
        if path in sweep.space:
            problems.append(f"space.{path}: `seeds` sets it, too; remove it from the space, or drop `seeds`")
    if sweep.seeds is not None and sweep.search.adaptive:
        problems.append(
            f"seeds: search.name={sweep.search.name} tries every point once; drop `seeds`, and repeat the best "
            "points in a sweep of their own: search.name=grid with `seeds`"
        )
    for path, entry in sweep.space.items():
        try:
            axis = _axis(path, entry, base)
            if sweep.search.name == "grid" and axis.kind != "grid":
                raise ConfigError(
                    f"{axis.kind!r} needs random draws, but search.name=grid draws nothing; use grid, or "
                    "search.name=random"
                )
            result.append(axis)
        except ConfigError as error:
            problems.append(f"space.{path}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    _refuse_overlaps(result)
    return result


def _axis(path: str, entry: Mapping[str, Any], base: Tree) -> Axis:
    if len(entry) != 1:
        raise ConfigError(f"expected one of {', '.join(KINDS)} with its values, got {dict(entry)!r}")
    ((kind, values),) = entry.items()
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}{nearest_and_known(str(kind), list(KINDS))}")
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f"{kind} needs a list of values, got {values!r}")
    if kind in {"grid", "choice"}:
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
            raise ConfigError(f"{kind} holds a value twice: {list(values)!r}; list each once")
        return Axis(path, kind, tuple(values))
    if len(values) != 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{kind} needs two numbers [low, high], got {list(values)!r}")
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{kind} needs finite ends, got [{low}, {high}]")
    if not low < high or (kind == "loguniform" and low <= 0):
        raise ConfigError(f"{kind} needs {'0 < ' if kind == 'loguniform' else ''}low < high, got [{low}, {high}]")
    current = _look_up(base, path)
    ends_are_whole = isinstance(low, int) and isinstance(high, int)
    whole = isinstance(current, int) and not isinstance(current, bool) or (current is None and ends_are_whole)
    if whole and not ends_are_whole:
        raise ConfigError(f"is a whole number, so {kind} needs two whole numbers, got [{low}, {high}]")
    return Axis(path, kind, (low, high), whole)


def _look_up(tree: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _refuse_overlaps(checked: list[Axis]) -> None:
    """A path and another one below it cannot both be swept, except a component's name and its parameters."""
    for a, b in itertools.permutations(checked, 2):
        if b.path.startswith(f"{a.path}.") and any(isinstance(v, Mapping) for v in a.values):
            raise ConfigError(f"space sweeps {a.path!r} whole and {b.path!r} inside of it; sweep one of them")


def experiment_at(sweep: SweepConfig, point: Mapping[str, Any]) -> ExperimentConfig:
    """Return the experiment of one point of the space.

    Raises:
        ConfigError: The point is not a valid experiment: an unknown path (with the nearest key) or a value out of
            range.
    """
    try:
        return build(ExperimentConfig, merge(sweep.base.resolved(), point))
    except ConfigError as error:
        where = label(point, seeds=True)
        raise ConfigError(f"space at {where}: {error}") from None


def points(sweep: SweepConfig) -> list[Point]:
    """Resolve a grid or random search into its points, in a fixed order; the same on every call and machine.

    ``random`` crosses the grid entries and draws all others ``search.samples`` times for each combination. The
    resulting points, draws included, are repeated with every seed of ``seeds``.

    Raises:
        ConfigError: The space is not valid (see ``axes``), is too large, or the search is ``optuna``.
    """
    if sweep.search.adaptive:
        raise ConfigError(
            f"search.name={sweep.search.name} chooses its points while it runs; they cannot be listed beforehand"
        )
    all_axes = axes(sweep)
    grid = [axis for axis in all_axes if axis.kind == "grid"]
    drawn = [axis for axis in all_axes if axis.kind != "grid"]
    samples = sweep.search.samples if sweep.search.name == "random" and drawn else 1
    seeds = sweep.seed_points
    size = samples * len(seeds) * math.prod(len(axis.values) for axis in grid)
    if size > MAX_POINTS:
        raise ConfigError(
            f"space holds {size} points, at most {MAX_POINTS} can be run; shorten a grid, or draw at random"
        )
    generators = {axis.path: numpy_generator(sweep.search.seed, "space", axis.path) for axis in drawn}
    order = [axis.path for axis in all_axes]
    all_points = []
    for combination in itertools.product(*(axis.values for axis in grid)):
        fixed = dict(zip((axis.path for axis in grid), combination, strict=True))
        for _ in range(samples):
            point = fixed | {axis.path: axis.draw(generators[axis.path]) for axis in drawn}
            all_points += [{path: point[path] for path in order} | seed for seed in seeds]
    return all_points


def probes(all_axes: list[Axis]) -> list[Point]:
    """Return few points that together cover every listed value and both ends of every range, for validation."""
    middle = {axis.path: axis.values[0] for axis in all_axes}
    return [middle] + [middle | {axis.path: value} for axis in all_axes for value in axis.values[1:]]
