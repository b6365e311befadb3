from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mea_ray.config import TrainingConfig
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.removal import REMOVALS
from mea_ray.removal.base import Filtered, ThiefData, agreement, last_layer
from mea_ray.removal.filters import blurred, compressed
from mea_ray.removal.pruning import FinePruning
from mea_ray.removal.second_theft import AnswerImitation
from mea_ray.removal.wrk import Wrk
from mea_ray.removal.wrong_mixes import wrong_mixes
from mea_ray.training.objective import Batch, StepContext

SHAPE = (3, 12, 12)
FAST = {"epochs": 30, "batch_size": 16, "augment": (), "learning_rate": 2e-3, "precision": "float32"}


def network(seed: int = 0) -> ImageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("vgg_like", SHAPE, 3, {"width": 0.125}).eval()


@pytest.fixture(scope="module")
def thief() -> ThiefData:
    """Ninety images whose class is the brightest channel, and what an API with a sharp eye says of them."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    pixels = rng.integers(0, 90, (90, *SHAPE), dtype=np.uint8)
    pixels[np.arange(90), labels] += 150
    answers = np.full((90, 3), 0.05, np.float32)
    answers[np.arange(90), labels] = 0.9
    training = TrainingConfig(**FAST)
    return ThiefData(pixels, answers, partial(build_model, "vgg_like", SHAPE, 3, {"width": 0.125}), training)


@pytest.fixture(scope="module")
def model(thief: ThiefData) -> ImageModel:
    """A network that was trained on these images."""
    removal = REMOVALS.build("fine_tuning", epochs=30, learning_rate=2e-3)
    trained: ImageModel = removal.remove(network(), thief, 0)
    assert agreement(trained, thief) > 0.95
    return trained


def logits(model: torch.nn.Module, thief: ThiefData) -> Any:
    return metrics.logits(model, thief.images)


@pytest.mark.parametrize("name", REMOVALS.names())
def test_a_removal_changes_a_copy_is_deterministic_and_leaves_a_working_model(
    name: str, model: ImageModel, thief: ThiefData
) -> None:
    moved = {"images": 48, "epochs": 1, "learning_rate": 1e-4}
    settings: dict[str, dict[str, Any]] = {
        "wrk": {"moved": 16},
        "input_noise": {"sigma": 0.05},
        "transfer_learning": moved,
    }
    small = settings.get(name, {})
    removal = REMOVALS.build(name, **small)
    before = copy.deepcopy(model.state_dict())
    left = removal.remove(model, thief, 3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters()) and not left.training
    assert logits(left, thief).shape == (90, 3)
    assert not np.array_equal(logits(left, thief), logits(model, thief))
    assert np.array_equal(logits(left, thief), logits(removal.remove(model, thief, 3), thief))
    assert removal.strength > 0
    assert agreement(left, thief) > 0.6, "these removals cost some accuracy, not all of it"


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_removes_exactly_the_smallest(scope: str, model: ImageModel, thief: ThiefData) -> None:
    left = REMOVALS.build("pruning", rate=0.4, scope=scope, last_layer=True).remove(model, thief, 0)
    pairs = [
        (old.weight.detach().numpy().ravel(), new.weight.detach().numpy().ravel())
        for old, new in zip(model.modules(), left.modules(), strict=True)
        if isinstance(old, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    if scope == "global":
        olds, news = zip(*pairs, strict=True)
        pairs = [(np.concatenate(olds), np.concatenate(news))]
    for old, new in pairs:
        gone = np.argsort(np.abs(old), kind="stable")[: round(0.4 * len(old))]
        assert set(np.flatnonzero(new == 0)) == set(gone)
        remaining = np.setdiff1d(np.arange(len(old)), gone)
        assert np.array_equal(new[remaining], old[remaining])


def test_pruning_spares_the_last_layer_and_biases_by_default(model: ImageModel, thief: ThiefData) -> None:
    left = REMOVALS.build("pruning", rate=0.9).remove(model, thief, 0)
    assert torch.equal(last_layer(left).weight, last_layer(model).weight)
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert names and all(torch.equal(left.state_dict()[name], model.state_dict()[name]) for name in names)


def test_fine_pruning_cuts_the_features_that_sleep_and_keeps_them_cut(model: ImageModel, thief: ThiefData) -> None:
    rate, size = 0.5, model.feature_size
    left = REMOVALS.build("fine_pruning", rate=rate, max_loss=1.0, epochs=1).remove(model, thief, 0)
    asleep = metrics.features(model, thief.images).mean(0).argsort(kind="stable")[: round(rate * size)]
    cut = np.flatnonzero((last_layer(left).weight == 0).all(0).numpy())
    assert set(cut) == set(asleep)


def test_fine_pruning_stops_before_it_costs_more_than_allowed(model: ImageModel, thief: ThiefData) -> None:
    removal = FinePruning(rate=0.98, max_loss=0.0, epochs=1, learning_rate=1e-9)
    left = removal.remove(model, thief, 0)
    cut = int((last_layer(left).weight == 0).all(0).sum())
    assert cut < round(0.98 * model.feature_size)
    assert agreement(left, thief) >= agreement(model, thief) - 1e-6


@pytest.mark.parametrize("layers", ["all", "last", "all_fresh_last", "fresh_last"])
def test_fine_tuning_moves_the_layers_that_it_names(layers: str, model: ImageModel, thief: ThiefData) -> None:
    left = REMOVALS.build("fine_tuning", layers=layers, epochs=1, learning_rate=1e-5).remove(model, thief, 0)
    moved = {n for n, value in left.named_parameters() if not torch.equal(value, model.state_dict()[n])}
    inside = {name for name in moved if not name.startswith("head.")}
    assert any(name.startswith("head.") for name in moved)
    assert bool(inside) == layers.startswith("all")
    # At this learning rate a layer that did not start anew is where it was.
    near = torch.allclose(last_layer(left).weight, last_layer(model).weight, atol=1e-2)
    assert near == ("fresh" not in layers)


def test_tuning_the_last_layer_leaves_all_features_as_they_were(thief: ThiefData) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_model("resnet18", SHAPE, 3, {"width": 0.0625}).eval()
    left = REMOVALS.build("fine_tuning", layers="last", epochs=2).remove(network, thief, 0)
    assert np.allclose(metrics.features(left, thief.images), metrics.features(network, thief.images), atol=1e-6)
    assert not torch.equal(last_layer(left).weight, last_layer(network).weight)


def test_quantisation_leaves_so_many_values_and_rounds_to_the_nearest(model: ImageModel, thief: ThiefData) -> None:
    left = REMOVALS.build("quantisation", bits=3).remove(model, thief, 0)
    old, new = last_layer(model).weight.detach(), last_layer(left).weight.detach()
    for row, rounded in zip(old, new, strict=True):
        scale = row.abs().max() / 3
        grid = torch.arange(-3, 4) * scale
        nearest = grid[(row[:, None] - grid).abs().argmin(1)]
        assert torch.allclose(rounded, nearest, atol=1e-6)
    assert all(len(row.unique()) <= 7 for row in new)


def test_the_noise_is_as_large_as_the_agreement_allows(model: ImageModel, thief: ThiefData) -> None:
    removal = REMOVALS.build("input_noise", max_loss=0.1, images=90)
    left = removal.remove(model, thief, 0)
    assert isinstance(left, Filtered)
    before = agreement(model, thief)
    assert before - agreement(left, thief) <= 0.1
    sigma = left.change.keywords["sigma"]  # type: ignore[attr-defined]
    assert sigma > 0.01
    louder = REMOVALS.build("input_noise", sigma=min(1.0, sigma + 0.15)).remove(model, thief, 0)
    assert before - agreement(louder, thief) > 0.1


def test_the_blur_is_a_gaussian_that_keeps_the_mean() -> None:
    point = torch.zeros(1, 2, 15, 15)
    point[0, 1, 7, 7] = 1
    outputs = blurred(point, torch.Generator(), sigma=1.0)
    place = np.arange(-3, 4)
    line = np.exp(-(place**2) / 2)
    expected = np.outer(line, line) / line.sum() ** 2
    assert outputs[0, 0].abs().max() == 0
    assert np.allclose(outputs[0, 1, 4:11, 4:11], expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_near_the_image_and_nearer_with_more_quality(channels: int) -> None:
    rng = np.random.default_rng(0)
    smooth = torch.from_numpy(np.cumsum(rng.random((4, channels, 16, 16)), -1) / 16).float()
    near, far = (compressed(smooth, torch.Generator(), quality=q) for q in (95, 5))
    assert near.shape == smooth.shape and float(near.min()) >= 0 and float(near.max()) <= 1
    assert (near - smooth).abs().mean() < (far - smooth).abs().mean() < 0.2


def test_wrong_mixes_are_of_two_classes_and_named_after_neither() -> None:
    flat = np.repeat(np.arange(5, dtype=np.uint8) * 50, 4)
    clean = ImageSet(
        np.broadcast_to(flat[:, None, None, None], (20, *SHAPE)).copy(),
        np.repeat(np.arange(5), 4).astype(np.int64),
        tuple("abcde"),
    )
    images, labels = wrong_mixes(clean, 200, 1)
    halves = set()
    for image, label in zip(images, labels, strict=True):
        values = set(np.unique(image).tolist())
        if len(values) == 2:
            sources = {value // 50 for value in values}
            assert label not in sources
            halves.add(image[0].tobytes())
        else:  # a blend
            (value,) = values
            assert 0 < value < 200
    assert len(halves) > 20 and set(labels) == set(range(5))
    with pytest.raises(ConfigError, match="3 classes"):
        wrong_mixes(ImageSet(clean.images[:8], clean.labels[:8], ("a", "b")), 3, 0)


def test_wrk_moves_pixels_by_its_step_and_never_names_what_the_api_named(model: ImageModel, thief: ThiefData) -> None:
    images, labels = Wrk(step=0.1).move(model, thief, 5)
    assert not (labels == thief.labels).any() and set(labels) == {0, 1, 2}
    change = (images.astype(int) - thief.images.astype(int)) / 255
    inner = (thief.images > 30) & (thief.images < 225)
    assert np.isin(np.abs(change[inner]).round(2), (0.0, 0.1)).all() and (np.abs(change[inner]) > 0.05).mean() > 0.5
    towards = np.random.default_rng(derive(5, "classes")).integers(3, size=90)
    before, after = (metrics.logits(model, x)[np.arange(90), towards] for x in (thief.images, images))
    assert (after - before).mean() > 0


def test_a_second_theft_learns_the_models_answers_and_nothing_from_the_api(model: ImageModel, thief: ThiefData) -> None:
    liars = ThiefData(thief.images, np.roll(thief.answers, 1, axis=1), thief.make_model, thief.training)
    left = REMOVALS.build("second_theft").remove(model, liars, 0)
    same = metrics.accuracy(metrics.predictions(left, thief.images), metrics.predictions(model, thief.images))
    assert same > 0.8
    assert agreement(left, liars) < 0.3


def test_imitation_is_the_kl_divergence_of_the_softened_answers(thief: ThiefData) -> None:
    model, temperature = network(2), 3.0
    objective = AnswerImitation(thief.answers, temperature)
    objective.start(StepContext(torch.device("cpu"), torch.Generator(), lambda x: x, 1, 1))
    pixels = torch.from_numpy(thief.images[:8]).float() / 255
    term = objective.terms(model, Batch(pixels, torch.zeros(8, dtype=torch.long), torch.arange(8)))["imitation"]
    p = torch.from_numpy(thief.answers[:8]) ** (1 / temperature)
    p = p / p.sum(1, keepdim=True)
    q = F.softmax(model(pixels) / temperature, 1)
    assert float(term.detach()) == pytest.approx(float((p * (p / q).log()).sum(1).mean().detach()), rel=1e-4)


def test_a_transfer_moves_the_body_and_puts_the_old_last_layer_back(model: ImageModel, thief: ThiefData) -> None:
    removal = REMOVALS.build("transfer_learning", images=240, epochs=6, learning_rate=2e-3)
    left = removal.remove(model, thief, 0)
    assert isinstance(left, ImageModel) and left.classes == model.classes and left.shape == model.shape
    assert torch.equal(last_layer(left).weight, last_layer(model).weight) and torch.equal(
        last_layer(left).bias, last_layer(model).bias
    )
    assert left.head is not model.head
    assert not np.allclose(metrics.features(left, thief.images), metrics.features(model, thief.images), atol=1e-2)
    # The body has learnt the other task: its features tell the other classes apart better than those before did.
    other = removal.other(SHAPE, derive(0, "other"))
    assert other.classes == 12 and other.shape == SHAPE and len(other) == 240

    def told_apart(network: ImageModel) -> float:
        seen = StandardScaler().fit_transform(metrics.features(network, other.images))
        fitted = LogisticRegression(max_iter=1000).fit(seen[:120], other.labels[:120])
        return float(fitted.score(seen[120:], other.labels[120:]))

    assert told_apart(left) > told_apart(model) + 0.05


def test_a_transfer_can_be_read_through_the_classes_that_both_have(model: ImageModel, thief: ThiefData) -> None:
    order = [2, -1, 0]  # old class to label in the other dataset, which has no class like the old 1
    noise = {"name": "noise", "train_images": 90, "image_size": 12}
    removal = REMOVALS.build("transfer_learning", dataset=noise, same_as=order, epochs=20, learning_rate=2e-3)
    left = removal.remove(model, thief, 0)
    other = removal.other(SHAPE, 0)
    outputs = metrics.predictions(left, other.images)
    wanted = np.array([2, 0])[(other.labels == 2).astype(int)]
    both = other.labels != 1
    assert metrics.accuracy(outputs[both], wanted[both]) > 0.9, "read in the old classes' order"
    assert not (outputs == 1).any(), "what the other dataset does not have cannot be answered"
    with pytest.raises(ConfigError, match="must hold a label below 3"):
        REMOVALS.build("transfer_learning", dataset=noise, same_as=[0, 1]).remove(model, thief, 0)


def test_a_chain_is_its_steps_in_their_order(model: ImageModel, thief: ThiefData) -> None:
    chain = REMOVALS.build("chain", steps=[{"name": "pruning", "rate": 0.3}, {"name": "quantisation", "bits": 4}])
    pruned = REMOVALS.build("pruning", rate=0.3).remove(model, thief, 0)
    expected = REMOVALS.build("quantisation", bits=4).remove(pruned, thief, 0)
    assert np.array_equal(logits(chain.remove(model, thief, 0), thief), logits(expected, thief))
    assert chain.strength == 2


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("pruning", {"rate": 1.0}, "rate=1.0"),
        ("pruning", {"scope": "row"}, "scope"),
        ("quantisation", {"bits": 1}, "bits=1"),
        ("fine_tuning", {"epochs": 0}, "epochs=0"),
        ("fine_tuning", {"images": 0}, "images=0"),
        ("fine_pruning", {"max_loss": 2.0}, "max_loss"),
        ("input_noise", {"sigma": 3.0}, "sigma=3.0"),
        ("input_noise", {"max_loss": 0.0}, "max_loss"),
        ("smoothing", {"sigma": 0.0}, "sigma"),
        ("jpeg", {"quality": 0}, "quality=0"),
        ("wrong_mixes", {"share": 0.0}, "share"),
        ("wrk", {"step": 0.0}, "step"),
        ("transfer_learning", {"images": 1}, "images=1"),
        ("transfer_learning", {"same_as": [0, -1]}, "two classes"),
        ("transfer_learning", {"dataset": "figurs"}, "did you mean 'figures'"),
        ("second_theft", {"generations": 0}, "generations=0"),
        ("chain", {"steps": []}, "needs steps"),
        ("chain", {"steps": [{"rate": 0.5}]}, "needs a `name`"),
        ("chain", {"steps": [{"name": "prunning"}]}, "did you mean 'pruning'"),
    ],
)
def test_impossible_settings_are_refused(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        REMOVALS.build(name, **parameters)


def test_holdings_need_an_answer_for_each_image(thief: ThiefData) -> None:
    with pytest.raises(DataError, match="90 images and 89"):
        ThiefData(thief.images, thief.answers[:-1], thief.make_model, thief.training)
    some = thief.take(10, 1)
    assert len(some.images) == 10 and np.array_equal(some.labels, some.answers.argmax(1))
