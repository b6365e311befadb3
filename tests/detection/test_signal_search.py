"""The search for a smooth signal in soft answers: what it finds, what it leaves alone, and what the report says."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from report_results import trial
from scipy.special import softmax
from torch import Tensor, nn

from mea_ray.config import load_experiment
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.splits import make_splits
from mea_ray.detection import DETECTIONS
from mea_ray.detection.signal_search import FoundSignal, _explained_by, find_signal
from mea_ray.evaluation.projections import residual
from mea_ray.experiment.leakage import Outsider
from mea_ray.report import front, html, leakage, verdict
from mea_ray.results.records import FoundSignalRecord, LeaningRecord, RankRecord
from mea_ray.watermarks.cosine import CosineLean, CosineMarker

CLASSES = 6


def made(count: int, seed: int = 0) -> ImageSet:
    """Smooth images: few components explain nearly all of them."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(size=(12, 64)) * np.linspace(30, 8, 12)[:, None]
    pixels = 128 + rng.normal(size=(count, 12)) @ basis
    labels = np.arange(count) % CLASSES
    images = np.clip(pixels, 0, 255).astype(np.uint8).reshape(count, 1, 8, 8)
    return ImageSet(images, labels.astype(np.int64), tuple("abcdef"))


DATA = made(1200)
PLAIN = softmax(np.random.default_rng(1).normal(0, 2, (1200, CLASSES)), axis=1).astype(np.float32)


def marked(seed: int, **options: Any) -> tuple[CosineLean, Any, np.ndarray]:
    scheme = CosineLean(drawn=199, **{"frequency": (0.2, 0.3), "amplitude": 0.3, **options})
    key = scheme.make_key(DATA, seed)
    return scheme, key, CosineMarker(key).mark(PLAIN, DATA.images)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_slow_wave_is_found_and_names_the_key(seed: int) -> None:
    scheme, key, answers = marked(seed)
    found, innocent = (find_signal(each[:800], DATA.images[:800], 0) for each in (answers, PLAIN))
    assert found is not None and innocent is not None
    assert found.explained > 0.1 > 0.03 > innocent.explained
    scores = scheme.signal(key, made(400, 7)).scores(found.at(made(400, 7).images).astype(np.float32))
    assert (scores[1:] >= scores[0]).mean() < 0.02


def test_what_is_found_in_innocent_answers_names_no_key() -> None:
    shares = []
    for seed in range(12):
        scheme, key, _ = marked(seed)
        answers = softmax(np.random.default_rng(seed).normal(0, 2, (400, CLASSES)), axis=1).astype(np.float32)
        found = find_signal(answers, DATA.images[:400], seed)
        assert found is not None and found.explained < 0.05
        scores = scheme.signal(key, made(300, 7)).scores(found.at(made(300, 7).images).astype(np.float32))
        shares.append((scores[1:] >= scores[0]).mean())
    assert 0.2 < np.mean(shares) < 0.8


def test_the_explained_part_is_that_of_least_squares_in_each_class() -> None:
    rng = np.random.default_rng(0)
    places, left = rng.normal(size=(300, 4)), residual(np.log(PLAIN[:300]))
    frequencies = rng.normal(size=(5, 4))
    parts = _explained_by(*map(torch.from_numpy, (frequencies, places, left))).numpy()
    for frequency, part in zip(frequencies, parts, strict=True):
        angles, remaining = places @ frequency, 0.0
        for label in range(CLASSES):
            other = left[:, label] != 0
            waves = np.stack([np.cos(angles), np.sin(angles), np.ones(300)], axis=1)[other]
            weights = np.linalg.lstsq(waves, left[other, label], rcond=None)[0]
            remaining += ((left[other, label] - waves @ weights) ** 2).sum()
        assert part == pytest.approx(1 - remaining / (left**2).sum(), abs=1e-9)


