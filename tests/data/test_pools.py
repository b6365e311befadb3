"""Pools of a thief: noise that is generated, several datasets in one, and the labels that go with them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from mea_ray.config import ExperimentConfig, SplitsConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Dataset
from mea_ray.data import DATASETS
from mea_ray.data.resize import fit


def noise(**params: Any) -> Dataset:
    loaded: Dataset = DATASETS.build("noise", **{"train_images": 90, "test_images": 9, "image_size": 24, **params})
    return loaded


def mixture(*parts: Any) -> Dataset:
    loaded: Dataset = DATASETS.build("mixture", parts=list(parts))
    return loaded


SMALL_NOISE = {"name": "noise", "train_images": 30, "test_images": 6}


def test_noise_has_its_kinds_as_classes_and_its_seed_in_it() -> None:
    first, again, other = noise(), noise(), noise(seed=1)
    assert first.train.class_names == ("uniform", "gaussian", "blobs")
    assert first.train.images.shape == (90, 3, 24, 24) and first.test.images.shape == (9, 3, 24, 24)
    assert np.bincount(first.train.labels).tolist() == [30, 30, 30]
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    assert len(np.unique(first.train.images.reshape(90, -1), axis=0)) == 90
    assert not np.array_equal(first.train.images[:9], first.test.images)
    np.testing.assert_array_equal(
        noise(train_images=3000, image_size=8).train.images[:90], noise(image_size=8).train.images
    )


def figures(**params: Any) -> Dataset:
    loaded: Dataset = DATASETS.build("figures", **{"train_images": 120, "test_images": 24, "image_size": 16, **params})
    return loaded


def test_figures_are_drawn_anew_by_their_seed_and_more_begin_with_the_same() -> None:
    first, again, other = figures(), figures(), figures(seed=1)
    assert first.train.images.shape == (120, 3, 16, 16) and first.test.images.shape == (24, 3, 16, 16)
    assert first.train.classes == 12 and np.bincount(first.train.labels).tolist() == [10] * 12
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert not np.array_equal(first.train.images, other.train.images)
    assert len(np.unique(first.train.images.reshape(120, -1), axis=0)) == 120
    assert not np.array_equal(first.train.images[:24], first.test.images)
    np.testing.assert_array_equal(figures(train_images=600).train.images[:120], first.train.images)


def test_figures_are_what_they_are_called() -> None:
    drawn = figures(channels=1, image_size=32, train_images=600).train
    contrast = drawn.images.astype(float).std((1, 2, 3))
    assert contrast.min() > 15, "two colours can always be told apart"
    # Whatever a figure's place and scale, its ink is a small part of the paper; a texture's is about half of it.
    low, high = drawn.images.min((1, 2, 3)), drawn.images.max((1, 2, 3))
    bright = (drawn.images > (low / 2.0 + high / 2.0)[:, None, None, None]).mean((1, 2, 3))
    share = {name: np.minimum(bright, 1 - bright)[drawn.labels == k].mean() for k, name in enumerate(drawn.class_names)}
    assert max(share["disc"], share["triangle"], share["cross"], share["square"]) < 0.3
    assert min(share["stripes"], share["checks"], share["rings"], share["spokes"]) > 0.35


def test_noise_is_what_it_is_called() -> None:
    images = {name: noise(kinds=[name], channels=1).train.images / 255.0 for name in ("uniform", "gaussian", "blobs")}
    assert images["uniform"].mean() == pytest.approx(0.5, abs=0.01)
    assert images["uniform"].std() == pytest.approx(12**-0.5, abs=0.01)
    assert images["gaussian"].mean() == pytest.approx(0.5, abs=0.01)
    inner = images["gaussian"][(images["gaussian"] > 0) & (images["gaussian"] < 1)]
    # A normal distribution cut off at two deviations keeps 0.774 of its variance.
    assert inner.std() == pytest.approx(0.25 * 0.774**0.5, abs=0.01)

    def step(values: np.ndarray) -> float:
        return float(np.abs(np.diff(values, axis=3)).mean())

    assert step(images["blobs"]) < 0.1 < 0.25 < step(images["uniform"])
    assert images["blobs"].std() > 0.1


@pytest.mark.parametrize(
    "bad",
    [{"kinds": []}, {"kinds": ["blobs", "blobs"]}, {"train_images": 2}, {"test_images": 0}, {"channels": 2}]
    + [{"image_size": 0}],
)
def test_noise_refuses_what_it_cannot_draw(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}="):
        noise(**bad)
    with pytest.raises(ConfigError, match="blob"):
        DATASETS.check("noise", {"kinds": ["blob"]})


def test_a_mixture_keeps_its_parts_apart() -> None:
    digits: Dataset = DATASETS.build("digits")
    mixed = mixture({"name": "digits", "limit": 50}, SMALL_NOISE | {"kinds": ["blobs", "uniform"]})
    assert mixed.train.class_names == (*(f"digits/{each}" for each in range(10)), "noise/blobs", "noise/uniform")
    assert mixed.test.class_names == mixed.train.class_names
    assert len(mixed.train) == 80 and len(mixed.test) == len(digits.test) + 6
    assert mixed.train.shape == (1, 16, 16)
    generated: Dataset = DATASETS.build("noise", kinds=("blobs", "uniform"), train_images=30, test_images=6)
    np.testing.assert_array_equal(mixed.train.images[50:], fit(generated.train.images, (1, 16, 16)))
    np.testing.assert_array_equal(mixed.train.labels[50:], generated.train.labels + 10)
    # What the limit leaves is of the part, with its labels, and not just its beginning.
    known = {image.tobytes(): label for image, label in zip(digits.train.images, digits.train.labels, strict=True)}
    limited = [image.tobytes() for image in mixed.train.images[:50]]
    assert [known[image] for image in limited] == mixed.train.labels[:50].tolist()
    assert limited != [image.tobytes() for image in digits.train.images[:50]] and len(set(limited)) == 50
    again = mixture({"name": "digits", "limit": 50}, SMALL_NOISE | {"kinds": ["blobs", "uniform"]})
    np.testing.assert_array_equal(mixed.train.images, again.train.images)


def test_grey_becomes_colour_and_a_repeated_dataset_is_numbered() -> None:
    mixed = mixture(SMALL_NOISE, "digits", {"name": "digits", "limit": 10**6})
    assert mixed.train.shape == (3, 32, 32)
    assert mixed.train.class_names[:4] == ("noise/uniform", "noise/gaussian", "noise/blobs", "digits.2/0")
    assert mixed.train.class_names[-1] == "digits.3/9" and mixed.train.classes == 23
    grey = mixed.train.images[30:]
    np.testing.assert_array_equal(grey[:, 0], grey[:, 2])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"name": "digits", "limt": 5}], "dataset 'digits' has no parameter 'limt'; did you mean 'limit'"),
        ([{"name": "noise", "kind": "blobs"}], "no parameter 'kind'; did you mean 'kinds'"),
        ([{"name": "digitz"}], "unknown dataset 'digitz'; did you mean 'digits'"),
        ([{"name": "digits", "limit": 0}], "parts.0.limit=0"),
        ([{"name": "digits", "limit": "few"}], "parts.0.limit='few'"),
        ([{"name": "digits", "image_size": "big"}], "image_size='big'"),
        ([{"limit": 5}], "needs a `name`"),
        ([3], "parts.0=3"),
    ],
)
def test_a_mistyped_part_is_refused_by_the_config(parts: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(ExperimentConfig, {"splits": {"thief_pool": {"name": "mixture", "parts": parts}}})
    assert message in str(caught.value)


def test_a_mixture_without_parts_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.parts is empty"):
        mixture()


def test_the_resolved_config_of_a_mixture_says_everything_and_reads_itself() -> None:
    pool = {"name": "mixture", "parts": ["digits", {"name": "mixture", "parts": [SMALL_NOISE]}]}
    config = build(SplitsConfig, {"thief_pool": pool})
    resolved = config.resolved()
    assert resolved["thief_pool"]["parts"][0] == {
        "name": "digits",
        "limit": None,
        "image_size": 16,
        "test_fraction": 0.4,
    }
    assert resolved["thief_pool"]["parts"][1]["parts"][0]["train_images"] == 30
    again = build(SplitsConfig, resolved)
    assert again == config == pickle.loads(pickle.dumps(config)) and again.resolved() == resolved
