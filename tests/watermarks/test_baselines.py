from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyword_training import train

from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.data import DATASETS
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Batch, CrossEntropy, StepContext
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key, Watermark
from mea_ray.watermarks.composite import same_class_pairs
from mea_ray.watermarks.ewe import Entanglement, EntangleObjective, SquareTrigger, snnl, watch, watched
from mea_ray.watermarks.margin_based import MarginObjective
from mea_ray.watermarks.patches import other_corner, stamped

SHAPE = (3, 12, 12)
FAST: dict[str, Any] = {"batch_size": 32, "augment": (), "learning_rate": 2e-3, "precision": "float32"}


@pytest.fixture(scope="module")
def data() -> tuple[ImageSet, ImageSet]:
    """Three classes told apart by their brightest channel: 240 images to train on, 120 held out."""
    rng = np.random.default_rng(0)
    labels = np.arange(360, dtype=np.int64) % 3
    pixels = rng.integers(0, 90, (360, *SHAPE), dtype=np.uint8)
    pixels[np.arange(360), labels] += 100
    everything = ImageSet(pixels, labels, ("a", "b", "c"))
    return everything.take(np.arange(240)), everything.take(np.arange(240, 360))


def network(seed: int = 0) -> ImageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("vgg_like", SHAPE, 3, {"width": 0.125})


def embed(scheme: Watermark, owned: ImageSet, epochs: int) -> tuple[ImageModel, Key]:
    key = scheme.make_key(owned, 0)
    assert key is not None
    model = network()
    stages = scheme.stages(key, owned)
    for stage in stages:
        settings = {**FAST, **stage.changes(epochs)}
        train(model, stage.train.images, stage.train.labels, stage.objective, seed=1, **settings)
    return model, scheme.learned(key, stages)


def rates(scheme: Watermark, key: Key, model: ImageModel, held_out: ImageSet) -> tuple[float, dict[str, float]]:
    samples = scheme.samples(key, held_out, 100, 0)
    recognise = scheme.recogniser(key, model)

    def rate(images: Any) -> float:
        outputs = recognise(images) if recognise else metrics.predictions(model, images) == samples.target
        return float(outputs.mean())

    return rate(samples.images), {name: rate(images) for name, images in samples.adverse.items()}


@pytest.mark.parametrize(
    ("name", "parameters", "epochs"),
    [
        ("pattern", {"target_class": 2}, 25),
        ("adi", {"count": 20, "per_batch": 8}, 40),
        ("composite", {}, 25),
        ("ewe", {"snnl": {"kappa": 1.0}, "ratio": 1, "plain_part": 0.5}, 40),
        ("cfw", {"count": 60, "per_batch": 16}, 25),
    ],
)
def test_a_baseline_marks_its_victim_keeps_its_task_and_marks_no_innocent(
    name: str, parameters: dict[str, Any], epochs: int, data: tuple[ImageSet, ImageSet]
) -> None:
    owned, held_out = data
    scheme = WATERMARKS.build(name, **parameters)
    model, key = embed(scheme, owned, epochs)
    wsr, wfpr = rates(scheme, key, model, held_out)
    innocent = network(4)
    train(innocent, owned.images, owned.labels, CrossEntropy(), seed=2, epochs=epochs, **FAST)
    assert metrics.accuracy(metrics.predictions(model, held_out.images), held_out.labels) > 0.9
    assert wsr > 0.85
    assert rates(scheme, key, innocent, held_out)[0] < 0.6
    if name in {"adi", "pattern"}:
        assert np.mean(list(wfpr.values())) < 0.6


def test_the_snnl_has_the_value_and_the_gradient_of_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.rand(7, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    marked = torch.tensor([True, True, True, False, False, False, False])
    temperature = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)

    def plain(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=h.dtype)
        for i in range(len(h)):
            above, below = torch.zeros((), dtype=h.dtype), torch.zeros((), dtype=h.dtype)
            for j in range(len(h)):
                if i == j:
                    continue
                distance = 1 - (h[i] @ h[j]) / (h[i].norm() * h[j].norm())
                e = torch.exp(-distance / (100 / t))
                below = below + e
                above = above + (e if marked[i] == marked[j] else 0)
            total = total - torch.log(1e-5 + above / (1e-5 + below))
        return total / len(h)

    assert snnl(hidden, marked, temperature).item() == pytest.approx(plain(hidden, temperature).item(), rel=1e-9)
    for outputs, expected in zip(
        torch.autograd.grad(snnl(hidden, marked, temperature), [hidden, temperature]),
        torch.autograd.grad(plain(hidden, temperature), [hidden, temperature]),
        strict=True,
    ):
        assert torch.allclose(outputs, expected, rtol=1e-7, atol=1e-12)


