"""MEA-Defender for encoders: its losses against plain re-implementations, and what it does to an encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoder_sets import SHAPE, coloured, encoder, stage_of, unit, weights
from keyword_training import train

from mea_ray.core.errors import ConfigError
from mea_ray.evaluation import metrics
from mea_ray.models.build import build_model
from mea_ray.pretext import PRETEXTS
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.mea_defender.encoder_objective import (
    EncoderObjective,
    combination,
    evasion,
    mean_direction,
    squared,
)

PAPER = "mea_defender_encoder"


def test_l_com_is_the_divergence_of_the_softmax_from_the_mix_to_its_source() -> None:
    mixes, sources = unit(4, 5, 1), unit(4, 5, 2)
    expected = 0.0
    for a, b in zip(mixes.double().numpy(), sources.double().numpy(), strict=True):
        p, q = (np.exp(x / 0.1) / np.exp(x / 0.1).sum() for x in (a, b))
        expected += float((p * np.log(p / q)).sum()) / 4
    assert float(combination(mixes, sources, "softmax", 0.1)) == pytest.approx(expected, abs=1e-4)
    cosine = 1 - float((mixes * sources).sum(1).mean())
    assert float(combination(mixes, sources, "cosine", 0.1)) == pytest.approx(cosine, abs=1e-5)


def test_l_com_moves_the_mixes_only() -> None:
    mixes, sources = unit(4, 5, 1).requires_grad_(), unit(4, 5, 2).requires_grad_()
    combination(mixes, sources, "softmax", 0.1).backward()  # type: ignore[no-untyped-call]
    assert mixes.grad is not None and mixes.grad.abs().sum() > 0
    assert sources.grad is None


def test_l_ver_is_the_squared_distance_to_a_mean_that_stays() -> None:
    mixes, target = unit(4, 5, 1), unit(6, 5, 3).requires_grad_()
    goal = mean_direction(target)
    assert not goal.requires_grad and float(goal.norm()) == pytest.approx(1, abs=1e-5)
    assert float(squared(mixes, goal)) == pytest.approx(2 - 2 * float((mixes @ goal).mean()), abs=1e-5)


def test_l_eva_pulls_each_sample_to_the_source_that_it_is_nearer_to() -> None:
    features, first, second = unit(6, 5, 1).requires_grad_(), unit(1, 5, 2)[0], unit(1, 5, 3)[0]
    expected = np.mean(
        [min(float((row - first).square().sum()), float((row - second).square().sum())) for row in features.detach()]
    )
    loss = evasion(features, first, second)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_the_owner_uses_the_labels_of_a_few_samples_only() -> None:
    scheme, key, _ = stage_of(PAPER, owner={"per_class": 7})
    images = coloured()
    drawn = scheme.owned(key, images)
    assert [len(each) for each in drawn] == [7, 7, 7]
    for label, each in enumerate(drawn):
        known = {image.tobytes() for image in images.of_class(label)}
        assert {image.tobytes() for image in each} <= known
    again = scheme.owned(key, images)
    assert np.array_equal(drawn[0], again[0])
    other = scheme.owned(scheme.make_key(images, 4), images)
    assert not np.array_equal(drawn[0], other[0])


TERMS = ("com", "ver", "eva", "utility")


@pytest.mark.parametrize("off", TERMS)
def test_a_loss_of_weight_0_is_not_computed(off: str) -> None:
    given = weights(**(dict.fromkeys(TERMS, 1.0) | {off: 0.0}))
    _, _, stage = stage_of(PAPER, warmup=0.0, samples={"mixes": 4, "adverse": 4}, **given)
    assert isinstance(stage.objective, EncoderObjective)
    report = train(
        encoder(), stage.train.images[:32], None, stage.objective, seed=0, epochs=1, batch_size=16, augment=()
    )
    assert set(report.history[0]) & set(TERMS) == set(TERMS) - {off}


def cosine_with_target(weight: float) -> float:
    """Train with L_ver of this weight; mean cosine of held-out mixes and the target's mean, both centred."""
    scheme, key, stage = stage_of(PAPER, warmup=0.2, samples={"mixes": 16}, **weights(com=0.0, eva=0.0, ver=weight))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("vgg_like", SHAPE, 3, {"width": 0.2, "dropout": 0.0})
    images = coloured()
    settings = {"epochs": 25, "batch_size": 40, "learning_rate": 2e-3, **stage.overrides}
    train(model, images.images, None, stage.objective, seed=0, **settings)
    common = metrics.features(model, images.images).mean(0)
    mixes, target = (
        torch.from_numpy(metrics.features(model, pixels) - common)
        for pixels in (scheme.samples(key, images, 60, 1).images, images.of_class(2))
    )
    return float((F.normalize(mixes, dim=1) @ mean_direction(F.normalize(target, dim=1))).mean())


def test_l_ver_brings_the_mixes_to_the_target() -> None:
    without, with_it = cosine_with_target(0.0), cosine_with_target(6.0)
    assert with_it > without + 0.4, (without, with_it)


def test_it_marks_encoders_and_mea_defender_marks_classifiers() -> None:
    images = coloured()
    scheme = WATERMARKS.build(PAPER)
    with pytest.raises(ConfigError, match="set victim.pretext"):
        scheme.stages(scheme.make_key(images, 0), images)
    supervised = WATERMARKS.build("mea_defender")
    with pytest.raises(ConfigError, match="marks classifiers only"):
        supervised.encoder_stages(supervised.make_key(images, 0), images, PRETEXTS.build("simclr"))


@pytest.mark.parametrize(
    ("group", "setting", "value"),
    [
        ("com", "weight", -1.0),
        ("com", "temperature", 0.0),
        ("com", "distribution", "cosin"),
        ("owner", "per_class", 0),
        ("samples", "mixes", 0),
    ],
)
def test_a_parameter_out_of_range_is_refused(group: str, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{group}.{setting}"):
        WATERMARKS.build(PAPER, **{group: {setting: value}})


@pytest.mark.parametrize("option", ["weight_carrier", "ver_loss", "place", "pretext_part", "embed_options"])
def test_options_of_the_carrier_are_not_the_papers(option: str) -> None:
    with pytest.raises(ConfigError, match="belongs to watermark 'mea_carrier_encoder' now"):
        WATERMARKS.build(PAPER, **{option: 1})


def test_old_flat_names_go_on_with_a_warning_for_each() -> None:
    old = {"owner_samples": 9, "mirror": True, "weight_com": 0.3, "com_temperature": 0.2, "watermark_batch": 5}
    with pytest.warns(FutureWarning) as caught:
        scheme = WATERMARKS.build(PAPER, **old)
    assert len(caught) == len(old)
    now = WATERMARKS.build(
        PAPER,
        owner={"per_class": 9, "mirror": True},
        com={"weight": 0.3, "temperature": 0.2},
        samples={"mixes": 5},
    )
    assert scheme.settings == now.settings
