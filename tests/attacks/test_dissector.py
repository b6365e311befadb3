"""Black-Box Dissector: Grad-CAM against the formula, what is erased, rounds within the budget, labels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_fakes import CLASSES, FakeBlackBox, flat, same, steal
from torch import Tensor, nn
from watermark_sets import context

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.dissector import SelfDistillation, erased_batch
from mea_ray.attacks.erasing import AREA, erased, grad_cam
from mea_ray.attacks.transfer import TransferSet
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Batch

POOL = np.random.default_rng(2).integers(0, 256, (120, 1, 8, 8), dtype=np.uint8)
OPTIONS: dict[str, Any] = {"initial": 20, "round_images": 16, "variants": 3, "round_epochs": 1, "query_chunk": 16}


def small() -> ImageModel:
    return build_model("vgg_like", (1, 8, 8), CLASSES, {"width": 0.0625})


class Seeing(nn.Module):
    """A convolution, its mean over places, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.last = nn.Linear(3, CLASSES)
        self.last.weight.data *= 30  # an untrained network answers all images alike

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.gelu(self.first(x)).mean((2, 3)))
        return logits


def test_the_map_is_that_of_the_formula() -> None:
    model, images = Seeing(), POOL[:5]
    labels = np.array([0, 1, 2, 3, 0])
    found = grad_cam(model, images, labels)
    for image, label, own in zip(images, labels, found, strict=True):
        maps = model.first(torch.from_numpy(image[None]).float() / 255)
        maps = maps.detach().requires_grad_()
        model.last(F.gelu(maps).mean((2, 3)))[0, label].backward()
        assert maps.grad is not None
        attention = np.zeros((8, 8))
        for k in range(3):
            attention += float(maps.grad[0, k].mean()) * maps.detach().numpy()[0, k]
        attention = np.maximum(attention, 0)
        plain = attention / attention.sum() if attention.sum() > 0 else np.full((8, 8), 1 / 64)
        np.testing.assert_allclose(own, plain, atol=1e-5)


def test_a_rectangle_is_erased_where_the_map_is_hot() -> None:
    images = np.zeros((200, 1, 16, 16), np.uint8)
    attention = np.zeros((200, 16, 16), np.float32)
    attention[:, 12:, 12:] = 1 / 16
    changed = erased(images, attention, np.random.default_rng(0)) != 0
    shares = changed.mean((1, 2, 3))
    assert (shares > 0).mean() > 0.95 and shares.max() <= AREA[1] + 0.05 and shares.std() > 0.05
    middle = np.array([np.argwhere(each[0]).mean(0) for each in changed if each.any()])
    assert middle.mean() > 9.5, "towards the corner, as far as the rectangle fits"
    anywhere = erased(images, None, np.random.default_rng(0)) != 0
    assert abs(np.mean([np.argwhere(each[0]).mean() for each in anywhere if each.any()]) - 7.5) < 0.7


def test_the_loss_is_that_of_a_plain_loop() -> None:
    answers = np.random.default_rng(0).dirichlet(np.ones(CLASSES), 6).astype(np.float32)
    objective = SelfDistillation(answers, erasings=2, weight=0.5)
    objective.start(context())
    model, images = Seeing(), torch.from_numpy(POOL[:6]).float() / 255
    terms = objective.terms(model, Batch(images, torch.full((6,), -1), torch.arange(6)))
    generator = torch.Generator().manual_seed(0)
    copies = [erased_batch(images, generator) for _ in range(2)]
    logits = model(images)
    plain = 0.0
    for row in range(6):
        own = torch.stack([F.softmax(model(copy[row : row + 1]), 1)[0] for copy in copies]).mean(0)
        plain += float((own * (own.log() - F.log_softmax(logits[row], 0))).sum().detach()) / 6
    assert float(terms["distillation"].detach()) == pytest.approx(plain, rel=1e-4)
    labels = torch.from_numpy(answers.argmax(1))
    torch.testing.assert_close(terms["utility"], F.cross_entropy(logits, labels))
    assert objective.weights == {"distillation": 0.5}
    shares = (erased_batch(torch.full((300, 1, 16, 16), 2.0), generator) != 2).float().mean((1, 2, 3))
    assert shares.min() > 0 and shares.max() <= AREA[1] + 0.05


def test_labels_are_all_that_is_learnt() -> None:
    attack = ATTACKS.build("black_box_dissector", **OPTIONS)
    found = [
        steal(FakeBlackBox(60, answer=answer), [60], attack, pool=POOL, make_model=small)[0].model
        for answer in ("all", "label")
    ]
    assert same(*found)


def test_rounds_hold_erased_images_of_the_pool_and_a_kill_repeats_nothing(tmp_path: Path) -> None:
    attack = ATTACKS.build("black_box_dissector", **OPTIONS)
    whole = FakeBlackBox(60, answer="label")
    rungs = steal(whole, [36, 60], attack, pool=POOL, make_model=small)
    assert whole.charged == 60 and [rung.queries for rung in rungs] == [36, 60]
    known = {image.tobytes() for image in POOL}
    fresh = [image in known for image in flat(whole.queries)]
    # Twenty of the pool; a round of eight erased ones and eight of the pool; another, cut by the budget.
    assert fresh == [True] * 20 + [False] * 8 + [True] * 8 + [False] * 8 + [True] * 8 + [False] * 8
    made = np.concatenate(whole.queries)[20:28]
    differ = np.array([[(image != original).mean() for original in POOL] for image in made]).min(1)
    assert (differ > 0).all() and (differ <= AREA[1] + 0.1).all()
    dying = FakeBlackBox(60, answer="label", fail_at=4)
    with pytest.raises(ConnectionError):
        steal(dying, [36, 60], attack, pool=POOL, make_model=small, transfer=TransferSet(tmp_path))
    stored = TransferSet(tmp_path)
    again = FakeBlackBox(60, answer="label", paid=dying.paid, start_at=len(stored))
    resumed = steal(again, [36, 60], attack, pool=POOL, make_model=small, transfer=stored)
    assert again.charged == 60 and all(same(a.model, b.model) for a, b in zip(rungs, resumed, strict=True))


def test_when_the_pool_is_used_up_what_is_left_is_erased() -> None:
    attack = ATTACKS.build("black_box_dissector", **{**OPTIONS, "erased": 1.0})
    blackbox = FakeBlackBox(100)
    (rung,) = steal(blackbox, [45], attack, pool=POOL[:30], make_model=small)
    assert rung.queries == blackbox.charged == 45