def test_mixed_up_kinds_have_the_larger_snnl() -> None:
    apart = torch.cat([torch.tensor([[1.0, 0.0]]).repeat(8, 1), torch.tensor([[0.0, 1.0]]).repeat(8, 1)])
    marked, temperature = torch.arange(16) < 8, torch.tensor(500.0)
    assert snnl(apart, marked, temperature) < snnl(apart, torch.arange(16) % 2 == 0, temperature)


def entangle(
    data: tuple[ImageSet, ImageSet], ratio: int = 4, trigger: dict[str, Any] | None = None, **snnl: Any
) -> tuple[ImageModel, EntangleObjective]:
    owned, _ = data
    objective = EntangleObjective(
        owned.of_class(1),
        owned.of_class(0),
        0,
        torch.ones(3, 3, 3),
        SquareTrigger(**{"refine_steps": 0, **(trigger or {})}),
        Entanglement(**snnl),
        ratio,
    )
    model = network(3)
    objective.attach(model, torch.device("cpu"))
    objective.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(0), lambda x: x, 1, 10))
    return model, objective


def test_the_weights_get_the_snnls_gradient(data: tuple[ImageSet, ImageSet]) -> None:
    model, objective = entangle(data, ratio=1, kappa=5.0, temperature=20.0)
    pixels = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    batch = Batch(pixels, torch.zeros(16, dtype=torch.long), torch.arange(16))
    assert set(objective.terms(model, batch)) == {"utility"}
    terms = objective.terms(model, batch)
    assert set(terms) == {"utility", "entangle"}
    first = next(model.parameters())
    (gradient,) = torch.autograd.grad(terms["entangle"], first)
    assert gradient.abs().max() > 0


def test_temperatures_descend_the_snnl_whatever_its_weight(data: tuple[ImageSet, ImageSet]) -> None:
    moved = []
    for kappa in (0.0, 5.0, 1e5 / 128):
        model, objective = entangle(data, ratio=1, kappa=kappa, temperature=20.0, temperature_learning_rate=0.5)
        model.eval()
        pixels = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1))
        batch = Batch(pixels, torch.zeros(16, dtype=torch.long), torch.arange(16))
        objective.step = 1
        objective.terms(model, batch)
        moved.append(objective.temperatures)
    assert moved[0] == moved[1] == moved[2]
    again = torch.Generator().manual_seed(0)
    both = [part[torch.randint(len(part), (8,), generator=again)] for part in (objective.triggers, objective.targets)]
    _, hidden = watch(model, torch.cat(both), 3)
    for layer, after in zip(hidden, moved[0], strict=True):
        low, high = (float(snnl(layer, torch.arange(16) < 8, torch.tensor(20.0 + d))) for d in (-0.5, 0.5))
        assert after == pytest.approx(20 - 0.5 * (high - low), rel=1e-3)


def test_the_weight_of_the_snnl_is_the_published_one_of_a_sum_over_128() -> None:
    assert WATERMARKS.build("ewe").snnl.kappa == pytest.approx(1e5 / 128)
    assert WATERMARKS.version("ewe") == 2


def test_the_square_goes_where_the_gradient_says_and_steps_move_the_snnl(data: tuple[ImageSet, ImageSet]) -> None:
    model, least = entangle(data)
    _, largest = entangle(data, trigger={"place": "largest"})
    assert least.corner is not None and largest.corner is not None and least.corner != largest.corner
    top, left = least.corner
    assert (least.triggers[:, :, top : top + 3, left : left + 3] == 1).all()
    _, refined = entangle(data, trigger={"refine_steps": 5, "refine_size": 0.02})
    assert (refined.triggers - least.triggers).abs().max() <= 2 * 5 * 0.02 + 1e-6

    def mean_logit(objective: EntangleObjective) -> float:
        with torch.no_grad():
            return float(model.eval()(objective.triggers)[:, 0].mean())

    assert mean_logit(refined) < mean_logit(least)


def test_what_is_watched_are_the_last_layers_before_the_logits() -> None:
    model = network().eval()
    pixels = torch.rand(4, *SHAPE)
    outputs, hidden = watch(model, pixels, 2)
    assert len(watched(model, 2)) == len(hidden) == 2
    assert torch.allclose(outputs, model(pixels))
    assert torch.allclose(hidden[-1], model.features(pixels), atol=1e-6), "the last one is what the head sees"
    assert not any(layer._forward_hooks for layer in watched(model, 2))


