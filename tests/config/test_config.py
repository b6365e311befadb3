"""Sections of a config: strict, documented, frozen, and complete when written down."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, Field, ValidationError

from mea_ray.cli.listing import config_rows
from mea_ray.config import (
    Choice,
    Config,
    DataChoice,
    ExperimentConfig,
    SweepConfig,
    build,
    identity,
    load_experiment,
    write_yaml,
)
from mea_ray.config.yaml_text import read
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings
from mea_ray.experiment.data import load_splits
from mea_ray.watermarks import WATERMARKS


def subclasses(kind: type[BaseModel]) -> set[type[BaseModel]]:
    collected = {kind}
    for direct in kind.__subclasses__():
        collected |= subclasses(direct)
    return collected


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
    written = read(tmp_path / "c.yaml")
    assert written["victim"]["watermark"]["target_class"] == 2
    assert written["splits"]["thief_pool"]["image_size"] == 16


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"victm": {}}, ["victm", "did you mean 'victim'?"]),
        ({"thief": {"budgest": [1]}}, ["thief.budgest", "did you mean 'thief.budgets'?"]),
        (
            {"victim": {"training": {"epochss": 3}}},
            ["victim.training.epochss", "did you mean 'victim.training.epochs'?"],
        ),
        ({"data": "digitz"}, ["data: ", "did you mean 'digits'?"]),
        ({"data": {"name": "digits", "image_sise": 8}}, ["data.image_sise: ", "did you mean 'image_size'?"]),
        ({"splits": {"thief_pool": {"image_size": 8}}}, ["name"]),
        ({"thief": {"budgets": [10, 10]}}, ["thief.budgets", "ascending"]),
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


def test_the_list_of_config_paths_is_complete() -> None:
    listed = {path for path, *_ in config_rows(ExperimentConfig)}
    config = load_experiment(None)

    def leaves(model: BaseModel, prefix: str = "") -> set[str]:
        collected = set()
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, Choice):
                collected.add(f"{prefix}{name}.name")
            elif isinstance(value, BaseModel):
                collected |= leaves(value, f"{prefix}{name}.")
            else:
                collected.add(f"{prefix}{name}")
        return collected

    assert leaves(config) <= listed


def test_sweep_names_are_safe_as_folders() -> None:
    with pytest.raises(ConfigError, match="name"):
        build(SweepConfig, {"name": "../up"})


@pytest.mark.parametrize(
    ("tree", "problem"),
    [
        (
            {"victim": {"model": {"dropout": 1.5}}},
            "victim.model.dropout=1.5: Input should be less than",
        ),
        ({"thief": {"attack": {"name": 3}}}, "thief.attack: attack needs a `name`; known: "),
        (
            {"removal": {"methods": ["pruning", {"name": "chain", "steps": [{"name": "prunning"}]}]}},
            "removal.methods.1.steps.0: unknown removal 'prunning'; did you mean 'pruning'?",
        ),
        ({"splits": {"thief_pool": {"name": "noise", "imags": 3}}}, "splits.thief_pool.imags: dataset 'noise' has no"),
    ],
)
def test_what_is_wrong_inside_of_a_component_has_its_full_path(tree: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(ExperimentConfig, tree)
    assert str(refused.value).startswith(problem)


def test_problems_of_components_and_of_sections_are_reported_together() -> None:
    tree = {"data": {"name": "noise", "imags": 3, "image_size": "big"}, "seed": -1, "thief": {"attack": "knokoff"}}
    with pytest.raises(ConfigError) as refused:
        build(ExperimentConfig, tree)
    paths = sorted(line.split("=")[0].split(":")[0] for line in str(refused.value).splitlines())
    assert paths == ["data.image_size", "data.imags", "seed", "thief.attack"]


@pytest.mark.parametrize(
    ("tree", "path", "value"),
    [
        ({"thief": {"budgets": 500}}, "thief.budgets", [500]),
        ({"thief": {"budgets": 1e3}}, "thief.budgets", [1000]),
        ({"removal": {"methods": "pruning"}}, "removal.methods.0.name", "pruning"),
        ({"removal": {"methods": {"name": "pruning"}}}, "removal.methods.0.name", "pruning"),
        ({"detection": {"tried_on": "victim"}}, "detection.tried_on", ["victim"]),
        ({"victim": {"training": {"augment": []}}}, "victim.training.augment", []),
        ({"data": "noise"}, "data.name", "noise"),
    ],
)
def test_a_single_value_is_a_list_of_one_and_a_word_a_name(tree: dict[str, Any], path: str, value: object) -> None:
    result: Any = build(ExperimentConfig, tree).resolved()
    for part in path.split("."):
        result = result[int(part)] if part.isdigit() else result[part]
    assert result == value


def test_search_and_scheduler_may_be_given_by_name() -> None:
    sweep = build(SweepConfig, {"search": "random", "scheduler": "asha"})
    assert (sweep.search.name, sweep.scheduler.name) == ("random", "asha")


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(ConfigError) as refused:
        build(ExperimentConfig, {"seed": "x" * 10_000, "thief": {"budgets": [[list(range(5000))] * 50] * 50}})
    assert all(len(line) < 300 for line in str(refused.value).splitlines())


FIGURES = ["stripes", "checks", "dots", "rings", "spiral", "spokes", "disc", "square", "triangle", "cross"]


def test_a_class_by_name_is_the_same_experiment_as_by_index(tmp_path: Path) -> None:
    by_index = load_experiment(
        None, ["data=figures", "victim.watermark.source_classes=[3, 0]", "victim.watermark.target_class=6"]
    )
    typed = ["data=figures", "victim.watermark.source_classes=rings,stripes", "victim.watermark.target_class=disc"]
    file = tmp_path / "c.yaml"
    file.write_text("data: figures\nvictim: {watermark: {source_classes: [rings, stripes], target_class: disc}}\n")
    for by_name in (load_experiment(None, typed), load_experiment(file)):
        assert by_name == by_index
        assert by_name.resolved() == by_index.resolved()
        assert identity(by_name) == identity(by_index)
    assert load_experiment(None, typed).victim.watermark.build().source_classes == (3, 0)


def test_an_experiment_that_names_classes_loads_its_data_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    build_it = DataChoice.build

    def counted(choice: DataChoice, *args: Any, **extra: Any) -> Any:
        built.append(choice.name)
        return build_it(choice, *args, **extra)

    monkeypatch.setattr(DataChoice, "build", counted)
    monkeypatch.setattr("mea_ray.config.class_names._READ", {})  # what other tests left
    config = load_experiment(None, ["data=figures", "victim.watermark.target_class=disc"])
    assert set(FIGURES) <= set(load_splits(config).test.class_names)
    assert built == ["figures"]
    load_splits(config)
    assert built == ["figures", "figures"], "it was left for one experiment, not for the whole process"


def test_a_quoted_number_is_a_name() -> None:
    config = load_experiment(None, ["victim.watermark.target_class='7'"])  # a digit's name is its number
    assert config.victim.watermark.params["target_class"] == 7
    with pytest.raises(ConfigError, match="the data have no class '7'"):
        load_experiment(None, ["data=figures", "victim.watermark.target_class='7'"])


def test_an_unknown_class_name_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ConfigError) as refused:
        load_experiment(None, ["data=figures", "victim.watermark.target_class=squire"])
    text = str(refused.value)
    assert text.startswith("victim.watermark.target_class='squire': the data have no class 'squire'; did you mean 'sq")
    assert all(name in text for name in FIGURES)


def test_classes_of_a_removals_own_dataset_are_named_by_that_dataset() -> None:
    method = {"name": "transfer_learning", "dataset": "figures", "same_as": ["triangle", *[-1] * 8, "disc"]}
    config = build(ExperimentConfig, {"removal": {"methods": [method]}})
    assert config.removal.methods[0].params["same_as"] == (8, *[-1] * 8, 6)
    with pytest.raises(ConfigError, match="removal.methods.0.same_as: there is no dataset"):
        build(ExperimentConfig, {"removal": {"methods": [{**method, "dataset": None, "same_as": ["triangle", 1]}]}})


def test_a_component_on_its_own_wants_indices() -> None:
    with pytest.raises(ConfigError, match="target_class='disc': only the config of an experiment"):
        WATERMARKS.build("mea_defender", target_class="disc")


def test_a_sweep_over_datasets_names_its_classes_in_the_space() -> None:
    base = {"data": "figures", "victim": {"watermark": {"target_class": "disc"}}}
    space = {"data.name": {"grid": ["figures", "digits"]}}
    with pytest.raises(ConfigError, match=r"base.victim.watermark.target_class: .* the space has data.name") as refused:
        build(SweepConfig, {"base": base, "space": space})
    assert "\n" not in str(refused.value)
    build(SweepConfig, {"base": base, "space": {"seed": {"grid": [0, 1]}}})


def test_a_list_whose_items_are_wrong_is_not_called_empty_too() -> None:
    with pytest.raises(ConfigError) as refusal:
        build(ExperimentConfig, {"thief": {"budgets": ["5oo"]}})
    assert "thief.budgets.0='5oo'" in str(refusal.value) and "at least 1 item" not in str(refusal.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        build(ExperimentConfig, {"thief": {"budgets": []}})
