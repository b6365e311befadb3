"""CloudLeak: the loss against its formula, images that move towards their guides, rounds within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_fakes import CLASSES, FakeBlackBox, Substitute, flat, same, steal

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.cloud_leak import feature_fool, fooling_loss, margins
from mea_ray.attacks.transfer import TransferSet
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model

POOL = np.random.default_rng(2).integers(0, 256, (120, 1, 8, 8), dtype=np.uint8)
OPTIONS: dict[str, Any] = {
    "initial": 20,
    "round_images": 16,
    "candidates": 30,
    "round_epochs": 1,
    "steps": 3,
    "query_chunk": 16,
}


def small() -> ImageModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return build_model("vgg_like", (1, 8, 8), CLASSES, {"width": 0.125}).eval()


def test_the_loss_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    x, sources = rng.random((2, 4, 1, 3, 3))
    features, own, guide = rng.normal(size=(3, 4, 5))
    margin = np.array([0.5, -9.0, 0.2, 1.0])
    plain = 0.0
    for k in range(4):
        plain += ((x[k] - sources[k]) ** 2).sum()
        hinge = np.linalg.norm(features[k] - guide[k]) - np.linalg.norm(features[k] - own[k]) + margin[k]
        plain += 0.7 * max(hinge, 0)
    a, b, c, d, e, f = map(torch.from_numpy, (x, sources, features, own, guide, margin))
    found = fooling_loss(a, b, c, d, e, f, 0.7)
    assert float(found) == pytest.approx(plain)


def test_a_margin_is_smaller_for_a_class_that_is_spread() -> None:
    features = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    found = margins(features, labels, CLASSES, 0.5)
    for label in range(3):
        own = features[labels == label].astype(float)
        pairs = [np.linalg.norm(a - b) for i, a in enumerate(own) for b in own[i + 1 :]]
        assert found[label] == pytest.approx(0.5 - np.mean(pairs))
    assert found[3] == 0.5


def test_images_move_towards_their_guides_within_the_box() -> None:
    model, sources, guides = Substitute().eval(), POOL[:10], POOL[10:20]
    moved = feature_fool(model, sources, guides, np.full(10, 5.0), weight=50.0, steps=10, largest=8 / 255)
    assert moved.dtype == np.uint8 and 0 < np.abs(moved.astype(int) - sources).max() <= 8
    features = [metrics.features(model, images) for images in (sources, moved, guides)]
    before, after = (np.linalg.norm(each - features[2], axis=1) for each in features[:2])
    assert (after < before).all()
    still = feature_fool(model, sources, guides, np.full(10, -1e6), weight=50.0, steps=10, largest=8 / 255)
    assert np.array_equal(still, sources), "where the hinge is off nothing pulls"


def test_rounds_query_made_images_and_a_kill_repeats_nothing(tmp_path: Path) -> None:
    attack = ATTACKS.build("cloud_leak", **OPTIONS)
    whole = FakeBlackBox(50)
    rungs = steal(whole, [36, 50], attack, pool=POOL, make_model=small)
    assert whole.charged == 50 and [rung.queries for rung in rungs] == [36, 50]
    made = np.concatenate(whole.queries)[20:]
    near = np.array([[np.abs(image.astype(int) - original).max() for original in POOL] for image in made]).min(1)
    assert (near <= 8).all() and set(flat(whole.queries)[:20]) <= {image.tobytes() for image in POOL}
    dying = FakeBlackBox(50, fail_at=3)
    with pytest.raises(ConnectionError):
        steal(dying, [36, 50], attack, pool=POOL, make_model=small, transfer=TransferSet(tmp_path))
    stored = TransferSet(tmp_path)
    again = FakeBlackBox(50, paid=dying.paid, start_at=len(stored))
    resumed = steal(again, [36, 50], attack, pool=POOL, make_model=small, transfer=stored)
    assert again.charged == 50 and all(same(a.model, b.model) for a, b in zip(rungs, resumed, strict=True))


def test_the_most_doubtful_are_queried_first() -> None:
    seen: list[np.ndarray[Any, Any]] = []
    probabilities = metrics.probabilities

    def watched(model: Any, images: Any, **rest: Any) -> Any:
        found = probabilities(model, images, **rest)
        seen.append(images[np.argsort(found.max(1), kind="stable")])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "probabilities", watched)
        blackbox = FakeBlackBox(36)
        steal(blackbox, [36], ATTACKS.build("cloud_leak", **OPTIONS), pool=POOL, make_model=small)
    assert np.array_equal(np.concatenate(blackbox.queries)[20:], seen[0][:16]) and len(seen[0]) == 30