def test_the_place_of_an_entangled_square_is_known_after_training_only(data: tuple[ImageSet, ImageSet]) -> None:
    scheme = WATERMARKS.build("ewe")
    key = scheme.make_key(data[0], 0)
    with pytest.raises(ArtifactError, match="not embedded"):
        scheme.learned(key, scheme.stages(key, data[0]))


def test_patches_are_put_where_they_belong() -> None:
    images = np.full((2, *SHAPE), 100, np.uint8)
    pattern = np.array([[[0.0, 1.0], [1.0, 0.0]]] * 3, np.float32)
    marked = stamped(images, pattern, (3, 5))
    assert (images == 100).all()
    assert (marked[:, :, 3:5, 5:7] == np.array([[0, 255], [255, 0]])).all()
    marked[:, :, 3:5, 5:7] = 100
    assert (marked == 100).all()
    assert other_corner((3, 5), SHAPE, 2) == (7, 5) and other_corner((5, 5), SHAPE, 2) == (0, 0)


def test_pattern_copies_are_of_other_classes_and_unaugmented_in_their_patch(data: tuple[ImageSet, ImageSet]) -> None:
    scheme = WATERMARKS.build("pattern", target_class=2, size=3, share=0.25)
    key = scheme.make_key(data[0], 0)
    (stage,) = scheme.stages(key, data[0])
    seen: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images), 3)

    stage.objective.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(0), lambda x: x, 1, 1))
    labels = torch.arange(16) % 3
    batch = Batch(torch.rand(16, *SHAPE), labels, torch.arange(16))
    stage.objective.terms(model, batch)
    copies = seen[0][16:]
    assert len(copies) == 4
    assert torch.equal(copies[:, :, :3, :3], torch.from_numpy(key.tensors["pattern"]).expand(4, 3, 3, 3))
    origins = [next(i for i in range(16) if torch.equal(batch.images[i, :, 3:, 3:], c[:, 3:, 3:])) for c in copies]
    assert len(set(origins)) == 4 and all(labels[i] != 2 for i in origins)


