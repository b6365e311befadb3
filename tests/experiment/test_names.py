"""What victims, null models, splits and trials are called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.experiment.data import Fingerprints
from mea_ray.experiment.names import Names

READ = Fingerprints("a" * 32)


def names(read: Fingerprints = READ, **settings: object) -> Names:
    tree = merge({}, {key.replace("__", "."): value for key, value in settings.items()})
    return Names.of(build(ExperimentConfig, tree), read)


@pytest.mark.parametrize(
    "same", [{"thief__budgets": [5]}, {"seed": 3}, {"storage": "elsewhere"}, {"service__replicas": 2}]
)
def test_a_victim_is_not_named_by_what_has_no_part_in_it(same: dict[str, Any]) -> None:
    assert names(**same).victim == names().victim


@pytest.mark.parametrize(
    "other",
    [
        {"victim__seed": 1},
        {"victim__training__epochs": 3},
        {"victim__watermark": "none"},
        {"splits__validation_fraction": 0.1},
        {"splits__thief_pool": "disjoint"},
        {"read": Fingerprints("b" * 32)},
    ],
)
def test_a_victim_is_named_by_what_made_it(other: dict[str, object]) -> None:
    assert names(**other).victim != names().victim  # type: ignore[arg-type]


def test_null_models_are_shared_by_all_watermarks_but_not_with_each_other() -> None:
    two = names(verification__null_models=2)
    assert two.nulls == names(verification__null_models=2, victim__watermark="none").nulls
    assert len({*two.nulls, *names(victim__seed=1).nulls, two.victim}) == 4


def test_a_trial_is_named_by_what_it_is_and_not_by_where_it_runs() -> None:
    assert names(storage="x", tracking__wandb="disabled", resources__trial__cpus=3).trial == names().trial
    assert len({names(seed=1).trial, names(thief__budgets=[5]).trial, names(victim__seed=1).trial, names().trial}) == 4


def test_data_count_by_their_content_and_not_by_where_they_were_read() -> None:
    here = {"data": {"name": "image_folder", "path": "data"}, "splits__thief_pool": {"name": "digits"}}
    there = {
        "data": {"name": "parquet", "path": "/data/set"},
        "splits__thief_pool": {"name": "digits", "image_size": 9},
    }
    read = Fingerprints("a" * 32, pool="c" * 32)
    assert names(read, **here) == names(read, **there)
    assert names(read, **here) != names(replace(read, data="d" * 32), **here)


def test_another_pool_gives_another_trial_with_the_same_models() -> None:
    pool = {"splits__thief_pool": {"name": "digits"}}
    one, other = names(Fingerprints("a" * 32, "b" * 32), **pool), names(Fingerprints("a" * 32, "c" * 32), **pool)
    assert one.trial != other.trial and one.data != other.data
    assert (one.victim, one.nulls) == (other.victim, other.nulls) == (names().victim, names().nulls)
