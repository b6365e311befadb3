"""What an outsider names where the owner has several keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mea_ray.config import load_experiment
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.splits import make_splits
from mea_ray.experiment.leakage import Outsider
from mea_ray.watermarks.several_keys import SeveralKeys


def images(each: int) -> ImageSet:
    labels = np.repeat(np.arange(10), each)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 1, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, labels.astype(np.int64), tuple("abcdefghij"))


def test_the_key_that_is_given_away_most_counts() -> None:
    data = make_splits(Dataset("made", images(20), images(10)), verification_fraction=0.5)
    scheme = SeveralKeys()
    key = scheme.make_key(data.victim_train, 0)
    first, second = SeveralKeys.parts(key)
    assert (first.source_classes, first.target_class) != (second.source_classes, second.target_class)
    answers = np.eye(10, dtype=np.float32)[np.arange(100) % 10] * 0.6 + 0.04
    for label in second.source_classes:
        answers[label::10, second.target_class] += 0.2
    answers /= answers.sum(1, keepdims=True)
    named = Outsider(load_experiment(None), data, key)._name(answers)
    assert named is not None and named.true_rank is not None and named.true_rank.at_least == 0
    assert named.target == "abcdefghij"[second.target_class]
    alone = Outsider(load_experiment(None), data, replace(first))._name(answers)
    assert alone is not None and alone.true_rank is not None and alone.true_rank.at_least > 0
