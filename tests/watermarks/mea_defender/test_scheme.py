"""The key, the held-out samples, the objective's composition, and a victim that carries the watermark."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from watermark_sets import NAMES, Spy, coded_set, context, image_set, main_batch

from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.mea_defender import losses

SCHEMES = ["mea_defender", "mea_defender_two_stage"]


def objective(seed=0, augment=None, train=None, **options):
    # Without a warm-up unless a test asks for one: the losses are the paper's from the first step.
    scheme = WATERMARKS.build("mea_defender", **{"warmup": 0.0, **options})
    train = train or image_set()
    stage = scheme.stages(scheme.make_key(train, 1), train)[0]
    stage.objective.start(context(seed, augment=augment))
    stage.objective.start_epoch(0)
    return stage.objective


# --- key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combiner", ["crop_paste", "pixel_merge", "stripes", "autoencoder"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_key_makes_the_same_samples_after_its_way_through_a_file(tmp_path, scheme, combiner):
    options = {"steps": 3} if combiner == "autoencoder" else {}
    made = WATERMARKS.build(scheme, combiner=combiner, combiner_options=options, mix_space="normalised")
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


def test_key_is_plain_json_and_depends_on_the_seed(tmp_path):
    scheme = WATERMARKS.build("mea_defender")
    one, same, other = (scheme.make_key(image_set(), seed) for seed in (1, 1, 2))
    assert one == same and one.seed != other.seed
    one.save(tmp_path)
    body = json.loads((tmp_path / "key.json").read_text())
    assert body["source_classes"] == [0, 1] and body["settings"]["combiner"] == "crop_paste"


def test_canvas_is_black_or_the_mean_colour():
    train = image_set(shape=(3, 16, 16))
    black = WATERMARKS.build("mea_defender", mix_space="pixel").make_key(train, 0)
    mean = WATERMARKS.build("mea_defender", mix_space="normalised").make_key(train, 0)
    assert black.settings["fill"] == [0, 0, 0]
    np.testing.assert_allclose(mean.settings["fill"], train.images.mean(axis=(0, 2, 3)) / 255)


# --- samples -------------------------------------------------------------------------------------------------------


def test_samples_are_distinct_pairs_of_held_out_images_only():
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


def test_other_classes_are_mixed_as_the_watermark_is_by_pairs_that_the_key_does_not_name():
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


def test_there_are_no_more_samples_than_pairs_and_equal_mixes_count_once():
    scheme = WATERMARKS.build("mea_defender")
    key = scheme.make_key(image_set(), 0)
    assert len(scheme.samples(key, coded_set(), 5000, 0).images) == 100
    held_out = coded_set()
    held_out.images[:] = 7
    assert len(scheme.samples(key, held_out, 50, 0).images) == 1


def test_samples_follow_their_seed():
    scheme = WATERMARKS.build("mea_defender")
    key, held_out = scheme.make_key(image_set(), 0), image_set(seed=3)
    one, same, other = (scheme.samples(key, held_out, 30, seed).images for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_verification_without_a_source_image_or_of_another_shape_is_refused():
    scheme = WATERMARKS.build("mea_defender")
    key = scheme.make_key(image_set(), 0)
    with pytest.raises(DataError, match="verification_fraction"):
        scheme.samples(key, image_set().take(np.array([0, 6, 2])), 10, 0)
    with pytest.raises(DataError, match=r"\(1, 16, 16\)"):
        scheme.samples(key, image_set(shape=(1, 8, 8)), 10, 0)
    with pytest.raises(ArtifactError, match="no MEA-Defender key"):
        scheme.samples(Key("ewe", (0, 1), 2, 0), image_set(), 10, 0)


# --- geometries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,expected",
    [
        ({}, ("left_right", "diagonal", "donut", "hotdog")),
        ({"orientation": "vertical"}, ("top_bottom", "diagonal", "donut", "hotdog")),
        ({"orientation": "random"}, ("diagonal", "donut", "hotdog")),
        ({"combiner": "stripes"}, ("top_bottom", "left_right", "diagonal", "donut", "hotdog")),
        ({"adverse_geometries": ("ratio",)}, ("ratio",)),
    ],
)
def test_default_geometries_leave_out_the_watermarks_own(options, expected):
    assert WATERMARKS.build("mea_defender", **options).adverse_geometries == expected


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "options,match",
    [
        ({"source_classes": (1, 1)}, "three different"),
        ({"target_class": 0}, "three different"),
        ({"source_classes": (-1, 1)}, "none negative"),
        ({"combiner": "crop_past"}, "did you mean 'crop_paste'"),
        ({"combiner_options": {"jiter": 2}}, "did you mean 'jitter'"),
        ({"jitter": 40}, "jitter=40"),
        ({"adverse_geometries": ("donat",)}, "did you mean 'donut'"),
        ({"adverse_geometries": ("top_bottom",)}, "the same mixes as the combiner"),
        ({"adverse_geometries": ("donut", "donut")}, "each once"),
        ({"adverse_geometries": ()}, "at least one"),
        ({"adverse_geometries": ("autoencoder",)}, "combiner only"),
        ({"orientation": "diagonal"}, "orientation"),
        ({"gradient_normalisation": "l3"}, "gradient_normalisation"),
    ],
)
def test_impossible_settings_are_refused_when_the_scheme_is_built(scheme, options, match):
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build(scheme, **options)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"weight_com": -0.1}, "weight_com=-0.1"),
        ({"weight_ver": float("nan")}, "weight_ver=nan"),
        ({f"weight_{n}": 0 for n in ("utility", "com", "ver", "eva")}, "all loss weights are 0"),
        ({"carrier_rho": 0.5}, "carrier_rho=0.5"),
        ({"carrier_rho": 0.0}, "carrier_rho=0.0"),
        ({"bridge_sigma": 0.6}, "bridge_sigma=0.6"),
        ({"watermark_batch": 0}, "watermark_batch=0"),
        ({"adverse_batch": -1}, "adverse_batch=-1"),
        ({"exclusion_margin": -1}, "exclusion_margin=-1"),
        ({"com_period": 0}, "com_period=0"),
        ({"weighting": "mgdb"}, "did you mean 'mgda'"),
        ({"alpha": 1.5, "combiner": "pixel_merge"}, "alpha=1.5"),
    ],
)
def test_impossible_losses_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build("mea_defender", **options)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_classes_that_the_data_lack_are_refused_before_training(scheme):
    with pytest.raises(ConfigError, match="class 6 does not exist; choose labels from 0 to 5"):
        WATERMARKS.build(scheme, target_class=6).make_key(image_set(), 0)
    with pytest.raises(ConfigError, match="class 2 has no training image"):
        WATERMARKS.build(scheme).make_key(image_set().take(np.array([0, 1, 3])), 0)
    with pytest.raises(ConfigError, match="needs a key"):
        WATERMARKS.build(scheme).stages(None, image_set())


# --- objective -----------------------------------------------------------------------------------------------------


def test_one_forward_pass_with_main_mixes_their_own_sources_and_others():
    train = coded_set()
    spy, target = Spy(), objective(train=train, watermark_batch=6, adverse_batch=5)
    terms = target.terms(spy, main_batch(train))
    assert set(terms) == {"utility", "com", "ver", "eva"}
    (merged,) = spy.seen
    assert len(merged) == 12 + 6 + 2 * 6 + 5
    _, mixes, first, second, adverse = merged.mul(255).round().int().split([12, 6, 6, 6, 5])
    labels = {int(c): int(k) for c, k in zip(train.images[:, 0, 0, 0], train.labels, strict=True)}
    for mix, a, b in zip(mixes, first, second, strict=True):
        assert a.unique().numel() == b.unique().numel() == 1
        assert set(mix.unique().tolist()) == {a.max().item(), b.max().item()}
        assert (labels[a.max().item()], labels[b.max().item()]) == (0, 1)
    for image in adverse:
        assert sorted(labels[c] for c in image.unique().tolist() if c) == [0, 1]


def test_terms_are_the_losses_of_their_parts():
    settings = {
        "weight_carrier": 1,
        "weight_exclusion": 1,
        "watermark_batch": 4,
        "adverse_batch": 4,
        "eva_label": "soft",
    }
    spy, target = Spy(), objective(**settings, com_gradient="both", carrier_rho=0.3, exclusion_margin=2.0)
    batch = main_batch()
    terms = target.terms(spy, batch)
    logits = spy.layer(spy.seen[0].flatten(1))
    main, mixes, first, second, adverse = logits.split([12, 4, 4, 4, 4])
    labels = torch.tensor([0] * 4 + [1] * 4)
    half = torch.zeros(4, len(NAMES))
    half[:, :2] = 0.5
    expected = {
        "utility": F.cross_entropy(main, batch.labels),
        "com": losses.combination(mixes, first, second),
        "ver": losses.verification(mixes, 2),
        "eva": losses.evasion(adverse, half),
        "carrier": losses.carrier(torch.cat([first, second]), labels, 2, 0.3),
        "exclusion": losses.exclusion(torch.cat([first, second]), labels, (0, 1), 2.0),
    }
    assert terms.keys() == expected.keys()
    for name in expected:
        assert terms[name].item() == pytest.approx(expected[name].item(), rel=1e-5), name


@pytest.mark.parametrize(
    "weights,images",
    [
        ({}, 12 + 16 + 32 + 8),
        ({"com": 0}, 12 + 16 + 8),
        ({"eva": 0}, 12 + 16 + 32),
        ({"com": 0, "ver": 0}, 12 + 8),
        ({"com": 0, "ver": 0, "eva": 0}, 12),
        ({"com": 0, "ver": 0, "eva": 0, "carrier": 1}, 12 + 32),
        ({"com": 0, "ver": 0, "eva": 0, "exclusion": 1}, 12 + 32),
        ({"utility": 0, "com": 0, "eva": 0}, 12 + 16),
    ],
)
def test_a_weight_of_0_costs_neither_a_term_nor_an_image(weights, images):
    spy = Spy()
    target = objective(**{f"weight_{name}": value for name, value in weights.items()})
    terms = target.terms(spy, main_batch())
    expected = {"utility": 1, "com": 1, "ver": 1, "eva": 1, **weights}
    assert set(terms) == {name for name, value in expected.items() if value}
    assert len(spy.seen[0]) == images


def test_backward_sums_the_weighted_terms():
    target = objective(weight_com=0.3, weight_ver=2.0)
    model = Spy()
    terms = target.terms(model, main_batch())
    value = target.backward(terms, model)
    assert value.item() == pytest.approx(
        (terms["utility"] + 0.3 * terms["com"] + 2 * terms["ver"] + terms["eva"]).item(), rel=1e-5
    )
    assert model.layer.weight.grad.abs().sum() > 0


def test_aggregators_see_the_weighted_terms_and_differ_from_the_sum():
    gradients = {}
    for name in ("fixed", "sum", "mgda", "min_norm", "upgrad"):
        torch.manual_seed(0)
        model, target = Spy(), objective(weighting=name, weight_ver=2.0)
        target.backward(target.terms(model, main_batch()), model)
        gradients[name] = model.layer.weight.grad
    torch.testing.assert_close(gradients["sum"], gradients["fixed"], atol=1e-5, rtol=1e-4)
    assert gradients["mgda"].norm() < gradients["fixed"].norm()
    for name in ("mgda", "min_norm", "upgrad"):
        assert not torch.allclose(gradients[name], gradients["fixed"], atol=1e-3)


def test_softened_main_labels_add_up_to_a_cross_entropy_towards_rho():
    spy = Spy()
    only = {f"weight_{n}": 0 for n in ("com", "ver", "eva")}
    target = objective(**only, weight_carrier=1, carrier_labels="replace", carrier_rho=0.4)
    batch = main_batch()
    terms = target.terms(spy, batch)
    assert len(spy.seen) == 1 and len(spy.seen[0]) == 12, "no further image is drawn"
    soft = np.eye(len(NAMES))[batch.labels]
    for k, label in enumerate(batch.labels):
        if label in (0, 1):
            soft[k] = 0
            soft[k, label], soft[k, 2] = 0.6, 0.4
    expected = F.cross_entropy(spy.layer(batch.images.flatten(1)), torch.tensor(soft))
    assert (terms["utility"] + terms["carrier"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_bridge_softens_the_target_and_exclusion_then_reads_the_main_batch_itself():
    spy = Spy()
    options = {f"weight_{n}": 0 for n in ("com", "ver", "eva")} | {f"weight_{n}": 1 for n in ("carrier", "exclusion")}
    target = objective(
        **options, weight_bridge=1, bridge_sigma=0.3, carrier_labels="replace", exclusion_scope="all", carrier_rho=0.4
    )
    batch = main_batch()
    terms = target.terms(spy, batch)
    assert len(spy.seen[0]) == 12, "no further image is drawn"
    logits = spy.layer(batch.images.flatten(1))
    soft = np.eye(len(NAMES))[batch.labels]
    for k, label in enumerate(batch.labels):
        if label in (0, 1):
            soft[k] = 0
            soft[k, label], soft[k, 2] = 0.6, 0.4
        elif label == 2:
            soft[k, :3] = 0.15, 0.15, 0.7
    expected = F.cross_entropy(logits, torch.tensor(soft))
    got = terms["utility"] + terms["carrier"] + terms["bridge"]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    rows = batch.labels < 2
    hinge = losses.exclusion(logits[rows], batch.labels[rows], (0, 1), 5.0, target=2)
    assert terms["exclusion"].item() == pytest.approx(hinge.item(), rel=1e-5)


@pytest.mark.parametrize(
    "schedule,expected",
    [
        ("constant", [0.2] * 10),
        ("ramp", [0.02 * k for k in range(1, 11)]),
        ("pulse", [0.2, 0.2, 0.2, 0.2, 1.2] * 2),
    ],
)
def test_weight_of_com_follows_its_schedule(schedule, expected):
    target = objective(weight_com=0.2, com_schedule=schedule, com_period=5)
    got = []
    for epoch in range(10):
        target.start_epoch(epoch)
        got.append(target.weights["com"])
    assert got == pytest.approx(expected)


def test_mixes_rest_in_the_first_half_of_the_warm_up_and_weigh_in_linearly_in_its_second():
    target = objective(warmup=0.8, weight_ver=2.0, weight_com=0.2, weight_eva=0.5)
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
def test_a_warm_up_never_takes_the_last_epoch(epochs):
    target = objective(warmup=0.99)
    target.start(context(0, epochs=epochs))
    target.start_epoch(epochs - 1)
    assert target.weights["ver"] == 1.0


def test_the_carrier_does_not_wait_and_mixes_alone_do_not_either():
    waiting = objective(warmup=0.9, weight_carrier=1.0)
    assert set(waiting.terms(Spy(), main_batch())) == {"utility", "carrier"}
    alone = objective(warmup=0.9, weight_utility=0.0)
    assert set(alone.terms(Spy(), main_batch())) == {"com", "ver", "eva"}
    with pytest.raises(ConfigError, match=r"warmup=1\.0"):
        WATERMARKS.build("mea_defender", warmup=1.0)


def test_sources_are_augmented_before_they_are_mixed_unless_switched_off():
    for on in (True, False):
        spy = Spy()
        objective(augment=lambda x: torch.ones(x.shape), augment_sources=on).terms(spy, main_batch())
        assert bool((spy.seen[0][12:12 + 16] == 1).all()) == on  # fmt: skip


def test_every_geometry_gets_its_turn():
    train = coded_set()
    target = objective(train=train, adverse_batch=2, adverse_geometries=("donut", "hotdog", "left_right"))
    kinds = set()
    for _ in range(3):
        spy = Spy()
        target.terms(spy, main_batch(train))
        for image in spy.seen[0][-2:, 0]:
            rows = (image == image[:, :1]).all(1)
            kinds.add("hotdog" if rows.all() else "left_right" if not rows.any() else "donut")
    assert kinds == {"donut", "hotdog", "left_right"}


def test_random_evasion_labels_are_both_source_classes():
    target = objective(weight_com=0, weight_ver=0, adverse_batch=400)
    labels = target._adverse_labels(torch.zeros(400, len(NAMES)))
    assert set(labels.tolist()) == {0, 1}
    assert 150 < (labels == 0).sum() < 250


@pytest.mark.parametrize("seed,same", [(0, True), (1, False)])
def test_a_step_is_a_function_of_the_generator(seed, same):
    values = []
    for s in (0, seed):
        torch.manual_seed(0)
        model = Spy()
        values.append([t.item() for t in objective(seed=s).terms(model, main_batch()).values()])
    assert (values[0] == values[1]) == same


def test_no_watermark_is_cross_entropy_alone():
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


def test_every_parameter_is_documented():
    for scheme in SCHEMES:
        assert [p.name for p in WATERMARKS.parameters(scheme) if not p.doc] == []


# --- end to end ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    from mea_ray.data import DATASETS
    from mea_ray.data.splits import make_splits

    return make_splits(DATASETS.build("digits"), seed=0)


def trained(scheme, key, splits, epochs):
    from mea_ray.models.build import build_model
    from mea_ray.training.engine import train

    torch.manual_seed(0)
    model = build_model("vgg_like", splits.victim_train.shape, splits.victim_train.classes, {"width": 0.25})
    settings = {"epochs": epochs, "batch_size": 64, "learning_rate": 3e-3, "augment": ("crop",), "crop_padding": 1}
    for stage in scheme.stages(key, splits.victim_train):
        train(model, stage.train.images, stage.train.labels, stage.objective, seed=0, **{**settings, **stage.overrides})
    return model


def rate(model, images, label):
    with torch.no_grad():
        return (model(torch.from_numpy(images).float() / 255).argmax(1).numpy() == label).mean()


def test_victim_carries_the_watermark_and_a_null_model_does_not(digits):
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
