"""Reads experiments and sweeps from files, with overrides from the command line, and writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from mea_ray.config import yaml_text
from mea_ray.config.experiment import ExperimentConfig
from mea_ray.config.overrides import dropped, load_tree, merge, overridden, refuse_twice, split_override
from mea_ray.config.paths import meant, paths
from mea_ray.config.sweep import SweepConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import InvalidSettings, SettingProblem, Settings, Tree, problems
from mea_ray.storage.files import write_whole

SettingsT = TypeVar("SettingsT", bound=Settings)


def build(model: type[SettingsT], tree: Mapping[str, Any]) -> SettingsT:
    """Check a tree against a group of settings.

    Raises:
        ConfigError: One line for every problem: the path, the value, the constraint; for an unknown path also similar
            known ones.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        issues = problems(error, model)
    raise InvalidSettings("", [_with_hint(problem, model, tree) for problem in issues])


def _with_hint(problem: SettingProblem, model: type[Settings], tree: Any) -> SettingProblem:
    """Replace the nearest sibling of an unknown key by similar full paths."""
    if not problem.text.startswith("unknown key"):
        return problem
    inside = "base." if model is SweepConfig and problem.path.startswith("base.") else ""
    below, within = (ExperimentConfig, tree.get("base")) if inside else (model, tree)
    hint = meant(problem.path.removeprefix(inside) + _single(tree, problem.path), list(paths(below, within)))
    known = problem.text[problem.text.index("Known:") :] if "Known:" in problem.text else ""
    return SettingProblem(problem.path, f"unknown key{hint or '.'} {known}".rstrip())


def _single(tree: Any, path: str) -> str:
    """Return the rest of a path below which a tree holds one setting only, as one override does."""
    for part in path.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    rest = ""
    while isinstance(tree, Mapping) and len(tree) == 1:
        ((key, tree),) = tree.items()
        rest += f".{key}"
    return rest


def load_experiment(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment file (all defaults when None) and apply overrides ``key.path=value``.

    Raises:
        ConfigError: The file cannot be read, or something in it or in an override is wrong.
    """
    tree = load_tree(path) if path is not None else {}
    return build(ExperimentConfig, overridden(ExperimentConfig, tree, list(map(split_override, overrides)))[0])


def load_stored(path: Path) -> ExperimentConfig:
    """Read the resolved config beside a victim; an older version of this program may have written it.

    Raises:
        ConfigError: As ``load_experiment``.
    """
    tree = load_tree(path)
    if isinstance(tree.get("victim"), dict):
        tree["victim"].setdefault("insecure_key_from_seed", True)  # as for all keys before this option existed
    return build(ExperimentConfig, tree)


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read a sweep file and apply overrides: of the sweep's own keys, else of its base experiment.

    ``space.thief.model.name={grid: [...]}`` sets one axis: config paths are keys of the space, dots and all.

    Raises:
        ConfigError: The file cannot be read, something in it or in an override is wrong, or an override has no effect
            because the space or ``seeds`` sets the same at every point.
    """
    sweep, file, settings = _read_sweep(path, overrides)
    _refuse_without_effect(sweep, file, settings)
    return sweep


def load_base(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read the base experiment of a sweep file; the space does not matter. See ``load_sweep``.

    Raises:
        ConfigError: The file cannot be read, or something in it or in an override is wrong.
    """
    return _read_sweep(path, overrides)[0].base


def _read_sweep(path: str | Path, overrides: Sequence[str]) -> tuple[SweepConfig, Tree, list[tuple[str, str]]]:
    """Return a sweep, its file, and the overrides of its own keys and of its base."""
    file, axes = load_tree(path), {}
    settings = []
    given = [split_override(text) for text in overrides]
    refuse_twice([(key if key.startswith("space.") else _in_sweep(key), text) for key, text in given])
    for key, text in given:
        if key.startswith("space."):
            axes[key.removeprefix("space.")] = yaml_text.parse(text, f"override {key!r}")
        else:
            settings.append((_in_sweep(key), text))
    tree, _ = overridden(SweepConfig, file, settings)
    if axes:
        space = tree.get("space") or {}
        if not isinstance(space, dict):
            raise ConfigError(f"space of {str(path)!r} is {space!r}; it must map config paths to the values to try")
        tree["space"] = {**space, **axes}
    return build(SweepConfig, tree), file, settings


def _refuse_without_effect(sweep: SweepConfig, file: Tree, settings: Sequence[tuple[str, str]]) -> None:
    """Refuse overrides of the base that the points of the sweep replace, all of them."""
    axes = {
        path: [{path: value} for value in values]
        for path, entry in sweep.space.items()
        if len(entry) == 1 and isinstance(values := next(iter(entry.values())), (list, tuple)) and values
    }
    if sweep.seeds is not None:
        axes["seeds"] = sweep.seed_points
    base = overridden(SweepConfig, file, settings)[0].get("base") or {}
    for key, text in settings:
        others = [(other, given) for other, given in settings if other != key]
        without = overridden(SweepConfig, file, others)[0].get("base") or {}
        if without == base:
            continue
        for axis, points in axes.items():
            if all(merge(base, point) == merge(without, point) for point in points):
                remedy = "seeds=[...]" if axis == "seeds" else f"space.{axis}={{grid: [...]}}"
                name = "`seeds`" if axis == "seeds" else f"space.{axis}"
                raise ConfigError(
                    f"override {key.removeprefix('base.')}={text} has no effect: {name} of the sweep replaces it at "
                    f"every point; set {remedy} instead"
                )


def _in_sweep(key: str) -> str:
    """Return the path in a sweep of one of its own keys, or of a key of its base experiment."""
    return key if key.split(".")[0] in SweepConfig.model_fields else f"base.{key}"


def dropped_options(model: type[Settings], tree: Tree, overrides: Sequence[str]) -> list[str]:
    """List the options in a file that overrides drop because they choose another component."""
    return dropped(tree, overridden(model, tree, list(map(split_override, overrides)))[1])


def write_yaml(config: Settings, path: str | Path) -> None:
    """Write the resolved config, defaults filled in."""
    write_whole(Path(path), yaml_text.dump(config.resolved()))
