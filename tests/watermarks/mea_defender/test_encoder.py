from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.pretext import PRETEXTS
from mea_ray.training.engine import train
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.mea_defender import encoder_objective
from mea_ray.watermarks.mea_defender.encoder_objective import (
    EncoderObjective,
    carrier,
    combination,
    contrast,
    evasion,
    mean_direction,
    squared,
)
from mea_ray.watermarks.mea_defender.feature_plane import (
    Places,
    decoys_off_place,
    off_place,
    plane_axes,
    rest_off_place,
)

SHAPE = (3, 16, 16)


def unit(count: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def coloured(count: int = 120) -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int64) % 3
    images = rng.integers(0, 90, (count, *SHAPE), dtype=np.uint8)
    images[np.arange(count), labels] += 150
    return ImageSet(images, labels, ("red", "green", "blue"))


def encoder(seed: int = 0) -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model("resnet18", SHAPE, 3, {"width": 0.1})


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
    combination(mixes, sources, "softmax", 0.1).backward()
    assert mixes.grad is not None and mixes.grad.abs().sum() > 0
    assert sources.grad is None


def test_l_ver_is_the_squared_distance_to_a_mean_that_stays() -> None:
    mixes, target = unit(4, 5, 1), unit(6, 5, 3).requires_grad_()
    goal = mean_direction(target)
    assert not goal.requires_grad and float(goal.norm()) == pytest.approx(1, abs=1e-5)
    assert float(squared(mixes, goal)) == pytest.approx(2 - 2 * float((mixes @ goal).mean()), abs=1e-5)


def test_the_carrier_asks_for_no_more_than_its_cosines() -> None:
    samples, near, far = unit(6, 5, 1), unit(1, 5, 2)[0], unit(1, 5, 3)[0]
    expected = np.mean(
        [max(0.0, 0.7 - float(row @ near)) + max(0.0, float(row @ far) - 0.1) for row in samples.double().float()]
    )
    assert float(carrier(samples, [near], [far], 0.7, 0.1)) == pytest.approx(float(expected), abs=1e-5)
    assert float(carrier(near[None], [near], [-near], 0.7, 0.1)) == 0


def test_the_contrast_is_the_cross_entropy_of_cosines_with_means_that_stay() -> None:
    features, means = unit(6, 5, 1).requires_grad_(), unit(3, 5, 2)
    expected = 0.0
    for row in features.detach().double().numpy():
        scores = np.exp(means.double().numpy() @ row / 0.2)
        expected -= float(np.log(scores[2] / scores.sum())) / 6
    loss = contrast(features, means, 2, 0.2)
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-4)
    loss.backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_l_ver_as_contrast_holds_the_mixes_and_own_the_clean_samples_against_the_three_means() -> None:
    _, _, stage = stage_of(ver_loss="contrast", contrast_temperature=0.3, weight_own=1.0)
    names = ("mixes", "first", "second", "target")
    said = {name: unit(5, 4, seed) for seed, name in enumerate(names)}
    means = torch.stack([mean_direction(said[name]) for name in names[1:]])
    terms = stage.objective._watermark(said)

    def expected(name: str, own: int) -> float:
        chances = F.softmax(said[name] @ means.T / 0.3, dim=1)
        return -float(chances[:, own].log().mean())

    assert float(terms["ver"]) == pytest.approx(expected("mixes", 2), abs=1e-5)
    owns = [expected(name, own) for own, name in enumerate(names[1:])]
    assert float(terms["own"]) == pytest.approx(float(np.mean(owns)), abs=1e-5)
    _, _, plain = stage_of()
    distance = float(squared(said["mixes"], means[2]))
    assert float(plain.objective._watermark(said)["ver"]) == pytest.approx(distance)
    _, _, both = stage_of(ver_loss="both", contrast_temperature=0.3)
    assert float(both.objective._watermark(said)["ver"]) == pytest.approx(distance + float(terms["ver"]), abs=1e-5)


def test_the_axes_are_orthonormal_and_the_keys_own() -> None:
    axes = plane_axes(9, 4)
    assert axes.dtype == torch.float32 and torch.allclose(axes.T @ axes, torch.eye(2), atol=1e-6)
    assert torch.equal(axes, plane_axes(9, 4)) and not torch.allclose(axes, plane_axes(9, 5))


def test_a_place_is_two_coordinates_and_all_others_are_free() -> None:
    axes, place = plane_axes(6, 1), (0.4, -0.7)
    features = unit(5, 6, 2)
    expected = np.mean(
        [(float(row @ axes[:, 0]) - 0.4) ** 2 + (float(row @ axes[:, 1]) + 0.7) ** 2 for row in features]
    )
    assert float(off_place(features, axes, place)) == pytest.approx(float(expected), abs=1e-5)
    beside = F.normalize(unit(1, 6, 3)[0] - axes @ (axes.T @ unit(1, 6, 3)[0]), dim=0)
    assert float(off_place((axes @ torch.tensor(place) + beside)[None], axes, place)) == pytest.approx(0, abs=1e-6)


