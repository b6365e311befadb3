"""The key, the held-out samples, the objective's composition, and a victim that carries the watermark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from watermark_sets import NAMES, Spy, coded_set, context, image_set, main_batch, started

from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.mea_defender import losses

SCHEMES = ["mea_defender", "mea_defender_two_stage"]


def weights(**values: Any) -> Any:
    """Options that set the weights of losses."""
    return {name: {"weight": value} for name, value in values.items()}


def objective(seed: Any = 0, augment: Any = None, train: Any = None, **options: Any) -> Any:
    # Without a warm-up unless a test asks for one: the losses are the paper's from the first step.
    return started("mea_defender", seed, augment, train, **{"warmup": 0.0, **options})


# --- key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combiner", ["crop_paste", "pixel_merge", "stripes", "autoencoder"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_key_makes_the_same_samples_after_its_way_through_a_file(tmp_path: Path, scheme: Any, combiner: Any) -> None:
    options = {"steps": 3} if combiner == "autoencoder" else {}
    made = WATERMARKS.build(scheme, mixing={"combiner": {"name": combiner, **options}, "space": "normalised"})
    key = made.make_key(image_set(), 5)
    key.save(tmp_path)
    loaded = Key.load(tmp_path)
    assert bool(loaded.tensors) == (combiner == "autoencoder")
    held_out = image_set(seed=9)
    # A scheme with other settings: what counts is the key.
    other = WATERMARKS.build(scheme, source_classes=(3, 4), target_class=5)
    one, two = made.samples(key, held_out, 20, 3), other.samples(loaded, held_out, 20, 3)
    assert np.array_equal(one.images, two.images) and one.target == two.target == 2
    assert list(one.adverse) == list(two.adverse)
    for name in one.adverse:
        assert np.array_equal(one.adverse[name], two.adverse[name])


def test_key_is_plain_json_and_depends_on_the_seed(tmp_path: Path) -> None:
    scheme = WATERMARKS.build("mea_defender")
    one, same, other = (scheme.make_key(image_set(), seed) for seed in (1, 1, 2))
    assert one == same and one.seed != other.seed
    one.save(tmp_path)
    body = json.loads((tmp_path / "key.json").read_text())
    assert body["source_classes"] == [0, 1] and body["settings"]["combiner"] == "crop_paste"


def test_canvas_is_black_or_the_mean_colour() -> None:
    train = image_set(shape=(3, 16, 16))
    black = WATERMARKS.build("mea_defender", mixing={"space": "pixel"}).make_key(train, 0)
    mean = WATERMARKS.build("mea_defender", mixing={"space": "normalised"}).make_key(train, 0)
    assert black.settings["fill"] == [0, 0, 0]
    np.testing.assert_allclose(mean.settings["fill"], train.images.mean(axis=(0, 2, 3)) / 255)


# --- samples -------------------------------------------------------------------------------------------------------


def test_samples_are_distinct_pairs_of_held_out_images_only() -> None:
    scheme = WATERMARKS.build("mea_defender", source_classes=(4, 1), target_class=0)
    held_out = coded_set()
    samples = scheme.samples(scheme.make_key(image_set(), 0), held_out, 80, 0)
    assert samples.images.dtype == np.uint8 and samples.images.shape == (80, 1, 16, 16)
    first, second = (set(held_out.of_class(c)[:, 0, 0, 0].tolist()) for c in (4, 1))
    for mixes in [samples.images, *samples.adverse.values()]:
        pairs = []
        for image in mixes:
            colours = set(np.unique(image).tolist()) - {0}  # the diagonal leaves a black line
            assert len(colours & first) == 1 and len(colours & second) == 1 and len(colours) == 2
            pairs.append(tuple(sorted(colours)))
        assert len(set(pairs)) == len(pairs) == 80
    assert set(samples.adverse) == {"left_right", "diagonal", "donut", "hotdog"}
    assert len(samples.sources) == 20 and samples.source_labels.tolist() == [4] * 10 + [1] * 10
    assert np.array_equal(samples.sources[:10], held_out.of_class(4))


def test_other_classes_are_mixed_as_the_watermark_is_by_pairs_that_the_key_does_not_name() -> None:
    scheme = WATERMARKS.build("mea_defender", source_classes=(4, 1), target_class=0)
    key, held_out = scheme.make_key(image_set(), 0), coded_set()
    mixes = scheme.samples(key, held_out, 80, 0).other_classes
    assert mixes.dtype == np.uint8 and 70 < len(mixes) <= 80, "a pair and its reverse may give the same mix"
    label_of = {int(image[0, 0, 0]): int(label) for image, label in zip(held_out.images, held_out.labels, strict=True)}
    seen = set()
    for image in mixes:
        # Cut at the middle, give or take the jitter: the first row and the last are of one image each.
        labels = label_of[int(image[0, 0, 0])], label_of[int(image[0, -1, 0])]
        assert labels[0] != labels[1] and not {0, 1, 4} & set(labels)
        seen.add(labels)
    assert len(seen) > 2
    named = held_out.take(np.flatnonzero(np.isin(held_out.labels, [0, 1, 4, 5])))
    assert scheme.samples(key, named, 80, 0).other_classes is None, "one other class has nothing to be mixed with"


def test_there_are_no_more_samples_than_pairs_and_equal_mixes_count_once() -> None:
    scheme = WATERMARKS.build("mea_defender")
    key = scheme.make_key(image_set(), 0)
    assert len(scheme.samples(key, coded_set(), 5000, 0).images) == 100
    held_out = coded_set()
    held_out.images[:] = 7
    assert len(scheme.samples(key, held_out, 50, 0).images) == 1


def test_samples_follow_their_seed() -> None:
    scheme = WATERMARKS.build("mea_defender")
    key, held_out = scheme.make_key(image_set(), 0), image_set(seed=3)
    one, same, other = (scheme.samples(key, held_out, 30, seed).images for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_verification_without_a_source_image_or_of_another_shape_is_refused() -> None:
    scheme = WATERMARKS.build("mea_defender")
    key = scheme.make_key(image_set(), 0)
    with pytest.raises(DataError, match="verification_fraction"):
        scheme.samples(key, image_set().take(np.array([0, 6, 2])), 10, 0)
    with pytest.raises(DataError, match=r"\(1, 16, 16\)"):
        scheme.samples(key, image_set(shape=(1, 8, 8)), 10, 0)
    with pytest.raises(ArtifactError, match="not a key of mixed classes"):
        scheme.samples(Key("ewe", (0, 1), 2, 0), image_set(), 10, 0)


# --- geometries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, ("left_right", "diagonal", "donut", "hotdog")),
        ({"combiner": {"orientation": "vertical"}}, ("top_bottom", "diagonal", "donut", "hotdog")),
        ({"combiner": {"orientation": "random"}}, ("diagonal", "donut", "hotdog")),
        ({"combiner": "stripes"}, ("top_bottom", "left_right", "diagonal", "donut", "hotdog")),
        ({"adverse": ["ratio"]}, ("ratio",)),
    ],
)
def test_default_geometries_leave_out_the_watermarks_own(options: Any, expected: Any) -> None:
    assert tuple(WATERMARKS.build("mea_defender", mixing=options).geometries) == expected


def test_geometries_have_options_of_their_own_and_by_default_the_jitter_of_the_watermark() -> None:
    scheme = WATERMARKS.build("mea_defender", mixing={"combiner": {"jitter": 1}})
    assert scheme.geometries["left_right"]["jitter"] == 1
    scheme = WATERMARKS.build(
        "mea_defender", mixing={"combiner": "diagonal", "adverse": [{"name": "ratio", "share": 0.4}]}
    )
    assert scheme.geometries == {"ratio": {"jitter": 3, "share": 0.4, "order": "random"}}


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "options,match",
    [
        ({"source_classes": (1, 1)}, "three different"),
        ({"target_class": 0}, "three different"),
        ({"source_classes": (-1, 1)}, "none negative"),
        ({"mixing": {"combiner": "crop_past"}}, "did you mean 'crop_paste'"),
        ({"mixing": {"combiner": {"jiter": 2}}}, "did you mean 'jitter'"),
        ({"mixing": {"combiner": {"jitter": 40}}}, "jitter=40"),
        ({"mixing": {"combiner": {"orientation": "diagonal"}}}, "orientation"),
        ({"mixing": {"adverse": ["donat"]}}, "did you mean 'donut'"),
        ({"mixing": {"adverse": ["top_bottom"]}}, "the same mixes as the combiner"),
        ({"mixing": {"adverse": ["donut", "donut"]}}, "each geometry once"),
        ({"mixing": {"adverse": []}}, "mixing.adverse"),
        ({"mixing": {"adverse": ["autoencoder"]}}, "combiner only"),
    ],
)
def test_impossible_settings_are_refused_when_the_scheme_is_built(scheme: Any, options: Any, match: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build(scheme, **options)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"com": {"weight": -0.1}}, "com.weight=-0.1"),
        ({"ver": {"weight": float("nan")}}, "ver.weight=nan"),
        (weights(utility=0, com=0, ver=0, eva=0), "all loss weights are 0"),
        ({"samples": {"mixes": 0}}, "samples.mixes=0"),
        ({"samples": {"adverse": -1}}, "samples.adverse=-1"),
        ({"com": {"period": 0}}, "com.period=0"),
        ({"weights": "mgdb"}, "weights.method: unknown aggregator 'mgdb'; did you mean 'mgda'"),
        ({"weights": {"normalisation": "l3"}}, "weights.normalisation='l3'"),
        ({"weights": {"smoothing": 1.0}}, "weights.smoothing=1.0"),
        ({"mixing": {"combiner": {"name": "pixel_merge", "alpha": 1.5}}}, "alpha=1.5"),
    ],
)
def test_impossible_losses_are_refused(options: Any, match: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build("mea_defender", **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_classes_that_the_data_lack_are_refused_before_training(scheme: Any) -> None:
    with pytest.raises(ConfigError, match="class 6 does not exist; choose labels from 0 to 5"):
        WATERMARKS.build(scheme, target_class=6).make_key(image_set(), 0)
    with pytest.raises(ConfigError, match="class 2 has no training image"):
        WATERMARKS.build(scheme).make_key(image_set().take(np.array([0, 1, 3])), 0)
    with pytest.raises(ConfigError, match="needs a key"):
        WATERMARKS.build(scheme).stages(None, image_set())


# --- objective -----------------------------------------------------------------------------------------------------


def test_one_forward_pass_with_main_mixes_their_own_sources_and_others() -> None:
    train = coded_set()
    spy, target = Spy(), objective(train=train, samples={"mixes": 6, "adverse": 5})
    terms = target.terms(spy, main_batch(train))
    assert set(terms) == {"utility", "com", "ver", "eva"}
    (merged,) = spy.seen
    assert len(merged) == 12 + 6 + 2 * 6 + 5
    _, mixes, first, second, adverse = torch.split(merged.mul(255).round().int(), [12, 6, 6, 6, 5])
    labels = {int(c): int(k) for c, k in zip(train.images[:, 0, 0, 0], train.labels, strict=True)}
    for mix, a, b in zip(mixes, first, second, strict=True):
        assert a.unique().numel() == b.unique().numel() == 1
        assert set(mix.unique().tolist()) == {a.max().item(), b.max().item()}
        assert (labels[a.max().item()], labels[b.max().item()]) == (0, 1)
    for image in adverse:
        assert sorted(labels[c] for c in image.unique().tolist() if c) == [0, 1]


def test_terms_are_the_losses_of_their_parts() -> None:
    samples = {"mixes": 4, "adverse": 4}
    spy, target = Spy(), objective(samples=samples, com={"gradient": "both"}, eva={"label": "soft"})
    batch = main_batch()
    terms = target.terms(spy, batch)
    logits = spy.layer(spy.seen[0].flatten(1))
    main, mixes, first, second, adverse = logits.split([12, 4, 4, 4, 4])
    half = torch.zeros(4, len(NAMES))
    half[:, :2] = 0.5
    expected = {
        "utility": F.cross_entropy(main, batch.labels),
        "com": losses.combination(mixes, first, second),
        "ver": losses.verification(mixes, 2),
        "eva": losses.evasion(adverse, half),
    }
    assert terms.keys() == expected.keys()
    for name in expected:
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


@pytest.mark.parametrize(
    "changed,images",
    [
        ({}, 12 + 16 + 32 + 8),
        ({"com": 0}, 12 + 16 + 8),
        ({"eva": 0}, 12 + 16 + 32),
        ({"com": 0, "ver": 0}, 12 + 8),
        ({"com": 0, "ver": 0, "eva": 0}, 12),
        ({"utility": 0, "com": 0, "eva": 0}, 12 + 16),
    ],
)
def test_a_weight_of_0_costs_neither_a_term_nor_an_image(changed: Any, images: Any) -> None:
    spy = Spy()
    target = objective(**weights(**changed))
    terms = target.terms(spy, main_batch())
    expected = {"utility": 1, "com": 1, "ver": 1, "eva": 1, **changed}
    assert set(terms) == {name for name, value in expected.items() if value}
    assert len(spy.seen[0]) == images


def test_backward_sums_the_weighted_terms() -> None:
    target = objective(**weights(com=0.3, ver=2.0))
    model = Spy()
    terms = target.terms(model, main_batch())
    value = target.backward(terms, model)
    assert value.item() == pytest.approx(
        (terms["utility"] + 0.3 * terms["com"] + 2 * terms["ver"] + terms["eva"]).item(), rel=1e-5
    )
    assert model.layer.weight.grad is not None and model.layer.weight.grad.abs().sum() > 0


def test_aggregators_see_the_weighted_terms_and_differ_from_the_sum() -> None:
    gradients: dict[str, Any] = {}
    for name in ("fixed", "sum", "mgda", "upgrad"):
        torch.manual_seed(0)
        model, target = Spy(), objective(weights=name, ver={"weight": 2.0})
        target.backward(target.terms(model, main_batch()), model)
        gradients[name] = model.layer.weight.grad
    torch.testing.assert_close(gradients["sum"], gradients["fixed"], atol=1e-5, rtol=1e-4)
    for name in ("mgda", "upgrad"):
        assert not torch.allclose(gradients[name], gradients["fixed"], atol=1e-3)


@pytest.mark.parametrize(
    "schedule,expected",
    [
        ("constant", [0.2] * 10),
        ("ramp", [0.02 * k for k in range(1, 11)]),
        ("pulse", [0.2, 0.2, 0.2, 0.2, 1.2] * 2),
    ],
)
def test_weight_of_com_follows_its_schedule(schedule: Any, expected: Any) -> None:
    target = objective(com={"weight": 0.2, "schedule": schedule, "period": 5})
    got = []
    for epoch in range(10):
        target.start_epoch(epoch)
        got.append(target.weights["com"])
    assert got == pytest.approx(expected)


def test_mixes_rest_in_the_first_half_of_the_warm_up_and_weigh_in_linearly_in_its_second() -> None:
    target = objective(warmup=0.8, **weights(ver=2.0, com=0.2, eva=0.5))
    seen = []
    for epoch in range(10):
        target.start_epoch(epoch)
        spy = Spy()
        terms = target.terms(spy, main_batch())
        seen.append((len(spy.seen[0]), target.weights["ver"]))
        # Half of 8 epochs pass before the first mix is drawn.
        assert set(terms) == ({"utility"} if epoch < 4 else {"utility", "com", "ver", "eva"})
    assert [size for size, _ in seen[:4]] == [len(main_batch().images)] * 4
    assert [weight for _, weight in seen] == pytest.approx([0.0] * 4 + [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert target.weights["com"] == pytest.approx(0.2) and target.weights["eva"] == pytest.approx(0.5)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_warm_up_never_takes_the_last_epoch(epochs: Any) -> None:
    target = objective(warmup=0.99)
    target.start(context(0, epochs=epochs))
    target.start_epoch(epochs - 1)
    assert target.weights["ver"] == 1.0


def test_mixes_alone_do_not_wait_for_a_warm_up() -> None:
    alone = objective(warmup=0.9, utility={"weight": 0.0})
    assert set(alone.terms(Spy(), main_batch())) == {"com", "ver", "eva"}
    with pytest.raises(ConfigError, match=r"warmup=1\.0"):
        WATERMARKS.build("mea_defender", warmup=1.0)


def test_sources_are_augmented_before_they_are_mixed_unless_switched_off() -> None:
    for on in (True, False):
        spy = Spy()
        objective(augment=lambda x: torch.ones(x.shape), samples={"augment": on}).terms(spy, main_batch())
        assert bool((spy.seen[0][12:12 + 16] == 1).all()) == on  # fmt: skip


def test_every_geometry_gets_its_turn() -> None:
    train = coded_set()
    target = objective(train=train, samples={"adverse": 2}, mixing={"adverse": ["donut", "hotdog", "left_right"]})
    kinds = set()
    for _ in range(3):
        spy = Spy()
        target.terms(spy, main_batch(train))
        for image in spy.seen[0][-2:, 0]:
            rows = (image == image[:, :1]).all(1)
            kinds.add("hotdog" if rows.all() else "left_right" if not rows.any() else "donut")
    assert kinds == {"donut", "hotdog", "left_right"}


def test_random_evasion_labels_are_both_source_classes() -> None:
    target = objective(samples={"adverse": 400}, **weights(com=0, ver=0))
    labels = target._adverse_labels(torch.zeros(400, len(NAMES)))
    assert set(labels.tolist()) == {0, 1}
    assert 150 < (labels == 0).sum() < 250


@pytest.mark.parametrize("seed,same", [(0, True), (1, False)])
def test_a_step_is_a_function_of_the_generator(seed: Any, same: Any) -> None:
    values = []
    for s in (0, seed):
        torch.manual_seed(0)
        model = Spy()
        values.append([t.item() for t in objective(seed=s).terms(model, main_batch()).values()])
    assert (values[0] == values[1]) == same


def test_no_watermark_is_cross_entropy_alone() -> None:
    scheme, train = WATERMARKS.build("none"), image_set()
    assert scheme.make_key(train, 0) is None
    (stage,) = scheme.stages(None, train)
    spy, batch = Spy(), main_batch()
    terms = stage.objective.terms(spy, batch)
    assert list(terms) == ["utility"] and len(spy.seen[0]) == 12
    assert terms["utility"].item() == pytest.approx(
        F.cross_entropy(spy.layer(batch.images.flatten(1)), batch.labels).item()
    )
    with pytest.raises(NotImplementedError, match="no samples"):
        scheme.samples(None, train, 1, 0)


@pytest.mark.parametrize("scheme", WATERMARKS.names())
def test_every_parameter_is_documented(scheme: Any) -> None:
    undocumented = [p.name for p in WATERMARKS.parameters(scheme) if not p.doc and not p.name.endswith(".name")]
    assert undocumented == []


# --- old names -----------------------------------------------------------------------------------------------------


def test_old_flat_names_go_on_with_a_warning_for_each() -> None:
    old = {
        "combiner": "pixel_merge",
        "combiner_options": {"contrast": 0.5},
        "alpha": 0.3,
        "adverse_geometries": ["donut"],
        "mix_space": "normalised",
        "weight_com": 0.2,
        "com_gradient": "both",
        "weight_ver": 2.0,
        "eva_label": "soft",
        "watermark_batch": 4,
        "augment_sources": False,
        "weighting": "mgda",
        "gradient_normalisation": "l2",
    }
    with pytest.warns(FutureWarning) as caught:
        scheme = WATERMARKS.build("mea_defender", **old)
    assert len(caught) == len(old)
    mixing = {"combiner": {"name": "pixel_merge", "contrast": 0.5, "alpha": 0.3}, "adverse": ["donut"]}
    now = WATERMARKS.build(
        "mea_defender",
        mixing={**mixing, "space": "normalised"},
        com={"weight": 0.2, "gradient": "both"},
        ver={"weight": 2.0},
        eva={"label": "soft"},
        samples={"mixes": 4, "augment": False},
        weights={"method": "mgda", "normalisation": "l2"},
    )
    assert scheme.settings == now.settings and scheme.mixing == now.mixing
    with pytest.warns(FutureWarning, match="'min_norm' is now 'mgda'"):
        assert WATERMARKS.build("mea_defender", weights="min_norm").settings.weights.method == "mgda"


@pytest.mark.parametrize("option", ["weight_carrier", "carrier_gate", "carrier", "bridge_sigma", "exclusion"])
def test_options_of_the_carrier_are_not_the_papers(option: Any) -> None:
    with pytest.raises(ConfigError, match=f"no parameter '{option}': it belongs to watermark 'mea_carrier' now"):
        WATERMARKS.build("mea_defender", **{option: 1})


# --- end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Any:
    from mea_ray.data import DATASETS
    from mea_ray.data.splits import make_splits

    return make_splits(DATASETS.build("digits"), seed=0)


def trained(scheme: Any, key: Any, splits: Any, epochs: int, augment: tuple[str, ...] = ("crop",)) -> Any:
    from keyword_training import train

    from mea_ray.models.build import build_model

    torch.manual_seed(0)
    model = build_model("vgg_like", splits.victim_train.shape, splits.victim_train.classes, {"width": 0.25})
    settings = {"epochs": epochs, "batch_size": 64, "learning_rate": 3e-3, "augment": augment, "crop_padding": 1}
    for stage in scheme.stages(key, splits.victim_train):
        train(model, stage.train.images, stage.train.labels, stage.objective, seed=0, **{**settings, **stage.overrides})
    return model


def rate(model: Any, images: Any, label: Any) -> Any:
    with torch.no_grad():
        return (model(torch.from_numpy(images).float() / 255).argmax(1).numpy() == label).mean()


def test_victim_carries_the_watermark_and_a_null_model_does_not(digits: Any) -> None:
    scheme = WATERMARKS.build("mea_defender")
    key = scheme.make_key(digits.victim_train, 0)
    victim, null = (trained(s, key, digits, 12) for s in (scheme, WATERMARKS.build("none")))
    samples = scheme.samples(key, digits.verification, 500, 0)
    assert rate(victim, samples.images, samples.target) > 0.9
    assert rate(null, samples.images, samples.target) < 0.3
    for name, images in samples.adverse.items():
        assert rate(victim, images, samples.target) < 0.3, name
    accuracies = [rate(m, digits.test.images, digits.test.labels) for m in (victim, null)]
    assert min(accuracies) > 0.8, accuracies


@pytest.mark.slow
def test_a_victim_of_equation_9_carries_the_watermark_and_is_as_accurate_as_a_null_model(digits: Any) -> None:
    mgda = {"weights": "mgda", **weights(com=0.003, ver=0.3, eva=0.1)}
    scheme = WATERMARKS.build("mea_defender", mixing={"combiner": "pixel_merge"}, **mgda)
    key = scheme.make_key(digits.victim_train, 0)
    victim, null = (trained(s, key, digits, 50, augment=()) for s in (scheme, WATERMARKS.build("none")))
    samples = scheme.samples(key, digits.verification, 1000, 0)
    assert rate(victim, samples.images, samples.target) >= 0.95
    assert max(rate(victim, images, samples.target) for images in samples.adverse.values()) < 0.1
    accuracies = [rate(m, digits.test.images, digits.test.labels) for m in (victim, null)]
    assert accuracies[0] >= accuracies[1] - 0.02, accuracies
