from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyword_training import train
from torch import Tensor

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.pretext import PRETEXTS
from mea_ray.pretext.base import Pretext
from mea_ray.training.objective import StepContext

SHAPE = (3, 16, 16)
ENCODERS = ["simclr", "moco", "byol"]


def small(seed: int = 0) -> ImageModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model("resnet18", SHAPE, 4, {"width": 0.1})


def started(name: str, model: ImageModel, **params: Any) -> Pretext:
    task: Pretext = PRETEXTS.build(name, **params)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        task.attach(model, torch.device("cpu"))
    task.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(0), lambda x: x, 1, 1))
    return task


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> float:
    """Chen et al. 2020, equation 1, written with loops."""
    rows = F.normalize(torch.cat([first, second]).detach(), dim=1).double()
    count, total = len(first), 0.0
    for i in range(2 * count):
        partner = (i + count) % (2 * count)
        others = sum(float(((rows[i] @ rows[j]) / temperature).exp()) for j in range(2 * count) if j != i)
        total -= float((rows[i] @ rows[partner]) / temperature) - np.log(others)
    return total / (2 * count)


def test_simclr_is_nt_xent_of_the_projections() -> None:
    model = small()
    task: Any = started("simclr", model, temperature=0.3)
    views = [pictures(6, 1), pictures(6, 2)]
    features = [model.features(view) for view in views]
    projected = task.head(torch.cat(features))
    expected = nt_xent(projected[:6], projected[6:], 0.3)
    # The head normalises batches, so that a second pass in training mode gives the same numbers.
    assert float(task.loss(features, views)) == pytest.approx(expected, abs=1e-4)


def test_moco_is_the_cross_entropy_of_the_own_key_among_the_queue() -> None:
    model = small()
    task: Any = started("moco", model, temperature=0.2, queue=5, projection=8)
    views = [pictures(3, 1), pictures(3, 2)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = float(task.loss([model.features(views[0])], views))
    queue = task.criterion.memory_bank.bank.clone()
    (_, encoder), (_, head) = task.momentum_pairs
    keys = F.normalize(head(encoder.features(views[1])), dim=1)
    # The keys of the first call are the queue's first entries now.
    assert torch.allclose(queue[:3], keys, atol=1e-5)
    predicted = F.normalize(task.head(model.features(views[0])), dim=1)
    logits = torch.cat([(predicted * keys).sum(1, keepdim=True), predicted @ queue.T], 1) / 0.2
    expected = float(F.cross_entropy(logits, torch.zeros(3, dtype=torch.int64)))
    assert float(task.loss([model.features(views[0])], views)) == pytest.approx(expected, abs=1e-4)
    assert np.isfinite(first)


def test_byol_is_the_symmetric_negative_cosine_of_prediction_and_target() -> None:
    model = small()
    task: Any = started("byol", model, projection=8, hidden=16)
    views = [pictures(6, 1), pictures(6, 2)]
    features = [model.features(view) for view in views]
    (_, encoder), (_, head) = task.momentum_pairs
    with torch.no_grad():
        both = encoder.features(torch.cat(views)).split(6)
        targets = [F.normalize(head(part), dim=1) for part in both]
    predicted = [F.normalize(task.predictor(task.head(part)), dim=1) for part in features]
    expected = -((predicted[0] * targets[1]).sum(1).mean() + (predicted[1] * targets[0]).sum(1).mean()) / 2
    assert float(task.loss(features, views)) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["moco", "byol"])
def test_a_momentum_encoder_follows_by_its_part_and_has_no_gradient(name: str) -> None:
    model = small()
    task: Any = started(name, model, momentum=0.75)
    (_, encoder), _ = task.momentum_pairs
    before = [parameter.detach().clone() for parameter in encoder.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    task.updated(model)
    for old, now in zip(before, encoder.parameters(), strict=True):
        assert torch.allclose(now, old + 0.25, atol=1e-5)
        assert not now.requires_grad


@pytest.mark.parametrize("name", ENCODERS)
def test_training_lowers_the_loss_moves_the_heads_and_repeats_under_a_seed(name: str) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 90, (64, *SHAPE), dtype=np.uint8)
    images[np.arange(64), np.arange(64) % 3] += 150
    runs = []
    for _ in range(2):
        model, task = small(1), PRETEXTS.build(name, **({"queue": 64} if name == "moco" else {}))
        report = train(
            model, images, None, task, seed=5, epochs=8, batch_size=32, augment=(), precision="float32", device=None
        )
        runs.append((model, report))
    losses = [epoch["utility"] for epoch in runs[0][1].history]
    assert losses[-1] < (losses[1] if name == "moco" else losses[0])  # a queue of noise is easy to tell apart at first
    for first, second in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("simclr", "temperature", 0.0), ("moco", "queue", 0), ("moco", "momentum", 1.0), ("byol", "momentum", -0.1)],
)
def test_a_setting_out_of_range_is_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        PRETEXTS.build(name, **{setting: value})


@pytest.mark.parametrize("name", ENCODERS)
def test_a_lone_last_image_is_left_out_and_batches_of_one_are_refused(name: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (9, 1, 16, 16), dtype=np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("vgg_like", (1, 16, 16), 4, {"width": 0.125})  # no batch normalisation of its own
    report = train(model, images, None, PRETEXTS.build(name), seed=0, epochs=2, batch_size=4, augment=())
    assert report.images == 16 and all(epoch["loss"] != 0 for epoch in report.history)
    with pytest.raises(DataError, match="batches of one image"):
        train(model, images, None, PRETEXTS.build(name), seed=0, epochs=1, batch_size=1, augment=())
