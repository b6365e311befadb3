"""The fingerprint of a dataset follows from its content and from nothing else."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest

from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data import DATASETS
from mea_ray.data.splits import make_splits


def part(count: int, seed: int, names: tuple[str, ...] = ("a", "b")) -> ImageSet:
    images = np.random.default_rng(seed).integers(0, 256, (count, 1, 3, 4), np.uint8)
    return ImageSet(images, np.arange(count, dtype=np.int64) % len(names), names)


def reshaped(each: ImageSet) -> ImageSet:
    return replace(each, images=each.images.reshape(len(each), 1, 4, 3))


@pytest.fixture
def dataset() -> Dataset:
    return Dataset("first", part(30, 1), part(12, 2))


def test_the_definition(dataset: Dataset) -> None:
    content = b"".join(
        f"({each.images.shape}, ('a', 'b'))".encode() + each.labels.tobytes() + each.images.tobytes()
        for each in (dataset.train, dataset.test)
    )
    assert dataset.fingerprint == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_equal_content_has_one_fingerprint_wherever_it_lies(dataset: Dataset) -> None:
    elsewhere = replace(dataset.train, images=np.repeat(dataset.train.images, 2, axis=3)[..., ::2])
    other = Dataset("second", elsewhere, part(12, 2))
    assert not other.train.images.flags.c_contiguous
    assert other.fingerprint == dataset.fingerprint
    assert pickle.loads(pickle.dumps(dataset)).fingerprint == dataset.fingerprint


def test_every_part_of_the_content_counts(dataset: Dataset) -> None:
    images, labels = dataset.train.images.copy(), dataset.train.labels.copy()
    images[7, 0, 2, 3] ^= 1
    labels[7] ^= 1
    others = [
        Dataset("first", replace(dataset.train, images=images), dataset.test),
        Dataset("first", replace(dataset.train, labels=labels), dataset.test),
        Dataset("first", part(30, 1, ("b", "a")), part(12, 2, ("b", "a"))),
        Dataset("first", dataset.train.take(np.arange(29)), dataset.test),
        Dataset("first", dataset.train.take(np.arange(30)[::-1]), dataset.test),
        Dataset("first", reshaped(dataset.train), reshaped(dataset.test)),
        Dataset("first", dataset.train, part(12, 3)),
        Dataset("first", dataset.test, dataset.train),
    ]
    prints = {dataset.fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == 1 + len(others)


def test_splits_carry_the_fingerprints_of_both_datasets(dataset: Dataset) -> None:
    pool = Dataset("pool", part(9, 5), part(3, 6))
    own, disjoint = make_splits(dataset), make_splits(dataset, thief_pool="disjoint")
    other = make_splits(dataset, thief_pool=pool)
    assert {own.fingerprint, disjoint.fingerprint, other.fingerprint} == {dataset.fingerprint}
    assert (own.pool_fingerprint, disjoint.pool_fingerprint) == (None, None)
    assert other.pool_fingerprint == pool.fingerprint


def test_a_dataset_that_is_loaded_again_has_the_same_fingerprint() -> None:
    first, again, larger = (DATASETS.build("digits", image_size=size).fingerprint for size in (8, 8, 9))
    assert first == again != larger
