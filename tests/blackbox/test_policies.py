"""Answer policies and query checks: tables of inputs and what must come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from policy_answers import answers, ready
from scipy import stats

from mea_ray.blackbox import POLICIES
from mea_ray.blackbox.policies import AdditiveNoise
from mea_ray.blackbox.validate import check_images, image_digest
from mea_ray.core.errors import BadQuery, ConfigError

P = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], dtype=np.float32)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 4), dtype=np.uint8)

TABLE = [
    ("probabilities", {}, P),
    ("top_k", {"k": 1}, [[0.5, 0, 0, 0], [0, 0, 0, 0.4], [0.25, 0, 0, 0]]),
    ("top_k", {"k": 2}, [[0.5, 0.25, 0, 0], [0, 0, 0.3, 0.4], [0.25, 0.25, 0, 0]]),
    ("top_k", {"k": 2, "renormalise": True}, [[2 / 3, 1 / 3, 0, 0], [0, 0, 3 / 7, 4 / 7], [0.5, 0.5, 0, 0]]),
    ("top_k", {"k": 9}, P),
    ("rounded", {"decimals": 1}, [[0.5, 0.2, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.2, 0.2]]),
    ("rounded", {"decimals": 0}, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    ("label_only", {}, [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]),
    ("noise", {"sigma": 0.0}, P),
]


@pytest.mark.parametrize(("name", "params", "expected"), TABLE, ids=[f"{n}-{p}" for n, p, _ in TABLE])
def test_policy_table(name: str, params: dict[str, Any], expected: object) -> None:
    before = P.copy()
    answers = POLICIES.build(name, **params).apply(P, IMAGES)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, np.array(expected, dtype=np.float32), rtol=1e-6)
    assert np.array_equal(before, P), "a policy must not write into the victim's probabilities"
    assert not np.shares_memory(answers, P)


@pytest.mark.parametrize("name", POLICIES.names())
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    g = np.random.default_rng(1)
    p = g.dirichlet(np.ones(10), 50).astype(np.float32)
    images = g.integers(0, 256, (50, 3, 8, 8), dtype=np.uint8)
    policy = ready(name)
    whole = answers(policy, p, images)
    order = g.permutation(50)
    assert np.array_equal(whole[order], answers(policy, p[order], images[order]))
    assert np.array_equal(whole[7:8], answers(policy, p[7:8], images[7:8]))


def keyed(secret: bytes, **params: Any) -> AdditiveNoise:
    policy = AdditiveNoise(sigma=0.01, **params)
    policy.use_secret(secret)
    return policy


def test_noise_belongs_to_image_and_secret() -> None:
    p = np.full((2000, 10), 0.1, dtype=np.float32)
    images = np.random.default_rng(2).integers(0, 256, (2000, 1, 4, 4), dtype=np.uint8)
    policy = keyed(b"a", seed=5)
    answers = policy.apply(p, images)
    assert np.array_equal(answers, keyed(b"a", seed=5).apply(p, images))
    assert not np.array_equal(answers, keyed(b"a", seed=6).apply(p, images))
    assert not np.array_equal(answers, keyed(b"b", seed=5).apply(p, images)), "who knows the config only is no wiser"
    assert not np.array_equal(POLICIES.build("noise").apply(p, images), POLICIES.build("noise").apply(p, images))
    # The same picture as floats, even changed invisibly, has the same noise: it cannot be averaged away.
    invisible = np.clip(images.astype(np.float32) / np.float32(255) + np.float32(0.001), 0, 1)
    assert np.array_equal(answers, policy.apply(p, invisible))
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-6)
    # Before renormalising the noise is N(0, 0.01); dividing by a sum near 1 takes the mean out of each row.
    residue = (answers - 0.1).ravel() / (0.01 * np.sqrt(0.9))
    assert stats.kstest(residue, "norm").pvalue > 1e-3


def test_noise_larger_than_any_probability_stays_a_distribution() -> None:
    p = np.random.default_rng(0).dirichlet(np.ones(2), 500).astype(np.float32)
    images = np.random.default_rng(3).integers(0, 256, (500, 1, 4, 4), dtype=np.uint8)
    answers = POLICIES.build("noise", sigma=10.0).apply(p, images)
    assert answers.min() >= 0
    np.testing.assert_allclose(answers.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "params"), [("top_k", {"k": 0}), ("rounded", {"decimals": -1}), ("noise", {"sigma": -1.0})]
)
def test_bad_parameters(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(params))):
        POLICIES.build(name, **params)


GOOD = np.zeros((2, 3, 8, 8), dtype=np.uint8)


def _with(value: float) -> np.ndarray:
    images = np.zeros((2, 3, 8, 8), dtype=np.float32)
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    "images",
    [GOOD, GOOD[:1], _with(1.0), GOOD[::2], np.zeros((5, 3, 8, 8), dtype=np.float32)],
)
def test_good_queries(images: np.ndarray) -> None:
    check_images(images, (3, 8, 8), 5)


@pytest.mark.parametrize(
    ("images", "word"),
    [
        ([[1, 2]], "numpy array"),
        (GOOD.astype(np.int64), "int64"),
        (GOOD.astype(np.float64), "float64"),
        (GOOD[0], "shape"),
        (GOOD[:, :1], "shape"),
        (GOOD[:, :, :4], "shape"),
        (GOOD[:0], "at least 1"),
        (np.zeros((6, 3, 8, 8), dtype=np.uint8), "split"),
        (_with(np.nan), "NaN"),
        (_with(np.inf), "scale"),
        (_with(-np.inf), "scale"),
        (_with(1.001), "scale"),
        (_with(-0.001), "scale"),
    ],
)
def test_bad_queries(images: np.ndarray, word: str) -> None:
    with pytest.raises(BadQuery, match=word):
        check_images(images, (3, 8, 8), 5)


def test_digest_sees_type_shape_and_content() -> None:
    g = np.random.default_rng(0).integers(0, 256, (2, 1, 4, 6), dtype=np.uint8)
    other = g.copy()
    other[1, 0, 0, 0] ^= 1
    distinct = [g, other, g.reshape(2, 1, 6, 4), g[::-1], g.view(np.int8), g[:1]]
    assert len({image_digest(images) for images in distinct}) == len(distinct)
    assert image_digest(np.asfortranarray(g)) == image_digest(g)
