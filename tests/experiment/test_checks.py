"""What can be known before training is refused before training, by the one walk over all that will run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet, Splits
from mea_ray.experiment.checks import check
from mea_ray.removal import REMOVALS

SHAPE = (1, 12, 12)
TINY = {"name": "vgg_like", "width": 0.0625}
NORMALISING = {"name": "resnet18", "width": 0.1}


def images(count: int, classes: int = 10, seed: int = 0) -> ImageSet:
    drawn = np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return ImageSet(drawn, np.arange(count, dtype=np.int64) % classes, tuple(f"class {c}" for c in range(classes)))


def splits(train: int = 300, pool: int = 200, classes: int = 10) -> Splits:
    owned, validation, thief, verification, test = (
        images(count, classes, seed) for seed, count in enumerate((train, 20, pool, 200, 60))
    )
    return Splits(owned, validation, thief, verification, test, f"{train}-{pool}-{classes}", None)


def config(**settings: Any) -> ExperimentConfig:
    given = {"victim.model": TINY, "thief.model": TINY, "thief.budgets": [100]}
    return build(
        ExperimentConfig, merge({}, given | {key.replace("__", "."): value for key, value in settings.items()})
    )


ENCODER = {
    "victim__pretext": "simclr",
    "victim__watermark": "mea_carrier_encoder",
    "thief__attack": "feature_distillation",
    "service__policy": "embedding",
}
ONE = {"thief__budgets": [1]}

REFUSED: list[tuple[dict[str, Any], dict[str, int], str]] = [
    # Removals that train, on one answered image, of a network that normalises batches.
    *(
        (
            {"removal__methods": [name], "removal__tried_on": ["null_model"], "victim__model": NORMALISING} | ONE,
            {},
            f"removal.methods: {name} on the null_model: a network with batch normalisation",
        )
        for name in ("fine_tuning", "fine_pruning", "chain")
    ),
    (
        {"removal__methods": [{"name": "wrk", "batch_size": 1}], "victim__model": NORMALISING},
        {},
        "wrk on the null_model: .* in batches of 1; raise",
    ),
    ({"removal__methods": ["wrong_mixes"]} | ONE, {}, "wrong mixes need 3 classes and 2 images, got 10"),
    ({"removal__methods": ["wrong_mixes"], "victim__watermark": "none"}, {"classes": 2}, "got 2 classes and 100"),
    (
        {"removal__methods": [{"name": "transfer_learning", "dataset": "figures", "same_as": [0, 1, 2]}]},
        {},
        "same_as=.0, 1, 2. must hold a label below 12 or -1 for each of the 10 old classes",
    ),
    (
        {"removal__methods": [{"name": "transfer_learning", "dataset": {"name": "parquet", "path": "/not/there"}}]},
        {},
        "transfer_learning on the substitute: .*/not/there",
    ),
    ({"detection__methods": ["lof"], "detection__images": 3}, {}, "'lof' needs at least 4 clean images"),
    # Schemes of the other kind of model.
    ({"victim__watermark": "mea_carrier_encoder"}, {}, "'mea_carrier_encoder' marks encoders; set victim.pretext"),
    ({"victim__watermark": "sslguard"}, {}, "'sslguard' marks encoders; set victim.pretext"),
    *(
        (ENCODER | {"victim__watermark": name}, {}, f"'{name}' marks classifiers only")
        for name in ("mea_defender", "ewe", "cfw", "dawn")
    ),
    # What a scheme finds in the images.
    ({"victim__watermark": {"name": "pattern", "size": 13}}, {}, "13"),
    ({"victim__watermark": {"name": "cfw", "kept_apart": 11}}, {}, "kept_apart=11 of the 12 classes"),
    ({"victim__watermark": {"name": "cfw", "dataset": {"name": "parquet", "path": "/not/there"}}}, {}, "/not/there"),
    ({"victim__watermark": {"name": "ewe", "source_class": 11}}, {}, "source_class"),
    # Encoders.
    (ENCODER | {"victim__training__batch_size": 1}, {}, "victim.pretext=simclr needs at least 2 images in a batch"),
    (ENCODER | {"verification__probe_images": 5}, {}, "class .* has none of the 5 labelled images"),
    (
        ENCODER | {"verification__reading": "linear_probe_cv", "verification__probe_images": 30},
        {},
        "fewer than the 3 folds of linear_probe_cv",
    ),
    (ENCODER | {"thief__attack": "cont_steal"} | ONE, {}, "thief.attack=cont_steal compares the images of a batch"),
    # Data and pool.
    ({"victim__watermark": "none"}, {"classes": 1}, "a classifier needs at least 2 classes, got 1"),
    ({"thief__budgets": [500]}, {}, "the thief's pool holds 200 images, .* 500 for thief.budgets"),
    ({"thief__model": NORMALISING} | ONE, {}, "would train it on 1 image at a time"),
    ({"victim__model": NORMALISING, "victim__training__batch_size": 1}, {}, "needs at least 2 images in a batch"),
]


@pytest.mark.parametrize(("settings", "data", "text"), REFUSED, ids=[text[:60] for _, _, text in REFUSED])
def test_what_could_not_be_finished_is_refused(settings: dict[str, Any], data: dict[str, int], text: str) -> None:
    with pytest.raises((ConfigError, DataError), match=text):
        check(config(**settings), splits(**data))


@pytest.mark.parametrize("name", REMOVALS.names())
def test_every_removal_passes_with_enough_images(name: str) -> None:
    check(config(removal__methods=[name], removal__tried_on=["substitute", "victim", "null_model"]), splits())


@pytest.mark.parametrize("name", ["fine_tuning", "second_theft", "pruning", "jpeg"])
def test_one_image_is_enough_without_batch_normalisation(name: str) -> None:
    check(config(removal__methods=[name], **ONE), splits())


def test_a_removal_is_checked_once_for_many_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    queried: list[int] = []
    pruning = REMOVALS.resolve("pruning")
    monkeypatch.setattr(pruning, "check", lambda self, prospect: queried.append(prospect.images))
    for seed in range(5):
        check(config(removal__methods=[{"name": "pruning", "rate": 0.123}], seed=seed), splits())
    assert queried == [100]  # victim and substitute are networks of one kind


def test_an_encoder_that_can_be_read_passes() -> None:
    check(config(**ENCODER), splits())
