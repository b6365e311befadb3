"""The draw of a key's classes: uniform, repeatable where it should be, and written down."""

from __future__ import annotations

import json
import stat
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from mea_ray.config import ExperimentConfig, build
from mea_ray.core.class_keys import AdmissibleKeys
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mixed_classes import MixedClasses

FIVE = AdmissibleKeys(5, ordered=True)


def images(classes: int = 5, missing: int | None = None) -> ImageSet:
    labels = np.repeat(np.arange(classes), 4).astype(np.int64)
    labels = labels[labels != missing] if missing is not None else labels
    pixels = np.random.default_rng(0).integers(0, 255, (len(labels), 1, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, labels, tuple(map(str, range(classes))))


def scheme(name: str = "composite", **key: str) -> MixedClasses:
    built: MixedClasses = WATERMARKS.build(name, key=key)
    return built


@pytest.mark.parametrize("origin", ["seed", "system", "beacon"])
def test_every_key_is_equally_likely(origin: str) -> None:
    def draw(number: int) -> KeyDraw:
        settings = {"classes": origin, "beacon": f"{number:064x}" if origin == "beacon" else ""}
        return KeyDraw.model_validate(settings)

    counts = Counter(draw(number).draw(FIVE, number) for number in range(6000))
    assert set(counts) == set(FIVE)
    assert chisquare([counts[key] for key in FIVE]).pvalue > 1e-4


def test_a_beacon_alone_decides_and_so_does_a_seed_but_the_system_does_not_repeat_itself() -> None:
    assert len({KeyDraw(classes="beacon", beacon="ab").draw(FIVE, seed) for seed in range(20)}) == 1
    assert len({KeyDraw(classes="seed").draw(FIVE, 7) for _ in range(20)}) == 1
    assert len({KeyDraw(classes="system").draw(FIVE, 7) for _ in range(60)}) > 1


def test_another_set_of_keys_is_another_draw() -> None:
    drawn = [KeyDraw(classes="beacon", beacon=str(n)) for n in range(200)]
    small, large = AdmissibleKeys(3, ordered=True), AdmissibleKeys(3, ordered=False)
    places = [(list(small).index(each.draw(small, 0)), list(large).index(each.draw(large, 0))) for each in drawn]
    assert len({(a % 3, b) for a, b in places}) == 9, "the two draws do not follow from each other"


@pytest.mark.parametrize("settings", [{"classes": "beacon"}, {"classes": "seed", "beacon": "ab"}, {"beacon": "ab"}])
def test_a_beacon_is_given_where_it_is_used(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="beacon"):
        build(ExperimentConfig, {"victim": {"watermark": {"name": "composite", "key": settings}}})


@pytest.mark.parametrize("name", ["composite", "mea_defender", "mea_carrier", "mea_defender_two_stage"])
def test_the_key_has_the_drawn_classes_and_says_how_they_were_drawn(name: str, tmp_path: Path) -> None:
    key = scheme(name, classes="beacon", beacon="00ff").make_key(images(), 3)
    expected = KeyDraw(classes="beacon", beacon="00ff").draw(FIVE, 0)
    assert (key.source_classes, key.target_class) == (expected.sources, expected.target) and key.drawn
    admissible = {"classes": 5, "ordered": True, "geometries": []}
    assert key.draw == {"classes": "beacon", "beacon": "00ff", "admissible": admissible}
    key.save(tmp_path)
    assert Key.load(tmp_path).digest() == key.digest() and Key.load(tmp_path).draw == key.draw
    assert stat.S_IMODE((tmp_path / "key.json").stat().st_mode) == 0o600
    changes: list[dict[str, Any]] = [{"target_class": 9}, {"seed": 1}, {"draw": {}}, {"tensors": {"a": np.zeros(2)}}]
    assert all(replace(key, **change).digest() != key.digest() for change in changes)


def test_a_key_that_was_chosen_says_so_and_so_does_one_of_an_older_version(tmp_path: Path) -> None:
    key = scheme().make_key(images(), 0)
    assert key.draw == {"classes": "chosen"} and not key.drawn
    assert (key.source_classes, key.target_class) == ((0, 1), 2)
    key.save(tmp_path)
    body = json.loads((tmp_path / "key.json").read_text())
    del body["draw"]
    (tmp_path / "key.json").write_text(json.dumps(body))
    assert not Key.load(tmp_path).drawn


@pytest.mark.parametrize("data", [images(2), images(5, missing=3)])
def test_too_few_classes_to_draw_from_are_refused(data: ImageSet) -> None:
    with pytest.raises(ConfigError, match=r"key\.classes"):
        scheme(classes="system").make_key(data, 0)


def test_a_drawn_geometry_is_the_keys_own_and_each_is_equally_likely() -> None:
    counts: Counter[str] = Counter()
    for seed in range(300):
        built = scheme(classes="seed", geometry="drawn")
        key = built.make_key(images(), seed)
        names = sorted(built.drawable)
        assert key.draw["admissible"] == {"classes": 5, "ordered": True, "geometries": names}
        assert sorted([key.settings["combiner"], *key.settings["geometries"]]) == names
        own, others = MixedClasses.combiners(key)
        assert not any(own.kinds & other.kinds for other in others.values()), "the others are not what it makes itself"
        counts[key.settings["combiner"]] += 1
    assert set(counts) == set(names) and len(names) > 2
    assert chisquare(list(counts.values())).pvalue > 1e-4
    assert len(AdmissibleKeys.from_tree(key.draw["admissible"])) == 5 * 4 * 3 * len(names)


def test_the_same_origin_draws_the_same_classes_only_without_a_geometry() -> None:
    plain = [scheme(classes="seed").make_key(images(), seed) for seed in range(20)]
    with_geometry = [scheme(classes="seed", geometry="drawn").make_key(images(), seed) for seed in range(20)]
    assert len({key.settings["combiner"] for key in plain}) == 1
    assert any(a.source_classes != b.source_classes for a, b in zip(plain, with_geometry, strict=True)), (
        "another set of keys is another draw"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"key": {"geometry": "drawn"}}, "geometry=drawn needs drawn classes"),
        ({"key": {"classes": "seed", "geometry": "drawn"}, "mixing": {"combiner": "autoencoder"}}, "autoencoder"),
    ],
)
def test_a_geometry_that_cannot_be_drawn_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WATERMARKS.build("composite", **settings)