def test_a_found_signal_is_evaluated_as_a_wave_along_its_direction() -> None:
    axes, weights = np.eye(2, 64) / 50, np.array([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    found = FoundSignal(axes, np.array([1.0, 2.0]), np.array([0.5, 1.5]), weights, 0.4)
    rows = DATA.images[:20].reshape(20, 64).astype(float)
    angle = 0.5 * (rows[:, 0] / 50 - 1) + 1.5 * (rows[:, 1] / 50 - 2)
    np.testing.assert_allclose(found.at(DATA.images[:20]), np.stack([np.cos(angle), 2 * np.sin(angle)], axis=1))


def test_labels_few_answers_and_equal_images_hold_no_signal() -> None:
    labels = np.eye(CLASSES, dtype=np.float32)[PLAIN.argmax(1)]
    assert find_signal(labels, DATA.images, 0) is None
    assert find_signal(PLAIN[:99], DATA.images[:99], 0) is None
    assert find_signal(PLAIN[:200], np.full((200, 1, 8, 8), 7, np.uint8), 0) is None


class Fixed(nn.Module):
    """Gives each image of ``DATA`` a row of its own."""

    channels_last = False

    def __init__(self, rows: np.ndarray) -> None:
        super().__init__()
        self.shape, self.classes = (1, 8, 8), CLASSES
        self.rows = {image.tobytes(): row for image, row in zip(DATA.images, rows, strict=True)}

    def forward(self, x: Tensor) -> Tensor:
        pixels = (x * 255).round().to(torch.uint8).numpy()
        others = np.full(CLASSES, 1 / CLASSES, np.float32)  # the service also passes images of its own, to size passes
        return torch.from_numpy(np.stack([self.rows.get(image.tobytes(), others) for image in pixels])).log()


def test_a_stolen_model_is_searched_by_the_detection() -> None:
    search = DETECTIONS.build("signal_search", answers=1000)
    _, _, answers = marked(0)
    carries, innocent = (
        search.inspect(cast(Any, Fixed(rows)), DATA.images, None, 0).numbers["explained"] for rows in (answers, PLAIN)
    )
    assert carries > 0.1 > 0.03 > innocent


def test_the_services_answers_are_searched_and_the_key_is_ranked() -> None:
    data = make_splits(Dataset("made", DATA, made(300, 5)), verification_fraction=0.5)
    config = load_experiment(
        None, ["victim.watermark={name: cosine, amplitude: 0.3, frequency: [0.2, 0.3], drawn: 199}"]
    )
    scheme = config.victim.watermark.build()
    key = scheme.make_key(data.victim_train, 3)
    model = cast(Any, Fixed(PLAIN))
    records = Outsider(config, data, key, scheme.signal(key, data.verification)).look(
        cast(Any, model), [cast(Any, model)]
    )
    assert [record.signal is None for record in records] == [True, True, False], "only the most answers are searched"
    last = records[-1]
    assert last.signal is not None and last.signal_nulls[0] is not None
    assert last.signal.true_rank.at_least <= 1 and last.signal.explained > last.signal_nulls[0].explained
    assert Outsider(config, data, key).look(model, [])[-1].signal is None, "the mark is no signal in the image"


def with_signal(at_least: int, explained: float) -> Any:
    def found(place: int, part: float) -> FoundSignalRecord:
        return FoundSignalRecord(explained=part, true_rank=RankRecord(at_least=place, references=999))

    record = LeaningRecord(answers=1000, signal=found(at_least, explained), signal_nulls=[found(500, 0.04)])
    return trial("a").model_copy(update={"leaning": [record]})


@pytest.mark.parametrize(
    ("at_least", "tone", "words"),
    [
        (0, "bad", "1,000 answers give the key away to a search for signals: it has rank 1 of 1,000 keys"),
        (400, "good", "1,000 answers do not give the key away to a search for signals: it has rank 401 of 1,000 keys"),
    ],
)
def test_the_report_says_whether_a_search_finds_the_key(at_least: int, tone: str, words: str) -> None:
    result = with_signal(at_least, 0.46)
    (text,) = [each.text for each in verdict.findings([result]) if "search for signals" in each.text]
    assert text.startswith(words) and "explains 46% of what" in text and "at most 4% in innocent models" in text
    assert leakage.sentence(result) == (text, tone)
    (row,) = leakage.lines([result])
    assert (row.rank, row.score, row.nulls, row.tone) == (f"{at_least + 1} of 1,000", "0.46", "0.04", tone)
    assert "a signal in the image" in html.render([result], name="demo")
    assert front._leak([result]) == (at_least + 1, 1000)