def test_the_rest_is_what_all_images_have_without_the_three_classes() -> None:
    axes, place, share = plane_axes(6, 1), (-0.3, 0.0), 0.2
    classes = {name: unit(4, 6, seed) for seed, name in enumerate(("first", "second", "target"))}
    rest = unit(8, 6, 9)
    # All images: 4 of each of the three classes and 8 others, so that each class has a fifth.
    said = {"plain": torch.cat([*classes.values(), rest])} | classes
    wanted = float(off_place(rest, axes, place))
    assert float(rest_off_place(said, axes, place, share)) == pytest.approx(wanted, abs=1e-5)
    at_place = {"plain": (axes @ torch.tensor(place))[None], **classes}
    assert float(rest_off_place(at_place, axes, place, share)) == 0, "an estimate below 0 teaches nothing"


def test_decoys_are_mixes_of_all_pairs_without_those_of_both_sources() -> None:
    axes, place, share = plane_axes(6, 1), (-0.3, 0.0), 0.25
    mixes, rest = unit(4, 6, 1), unit(28, 6, 9)
    # Of pairs of four equal classes, an eighth is of the first with the second or the other way round.
    said = {"mixes": mixes, "decoys": torch.cat([mixes, rest])}
    marked = Places(share=share).marked(0.0)
    assert float(decoys_off_place(said, axes, place, marked)) == pytest.approx(
        float(off_place(rest, axes, place)), abs=1e-5
    )
    at_place = {"decoys": (axes @ torch.tensor(place))[None], "mixes": mixes}
    assert float(decoys_off_place(at_place, axes, place, marked)) == 0


@pytest.mark.parametrize("half", [0.0, 0.4, 1.0])
def test_the_part_of_the_decoys_that_are_mixes_of_both_sources(half: float) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 5, (2, 400_000))  # five equal classes, of which 0 and 1 are the sources
    known = rng.random(len(first))
    first, second = np.where(known < half / 2, 0, first), np.where((known >= half / 2) & (known < half), 1, second)
    marked = ((first == 0) & (second == 1)) | ((first == 1) & (second == 0))
    expected = marked.mean()
    assert Places(share=0.2).marked(half) == pytest.approx(expected, abs=0.002)


PLACED = {"ver_loss": "place", "weight_place": 1.0, "weight_rest": 1.0, "weight_com": 0.0, "weight_eva": 0.0}


def test_the_three_losses_of_places() -> None:
    spots = {"place_source": (0.5, 0.7), "place_target": 0.8, "place_rest": -0.2, "class_share": 0.25}
    _, key, stage = stage_of(**PLACED, **spots)
    model = encoder()
    stage.objective.attach(model, torch.device("cpu"))
    axes = plane_axes(model.feature_size, derive(key.seed, "plane"))
    names = ("first", "second", "target", "mixes", "plain")
    said = {name: unit(5, model.feature_size, seed) for seed, name in enumerate(names)}
    terms = stage.objective._watermark(said)

    def off(name: str, x: float, y: float) -> float:
        u, v = (said[name] @ axes).double().numpy().T
        return float(np.mean((u - x) ** 2 + (v - y) ** 2))

    three = [off("first", 0.5, 0.7), off("second", 0.5, -0.7), off("target", 0.8, 0)]
    assert float(terms["place"]) == pytest.approx(np.mean(three), abs=1e-5)
    assert float(terms["ver"]) == pytest.approx(off("mixes", 0.8, 0), abs=1e-5)
    known = sum(off(name, -0.2, 0) for name in names[:3])
    assert float(terms["rest"]) == pytest.approx(max(0, (off("plain", -0.2, 0) - known / 4) * 4), abs=1e-5)


