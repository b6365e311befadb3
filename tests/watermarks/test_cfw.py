"""The class-feature watermark against plain re-implementations, and a marked victim on digits."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.data import DATASETS
from mea_ray.evaluation import metrics
from mea_ray.experiment.local import run_in_memory
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Batch, StepContext
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.cfw_objective import (
    Domain,
    MergeObjective,
    TieObjective,
    balanced_choice,
    drift,
    principal_directions,
    similarity,
)

SHAPE, CLASSES = (3, 12, 12), 4


@pytest.fixture(scope="module")
def owned() -> ImageSet:
    rng = np.random.default_rng(0)
    labels = np.arange(80, dtype=np.int64) % CLASSES
    pixels = rng.integers(0, 90, (80, *SHAPE), dtype=np.uint8)
    pixels[np.arange(80), labels % 3] += 100
    return ImageSet(pixels, labels, tuple("abcd"))


def network(seed: int = 0) -> ImageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model("vgg_like", SHAPE, CLASSES, {"width": 0.125, "dropout": 0.0})


def context(seed: int = 0) -> StepContext:
    return StepContext(torch.device("cpu"), torch.Generator().manual_seed(seed), lambda x: x, 1, 1)


def merge(owned: ImageSet) -> tuple[Any, MergeObjective, ImageModel]:
    scheme = WATERMARKS.build("cfw", count=12, verified=20, per_batch=5)
    key = scheme.make_key(owned, 0)
    objective = scheme.stages(key, owned)[1].objective
    model = network()
    objective.attach(model, torch.device("cpu"))
    return scheme, objective, model


def test_the_four_terms_have_the_values_of_their_definitions(owned: ImageSet) -> None:
    model: Any
    _, marks, model = merge(owned)
    objective = TieObjective(marks, owned, 2, {"mark": 0.5, "similarity": 0.25, "drift": 2.0})
    objective.attach(model, torch.device("cpu"))
    objective.start(context(3))
    objective.start_epoch(0)
    with torch.no_grad():
        model.head.weight.add_(0.3 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(1)))
    batch = Batch(torch.from_numpy(owned.images[:8]).float() / 255, torch.from_numpy(owned.labels[:8]), torch.arange(8))
    terms = objective.terms(model, batch)
    assert model.training, "the fine-tuning goes on in the mode that it was in"

    chosen = torch.randint(12, (5,), generator=torch.Generator().manual_seed(3))
    queries = marks.images[chosen].float() / 255
    with torch.no_grad():
        before, after = objective.teacher(batch.images).softmax(1), model(batch.images).softmax(1)
        outputs = model(queries)
    stability = sum(
        float(before[i, c] * (before[i, c].log() - after[i, c].log())) for i in range(8) for c in range(CLASSES)
    ) / (8 * CLASSES)
    assert float(terms["stability"].detach()) == pytest.approx(stability, rel=1e-3)
    mark = -sum(float(row.log_softmax(0)[0]) for row in outputs) / 5
    assert float(terms["mark"].detach()) == pytest.approx(mark, rel=1e-4)

    # The two hidden layers of this network, before their ReLUs.
    total = 0.0
    with torch.no_grad():
        flat = [
            model.shrink(model.convolutions((x - model.mean) / model.std)).flatten(1) for x in (batch.images, queries)
        ]
        first = [model.hidden[2](x) for x in flat]
        second = [model.hidden[4](x.relu()) for x in first]
    for clean, marked in (first, second):
        a, b = clean.mean(0).double(), marked.mean(0).double()
        total += float((a * b).sum() / (a.norm() * b.norm()))
    assert float(terms["similarity"].detach()) == pytest.approx(-total, rel=1e-4)

    logits = metrics.logits(model, owned.images)
    distances = []
    for label in range(CLASSES):
        axis = PCA(1).fit(logits[owned.labels == label]).components_[0]
        distances += [abs(float((p - q) @ axis)) for p in outputs.numpy() for q in outputs.numpy()]
    assert float(terms["drift"].detach()) == pytest.approx(np.mean(distances), rel=1e-3)

    total_loss = float(objective.backward(terms, model))
    values = {name: float(term.detach()) for name, term in terms.items()}
    assert total_loss == pytest.approx(
        values["stability"] + 0.5 * values["mark"] + 0.25 * values["similarity"] + 2 * values["drift"], rel=1e-5
    )
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


def test_terms_of_weight_0_are_not_computed(owned: ImageSet) -> None:
    _, marks, model = merge(owned)
    objective = TieObjective(marks, owned, 2, {"mark": 0.5, "similarity": 0.0, "drift": 0.0})
    objective.attach(model, torch.device("cpu"))
    objective.start(context())
    objective.start_epoch(0)
    pixels = torch.from_numpy(owned.images[:4]).float() / 255
    terms = objective.terms(model, Batch(pixels, torch.zeros(4, dtype=torch.long), torch.arange(4)))
    assert set(terms) == {"stability", "mark"}


def test_alike_representations_and_near_marks_cost_less() -> None:
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    alike = torch.cat([rows, 2 * rows])
    assert float(similarity([alike, alike], 6)) == pytest.approx(2.0, abs=1e-5)
    assert float(similarity([torch.cat([rows, -rows])], 6)) == pytest.approx(-1.0, abs=1e-5)
    axis = torch.tensor([[1.0, 0.0]])
    assert float(drift(torch.tensor([[3.0, -1.0], [3.0, 9.0]]), axis)) == 0.0
    assert float(drift(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), axis)) == pytest.approx(1.0)


def test_directions_are_principal_components_and_a_single_image_has_none() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(41, 3)).astype(np.float32) * [5, 1, 1] + 7
    labels = np.array([0] * 40 + [2])
    (result,) = principal_directions(logits.astype(np.float32), labels)
    expected = PCA(1).fit(logits[:40]).components_[0]
    assert abs(float(result.numpy() @ expected)) == pytest.approx(1.0, abs=1e-5)


def test_images_are_chosen_evenly_over_what_they_are_called() -> None:
    named = np.array([0] * 50 + [1] * 50 + [2] * 3)
    chosen = balanced_choice(named, 30, 0)
    counts = np.bincount(named[chosen])
    assert len(set(chosen)) == 30 and counts[2] == 3 and abs(counts[0] - counts[1]) <= 1
    assert not np.array_equal(chosen, balanced_choice(named, 30, 1))
    assert len(balanced_choice(named, 1000, 0)) == 103


def test_the_trained_network_chooses_and_verification_images_are_held_out(owned: ImageSet) -> None:
    scheme, objective, model = merge(owned)
    key = scheme.make_key(owned, 0)
    with pytest.raises(ArtifactError, match="not embedded"):
        scheme.learned(key, scheme.stages(key, owned))
    stages = scheme.stages(key, owned)
    for stage in stages[1:]:
        stage.objective.attach(model, torch.device("cpu"))
    learned = scheme.learned(key, stages)
    trained, held_out = learned.tensors["images"], learned.tensors["held_out"]
    assert len(trained) == 12 and len(held_out) == 20
    called = np.bincount(metrics.predictions(model, objective.domain.trained), minlength=CLASSES)
    now = np.bincount(metrics.predictions(model, trained), minlength=CLASSES)
    assert all(n >= min(12 // CLASSES, c) for n, c in zip(now, called, strict=True))
    assert not {x.tobytes() for x in trained} & {x.tobytes() for x in held_out}
    samples = scheme.samples(learned, owned, 15, 0)
    assert np.array_equal(samples.images, held_out[:15]) and samples.target == 0
    assert set(samples.adverse) == {"other_classes", "noise"}
    assert all(mixed.shape[1:] == SHAPE for mixed in samples.adverse.values())
    with pytest.raises(DataError, match="held-out"):
        scheme.samples(learned, ImageSet(np.zeros((1, 1, 12, 12), np.uint8), np.zeros(1, np.int64), ("a", "b")), 5, 0)


def test_the_mark_never_uses_the_classes_set_aside(owned: ImageSet) -> None:
    scheme = WATERMARKS.build("cfw", kept_apart=3)
    key = scheme.make_key(owned, 1)
    names = DATASETS.build("figures", train_images=12, test_images=12).train.class_names
    assert len(key.settings["apart"]) == 3
    assert sorted([*key.settings["apart"], *key.settings["merged"]]) == sorted(names)
    assert scheme.make_key(owned, 2).settings["apart"] != key.settings["apart"], "the owner's secret"


def test_the_other_domain_is_any_dataset_and_its_choice_survives_a_file(owned: ImageSet) -> None:
    choice = {"name": "cfw", "dataset": {"name": "noise", "train_images": 60, "test_images": 30}, "kept_apart": 1}
    config = build(ExperimentConfig, {"victim": {"watermark": choice}})
    again = build(ExperimentConfig, json.loads(json.dumps(config.resolved())))
    assert again.resolved() == config.resolved()
    domain = again.victim.watermark.build().domain(SHAPE, 0)
    assert isinstance(domain, Domain) and domain.trained.shape == (40, *SHAPE) and len(domain.apart) == 10
    with pytest.raises(ConfigError, match="kept_apart=2 of the 3 classes of noise"):
        WATERMARKS.build("cfw", dataset={"name": "noise"}).make_key(owned, 0)
    with pytest.raises(ConfigError, match="did you mean 'figures'"):
        WATERMARKS.build("cfw", dataset="figurs")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"count": 0}, "count=0"),
        ({"kept_apart": 0}, "kept_apart=0"),
        ({"plain_part": 0.95}, "sum must be below 1"),
        ({"weight_drift": -1.0}, "weight_drift"),
        ({"tuning_learning_rate": 0.0}, "tuning_learning_rate"),
    ],
)
def test_impossible_settings_are_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WATERMARKS.build("cfw", **parameters)


def test_a_target_that_is_no_class_is_refused(owned: ImageSet) -> None:
    with pytest.raises(ConfigError, match="target_class"):
        WATERMARKS.build("cfw", target_class=9).make_key(owned, 0)


@pytest.mark.slow
def test_a_victim_of_digits_carries_the_mark_and_an_innocent_model_does_not() -> None:
    training = {"epochs": 12, "batch_size": 64, "augment": [], "learning_rate": 2e-3, "precision": "float32"}
    model = {"name": "vgg_like", "width": 0.25}
    config = build(
        ExperimentConfig,
        {
            "data": {"name": "digits", "image_size": 12},
            "victim": {"model": model, "watermark": {"name": "cfw", "verified": 200}, "training": training},
            "thief": {"budgets": [300], "model": model, "training": training, "learning": {"temperature": 1.0}},
        },
    )
    result = run_in_memory(config)
    victim, null, thief = result.victim_report, result.null_reports[0], result.rungs[0].report
    assert victim.wsr is not None and null.wsr is not None and thief.wsr is not None
    assert victim.wsr.trials == thief.wsr.trials == 200
    assert victim.wsr.rate > 0.8 and victim.accuracy > null.accuracy - 0.05 > 0.85
    assert null.wsr.rate < 0.3 and victim.infringes_threshold and victim.p_value == 0.5
    assert set(victim.wfpr) == {"other_classes", "noise"} and thief.p_value is not None