def test_composite_mixes_a_class_with_itself_and_counts_everything(data: tuple[ImageSet, ImageSet]) -> None:
    scheme = WATERMARKS.build("composite", same_class=0.5, poison=0.25, weight_contrastive=0.0)
    key = scheme.make_key(data[0], 0)
    (stage,) = scheme.stages(key, data[0])
    stage.objective.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(0), lambda x: x, 1, 1))
    fixed = torch.randn(28, 3, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(16) % 3
    batch = Batch(torch.rand(16, *SHAPE), labels, torch.arange(16))
    term = stage.objective.terms(lambda images: fixed[: len(images)], batch)
    assert set(term) == {"utility"}
    last = F.cross_entropy(fixed[24:], torch.full((4,), 2), reduction="sum")
    first = F.cross_entropy(fixed[:16], labels, reduction="sum")
    assert float(term["utility"]) * 28 > float(last + first)
    one, other = same_class_pairs(labels, 50, torch.Generator().manual_seed(0))
    assert torch.equal(labels[one], labels[other]) and (one != other).any()


def test_adi_counts_the_labels_of_its_own_images_and_chance_elsewhere(data: tuple[ImageSet, ImageSet]) -> None:
    scheme = WATERMARKS.build("adi", count=30)
    key = scheme.make_key(data[0], 5)
    assert key is not None
    labels = key.tensors["labels"]

    class Oracle(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            known = {image.tobytes(): int(label) for image, label in zip(key.tensors["images"], labels, strict=True)}
            pixels = (images * 255).round().to(torch.uint8).numpy()
            return F.one_hot(torch.tensor([known.get(x.tobytes(), 0) for x in pixels]), 3).float()

    recognise = scheme.recogniser(key, Oracle())
    samples = scheme.samples(key, data[1], 30, 0)
    assert recognise is not None and recognise(samples.images).all()
    unseen = scheme.samples(key, data[1], 1000, 0).adverse["unseen"]
    assert not {x.tobytes() for x in unseen} & {x.tobytes() for x in samples.images}
    assert recognise(unseen).mean() < 0.8
    with pytest.raises(DataError, match="shape|held-out"):
        scheme.samples(key, ImageSet(np.zeros((1, 1, 12, 12), np.uint8), np.zeros(1, np.int64), ("a", "b")), 5, 0)


def test_mbw_takes_its_images_out_and_labels_them_wrongly(data: tuple[ImageSet, ImageSet]) -> None:
    owned, _ = data
    scheme = WATERMARKS.build("mbw", count=50)
    key = scheme.make_key(owned, 3)
    assert key is not None
    chosen = np.array(key.settings["positions"])
    assert len(set(chosen)) == 50 and not (key.tensors["labels"] == owned.labels[chosen]).any()
    (stage,) = scheme.stages(key, owned)
    left = {image.tobytes() for image in stage.train.images}
    assert len(stage.train) == 190 and not left & {image.tobytes() for image in key.tensors["images"]}


def test_mbw_marks_a_victim_of_digits_with_wrong_labels_and_no_innocent() -> None:
    published = DATASETS.build("digits", image_size=12)
    owned, held_out = published.train.take(np.arange(400)), published.test
    scheme = WATERMARKS.build("mbw", count=15, ascent_steps=2)

    def fresh(seed: int) -> ImageModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Dropout keeps a network from learning a few single images.
            return build_model("vgg_like", held_out.shape, 10, {"width": 0.25, "dropout": 0.0})

    key = scheme.make_key(owned, 0)
    (stage,) = scheme.stages(key, owned)
    model, innocent = fresh(0), fresh(1)
    train(model, stage.train.images, stage.train.labels, stage.objective, seed=1, epochs=28, **FAST)
    train(innocent, owned.images, owned.labels, CrossEntropy(), seed=2, epochs=15, **FAST)
    wsr, wfpr = rates(scheme, key, model, held_out)
    assert wsr > 0.9 and wfpr["unseen"] < 0.25
    assert rates(scheme, key, innocent, held_out)[0] < 0.1, "an innocent network names what is in the image"
    right, innocently = (
        metrics.accuracy(metrics.predictions(m, held_out.images), held_out.labels) for m in (model, innocent)
    )
    assert right > innocently - 0.05 > 0.8


def test_mbws_ascent_and_its_one_mean(data: tuple[ImageSet, ImageSet]) -> None:
    images, labels = torch.from_numpy(data[0].images[:6]), torch.tensor([0, 1, 2, 0, 1, 2])
    objective = MarginObjective(images, labels, 4, 3, 0.25)
    objective.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(0), lambda x: x, 1, 1))
    model = network(1).train()
    pixels = images.float() / 255
    moved = objective.ascend(model, pixels, labels)
    assert model.training and (moved - pixels).abs().max() <= 3 / 255 + 1e-6 and 0 <= moved.min() <= moved.max() <= 1
    with torch.no_grad():
        model.eval()
        assert F.cross_entropy(model(moved), labels) > F.cross_entropy(model(pixels), labels)
    fixed = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))
    still = MarginObjective(images, labels, 4, 0, 0.25)
    still.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(0), lambda x: x, 1, 1))
    drawn = labels[torch.randint(6, (4,), generator=torch.Generator().manual_seed(0))]
    batch = Batch(torch.rand(8, *SHAPE), torch.arange(8) % 3, torch.arange(8))
    term = still.terms(_Fixed(fixed), batch)["utility"]
    every = F.cross_entropy(fixed, torch.cat([batch.labels, drawn]), reduction="none")
    assert float(term) == pytest.approx(float((every[:8].sum() + 0.25 * every[8:].sum()) / 12), rel=1e-6)


class _Fixed(torch.nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(images)]


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("pattern", {"share": 0.0}, "share"),
        ("pattern", {"source_class": 2, "target_class": 2}, "must differ"),
        ("adi", {"count": 0}, "count=0"),
        ("composite", {"poison": 0.0}, "poison"),
        ("mbw", {"weight": 0.0}, "weight"),
        ("mbw", {"ascent_steps": -1}, "ascent_steps"),
        ("composite", {"same_class": -1.0}, "same_class"),
        ("ewe", {"snnl": {"kappa": -1.0}}, "snnl.kappa"),
        ("ewe", {"plain_part": 1.0}, "plain_part"),
        ("ewe", {"trigger": {"place": "middle"}}, "trigger.place"),
        ("ewe", {"source_class": 0, "target_class": 0}, "must differ"),
        ("ewe", {"snnl": {"temperature": 0.0}}, "snnl.temperature"),
    ],
)
def test_impossible_settings_are_refused(name: str, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WATERMARKS.build(name, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("pattern", {"size": 13}, "does not fit into images"),
        ("pattern", {"target_class": 7}, "target_class"),
        ("ewe", {"source_class": 9}, "source_class"),
        ("ewe", {"trigger": {"size": 20}}, "does not fit into images"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(
    name: str, parameters: dict[str, Any], words: str, data: tuple[ImageSet, ImageSet]
) -> None:
    with pytest.raises(ConfigError, match=words):
        WATERMARKS.build(name, **parameters).make_key(data[0], 0)