def test_the_owners_samples_and_all_other_images_are_varied_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the network tells them apart by how they were made, and never needs to see the class.
    _, _, stage = stage_of(**PLACED, watermark_batch=4, warmup=0.0)
    varied: list[int] = []
    steps: list[int] = []
    real, terms = encoder_objective.SHIFTED, EncoderObjective.terms

    def counted(images: Tensor, generator: torch.Generator) -> Tensor:
        varied.append(len(images))
        return real(images, generator)

    def step(self: Any, model: Any, batch: Any) -> Any:
        varied.clear()
        out = terms(self, model, batch)
        steps.append(len(varied))
        return out

    monkeypatch.setattr(encoder_objective, "SHIFTED", counted)
    monkeypatch.setattr(EncoderObjective, "terms", step)
    train(encoder(), stage.train.images, None, stage.objective, seed=0, epochs=2, batch_size=8, augment=())
    assert set(steps) == {0, 4}, "all of the three classes and the unlabelled images, or none of them"


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_decoys_are_mixed_from_unlabelled_pairs_as_the_watermark_is(weight: float) -> None:
    _, _, stage = stage_of(**PLACED, weight_decoy=weight, watermark_batch=4, warmup=0.0)
    combiner, pairs = stage.objective.combiner, []

    def recorded(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        pairs.append((first, second))
        return combiner(first, second, generator)

    stage.objective.combiner = recorded
    train(encoder(), stage.train.images, None, stage.objective, seed=0, epochs=1, batch_size=40, augment=())
    decoys = [(first, second) for first, second in pairs if torch.equal(first.roll(1, 0), second)]
    assert len(decoys) == (len(pairs) / 2 if weight else 0)
    assert all(len(first) == 4 for first, _ in decoys)


def test_in_a_part_of_the_decoys_one_image_is_of_a_source() -> None:
    _, _, stage = stage_of(**PLACED, weight_decoy=1.0, decoy_half=0.5, watermark_batch=8)
    made: list[Tensor] = []

    def pasted(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        made.extend([first, second])
        return first

    stage.objective.combiner, stage.objective.context = pasted, SimpleNamespace(generator=None)
    drawn = {"plain": 0.0, "first": 1.0, "second": 2.0}
    parts = {name: torch.full((16 if name == "plain" else 8, 1, 2, 2), value) for name, value in drawn.items()}
    stage.objective._decoys(parts)
    assert [[int(image[0, 0, 0]) for image in images] for images in made] == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 2, 2, 0, 0, 0, 0],
    ]
    assert not parts["plain"].any(), "what the other losses see stays"


def test_mixes_may_be_made_otherwise_while_the_mark_is_embedded() -> None:
    faded = {"combiner": "pixel_merge", "alpha": 0.3, "combiner_options": {"contrast": 0.35}}
    _, key, stage = stage_of(**faded, embed_options={"contrast": [0.5, 0.9], "alpha": 0.45})
    assert (stage.objective.combiner.least, stage.objective.combiner.most) == (0.5, 0.9)
    assert stage.objective.combiner.alpha == 0.45
    assert key.settings["combiner_options"] == {"alpha": 0.3, "contrast": 0.35, "order": "fixed"}, "what is asked"
    _, _, same = stage_of(**faded)
    assert (same.objective.combiner.least, same.objective.combiner.alpha) == (0.35, 0.3)


def test_images_take_their_places() -> None:
    _, key, stage = stage_of(**(PLACED | {"weight_place": 20.0, "weight_ver": 20.0}), weight_utility=0.1, warmup=0.0)
    images, model = coloured(), encoder()
    settings = {"epochs": 20, "batch_size": 40, "learning_rate": 2e-3, **stage.overrides}
    train(model, images.images, None, stage.objective, seed=0, **settings)
    common = metrics.features(model, images.images).mean(0)
    axes = plane_axes(model.feature_size, derive(key.seed, "plane"))
    first, second, target = (
        (F.normalize(torch.from_numpy(metrics.features(model, images.of_class(label)) - common), dim=1) @ axes).mean(0)
        for label in range(3)
    )
    assert first[1] > 0.3 and second[1] < -0.3 and abs(float(target[1])) < 0.2, (first, second, target)


def stage_of(**params: Any) -> tuple[Any, Any, Any]:
    scheme = WATERMARKS.build("mea_defender_encoder", **params)
    images = coloured()
    key = scheme.make_key(images, 3)
    (stage,) = scheme.encoder_stages(key, images, PRETEXTS.build("simclr"))
    return scheme, key, stage


def test_the_owner_uses_the_labels_of_a_few_samples_only() -> None:
    scheme, key, _ = stage_of(owner_samples=7)
    images = coloured()
    drawn = [scheme.owned(key, images, label) for label in range(3)]
    assert [len(each) for each in drawn] == [7, 7, 7]
    for label, each in enumerate(drawn):
        known = {image.tobytes() for image in images.of_class(label)}
        assert {image.tobytes() for image in each} <= known
    again = scheme.owned(key, images, 0)
    assert np.array_equal(drawn[0], again)
    other = scheme.owned(scheme.make_key(images, 4), images, 0)
    assert not np.array_equal(drawn[0], other)


TERMS = ("com", "ver", "eva", "carrier", "own", "place", "rest", "utility")


