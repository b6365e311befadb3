"""Names of what was made: pinned, the same when the program grows, others when what they stand for changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import golden
import pytest

from mea_ray.config import ExperimentConfig, SplitsConfig, build, digest, identity, load_experiment, merge
from mea_ray.config.components import CombinerChoice, DataChoice, RemovalChoice
from mea_ray.core.settings import Settings
from mea_ray.data import DATASETS
from mea_ray.removal import REMOVALS
from mea_ray.watermarks import WATERMARKS

RAISED = {"verification": {"@version": 2}}
"""What the names of all experiments hold: groups of settings whose version is not 1."""
CASES = json.loads(golden.FILE.read_text(encoding="utf-8"))
Install = Callable[[type], None]


def experiment(**settings: Any) -> ExperimentConfig:
    return build(ExperimentConfig, merge({}, {key.replace("__", "."): value for key, value in settings.items()}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: ",".join(case["settings"]) or "defaults")
def test_names_are_those_of_the_golden_file(case: dict[str, Any]) -> None:
    assert golden.names(case["settings"]) == case["names"], (
        "artifacts would be trained again; if that is meant, run tests/helpers/golden.py"
    )


def test_the_golden_file_pins_a_dozen_different_experiments() -> None:
    assert len(CASES) >= 12
    assert len({case["names"]["trial"] for case in CASES}) == len(CASES)
    assert len({case["names"]["victim"] for case in CASES}) >= 8


def test_defaults_have_no_identity() -> None:
    assert identity(load_experiment(None)) == RAISED


def test_only_what_differs_from_the_defaults_is_in_it() -> None:
    config = experiment(
        seed=0, victim__seed=3, victim__watermark__name="mea_defender", victim__watermark__target_class=5, data="digits"
    )
    differs = {"victim": {"seed": 3, "watermark": {"name": "mea_defender", "target_class": 5}}}
    assert identity(config) == {**differs, **RAISED}


def test_a_default_that_is_spelt_out_changes_no_name() -> None:
    config = experiment(victim__watermark__target_class=5)
    assert golden.names_of(build(ExperimentConfig, config.resolved())) == golden.names_of(config)
    assert identity(build(ExperimentConfig, config.resolved())) == identity(config)


def test_components_inside_of_lists_and_mixtures_count_without_their_defaults() -> None:
    methods = ["pruning", {"name": "chain", "steps": ["fine_tuning", {"name": "quantisation", "bits": 3}]}]
    pool = {"name": "mixture", "parts": [{"name": "digits", "limit": 500}, "noise"]}
    tree = identity(experiment(removal__methods=methods, splits__thief_pool=pool))
    assert tree["removal"]["methods"] == [
        {"name": "pruning"},
        {"name": "chain", "steps": [{"name": "fine_tuning"}, {"name": "quantisation", "bits": 3}]},
    ]
    assert tree["splits"] == {
        "thief_pool": {"name": "mixture", "parts": [{"name": "digits", "limit": 500}, {"name": "noise"}]}
    }


def test_a_component_in_place_of_a_word_has_an_identity_even_with_its_defaults() -> None:
    assert identity(SplitsConfig(thief_pool="digits")) == {"thief_pool": {"name": "digits"}}
    assert identity(SplitsConfig(thief_pool="train")) == {}


def test_a_component_alone_names_itself() -> None:
    assert identity(CombinerChoice(name="left_right")) == {"name": "left_right"}


def test_an_optional_section_that_is_there_counts() -> None:
    one = experiment(service__rate={"images_per_second": 5.0})
    assert identity(one) == {"service": {"rate": {"images_per_second": 5.0}}, **RAISED}


class Spring(Settings):
    """Settings of ``Clock``."""

    turns: int = 3


class Clock:
    """A component."""

    def __init__(self, *, ticks: int = 1, spring: Spring = Spring(turns=9), extra: Spring | None = None) -> None: ...


class GrownSpring(Spring):
    """Settings of ``GrownClock``."""

    wire: float = 0.5


class GrownClock:
    """The same one version later: an option and a setting more, both doing nothing at their defaults."""

    def __init__(
        self,
        *,
        ticks: int = 1,
        bell: bool = False,
        spring: GrownSpring = GrownSpring(turns=9),
        extra: GrownSpring | None = None,
    ) -> None: ...


class OtherClock(Clock):
    """The same, but it works otherwise."""

    version: ClassVar[int] = 2


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a class into the tables of watermarks, removals and datasets as ``clock``, in place of the one before."""

    def put(kind: type) -> None:
        module = ModuleType("clockwork")
        module.Clock = kind  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "clockwork", module)
        for table in (WATERMARKS, REMOVALS, DATASETS):
            monkeypatch.setitem(table.entries, "clock", "clockwork:Clock")
            monkeypatch.setattr(table, "_schemas", {})

    return put


SETTINGS: list[dict[str, Any]] = [
    {"victim__watermark": "clock"},
    {"victim__watermark": {"name": "clock", "ticks": 4, "spring": {"turns": 2}, "extra": {}}},
    {"data": "clock"},
    {"removal__methods": ["clock"]},
    {"removal__methods": [{"name": "chain", "steps": ["pruning", "clock"]}]},
    {"splits__thief_pool": {"name": "mixture", "parts": ["digits", "clock"]}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: json.dumps(settings))
def test_an_option_that_does_nothing_renames_nothing_and_another_version_does(
    install: Install, settings: dict[str, Any]
) -> None:
    install(Clock)
    before = experiment(**settings)
    names = golden.names_of(before)
    install(GrownClock)
    grown = experiment(**settings)
    assert golden.names_of(grown) == names
    install(OtherClock)
    assert golden.names_of(experiment(**settings))["trial"] != names["trial"]


def test_another_version_of_a_default_component_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = golden.names_of(load_experiment(None))
    monkeypatch.setattr(WATERMARKS.resolve("mea_defender"), "version", 2, raising=False)
    monkeypatch.setattr(REMOVALS.resolve("pruning"), "version", 5, raising=False)
    config = load_experiment(None)
    assert identity(config) == {"victim": {"watermark": {"name": "mea_defender", "@version": 2}}, **RAISED}
    now = golden.names_of(config)
    assert now["victim"] != before["victim"] and now["null"] == before["null"]
    assert identity(RemovalChoice(name="chain")) == {
        "name": "chain",
        "steps": [{"name": "fine_tuning"}, {"name": "pruning", "@version": 5}],
    }


def test_a_function_may_have_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DATASETS.resolve("digits"), "version", 4, raising=False)
    assert identity(DataChoice(name="digits")) == {"name": "digits", "@version": 4}


def test_another_version_of_a_group_counts(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Clock)
    assert identity(experiment(victim__watermark="clock"))["victim"] == {"watermark": {"name": "clock"}}
    monkeypatch.setattr(Spring, "version", 2)
    watermark = identity(experiment(victim__watermark="clock"))["victim"]["watermark"]
    assert watermark == {"name": "clock", "spring": {"@version": 2}}


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (1, "1"), (None, "None")])
def test_values_that_are_equal_in_python_only_have_names_of_their_own(one: Any, other: Any) -> None:
    assert digest({"a": one}) != digest({"a": other})


def test_digest_is_stable_and_depends_on_the_values_only() -> None:
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 1}) == "015abd7f5cc57a2d"  # the same on every machine: artifacts are named by it
