"""Configs: strict, documented, overridable, and complete when written down."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import yaml
from pydantic import BaseModel, Field, ValidationError

from mea_ray.config import (
    Choice,
    Config,
    ExperimentConfig,
    SweepConfig,
    build,
    load_experiment,
    load_sweep,
    merge,
    parse_override,
    set_path,
    write_yaml,
)
from mea_ray.config.overrides import let_go
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings
from mea_ray.report.terminal import config_rows
from mea_ray.watermarks import WATERMARKS


def subclasses(kind: type[BaseModel]) -> set[type[BaseModel]]:
    found = {kind}
    for direct in kind.__subclasses__():
        found |= subclasses(direct)
    return found


@pytest.mark.parametrize("model", sorted(subclasses(Config), key=str))
def test_every_field_is_documented_and_every_model_is_frozen_and_strict(model: type[BaseModel]) -> None:
    assert all((field.description or "").strip().endswith((".", "}")) for field in model.model_fields.values())
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid" or issubclass(model, Choice)


def test_configs_cannot_be_changed() -> None:
    config = load_experiment(None)
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


def test_a_written_config_says_everything_and_reads_back_as_the_same(tmp_path: Path) -> None:
    config = build(
        ExperimentConfig, {"thief": {"model": "resnet18", "budgets": [3, 9]}, "splits": {"thief_pool": "digits"}}
    )
    write_yaml(config, tmp_path / "c.yaml")
    assert load_experiment(tmp_path / "c.yaml") == config
    written = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert written["victim"]["watermark"]["target_class"] == 2
    assert written["splits"]["thief_pool"]["image_size"] == 16


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"victm": {}}, ["victm", "did you mean 'victim'?"]),
        ({"thief": {"budgest": [1]}}, ["thief.budgest", "did you mean 'budgets'?"]),
        ({"victim": {"training": {"epochss": 3}}}, ["victim.training.epochss", "did you mean 'epochs'?"]),
        ({"data": "digitz"}, ["did you mean 'digits'?"]),
        ({"data": {"name": "digits", "image_sise": 8}}, ["did you mean 'image_size'?"]),
        ({"splits": {"thief_pool": {"image_size": 8}}}, ["name"]),
        ({"thief": {"budgets": [10, 10]}}, ["thief.budgets", "rising"]),
        ({"thief": {"budgets": []}}, ["thief.budgets"]),
        ({"victim": {"training": {"epochs": 0}}}, ["victim.training.epochs", "greater than or equal to 1"]),
        ({"splits": {"validation_fraction": 0.9}}, ["splits.validation_fraction"]),
        ({"service": {"rate": {"images_per_second": -1}}}, ["service.rate.images_per_second"]),
    ],
)
def test_bad_configs_are_refused_with_path_and_remedy(tree: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        build(ExperimentConfig, tree)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        build(ExperimentConfig, {"sed": 1, "victim": {"seed": -1}, "thief": {"budgets": [0]}})
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", ("seed", 3)),
        ("thief.budgets=[1, 2]", ("thief.budgets", [1, 2])),
        ("storage=s3://bucket/a=b", ("storage", "s3://bucket/a=b")),
        ("service.rate=null", ("service.rate", None)),
        ("tracking.entity=", ("tracking.entity", None)),
    ],
)
def test_overrides_are_yaml(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", "seed=[1"])
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        parse_override(text)


def test_set_path_copies_and_never_changes_its_input() -> None:
    tree = {"a": {"b": 1}}
    assert set_path(tree, "a.c", 2) == {"a": {"b": 1, "c": 2}}
    assert tree == {"a": {"b": 1}}


def test_another_component_drops_the_parameters_of_the_one_before() -> None:
    tree = {"data": {"name": "digits", "image_size": 24}}
    assert set_path(tree, "data.name", "cifar10") == {"data": {"name": "cifar10"}}
    assert set_path(tree, "data.name", "digits") == tree


def test_what_another_component_drops_is_named() -> None:
    tree = {"data": {"name": "cifar10", "image_size": 16, "normalise": True}, "victim": {"model": "vgg"}, "seed": 1}
    assert let_go(tree, {"data.name": "parquet", "data.path": "x", "data.normalise": False}) == ["data.image_size=16"]
    for settings in (
        {"data.name": "cifar10"},
        {"data.path": "x"},
        {"victim.model.name": "z"},
        {"name": "n"},
        {"a.name": 1},
    ):
        assert let_go(tree, settings) == []


def test_a_title_is_no_component_and_drops_nothing(tmp_path: Path) -> None:
    assert set_path({"name": "one", "base": {"seed": 3}}, "name", "two") == {"name": "two", "base": {"seed": 3}}
    file = tmp_path / "sweep.yaml"
    file.write_text("name: one\nbase: {victim: {watermark: {weight_com: 0.7}}}\nspace: {seed: {grid: [1, 2]}}\n")
    sweep = load_sweep(file, ["name=two"])
    assert sweep.name == "two" and sweep.base.victim.watermark.params["weight_com"] == 0.7


def test_a_parameter_below_a_bare_name_keeps_the_name() -> None:
    assert set_path({"data": "digits"}, "data.image_size", 24) == {"data": {"name": "digits", "image_size": 24}}


def test_parameters_without_a_name_belong_to_the_default_component() -> None:
    config = build(ExperimentConfig, merge({}, {"thief.attack.query_chunk": 2, "data.image_size": 24}))
    assert (config.thief.attack.name, config.thief.attack.params["query_chunk"]) == ("distillation", 2)
    assert (config.data.name, config.data.params["image_size"]) == ("digits", 24)


class Spring(Settings):
    """A part of ``Clock``."""

    turns: int = Field(3, ge=1, description="Turns.")
    wire: float = Field(0.5, gt=0, description="Thickness in mm.")


class Clock:
    """A component with a group of settings.

    Args:
        spring: Its spring.
    """

    renamed: ClassVar[dict[str, str]] = {"spring_turns": "spring.turns"}

    def __init__(self, *, spring: Spring = Spring(turns=9)) -> None:
        self.spring = spring


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watermark ``clock`` with a group of settings."""
    module = ModuleType("clockwork")
    module.Clock = Clock  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clockwork", module)
    monkeypatch.setitem(WATERMARKS.entries, "clock", "clockwork:Clock")


