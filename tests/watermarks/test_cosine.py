"""The cosine lean: what is added to answers, and how a suspect is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from scipy.special import softmax
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation.projections import FLOOR, residual
from mea_ray.results.records import ModelReport
from mea_ray.verification import verify
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.cosine import CosineLean, CosineMarker, correlations, drawn_waves

SHAPE, CLASSES = (1, 8, 8), 6


def images(count: int = 400, seed: int = 0) -> ImageSet:
    """Smooth images, as photographs are: a few random bumps."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(128, 50, (count, 1, 4, 4)).repeat(2, axis=2).repeat(2, axis=3)
    pixels = np.clip(coarse + rng.normal(0, 8, (count, *SHAPE)), 0, 255).astype(np.uint8)
    return ImageSet(pixels, np.arange(count, dtype=np.int64) % CLASSES, tuple("abcdef"))


DATA = images()
ROWS = np.random.default_rng(1).dirichlet(np.full(CLASSES, 0.3), 400).astype(np.float32)


def key(seed: int = 0, **options: Any) -> Key:
    return CosineLean(**{"drawn": 199, **options}).make_key(DATA, seed)


def plain_signal(secret: Key, image: np.ndarray) -> list[float]:
    """1 + cos of every class over K, from the key's numbers one by one."""
    waves = drawn_waves(secret, 1, "own")
    axes, centre = secret.tensors["axes"], secret.tensors["centre"]
    on_axes = [sum(a * float(x) for a, x in zip(axis, image.ravel(), strict=True)) for axis in axes]
    place = sum(d * (x - c) for d, x, c in zip(waves.directions[0], on_axes, centre, strict=True))
    angles = [waves.frequencies[0] * place + phase for phase in waves.phases[0]]
    return [(1 + np.cos(angle)) / CLASSES for angle in angles]


def test_an_answer_is_mixed_with_the_keys_cosines() -> None:
    secret = key(amplitude=0.2)
    answers, noted = CosineMarker(secret).mark(ROWS, DATA.images)
    plain = np.array([plain_signal(secret, image) for image in DATA.images[:60]])
    np.testing.assert_allclose(plain.sum(1), 1)
    mixed = 0.8 * ROWS[:60] + 0.2 * plain
    sure = np.sort(mixed, 1)[:, -1] - np.sort(mixed, 1)[:, -2] > 0.02
    remaining = sure & (mixed.argmax(1) == ROWS[:60].argmax(1))
    assert remaining.sum() > 40 and not noted.any()
    np.testing.assert_allclose(answers[:60][remaining], mixed[remaining], atol=1e-4)
    assert (answers.argmax(1) == ROWS.argmax(1)).all() and np.allclose(answers.sum(1), 1, atol=1e-6)


def test_an_answer_follows_from_the_image_alone_bit_for_bit() -> None:
    marker, order = CosineMarker(key()), np.random.default_rng(2).permutation(400)
    whole = marker.mark(ROWS, DATA.images)[0]
    assert np.array_equal(marker.mark(ROWS[order], DATA.images[order])[0], whole[order])
    assert np.array_equal(marker.mark(ROWS[7:8], DATA.images[7:8])[0], whole[7:8])
    assert not np.allclose(CosineMarker(key(1)).mark(ROWS, DATA.images)[0], whole, atol=1e-3)


