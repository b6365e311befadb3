"""Trees of settings, and values as a person types them on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mea_ray.config import ExperimentConfig, build, load_base, load_experiment, load_sweep, merge, set_path
from mea_ray.config.overrides import dropped, overridden, split_override
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import InvalidSettings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed=3", ("seed", "3")),
        ("storage=s3://bucket/a=b", ("storage", "s3://bucket/a=b")),
        (" thief.budgets = [1]", ("thief.budgets", " [1]")),
        ("tracking.entity=", ("tracking.entity", "")),
    ],
)
def test_an_override_is_split_at_its_first_equals_sign(text: str, expected: tuple[str, str]) -> None:
    assert split_override(text) == expected


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=3", ".a=3", "a.=3", ""])
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        split_override(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=3", 3),
        ("seed=1e4", 10_000),
        ("thief.budgets=[1, 2]", [1, 2]),
        ("thief.budgets=500", [500]),
        ("thief.budgets=100,300", [100, 300]),
        ("thief.budgets=100, 1e3", [100, 1000]),
        ("victim.training.augment=flip", ["flip"]),
        ("victim.training.augment=flip,crop", ["flip", "crop"]),
        ("victim.training.augment=[]", []),
        ("victim.training.learning_rate=1e-3", 0.001),
        ("victim.training.compile=true", True),
        ("service.rate=null", None),
        ("service.rate.images_per_second=5", 5.0),
        ("tracking.entity=", None),
        ("tracking.entity=null", None),
        ("tracking.entity=007", "007"),
        ("tracking.project=on", "on"),
        ("tracking.project=1e3", "1e3"),
        ("tracking.project='quoted'", "quoted"),
        ("tracking.project=null", "null"),
        ("tracking.project=a: b", "a: b"),
        ("tracking.project=[x", "[x"),
        ("tracking.project=99999999999999999999", "99999999999999999999"),
        ("storage=007", "007"),
        ("storage=1:30", "1:30"),
        ("storage=s3://bucket/a=b", "s3://bucket/a=b"),
        ("storage=#1", "#1"),
        ("service.policy=label_only", {"name": "label_only"}),
        ("splits.thief_pool=disjoint", "disjoint"),
        ("removal.methods=[pruning, jpeg]", None),
    ],
)
def test_a_value_is_read_as_its_setting_asks(text: str, value: Any) -> None:
    result: Any = load_experiment(None, [text]).resolved()
    for part in text.split("=")[0].split("."):
        result = result[part]
    if text.startswith("removal"):
        result, value = [each["name"] for each in result], ["pruning", "jpeg"]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("text", "name"), [("name=1e3", "1e3"), ("name=on", "on"), ("name=007", "007"), ("name=2024-01-01", "2024-01-01")]
)
def test_the_name_of_a_sweep_is_taken_as_typed(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: a\n")
    assert load_sweep(tmp_path / "s.yaml", [text]).name == name


def test_options_of_a_component_are_read_as_the_chosen_component_asks() -> None:
    overrides = ["thief.attack.policy=random", "thief.attack.name=knockoff", "victim.watermark.source_classes=3,5"]
    config = load_experiment(None, overrides)
    assert config.thief.attack.params["policy"] == "random"
    assert config.victim.watermark.params["source_classes"] == (3, 5)
    folder = load_experiment(None, ["data=parquet", "data.path=007"])
    assert folder.data.params["path"] == "007"


def test_a_whole_list_of_typed_items_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: a\n")
    sweep = load_sweep(tmp_path / "s.yaml", ["search.metric=wsr,accuracy", "search.mode=max,min", "search=random"])
    assert (sweep.search.metric, sweep.search.mode, sweep.search.name) == (
        ("wsr", "accuracy"),
        ("max", "min"),
        "random",
    )


def test_an_override_that_is_no_yaml_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"override 'seed=\[1' is not valid YAML: line 1"):
        load_experiment(None, ["seed=[1"])


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("epochs=3", "did you mean 'victim.training.epochs', 'victim.null_training.epochs', 'thief.training.epochs'?"),
        ("target_class=3", "did you mean 'victim.watermark.target_class'?"),
        ("budgets=3", "did you mean 'thief.budgets'?"),
        ("budgest=3", "did you mean 'thief.budgets'?"),
        ("victim.epochs=3", "did you mean 'victim.training.epochs'"),
        ("victim.trainng.epochs=3", "did you mean 'victim.training.epochs'"),
        ("victim.training.epochz=3", "did you mean 'victim.training.epochs'?"),
        ("victin.training.epochs=3", "did you mean 'victim.training.epochs'"),
        ("lr=3", "did you mean 'victim.training.learning_rate', 'victim.null_training.learning_rate', "),
        ("victim.training.lr=3", "did you mean 'victim.training.learning_rate'?"),
        ("model=alexnet", "did you mean 'victim.model', 'thief.model'"),
        ("service.rat.burst=3", "did you mean 'service.rate.burst'?"),
        ("serivce.rate.images_per_secnd=3", "did you mean 'service.rate.images_per_second'?"),
    ],
)
def test_an_unknown_path_is_answered_with_the_full_paths_that_may_be_meant(
    override: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_experiment(None, [override])
    assert hint in str(refused.value)
    (tmp_path / "s.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError) as refused:
        load_sweep(tmp_path / "s.yaml", [override])
    assert hint in str(refused.value)


@pytest.mark.parametrize(
    ("override", "known"),
    [("zzqqzz=1", "Known: seed, data"), ("victim.training.zzqqzz=1", "Known: epochs, batch_size")],
)
def test_a_path_that_resembles_nothing_gets_the_list_only(override: str, known: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_experiment(None, [override])
    assert "did you mean" not in str(refused.value) and f"unknown key. {known}" in str(refused.value)


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
    assert dropped(tree, {"data.name": "parquet", "data.path": "x", "data.normalise": False}) == ["data.image_size=16"]
    for settings in (
        {"data.name": "cifar10"},
        {"data.path": "x"},
        {"victim.model.name": "z"},
        {"name": "n"},
        {"a.name": 1},
    ):
        assert dropped(tree, settings) == []


def test_a_title_is_no_component_and_drops_nothing(tmp_path: Path) -> None:
    assert set_path({"name": "one", "base": {"seed": 3}}, "name", "two") == {"name": "two", "base": {"seed": 3}}
    file = tmp_path / "sweep.yaml"
    file.write_text("name: one\nbase: {victim: {watermark: {com: {weight: 0.7}}}}\nspace: {seed: {grid: [1, 2]}}\n")
    sweep = load_sweep(file, ["name=two"])
    assert sweep.name == "two" and sweep.base.victim.watermark.params["com"].weight == 0.7


def test_a_parameter_below_a_bare_name_keeps_the_name() -> None:
    assert set_path({"data": "digits"}, "data.image_size", 24) == {"data": {"name": "digits", "image_size": 24}}


def test_parameters_without_a_name_belong_to_the_default_component() -> None:
    config = build(ExperimentConfig, merge({}, {"thief.attack.query_chunk": 2, "data.image_size": 24}))
    assert (config.thief.attack.name, config.thief.attack.params["query_chunk"]) == ("distillation", 2)
    assert (config.data.name, config.data.params["image_size"]) == ("digits", 24)


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


@pytest.mark.parametrize(
    ("override", "space", "remedy"),
    [
        (
            "thief.model.width=0.5",
            {"thief.model": {"grid": ["alexnet", {"name": "vgg_like", "width": 0.25}]}},
            "thief.model",
        ),
        ("thief.model=resnet18", {"thief.model.name": {"grid": ["alexnet", "vgg_like"]}}, "thief.model.name"),
        ("thief.training.epochs=3", {"thief.training.epochs": {"grid": [1, 2]}}, "thief.training.epochs"),
    ],
)
def test_an_override_that_every_point_replaces_is_refused(
    override: str, space: dict[str, Any], remedy: str, tmp_path: Path
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": {"data": "digits"}, "space": space}))
    with pytest.raises(ConfigError) as refused:
        load_sweep(file, [override])
    assert f"override {override} has no effect" in str(refused.value)
    assert f"space.{remedy}={{grid: [...]}}" in str(refused.value)


def test_a_seed_that_the_seeds_replace_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": {"data": "digits"}, "seeds": 3}))
    with pytest.raises(ConfigError, match=r"override seed=5 has no effect.*seeds=\[\.\.\.\]"):
        load_sweep(file, ["seed=5"])


def test_an_override_that_some_point_keeps_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    space = {"thief.model.name": {"grid": ["alexnet", "vgg_like"]}, "victim.training.epochs": {"grid": [1, 2]}}
    base = {"data": "digits", "thief": {"model": {"name": "vgg_like"}}}
    file.write_text(yaml.safe_dump({"base": base, "space": space}))
    sweep = load_sweep(file, ["thief.model.width=0.25", "victim.training.batch_size=8"])
    assert sweep.base.resolved()["thief"]["model"]["width"] == 0.25


def test_a_component_that_is_overridden_by_name_is_set_before_its_options() -> None:
    overrides = [("data.image_size", "24"), ("data.name", "digits"), ("data", "noise")]
    tree, values = overridden(ExperimentConfig, {}, overrides)
    assert tree == {"data": {"name": "digits", "image_size": 24}}
    assert values == {"data": "noise", "data.name": "digits", "data.image_size": 24}


@pytest.mark.parametrize(
    "text",
    [
        "seed=true",
        "victim.seed=false",
        "data.image_size=true",
        "thief.budgets=true",
        "thief.budgets=[true, 20]",
        "victim.training.learning_rate=true",
        "victim.training.early_stop_patience=true",
        "victim.watermark.target_class=true",
        "service.rate.images_per_second=true",
        "thief.accounts=True",
    ],
)
def test_true_is_no_number(text: str) -> None:
    with pytest.raises(ConfigError, match=r"a number is needed, not true or false"):
        load_experiment(None, [text])


@pytest.mark.parametrize("text", ["seeds=true", "seeds=[0, true]", "stop={wsr: true}", "prices.hour=true"])
def test_nor_in_a_sweep(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match=r"a number is needed, not true or false"):
        load_sweep(tmp_path / "s.yaml", [text])


def test_two_values_for_one_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match="seed is overridden twice, by '1' and by '2'; remove one"):
        load_experiment(None, ["seed=1", "storage=x", "seed=2"])
    for pair in (("seed=1", "base.seed=2"), ("space.seed={grid: [1]}", "space.seed={grid: [2]}"), ("name=b", "name=c")):
        with pytest.raises(ConfigError, match="is overridden twice"):
            load_sweep(tmp_path / "s.yaml", pair)
    assert load_experiment(None, ["seed=1", "seed=1"]).seed == 1


@pytest.mark.parametrize("text", ["storage=", "storage='  '"])
def test_an_empty_storage_is_not_the_working_directory(text: str) -> None:
    with pytest.raises(ConfigError, match="storage is empty; give a folder or URI"):
        load_experiment(None, [text])


def test_a_list_of_wrong_items_is_not_called_empty_too() -> None:
    with pytest.raises(ConfigError) as refused:
        load_experiment(None, ["thief.budgets=abc"])
    assert "thief.budgets.0='abc': Input should be a valid integer" in str(refused.value)
    assert "at least 1 item" not in str(refused.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        load_experiment(None, ["thief.budgets=[]"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resources.trial.cpus=0.00001", "Ray counts in steps of 0.0001"),
        ("service.cpus_per_replica=1e-9", "Ray counts in steps of 0.0001"),
        ("service.gpus_per_replica=0.00009", "Ray counts in steps of 0.0001"),
        ("resources.victim.gpus=1.5", "a fraction of one GPU, or several whole ones"),
    ],
)
def test_what_ray_would_refuse_hours_later_is_refused_at_once(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_experiment(None, [text])
    for fine in ("resources.trial.cpus=0.0001", "service.gpus_per_replica=0", "resources.victim.gpus=2.0"):
        load_experiment(None, [fine])


@pytest.mark.parametrize("url", ["x", "ftp://x", "http://", "127.0.0.1:8000", "https:/x"])
def test_a_url_of_another_kind_is_refused_with_the_config(url: str) -> None:
    with pytest.raises(ConfigError, match="it is not an http or https URL; give one like"):
        load_experiment(None, [f"thief.blackbox.url={url}"])


def test_too_few_values_are_counted_and_an_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings) as refused:
        load_experiment(None, ["victim.watermark.source_classes=3"])
    assert str(refused.value) == "victim.watermark.source_classes=[3]: give 2 values"
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ConfigError, match=r"empty\.yaml is empty; write config keys"):
        load_experiment(tmp_path / "empty.yaml")


def test_the_base_alone_takes_overrides_that_the_space_would_replace(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": {"data": "digits"}, "space": {"thief.training.epochs": {"grid": [1, 2]}}}))
    assert load_base(file, ["thief.training.epochs=3"]).thief.training.epochs == 3