@pytest.mark.usefixtures("clock")
def test_a_group_of_settings_is_overridden_by_path_and_survives_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("victim: {watermark: {name: clock, spring: {turns: 5}}}\n")
    config = load_experiment(file, ["victim.watermark.spring.wire=.25"])
    assert config.victim.watermark.build().spring == Spring(turns=5, wire=0.25)
    assert config.resolved()["victim"]["watermark"] == {"name": "clock", "spring": {"turns": 5, "wire": 0.25}}
    write_yaml(config, file)
    assert load_experiment(file) == config
    again = load_experiment(file, ["victim.watermark.spring.turns=6"])
    assert again.victim.watermark.build().spring == Spring(turns=6, wire=0.25)
    assert load_experiment(file, ["victim.watermark={name: clock}"]).victim.watermark.build().spring.turns == 9
    with pytest.raises(ConfigError, match="spring.turns=0"):
        load_experiment(file, ["victim.watermark.spring.turns=0"])


@pytest.mark.usefixtures("clock")
def test_an_old_name_in_a_file_or_an_override_sets_the_new_path(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("victim: {watermark: {name: clock, spring_turns: 5}}\n")
    with pytest.warns(FutureWarning, match="'spring_turns' is now 'spring.turns'"):
        config = load_experiment(file, ["victim.watermark.spring.wire=2"])
    assert config.resolved()["victim"]["watermark"]["spring"] == {"turns": 5, "wire": 2.0}


def test_a_path_below_a_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="seed"):
        set_path({"seed": 3}, "seed.x", 1)


@pytest.mark.parametrize("order", [1, -1])
def test_names_are_set_before_their_parameters_whatever_the_order(order: int) -> None:
    settings = {"data.image_size": 24, "data.name": "digits", "data": "cifar10"}
    merged = merge({}, dict(list(settings.items())[::order]))
    assert merged == {"data": {"name": "digits", "image_size": 24}}


def test_overrides_of_a_sweep_go_to_its_base_or_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: a\nbase: {seed: 1}\n")
    sweep = load_sweep(path, ["seed=2", "name=b", "thief.model=cnn9", "base.data.image_size=24", "search.name=random"])
    assert (sweep.name, sweep.base.seed, sweep.base.thief.model.name) == ("b", 2, "cnn9")
    assert (sweep.base.data.params["image_size"], sweep.search.name) == (24, "random")


def test_an_override_sets_one_axis_of_the_space(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: a\nspace: {seed: {grid: [1]}, thief.budgets: {grid: [[10]]}}\n")
    sweep = load_sweep(path, ["space.thief.model.name={grid: [cnn9]}", "space.seed={grid: [2, 3]}"])
    assert list(sweep.space) == ["seed", "thief.budgets", "thief.model.name"]
    assert (sweep.space["seed"], sweep.space["thief.model.name"]) == ({"grid": [2, 3]}, {"grid": ["cnn9"]})
    path.write_text("name: a\nspace: 3\n")
    with pytest.raises(ConfigError, match="space"):
        load_sweep(path, ["space.seed={grid: [2]}"])


@pytest.mark.parametrize(("text", "words"), [("[1, 2]", "mapping"), ("a: [", "YAML")])
def test_files_that_are_no_config_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_experiment(path)


def test_reading_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("seed: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError):
        load_experiment(path)


def test_the_list_of_config_paths_is_complete() -> None:
    listed = {path for path, *_ in config_rows(ExperimentConfig)}
    config = load_experiment(None)

    def leaves(model: BaseModel, prefix: str = "") -> set[str]:
        found = set()
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, Choice):
                found.add(f"{prefix}{name}.name")
            elif isinstance(value, BaseModel):
                found |= leaves(value, f"{prefix}{name}.")
            else:
                found.add(f"{prefix}{name}")
        return found

    assert leaves(config) <= listed


def test_sweep_names_are_safe_as_folders() -> None:
    with pytest.raises(ConfigError, match="name"):
        build(SweepConfig, {"name": "../up"})