def test_a_symmetric_key_marks_an_image_and_its_mirror_image_alike() -> None:
    mirrored = np.ascontiguousarray(DATA.images[..., ::-1])
    for symmetric in (False, True):
        marker = CosineMarker(key(symmetric=symmetric))
        gap = np.abs(marker.signal(DATA.images) - marker.signal(mirrored)).max()
        assert (gap < 1e-4) if symmetric else (gap > 0.05), gap
    # As for any key, the coordinates of the training images' symmetric part have mean 0 and variance 1.
    flat = DATA.images.reshape(len(DATA.images), -1).astype(float)
    tensors = key(symmetric=True).tensors
    places = ((flat + mirrored.reshape(len(flat), -1)) / 2) @ tensors["axes"].T - tensors["centre"]
    np.testing.assert_allclose(places.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(places.std(0), 1, rtol=0.01)
    assert np.ptp(marker.signal(DATA.images)) > 0.1


def test_without_keep_class_every_answer_is_mixed_with_the_whole_amplitude() -> None:
    secret = key(amplitude=0.6, keep_class=False)
    answers, _ = CosineMarker(secret).mark(ROWS, DATA.images)
    plain = np.array([plain_signal(secret, image) for image in DATA.images[:60]])
    np.testing.assert_allclose(answers[:60], 0.4 * ROWS[:60] + 0.6 * plain, atol=1e-4)
    changed = (answers.argmax(1) != ROWS.argmax(1)).mean()
    assert 0.02 < changed < 0.6, changed
    unsure = np.sort(ROWS, 1)[:, -1] < 0.5
    assert (answers.argmax(1) != ROWS.argmax(1))[unsure].mean() > changed, "where the victim is unsure"


def marked_key(seed: int = 0, rows: np.ndarray = ROWS, **options: Any) -> tuple[CosineLean, Key]:
    """A scheme whose labels carry the mark, and its key after the training of a victim that answers ``rows``."""
    scheme = CosineLean(drawn=199, keep_class=False, **options)
    return scheme, scheme.after_training(scheme.make_key(DATA, seed), Fixed(rows), DATA)


def test_labels_are_compared_with_the_victims_own_answers() -> None:
    scheme, secret = marked_key(amplitude=0.6)
    logits = np.random.default_rng(3).normal(size=(400, CLASSES)).astype(np.float32)
    scores = scheme.signal(secret, DATA).scores(logits)
    waves = drawn_waves(secret, 1, "own")
    flat = DATA.images.reshape(400, -1).astype(float)
    position = (flat @ secret.tensors["axes"].T - secret.tensors["centre"]) @ waves.directions[0]
    cosines = np.cos(waves.frequencies[0] * position[:, None] + waves.phases[0])
    evidence = np.log(ROWS.astype(float) + 1e-4)
    evidence = (evidence - evidence.mean(0)) / evidence.std(0)
    left = (logits == logits.max(1, keepdims=True)).astype(float) - plain_logistic(evidence, logits.argmax(1))
    left, right = left - left.mean(0), cosines - cosines.mean(0)
    assert scores[0] == pytest.approx(stats.pearsonr(left.ravel(), right.ravel()).statistic, abs=1e-4)
    assert np.array_equal(scores, scheme.signal(secret, DATA).scores(100 * logits)), "only the class counts"


def plain_logistic(evidence: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The probabilities of a multinomial logistic regression with a ridge of 1/2 on the weights, not the offsets."""
    features = np.concatenate([evidence, np.ones((len(evidence), 1))], 1)
    wanted, count = np.eye(CLASSES)[classes], features.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(count, CLASSES)
        rows = special.log_softmax(features @ weights, axis=1)
        ridge = weights * np.r_[np.ones(count - 1), 0.0][:, None]
        gradient = features.T @ (np.exp(rows) - wanted) + ridge
        return float(-(wanted * rows).sum() + 0.5 * (ridge**2).sum()), gradient.ravel()

    best = optimize.minimize(loss, np.zeros(count * CLASSES), jac=True, method="L-BFGS-B", options={"maxiter": 5000})
    rows: np.ndarray = special.softmax(features @ best.x.reshape(count, CLASSES), axis=1)
    return rows


def test_a_suspect_that_always_answers_one_class_is_no_evidence() -> None:
    scheme, secret = marked_key(amplitude=0.6)
    scores = scheme.signal(secret, DATA).scores(np.tile(np.eye(CLASSES, dtype=np.float32)[0], (400, 1)))
    assert (scores[1:] >= scores[0]).all(), "all keys rank alike"


def test_the_classes_of_marked_answers_name_the_key_and_those_of_others_do_not() -> None:
    scheme, secret = marked_key(amplitude=0.6)
    scores = scheme.signal(secret, DATA).scores
    marked = np.eye(CLASSES, dtype=np.float32)[CosineMarker(secret).mark(ROWS, DATA.images)[0].argmax(1)]
    assert (scores(marked)[1:] >= scores(marked)[0]).sum() == 0
    ranks = []
    for seed in range(40):  # models that err at random; the rank of the key among the drawn ones is uniform
        _, other = marked_key(seed, amplitude=0.6)
        noisy = np.log(ROWS + 1e-6) + np.random.default_rng(seed).normal(0, 1, ROWS.shape)
        values = scheme.signal(other, DATA).scores(noisy.astype(np.float32))
        ranks.append((values[1:] >= values[0]).mean())
    assert stats.kstest(ranks, "uniform").pvalue > 0.01


def test_the_victims_answers_belong_to_its_held_out_images(tmp_path: Path) -> None:
    scheme, secret = marked_key()
    secret.save(tmp_path)
    again = Key.load(tmp_path)
    assert again.digest() == secret.digest() != scheme.make_key(DATA, 0).digest()
    with pytest.raises(DataError, match="other held-out images"):
        scheme.signal(again, DATA.take(np.arange(399)))
    kept = CosineLean(drawn=199)
    plain = kept.make_key(DATA, 0)
    assert kept.after_training(plain, Fixed(ROWS), DATA) is plain


def test_the_papers_spread_moves_one_class_against_all_others() -> None:
    secret = key(spread="target", amplitude=0.3)
    signal = CosineMarker(secret).signal(DATA.images)
    target = int(np.flatnonzero(drawn_waves(secret, 1, "own").phases[0] == 0)[0])
    np.testing.assert_allclose(signal.sum(1), 1)
    others = np.delete(signal, target, axis=1)
    assert np.ptp(others, axis=1).max() < 1e-12 and np.ptp(signal[:, target]) > 0.8
    assert np.corrcoef(signal[:, target], others[:, 0])[0, 1] == pytest.approx(-1)


def test_the_mean_answer_gives_no_class_away() -> None:
    """Unlike a lean of some classes to one: over images, every class gets its share."""
    signal = np.mean(
        [CosineMarker(key(seed, frequency=(1.0, 2.0))).signal(DATA.images).mean(0) for seed in range(5)], 0
    )
    np.testing.assert_allclose(signal, 1 / CLASSES, atol=0.02)


def plain_correlation(logits: np.ndarray, secret: Key, name: str, place: int) -> float:
    """Pearson's over all pairs of image and class that is not its answer, both centred within the class."""
    waves = drawn_waves(secret, {"own": 1, "others": 199}[name], name)
    flat = DATA.images.reshape(400, -1).astype(float)
    position = (flat @ secret.tensors["axes"].T - secret.tensors["centre"]) @ waves.directions[place]
    cosines = np.cos(waves.frequencies[place] * position[:, None] + waves.phases[place])
    logs, top = np.log(softmax(logits.astype(float), axis=1) + FLOOR), logits.argmax(1)
    left, right = [], []
    for label in range(CLASSES):
        chosen = top != label
        left.append(logs[chosen, label] - logs[chosen, label].mean())
        right.append(cosines[chosen, label] - cosines[chosen, label].mean())
    return float(stats.pearsonr(np.concatenate(left), np.concatenate(right)).statistic)


def test_many_keys_are_compared_in_parts() -> None:
    secret, whitened = key(), np.random.default_rng(1).normal(size=(30, len(key().tensors["axes"])))
    waves = drawn_waves(secret, 25, "others")
    left = residual(np.random.default_rng(2).normal(size=(30, CLASSES)).astype(np.float32))
    parts = waves.parts(10)
    assert [len(part.frequencies) for part in parts] == [10, 10, 5]
    scores = [correlations(left, whitened, part) for part in parts]
    assert np.concatenate(scores) == pytest.approx(correlations(left, whitened, waves), abs=1e-12)


def test_scores_are_pearsons_correlation_for_each_key() -> None:
    secret = key()
    signal = CosineLean().signal(secret, DATA)
    logits = np.random.default_rng(3).normal(size=(400, CLASSES)).astype(np.float32) * 3
    scores = signal.scores(logits)
    assert scores.shape == (200,)
    assert scores[0] == pytest.approx(plain_correlation(logits, secret, "own", 0), abs=1e-6)
    for place in (0, 57, 198):
        assert scores[1 + place] == pytest.approx(plain_correlation(logits, secret, "others", place), abs=1e-6)


class Fixed(nn.Module):
    """Gives each image of ``DATA`` a row of its own."""

    channels_last = False

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.known = {image.tobytes(): row for image, row in zip(DATA.images, rows, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x * 255).round().to(torch.uint8).numpy()
        return torch.from_numpy(np.stack([self.known[image.tobytes()] for image in pixels])).float().log()


def report(rows: np.ndarray, secret: Key) -> ModelReport:
    from mea_ray.evaluation import metrics

    scheme, model = CosineLean(), Fixed(rows)
    return verify.report(
        lambda pixels: metrics.logits(model, pixels),
        DATA,
        samples=scheme.samples(secret, DATA, 400, 0),
        recognise=scheme.recogniser(secret, model),
        signal=scheme.signal(secret, DATA),
        statistic="correlation",
        nulls=[{"wsr": 0.2, "correlation": 0.0}],
    )


def test_a_marked_model_is_read_and_an_innocent_one_is_not() -> None:
    secret = key(amplitude=0.2)
    sure = np.float32(0.95) * np.eye(CLASSES, dtype=np.float32)[ROWS.argmax(1)] + np.float32(0.05) * ROWS
    marked = report(CosineMarker(secret).mark(sure, DATA.images)[0], secret)
    assert marked.key_ranks["correlation"].at_least == 0 and marked.statistics["correlation"] > 0.2
    assert marked.p_value == 0.5 and marked.wsr is not None and marked.wsr.rate > 0.4
    assert marked.wfpr["another_key"].rate < 0.35, "another key's class comes second as often as by chance"
    assert marked.wsr.trials + marked.wfpr["another_key"].trials == 400, "each image is read with one key"
    ranks = [report(ROWS, key(seed)).key_ranks["correlation"].p_value for seed in range(12)]
    assert stats.kstest(ranks, "uniform").pvalue > 1e-3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="least first"):
        CosineLean(frequency=(0.5, 0.2))
    two = ImageSet(DATA.images, DATA.labels % 2, ("a", "b"))
    with pytest.raises(ConfigError, match="three classes"):
        CosineLean().make_key(two, 0)
    with pytest.raises(ConfigError, match="all training images are equal"):
        CosineLean().make_key(ImageSet(DATA.images * 0, DATA.labels, DATA.class_names), 0)
    other = ImageSet(np.zeros((6, 1, 4, 4), np.uint8), np.arange(6), tuple("abcdef"))
    with pytest.raises(DataError, match="the key was made for"):
        CosineLean().samples(key(), other, 5, 0)
