"""The thieves of encoders: their losses against plain re-implementations, and what they steal of a planted encoder."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.cont_steal import contrast
from mea_ray.attacks.encoder_attack import EncoderAttack, distance
from mea_ray.attacks.feature_distillation import FeatureObjective
from mea_ray.attacks.stolen_encoder import ViewsObjective
from mea_ray.blackbox import POLICIES
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import LearningConfig, TrainingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Batch, StepContext
from mea_ray.training.views import Views

SHAPE = (3, 12, 12)
THIEVES = ["feature_distillation", "stolen_encoder", "cont_steal"]


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def encoder(name: str = "vgg_like", seed: int = 0, width: float = 0.1) -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        params = {"dropout": 0.0} if name == "vgg_like" else {}
        return build_model(name, SHAPE, 4, {"width": width, **params}).eval()


@pytest.mark.parametrize("kind", ["l2", "l1", "cosine"])
def test_a_distance_is_the_mean_over_rows(kind: str) -> None:
    outputs, targets = rows(5, 7, 1), rows(5, 7, 2)
    expected = 0.0
    for a, b in zip(outputs.numpy().astype(np.float64), targets.numpy().astype(np.float64), strict=True):
        if kind == "l2":
            expected += float(np.sqrt(((a - b) ** 2).sum())) / 5
        elif kind == "l1":
            expected += float(np.abs(a - b).sum()) / 5
        else:
            expected += (1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))) / 5
    assert float(distance(outputs, targets, kind)) == pytest.approx(expected, abs=1e-5)  # type: ignore[arg-type]


def test_a_student_that_is_right_already_gets_a_finite_gradient() -> None:
    outputs = rows(3, 4, 1).requires_grad_()
    distance(outputs, outputs.detach().clone(), "l2").backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_cont_steals_loss_is_the_papers_sum(symmetric: bool) -> None:
    outputs, targets = (F.normalize(rows(4, 6, seed), dim=1).double() for seed in (1, 2))

    def one_side(s: Tensor, t: Tensor) -> float:
        total = 0.0
        for i in range(4):
            above = float((s[i] @ t[i] / 0.5).exp())
            below = sum(float((s[i] @ t[j] / 0.5).exp()) for j in range(4))
            below += sum(float((s[i] @ s[j] / 0.5).exp()) for j in range(4) if j != i)
            total -= np.log(above / below) / 4
        return total

    expected = (
        (one_side(outputs, targets) + one_side(targets, outputs)) / 2 if symmetric else one_side(outputs, targets)
    )
    assert float(contrast(outputs, targets, 0.5, symmetric=symmetric)) == pytest.approx(expected, abs=1e-6)


def test_both_directions_are_the_nt_xent_of_the_library() -> None:
    from lightly.loss import NTXentLoss

    outputs, targets = (F.normalize(rows(5, 6, seed), dim=1) for seed in (3, 4))
    expected = float(NTXentLoss(temperature=0.5)(outputs, targets))
    assert float(contrast(outputs, targets, 0.5, symmetric=True)) == pytest.approx(expected, abs=1e-5)


def ready(objective: Any, model: ImageModel) -> Batch:
    objective.attach(model, torch.device("cpu"))
    objective.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(9), lambda x: x, 1, 1))
    images = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(5))
    return Batch(images, torch.full((4,), -1), torch.tensor([3, 0, 5, 1]))


def test_stolen_encoder_compares_the_image_and_its_views_with_the_one_answer_at_length_1() -> None:
    model = encoder()
    answers = 3 * rows(6, model.feature_size, 7).numpy()
    make_view = Views(crop_scale=(1.0, 1.0))
    objective = ViewsObjective(answers, "l2", 20.0, 2, make_view)
    batch = ready(objective, model)
    terms = objective.terms(model, batch)
    stream = torch.Generator().manual_seed(9)
    views = [make_view(batch.images, stream) for _ in range(2)]
    targets = F.normalize(torch.from_numpy(answers)[batch.indices], dim=1)

    def away(images: Tensor) -> float:
        return float((F.normalize(model.features(images), dim=1) - targets).norm(dim=1).mean())

    assert float(terms["images"]) == pytest.approx(away(batch.images), abs=1e-4)
    assert float(terms["views"]) == pytest.approx((away(views[0]) + away(views[1])) / 2, abs=1e-4)
    assert objective.weights == {"views": 20.0}


def test_feature_distillation_compares_the_numbers_as_they_are() -> None:
    model = encoder()
    answers = 3 * rows(6, model.feature_size, 7).numpy()
    objective = FeatureObjective(answers, "mse")
    batch = ready(objective, model)
    with torch.no_grad():
        expected = (model.features(batch.images) - torch.from_numpy(answers)[batch.indices]).square().mean()
    assert float(objective.terms(model, batch)["distillation"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_centred_cosine_leaves_out_what_all_answers_have_in_common() -> None:
    model = encoder()
    answers = (rows(6, model.feature_size, 7) + 5).numpy()
    objective = FeatureObjective(answers, "centred_cosine")
    batch = ready(objective, model)
    with torch.no_grad():
        outputs = model.features(batch.images).double().numpy()
    outputs, wanted = (
        each / np.linalg.norm(each, axis=1, keepdims=True) for each in (outputs, answers.astype(np.float64))
    )
    outputs, wanted = outputs - wanted.mean(0), (wanted - wanted.mean(0))[batch.indices]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(outputs, wanted, strict=True)]
    value = float(objective.terms(model, batch)["distillation"])
    assert value == pytest.approx(1 - np.mean(cosines), rel=1e-4)
    plain = FeatureObjective(answers, "cosine")
    assert float(plain.terms(model, ready(plain, model))["distillation"]) < 0.7 * value


def stolen(name: str, make_model: Any, pool: np.ndarray, victim: ImageModel, epochs: int, **params: Any) -> Any:
    attack: EncoderAttack = ATTACKS.build(name, **params)
    ledger = Ledger(None)
    ledger.register("thief", len(pool))
    box = LocalBlackBox(victim, POLICIES.build("embedding"), ledger, "thief", pass_images=16)
    training = TrainingConfig(epochs=epochs, batch_size=16, learning_rate=3e-3, augment=(), precision="float32")
    budgets = (len(pool) // 2, len(pool))
    rungs = list(attack.run(box, pool, budgets=budgets, make_model=make_model, training=training, seed=1))
    assert ledger.charged("thief") == len(pool)  # one query per image, views cost nothing
    assert [rung.queries for rung in rungs] == list(budgets)
    return rungs[-1].model


def likeness(a: ImageModel, b: ImageModel, images: np.ndarray) -> float:
    """How alike two encoders see images: correlation of the cosines between all pairs, whatever their lengths."""
    seen = []
    for model in (a, b):
        features = metrics.features(model, images).astype(np.float64)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        seen.append((features @ features.T)[np.triu_indices(len(images), 1)])
    return float(np.corrcoef(seen[0], seen[1])[0, 1])


@pytest.mark.parametrize(
    ("name", "model", "width"),
    [*((name, "vgg_like", 0.15) for name in THIEVES), ("feature_distillation", "cnn9", 0.1)],
)
def test_a_thief_sees_images_as_the_victim_does_also_with_another_network_and_feature_length(
    name: str, model: str, width: float
) -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 160, (6, 3, 1, 1))
    pictures = (kinds[rng.integers(0, 6, 200)] + rng.integers(0, 90, (200, *SHAPE))).astype(np.uint8)
    pool, unseen = pictures[:96], pictures[96:]
    victim = encoder(seed=4)
    make = partial(encoder, model, 8, width)
    substitute = stolen(name, make, pool, victim, 20 if model == "vgg_like" else 12)
    assert substitute.feature_size == make().feature_size != victim.feature_size
    # The control is the same network, untrained.
    got, untrained = likeness(victim, substitute, unseen), likeness(victim, make(), unseen)
    assert got > 0.5 and got > untrained + 0.2, (got, untrained)


@pytest.mark.parametrize("setting", [{"temperature": 3.0}, {"mixing": "mixup"}, {"label_smoothing": 0.1}])
def test_what_is_about_probabilities_is_refused(setting: dict[str, Any]) -> None:
    attack: EncoderAttack = ATTACKS.build("stolen_encoder")
    attack.check(50, [10], TrainingConfig(), LearningConfig(statistics="none"))
    with pytest.raises(ConfigError, match=f"thief.learning.{next(iter(setting))}"):
        attack.check(50, [10], TrainingConfig(), LearningConfig(**setting))
    with pytest.raises(ConfigError, match="early_stop_patience"):
        attack.check(50, [10], TrainingConfig(early_stop_patience=3))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("stolen_encoder", "views", 0),
        ("stolen_encoder", "augmentation_weight", -1.0),
        ("cont_steal", "temperature", 0.0),
        ("feature_distillation", "query_chunk", 0),
    ],
)
def test_a_parameter_out_of_range_is_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        ATTACKS.build(name, **{setting: value})
