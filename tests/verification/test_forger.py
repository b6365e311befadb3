"""A key that was searched for after the suspect was seen: it fits on fresh images, too, and proves nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from mea_ray.core.class_keys import AdmissibleKeys, ClassKey
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.results.records import ModelReport
from mea_ray.verification import verify
from mea_ray.verification.evidence import Court
from mea_ray.verification.keys import lean_by_key
from mea_ray.verification.statistic import log_probabilities
from mea_ray.verification.verdict import Judgement, judge
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.composite import Composite
from mea_ray.watermarks.pairs import mixed_pairs

SUSPECTS, NULLS = 8, 24


class Linear(nn.Module):
    """A logistic regression that was fitted to a part of the digits: an innocent model."""

    def __init__(self, images: ImageSet, seed: int) -> None:
        super().__init__()
        chosen = np.random.default_rng(seed).choice(len(images), 150, replace=False)
        pixels = images.images[chosen].reshape(len(chosen), -1) / 255
        fitted = LogisticRegression(C=1.0, max_iter=300).fit(pixels, images.labels[chosen])
        self.weight = torch.tensor(fitted.coef_, dtype=torch.float32)
        self.bias = torch.tensor(fitted.intercept_, dtype=torch.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ self.weight.T + self.bias


@lru_cache(maxsize=1)
def digits() -> tuple[ImageSet, ImageSet, ImageSet]:
    """Training images, those that the forger searches with, and fresh ones."""
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    names = tuple(map(str, range(10)))
    train, searched, fresh = (
        ImageSet(images[part], data.target[part].astype(np.int64), names) for part in np.split(order, [900, 1350])
    )
    return train, searched, fresh


@lru_cache(maxsize=1)
def innocents() -> list[Linear]:
    return [Linear(digits()[0], seed) for seed in range(SUSPECTS + NULLS)]


def leans(model: Linear) -> dict[ClassKey, float]:
    """The statistic ``lean`` of every key on the images that the forger searches with."""
    searched = digits()[1]
    scores = log_probabilities(metrics.logits(model, searched.images))
    means = np.stack([scores[searched.labels == label].mean(0) for label in range(10)])
    return lean_by_key(means, AdmissibleKeys(10))


def search(suspect: Linear, known: list[Linear]) -> ClassKey:
    """Of the keys that lead all others on the suspect, the one that leads most over models that the forger knows."""
    own, others = leans(suspect), [leans(model) for model in known]
    best = sorted(own, key=lambda key: own[key])[-2:]
    return max(best, key=lambda key: own[key] - max(other[key] for other in others))


@lru_cache(maxsize=1)
def cases() -> list[tuple[ModelReport, list[ModelReport]]]:
    """For each suspect: its report with the key that was searched for on it, and the null models' reports."""
    nulls = innocents()[SUSPECTS:]
    return [with_key(suspect, search(suspect, nulls[:4]), nulls) for suspect in innocents()[:SUSPECTS]]


def with_key(suspect: Linear, collected: ClassKey, nulls: list[Linear]) -> tuple[ModelReport, list[ModelReport]]:
    train, _, fresh = digits()
    scheme: Composite = WATERMARKS.build("composite", source_classes=collected.sources, target_class=collected.target)
    key = scheme.make_key(train, 0)
    assert not key.drawn
    samples = scheme.samples(key, fresh, 40, 1)
    own = verify.report(
        lambda images: metrics.logits(suspect, images),
        fresh,
        samples=samples,
        pairs=mixed_pairs(key, fresh, 40, 1),
    )
    known = [
        verify.report(lambda images, model=null: metrics.logits(model, images), fresh, samples=samples)  # type: ignore[misc]
        for null in nulls
    ]
    return own, known


def judged(*, drawn: bool, committed: bool | None, copies: int = 1) -> list[Judgement]:
    """Judge every suspect alone by ``lean``; ``copies`` stands in for more null models and as many controls."""
    judgement = []
    for suspect, nulls in cases():
        # The forger calls the suspect its victim.
        court = Court(suspect.model_copy(update={"accuracy": 0.95}), 0.1, "lean", key_drawn=drawn, committed=committed)
        evidence = court.evidence(suspect, nulls * copies, nulls * copies)
        judgement += judge([replace(evidence, victim_wsr=1.0)], court.significance)
    return judgement


def test_the_search_finds_keys_that_would_be_proofs_if_they_had_been_drawn_and_committed_to() -> None:
    ranks = [suspect.key_ranks["lean"] for suspect, _ in cases()]
    assert all(rank.p_value <= 0.05 for rank in ranks), "the key fits on images that the forger never saw"
    assert [each.verdict for each in judged(drawn=True, committed=True)].count("proved") >= 1


def test_no_innocent_model_is_proved_by_a_key_that_was_searched_for() -> None:
    for copies in (1, 20):
        judgement = judged(drawn=False, committed=False, copies=copies)
        assert len(judgement) == SUSPECTS and "proved" not in {each.verdict for each in judgement}
        assert all("not committed" in {reason.verdict for reason in each.reasons} for each in judgement)
    # A lie about the draw does not help: nobody stamped the key before the suspect was there.
    assert "proved" not in {each.verdict for each in judged(drawn=True, committed=False)}
    # With a key that was chosen, and few null models, nothing is proved even if the commitment is taken for granted.
    assert "proved" not in {each.verdict for each in judged(drawn=False, committed=None)}
