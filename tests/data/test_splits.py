"""Splits: disjoint, stratified, deterministic; resizing; the digits that need no files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Dataset, ImageSet, Splits
from mea_ray.data import DATASETS
from mea_ray.data.digits import load as load_digits
from mea_ray.data.resize import fit
from mea_ray.data.splits import make_splits, stratified


def numbered(counts: list[int], start: int) -> ImageSet:
    """Images that each carry their own number, so that they can be recognised; classes are shuffled."""
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(start).permutation(labels).astype(np.int64)
    number = np.arange(start, start + len(labels))
    images = np.zeros((len(labels), 1, 2, 2), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = number % 256, number // 256
    return ImageSet(images, labels, tuple(f"class{i}" for i in range(len(counts))))


def ids(part: ImageSet) -> set[int]:
    return {int(low) + 256 * int(high) for low, high in part.images[:, 0, 0].tolist()}


def labels_by_id(part: ImageSet) -> dict[int, int]:
    numbers = part.images[:, 0, 0].astype(int) @ [1, 256]
    return dict(zip(numbers.tolist(), part.labels.tolist(), strict=True))


@pytest.fixture
def dataset() -> Dataset:
    return Dataset("numbered", numbered([200, 100, 40], 0), numbered([100, 80, 20], 1000))


def sets(splits: Splits) -> dict[str, ImageSet]:
    return {name: part for name, part in vars(splits).items() if isinstance(part, ImageSet)}


def parts(splits: Splits) -> dict[str, set[int]]:
    assert len(sets(splits)) == 5
    return {name: ids(part) for name, part in sets(splits).items()}


def test_the_papers_pool_is_all_of_the_owners_train(dataset: Dataset) -> None:
    got = parts(make_splits(dataset, validation_fraction=0.1, verification_fraction=0.25))
    assert got["thief_pool"] == ids(dataset.train)
    assert got["victim_train"] | got["victim_validation"] == ids(dataset.train)
    assert not got["victim_train"] & got["victim_validation"]
    assert got["verification"] | got["test"] == ids(dataset.test)
    assert not got["verification"] & got["test"]
    assert not (got["verification"] | got["test"]) & ids(dataset.train)


def test_a_disjoint_pool_is_never_seen_by_the_victim(dataset: Dataset) -> None:
    got = parts(make_splits(dataset, thief_pool="disjoint", disjoint_fraction=0.3))
    assert sum(map(len, got.values())) == len(set().union(*got.values())) == len(dataset.train) + len(dataset.test)
    assert len(got["thief_pool"]) == 0.3 * len(dataset.train)


def test_every_cut_takes_its_fraction_of_every_class(dataset: Dataset) -> None:
    splits = make_splits(dataset, validation_fraction=0.1, verification_fraction=0.6, verification_minimum=1)
    assert np.bincount(splits.victim_validation.labels).tolist() == [20, 10, 4]
    assert np.bincount(splits.victim_train.labels).tolist() == [180, 90, 36]
    assert np.bincount(splits.verification.labels).tolist() == [60, 48, 12]


def test_verification_gets_its_minimum_but_at_most_half_of_a_class(dataset: Dataset) -> None:
    splits = make_splits(dataset, verification_fraction=0.1, verification_minimum=36)
    assert np.bincount(splits.verification.labels).tolist() == [36, 36, 10]


def test_images_keep_their_labels(dataset: Dataset) -> None:
    truth = {**labels_by_id(dataset.train), **labels_by_id(dataset.test)}
    for part in sets(make_splits(dataset, thief_pool="disjoint")).values():
        assert labels_by_id(part).items() <= truth.items()


def test_a_seed_fixes_the_splits(dataset: Dataset) -> None:
    assert parts(make_splits(dataset, seed=3)) == parts(make_splits(dataset, seed=3))
    assert parts(make_splits(dataset, seed=3)) != parts(make_splits(dataset, seed=4))


def test_another_dataset_is_brought_to_the_victims_shape(dataset: Dataset) -> None:
    colour = np.full((5, 3, 9, 7), 90, np.uint8)
    other = ImageSet(colour, np.zeros(5, np.int64), ("thing",))
    pool = make_splits(dataset, thief_pool=Dataset("other", other, other)).thief_pool
    assert pool.images.shape == (5, 1, 2, 2)
    assert np.all(np.abs(pool.images.astype(int) - 90) <= 1)


def test_a_class_too_small_is_named() -> None:
    one = Dataset("one", numbered([50, 1], 0), numbered([50, 50], 1000))
    with pytest.raises(DataError, match=r"'class1' .* has 1 images, the validation split needs at least 2"):
        make_splits(one)
    two = Dataset("two", numbered([50, 2], 0), numbered([50, 50], 1000))
    make_splits(two)
    with pytest.raises(DataError, match="the disjoint split needs at least 3"):
        make_splits(two, thief_pool="disjoint")
    three = Dataset("three", numbered([50, 3], 0), numbered([50, 2], 1000))
    for fraction in (0.01, 0.99):
        splits = make_splits(three, thief_pool="disjoint", disjoint_fraction=fraction)
        assert all(1 in part.labels for part in sets(splits).values())


@pytest.mark.parametrize("name", ["validation_fraction", "verification_fraction", "disjoint_fraction"])
@pytest.mark.parametrize("value", [0, 1, -0.1])
def test_fractions_outside_are_refused(dataset: Dataset, name: str, value: float) -> None:
    fractions: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=name):
        make_splits(dataset, **fractions)


def test_an_unknown_pool_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="'all' must be"):
        make_splits(dataset, thief_pool="all")  # type: ignore[arg-type]


def test_labels_are_checked() -> None:
    images = np.zeros((3, 1, 2, 2), np.uint8)
    assert not ImageSet(images, np.array([0, -1, 1]), ("a", "b")).labelled
    assert ImageSet(images, np.array([0, 0, 1]), ("a", "b")).labelled
    for labels in ([0, 1, 2], [-2, 0, 1]):
        with pytest.raises(DataError, match="or be -1 for no label"):
            ImageSet(images, np.array(labels), ("a", "b"))
    with pytest.raises(DataError, match="they must agree"):
        Dataset("x", ImageSet(images, np.zeros(3, np.int64), ("a",)), ImageSet(images, np.zeros(3, np.int64), ("b",)))


def test_a_dataset_without_labels_or_test_images_is_refused(dataset: Dataset) -> None:
    unlabelled = ImageSet(dataset.train.images, np.full(len(dataset.train), -1), dataset.train.class_names)
    with pytest.raises(DataError, match="numbered has 340 train images, 340 of them without a label"):
        make_splits(Dataset("numbered", unlabelled, dataset.test))
    empty = Dataset("numbered", dataset.train, dataset.test.take(np.arange(0)))
    with pytest.raises(DataError, match="numbered has 0 test images"):
        make_splits(empty)
    with pytest.raises(DataError, match="^no test part$"):
        make_splits(Dataset("numbered", dataset.train, dataset.test, "no test part"))
    with pytest.raises(DataError, match="splits.thief_pool=numbered has no training images"):
        make_splits(dataset, thief_pool=Dataset("numbered", empty.test, dataset.test))


def test_stratified_partitions_what_it_is_given() -> None:
    images = numbered([30, 30], 0)
    given = np.arange(0, 60, 2)
    first, second = stratified(images, given, 0.4, 0, "name")
    assert sorted([*first, *second]) == given.tolist()
    assert np.all(np.diff(first) > 0) and np.all(np.diff(second) > 0)


def test_digits_hold_enough_for_a_thousand_watermark_samples() -> None:
    dataset = DATASETS.build("digits")
    assert len(dataset.train) + len(dataset.test) == 1797
    assert dataset.train.shape == (1, 16, 16)
    assert dataset.train.images.max() == 255 and dataset.train.images.min() == 0
    counts = np.sort(np.bincount(make_splits(dataset).verification.labels))
    assert counts[0] >= 30 and counts[0] * counts[1] >= 1000


def test_digits_at_their_own_size_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits as raw

    dataset = load_digits(image_size=8)
    got = np.concatenate([dataset.train.images, dataset.test.images])[:, 0]
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    want = np.round(raw().images * 255 / 16).astype(np.uint8)
    key = sorted((label, image.tobytes()) for label, image in zip(labels.tolist(), got, strict=True))
    assert key == sorted((label, image.tobytes()) for label, image in zip(raw().target.tolist(), want, strict=True))
    again = load_digits(image_size=8)
    assert np.array_equal(again.test.images, dataset.test.images)
    # Drawings of two people may agree pixel by pixel, but hardly.
    assert len({i.tobytes() for i in dataset.train.images} & {i.tobytes() for i in dataset.test.images}) <= 2


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("digits", "image_size", 7),
        ("digits", "image_size", 10**9),
        ("digits", "test_fraction", 1.0),
        ("digits", "test_fraction", float("nan")),
        ("noise", "train_images", 0),
        ("noise", "channels", 2),
        ("figures", "train_images", 11),
        ("figures", "image_size", 7),
        ("image_folder", "max_images_per_class", 0),
        ("image_folder", "test_fraction", 0),
        ("parquet", "image_size", 0),
        ("parquet", "test_fraction", 1.5),
        ("youtube_faces", "min_images", 1),
        ("youtube_faces", "max_images_per_class", 1),
        ("svhn", "image_size", -1),
    ],
)
def test_options_out_of_range_are_refused_when_the_config_is_read(name: str, option: str, value: float) -> None:
    for tree in ({"data": {"name": name, option: value}}, {"splits": {"thief_pool": {"name": name, option: value}}}):
        with pytest.raises(ConfigError, match=f"{option}="):
            build(ExperimentConfig, tree)


def test_fit_changes_nothing_that_fits() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 6, 6), np.uint8)
    assert fit(images, (3, 6, 6)) is images


def test_fit_averages_when_it_shrinks_and_crops_the_middle() -> None:
    left_dark = np.zeros((1, 1, 8, 16), np.uint8)
    left_dark[..., 8:] = 200
    out = fit(left_dark, (1, 4, 4))
    assert out.shape == (1, 1, 4, 4)
    assert out[0, 0, :, 0].max() < 60 and out[0, 0, :, -1].min() > 140, "the dark and the bright half both survive"
    noise = np.random.default_rng(0).integers(0, 256, (4, 1, 64, 64), np.uint8)
    assert fit(noise, (1, 4, 4)).std() < 0.2 * noise.std(), "antialiasing averages noise away"


def test_fit_converts_colour() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
    assert np.array_equal(fit(grey, (3, 2, 2)), np.concatenate([grey] * 3, axis=1))
    colour = np.zeros((1, 3, 2, 2), np.uint8)
    colour[:, 1] = 100
    assert fit(colour, (1, 2, 2)).tolist() == [[[[59, 59], [59, 59]]]]
    with pytest.raises(DataError, match="2 channels into 3"):
        fit(np.zeros((1, 2, 2, 2), np.uint8), (3, 2, 2))