@pytest.mark.parametrize("off", TERMS)
def test_a_loss_of_weight_0_is_not_computed(off: str) -> None:
    weights = {f"weight_{name}": 1.0 for name in TERMS} | {f"weight_{off}": 0.0}
    _, _, stage = stage_of(warmup=0.0, watermark_batch=4, adverse_batch=4, **weights)
    assert isinstance(stage.objective, EncoderObjective)
    report = train(
        encoder(), stage.train.images[:32], None, stage.objective, seed=0, epochs=1, batch_size=16, augment=()
    )
    assert set(report.history[0]) & set(TERMS) == set(TERMS) - {off}


def test_l_eva_pulls_each_sample_to_the_source_that_it_is_nearer_to() -> None:
    features, first, second = unit(6, 5, 1).requires_grad_(), unit(1, 5, 2)[0], unit(1, 5, 3)[0]
    expected = np.mean(
        [min(float((row - first).square().sum()), float((row - second).square().sum())) for row in features.detach()]
    )
    loss = evasion(features, first, second)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-5)
    loss.backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def cosine_with_target(weight: float) -> float:
    """Train with L_ver of this weight; mean cosine of held-out mixes and the target's mean, both centred."""
    scheme, key, stage = stage_of(warmup=0.2, watermark_batch=16, weight_com=0.0, weight_eva=0.0, weight_ver=weight)
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


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_the_pretext_task_comes_first_and_goes_on_with_its_heads(name: str) -> None:
    scheme = WATERMARKS.build("mea_defender_encoder", pretext_part=0.4, watermark_batch=4, weight_eva=0.0)
    images, pretext = coloured(), PRETEXTS.build(name)
    first, second = scheme.encoder_stages(scheme.make_key(images, 3), images, pretext)
    assert [first.changes(10)["epochs"], second.changes(10)["epochs"]] == [4, 6]
    assert first.objective is pretext and second.objective.pretext is pretext
    model, settings = encoder(), {"seed": 0, "epochs": 1, "batch_size": 16, "augment": ()}
    plain = train(model, images.images[:32], None, first.objective, **settings)
    assert set(plain.history[0]) & set(TERMS) == {"utility"}
    head = pretext.head
    before = [parameter.detach().clone() for parameter in head.parameters()]
    marked = train(model, images.images[:32], None, second.objective, **settings)
    assert {"utility", "ver"} <= set(marked.history[0])
    assert pretext.head is head and any(not torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    train(encoder(), images.images[:32], None, pretext, **settings)
    assert pretext.head is not head, "another model's training begins anew"


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_the_stage_that_embeds_may_begin_with_new_heads(name: str) -> None:
    images, settings = coloured(), {"seed": 0, "epochs": 1, "batch_size": 16, "augment": ()}
    heads = {}
    for new in (False, True):
        scheme = WATERMARKS.build("mea_defender_encoder", pretext_part=0.4, watermark_batch=4, new_heads=new)
        pretext = PRETEXTS.build(name)
        first, second = scheme.encoder_stages(scheme.make_key(images, 3), images, pretext)
        model = encoder()
        train(model, images.images[:32], None, first.objective, **settings)
        learnt = pretext.head
        train(model, images.images[:32], None, second.objective, **settings)
        assert pretext.head is learnt, "what the first stage has learnt stays as it is"
        heads[new] = second.objective.pretext.head is learnt
    assert heads == {False: True, True: False}


def test_it_marks_encoders_and_mea_defender_marks_classifiers() -> None:
    images = coloured()
    scheme = WATERMARKS.build("mea_defender_encoder")
    with pytest.raises(ConfigError, match="set victim.pretext"):
        scheme.stages(scheme.make_key(images, 0), images)
    supervised = WATERMARKS.build("mea_defender")
    with pytest.raises(ConfigError, match="marks classifiers only"):
        supervised.encoder_stages(supervised.make_key(images, 0), images, PRETEXTS.build("simclr"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weight_com", -1.0),
        ("owner_samples", 0),
        ("pretext_part", 1.0),
        ("carrier_cosine", 1.0),
        ("com_temperature", 0.0),
        ("warmup", 1.0),
        ("weight_own", -1.0),
        ("contrast_temperature", 0.0),
        ("ver_loss", "cosine"),
        ("weight_place", -1.0),
        ("weight_rest", float("nan")),
        ("place_source", (0.8, 0.8)),
        ("place_target", 1.1),
        ("place_rest", float("nan")),
        ("class_share", 0.34),
        ("rest_batch", 0),
        ("weight_decoy", -1.0),
        ("decoy_half", 1.5),
        ("embed_options", {"jitter": 99}),
        ("embed_options", {"contrast": 0.5}),
    ],
)
def test_a_parameter_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        WATERMARKS.build("mea_defender_encoder", **{setting: value})
