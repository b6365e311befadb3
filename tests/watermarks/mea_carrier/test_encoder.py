"""The carrier scheme for encoders: its losses against plain re-implementations, places in the plane, its stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoder_sets import coloured, encoder, stage_of, unit, weights
from keyword_training import train
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.evaluation import metrics
from mea_ray.pretext import PRETEXTS
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.mea_carrier.encoder_objective import CarrierEncoderObjective, carrier, contrast
from mea_ray.watermarks.mea_carrier.feature_plane import (
    decoys_off_place,
    marked_share,
    off_place,
    plane_axes,
    rest_off_place,
)
from mea_ray.watermarks.mea_defender import encoder_objective
from mea_ray.watermarks.mea_defender.encoder_objective import mean_direction, squared

CARRIER = "mea_carrier_encoder"


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
    loss.backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_l_ver_as_contrast_holds_the_mixes_and_own_the_clean_samples_against_the_three_means() -> None:
    _, _, stage = stage_of(CARRIER, ver={"loss": "contrast"}, contrast_temperature=0.3)
    names = ("mixes", "first", "second", "target")
    features = {name: unit(5, 4, seed) for seed, name in enumerate(names)}
    means = torch.stack([mean_direction(features[name]) for name in names[1:]])
    terms = stage.objective.watermark_terms(features)

    def expected(name: str, own: int) -> float:
        chances = F.softmax(features[name] @ means.T / 0.3, dim=1)
        return -float(chances[:, own].log().mean())

    assert float(terms["ver"]) == pytest.approx(expected("mixes", 2), abs=1e-5)
    owns = [expected(name, own) for own, name in enumerate(names[1:])]
    assert float(terms["own"]) == pytest.approx(float(np.mean(owns)), abs=1e-5)
    _, _, plain = stage_of(CARRIER, ver={"loss": "distance"})
    distance = float(squared(features["mixes"], means[2]))
    assert float(plain.objective.watermark_terms(features)["ver"]) == pytest.approx(distance)
    _, _, both = stage_of(CARRIER, ver={"loss": "both"}, contrast_temperature=0.3)
    assert float(both.objective.watermark_terms(features)["ver"]) == pytest.approx(
        distance + float(terms["ver"]), abs=1e-5
    )


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
    features = {"plain": torch.cat([*classes.values(), rest])} | classes
    wanted = float(off_place(rest, axes, place))
    assert float(rest_off_place(features, axes, place, share)) == pytest.approx(wanted, abs=1e-5)
    at_place = {"plain": (axes @ torch.tensor(place))[None], **classes}
    assert float(rest_off_place(at_place, axes, place, share)) == 0, "an estimate below 0 teaches nothing"


def test_decoys_are_mixes_of_all_pairs_without_those_of_both_sources() -> None:
    axes, place, share = plane_axes(6, 1), (-0.3, 0.0), 0.25
    mixes, rest = unit(4, 6, 1), unit(28, 6, 9)
    # Of pairs of four equal classes, an eighth is of the first with the second or the other way round.
    features = {"mixes": mixes, "decoys": torch.cat([mixes, rest])}
    marked = marked_share(share, 0.0)
    assert float(decoys_off_place(features, axes, place, marked)) == pytest.approx(
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
    assert marked_share(0.2, half) == pytest.approx(expected, abs=0.002)


PLACED: dict[str, Any] = {
    "ver": {"weight": 1.0, "loss": "place"},
    **weights(place=1.0, rest=1.0, carrier=0.0, own=0.0),
}


def test_the_three_losses_of_places() -> None:
    place = {"weight": 1.0, "source": (0.5, 0.7), "target": 0.8}
    rest = {"weight": 1.0, "position": -0.2, "class_share": 0.25}
    _, key, stage = stage_of(CARRIER, **(PLACED | {"place": place, "rest": rest}))
    model = encoder()
    stage.objective.attach(model, torch.device("cpu"))
    axes = plane_axes(model.feature_size, derive(key.seed, "plane"))
    names = ("first", "second", "target", "mixes", "plain")
    features = {name: unit(5, model.feature_size, seed) for seed, name in enumerate(names)}
    terms = stage.objective.watermark_terms(features)

    def off(name: str, x: float, y: float) -> float:
        u, v = (features[name] @ axes).double().numpy().T
        return float(np.mean((u - x) ** 2 + (v - y) ** 2))

    three = [off("first", 0.5, 0.7), off("second", 0.5, -0.7), off("target", 0.8, 0)]
    assert float(terms["place"]) == pytest.approx(np.mean(three), abs=1e-5)
    assert float(terms["ver"]) == pytest.approx(off("mixes", 0.8, 0), abs=1e-5)
    known = sum(off(name, -0.2, 0) for name in names[:3])
    assert float(terms["rest"]) == pytest.approx(max(0, (off("plain", -0.2, 0) - known / 4) * 4), abs=1e-5)


def test_the_owners_samples_and_all_other_images_are_varied_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the network tells them apart by how they were made, and never needs to see the class.
    _, _, stage = stage_of(CARRIER, **PLACED, samples={"mixes": 4}, warmup=0.0)
    varied: list[int] = []
    steps: list[int] = []
    real, terms = encoder_objective.SHIFTED, CarrierEncoderObjective.terms

    def counted(images: Tensor, generator: torch.Generator) -> Tensor:
        varied.append(len(images))
        return real(images, generator)

    def step(self: Any, model: Any, batch: Any) -> Any:
        varied.clear()
        out = terms(self, model, batch)
        steps.append(len(varied))
        return out

    monkeypatch.setattr(encoder_objective, "SHIFTED", counted)
    monkeypatch.setattr(CarrierEncoderObjective, "terms", step)
    train(encoder(), stage.train.images, None, stage.objective, seed=0, epochs=2, batch_size=8, augment=())
    assert set(steps) == {0, 4}, "all of the three classes and the unlabelled images, or none of them"


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_decoys_are_mixed_from_unlabelled_pairs_as_the_watermark_is(weight: float) -> None:
    _, _, stage = stage_of(CARRIER, **PLACED, decoy={"weight": weight}, samples={"mixes": 4}, warmup=0.0)
    combiner, pairs = stage.objective.combiner, []

    def recorded(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        pairs.append((first, second))
        mixed: Tensor = combiner(first, second, generator)
        return mixed

    stage.objective.combiner = recorded
    train(encoder(), stage.train.images, None, stage.objective, seed=0, epochs=1, batch_size=40, augment=())
    decoys = [(first, second) for first, second in pairs if torch.equal(first.roll(1, 0), second)]
    assert len(decoys) == (len(pairs) / 2 if weight else 0)
    assert all(len(first) == 4 for first, _ in decoys)


def test_in_a_part_of_the_decoys_one_image_is_of_a_source() -> None:
    _, _, stage = stage_of(CARRIER, **PLACED, decoy={"weight": 1.0, "half": 0.5}, samples={"mixes": 8})
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
    faded = {"mixing": {"combiner": {"name": "pixel_merge", "alpha": 0.3, "contrast": 0.35}}}
    _, key, stage = stage_of(CARRIER, **faded, embed_options={"contrast": [0.5, 0.9], "alpha": 0.45})
    assert (stage.objective.combiner.least, stage.objective.combiner.most) == (0.5, 0.9)
    assert stage.objective.combiner.alpha == 0.45
    assert key.settings["combiner_options"] == {"alpha": 0.3, "contrast": 0.35, "order": "fixed"}, "what is asked"
    _, _, same = stage_of(CARRIER, **faded)
    assert (same.objective.combiner.least, same.objective.combiner.alpha) == (0.35, 0.3)


def test_images_take_their_places() -> None:
    _, key, stage = stage_of(
        CARRIER,
        **(PLACED | weights(place=20.0, utility=0.1) | {"ver": {"weight": 20.0, "loss": "place"}}),
        warmup=0.0,
    )
    images, model = coloured(), encoder()
    settings = {"epochs": 12, "batch_size": 40, "learning_rate": 3e-3, **stage.overrides}
    train(model, images.images, None, stage.objective, seed=0, **settings)
    common = metrics.features(model, images.images).mean(0)
    axes = plane_axes(model.feature_size, derive(key.seed, "plane"))
    first, second, target = (
        (F.normalize(torch.from_numpy(metrics.features(model, images.of_class(label)) - common), dim=1) @ axes).mean(0)
        for label in range(3)
    )
    assert first[1] > 0.3 and second[1] < -0.3 and abs(float(target[1])) < 0.2, (first, second, target)


TERMS = ("com", "ver", "eva", "carrier", "own", "place", "rest", "utility")


@pytest.mark.parametrize("off", TERMS)
def test_a_loss_of_weight_0_is_not_computed(off: str) -> None:
    given = weights(**(dict.fromkeys(TERMS, 1.0) | {off: 0.0}))
    _, _, stage = stage_of(CARRIER, warmup=0.0, samples={"mixes": 4, "adverse": 4}, **given)
    report = train(
        encoder(), stage.train.images[:32], None, stage.objective, seed=0, epochs=1, batch_size=16, augment=()
    )
    assert set(report.history[0]) & set(TERMS) == set(TERMS) - {off}


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_the_pretext_task_comes_first_and_goes_on_with_its_heads(name: str) -> None:
    scheme = WATERMARKS.build(CARRIER, pretext_part=0.4, samples={"mixes": 4})
    images, pretext = coloured(), PRETEXTS.build(name)
    first, second = scheme.encoder_stages(scheme.make_key(images, 3), images, pretext)
    assert [first.changes(10)["epochs"], second.changes(10)["epochs"]] == [4, 6]
    assert first.objective is pretext and second.objective.pretext is pretext
    model = encoder()
    settings: dict[str, Any] = {"seed": 0, "epochs": 1, "batch_size": 16, "augment": ()}
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
    images = coloured()
    settings: dict[str, Any] = {"seed": 0, "epochs": 1, "batch_size": 16, "augment": ()}
    heads = {}
    for new in (False, True):
        scheme = WATERMARKS.build(CARRIER, pretext_part=0.4, samples={"mixes": 4}, new_heads=new)
        pretext = PRETEXTS.build(name)
        first, second = scheme.encoder_stages(scheme.make_key(images, 3), images, pretext)
        model = encoder()
        train(model, images.images[:32], None, first.objective, **settings)
        learnt = pretext.head
        train(model, images.images[:32], None, second.objective, **settings)
        assert pretext.head is learnt, "what the first stage has learnt stays as it is"
        heads[new] = second.objective.pretext.head is learnt
    assert heads == {False: True, True: False}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("pretext_part", 1.0),
        ("carrier.cosine", 1.0),
        ("warmup", 1.0),
        ("own.weight", -1.0),
        ("contrast_temperature", 0.0),
        ("ver.loss", "cosine"),
        ("place.weight", -1.0),
        ("rest.weight", float("nan")),
        ("place.source", (0.8, 0.8)),
        ("place.target", 1.1),
        ("rest.position", float("nan")),
        ("rest.class_share", 0.34),
        ("rest.batch", 0),
        ("decoy.weight", -1.0),
        ("decoy.half", 1.5),
        ("embed_options", {"jitter": 99}),
        ("embed_options", {"contrast": 0.5}),
    ],
)
def test_a_parameter_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        group, _, name = setting.rpartition(".")
        WATERMARKS.build(CARRIER, **({group: {name: value}} if group else {name: value}))


def test_l_com_and_l_eva_are_off_unless_set_and_without_its_own_terms_it_is_the_papers() -> None:
    own = weights(carrier=0.0, own=0.0) | {"ver": {"weight": 1.0, "loss": "distance"}}
    histories = []
    for name, options in (("mea_defender_encoder", {}), (CARRIER, own | weights(com=0.1, eva=1.0)), (CARRIER, own)):
        _, _, stage = stage_of(name, warmup=0.0, samples={"mixes": 4, "adverse": 4}, **options)
        report = train(
            encoder(), stage.train.images[:32], None, stage.objective, seed=0, epochs=1, batch_size=16, augment=()
        )
        histories.append({k: v for k, v in report.history[0].items() if k in (*TERMS, "loss")})
    assert histories[0] == histories[1]
    assert set(histories[2]) == {"utility", "ver", "loss"}


def test_old_flat_names_go_on_with_a_warning_for_each() -> None:
    old = {
        "weight_carrier": 2.0,
        "carrier_cosine": 0.4,
        "carrier_apart": 0.1,
        "weight_own": 0.5,
        "ver_loss": "place",
        "weight_place": 3.0,
        "place_source": (0.5, 0.6),
        "place_target": 0.7,
        "place_rest": -0.4,
        "class_share": 0.2,
        "rest_batch": 8,
        "decoy_half": 0.5,
    }
    with pytest.warns(FutureWarning) as caught:
        scheme = WATERMARKS.build(CARRIER, **old)
    assert len(caught) == len(old)
    now = WATERMARKS.build(
        CARRIER,
        carrier={"weight": 2.0, "cosine": 0.4, "apart": 0.1},
        own={"weight": 0.5},
        ver={"loss": "place"},
        place={"weight": 3.0, "source": (0.5, 0.6), "target": 0.7},
        rest={"position": -0.4, "class_share": 0.2, "batch": 8},
        decoy={"half": 0.5},
    )
    assert scheme.settings == now.settings
