"""The walk in self-supervised features: spread over them, outliers last, and nothing asked to learn them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_fakes import CLASSES, FAST, FakeBlackBox, flat, same, steal

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.ssl_extraction import most_isolated, unit, walk
from mea_ray.attacks.transfer import TransferSet
from mea_ray.core.seeding import numpy_generator
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model

POOL = np.random.default_rng(2).integers(0, 256, (90, 1, 8, 8), dtype=np.uint8)
OPTIONS: dict[str, Any] = {"pretext_epochs": 1, "query_chunk": 16, "proposals": 4}


def small() -> ImageModel:
    return build_model("vgg_like", (1, 8, 8), CLASSES, {"width": 0.0625})


def plain_walk(features: Any, last: Any, proposals: int, seed: int) -> list[int]:
    generator = numpy_generator(seed, "steps")
    visited: list[int] = []
    for part in (np.flatnonzero(~last), np.flatnonzero(last)):
        left = list(generator.permutation(part))
        while left:
            drawn = generator.choice(len(left), size=min(proposals, len(left)), replace=False)
            best, farthest = -1, -1.0
            for place in drawn:
                away = [float(((features[left[place]] - features[k]) ** 2).sum()) for k in visited]
                if min(away, default=np.inf) > farthest:
                    best, farthest = int(place), min(away, default=np.inf)
            visited.append(int(left[best]))
            left[best] = left[-1]
            left.pop()
    return visited


def test_the_walk_is_that_of_a_plain_loop() -> None:
    features = unit(np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32))
    last = np.arange(40) % 7 == 0
    found = list(walk(features, last, 6, 3))
    assert found == plain_walk(features, last, 6, 3)
    assert sorted(found) == list(range(40)) and all(last[found[-last.sum() :]])


def test_the_walk_covers_what_chance_leaves_out() -> None:
    """Nine of ten images lie close together; the walk sees the rest soon."""
    rng = np.random.default_rng(1)
    features = np.concatenate([rng.normal(0, 0.01, (180, 3)), rng.normal(0, 1, (20, 3))]).astype(np.float32)
    nobody = np.zeros(200, np.bool_)
    first = [position >= 180 for position in list(walk(features, nobody, 32, 0))[:30]]
    chance = [position >= 180 for position in list(walk(features, nobody, 1, 0))[:30]]
    assert sum(first) >= 15 > 8 > sum(chance)


def test_an_outlier_is_far_from_its_nearest() -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(50, 4)).astype(np.float32)
    features[[7, 19]] += 9
    found = most_isolated(features, 5, 0.1, 0)
    away = np.sqrt(((features[:, None].astype(float) - features) ** 2).sum(2))
    plain = np.sort(away, 1)[:, 1:6].mean(1)
    assert set(np.flatnonzero(found)) == set(np.argsort(-plain)[:5]) >= {7, 19}
    assert not most_isolated(features, 5, 0.0, 0).any()


@pytest.mark.parametrize("warm", [True, False])
def test_the_budget_is_spent_on_distinct_images_and_a_kill_repeats_nothing(warm: bool, tmp_path: Path) -> None:
    attack = ATTACKS.build("ssl_extraction", warm_start=warm, **OPTIONS)
    whole = FakeBlackBox(60)
    rungs = steal(whole, [20, 60], attack, pool=POOL, make_model=small)
    assert whole.charged == whole.distinct() == 60 and [rung.queries for rung in rungs] == [20, 60]
    dying = FakeBlackBox(60, fail_at=2)
    with pytest.raises(ConnectionError):
        steal(dying, [20, 60], attack, pool=POOL, make_model=small, transfer=TransferSet(tmp_path))
    stored = TransferSet(tmp_path)
    again = FakeBlackBox(60, paid=dying.paid, start_at=len(stored))
    resumed = steal(again, [20, 60], attack, pool=POOL, make_model=small, transfer=stored)
    assert again.charged == 60 and flat(whole.queries)[len(flat(dying.queries)) :] == flat(again.queries)
    assert all(same(a.model, b.model) for a, b in zip(rungs, resumed, strict=True))


def test_a_warm_substitute_starts_from_the_encoder_with_a_head_of_its_own() -> None:
    started = []

    def make() -> ImageModel:
        started.append(small())
        return started[-1]

    slow = {**FAST, "epochs": 1, "learning_rate": 1e-12}
    attack = ATTACKS.build("ssl_extraction", **OPTIONS)
    (rung,) = steal(FakeBlackBox(32), [32], attack, pool=POOL, make_model=make, training=slow)
    encoder = started[0]
    for name, value in rung.model.named_parameters():
        if name.endswith("weight"):  # all begin with a bias of zero
            near = torch.allclose(value, dict(encoder.named_parameters())[name], atol=1e-6)
            assert near == (not name.startswith("head.")), name
