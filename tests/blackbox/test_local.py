"""The in-process black box: what it answers, what it charges, and that neighbours do not matter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch

from mea_ray.blackbox.ledger import Ledger, RateLimit
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.passes import FixedShapePasses
from mea_ray.blackbox.policies import LabelOnly, Probabilities
from mea_ray.core.errors import BadQuery, ConfigError, OverBudget, UnknownClient
from mea_ray.core.types import BlackBox
from mea_ray.models import MODELS
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model


def _model(name: str = "vgg_like", shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10) -> ImageModel:
    torch.manual_seed(0)
    model = build_model(name, shape, classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def _images(n: int, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def test_answers_are_the_softmax_of_the_model() -> None:
    model = _model()
    box = LocalBlackBox(model)
    assert isinstance(box, BlackBox)
    assert (box.classes, box.image_shape, box.remaining) == (10, (1, 8, 8), None)
    images = _images(70)
    with torch.inference_mode():
        expected = torch.softmax(model(torch.from_numpy(images).float() / 255), 1).numpy()
    answers = box.query(images)
    assert answers.dtype == np.float32
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-6)
    assert np.array_equal(box.query(images.astype(np.float32) / np.float32(255)), answers)


def test_a_thiefs_autocast_does_not_reach_the_victim() -> None:
    images = _images(9)
    expected = LocalBlackBox(_model()).query(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = LocalBlackBox(_model()).query(images)
    assert np.array_equal(answers, expected)


@pytest.mark.parametrize(
    ("name", "pass_images"), [(name, 5) for name in MODELS.names()] + [("vgg_like", 32), ("cnn9", 32), ("alexnet", 32)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_the_same_whatever_it_is_merged_with(
    name: str, pass_images: int, threads: int, request: pytest.FixtureRequest
) -> None:
    shape = (3, 16, 16)
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    passes = FixedShapePasses(_model(name, shape), shape, Probabilities(), pass_images=pass_images)
    images = _images(2 * pass_images + 3, shape)
    whole = passes.answer([images])[0]
    g = np.random.default_rng(1)
    for _ in range(2):
        order = g.permutation(len(images))
        assert np.array_equal(passes.answer([images[order]])[0], whole[order])
    cuts = [1, 4, 4 + pass_images]
    parts = np.split(images, cuts)
    parts[1] = parts[1].astype(np.float32) / np.float32(255)  # another client sends floats
    for part, answer in zip(np.split(whole, cuts), passes.answer(parts), strict=True):
        assert np.array_equal(part, answer)
    assert np.array_equal(passes.answer([images[3:4]])[0], whole[3:4])
    assert torch.get_num_threads() == threads, "the caller's threads are its own"


def test_charges_every_query_but_not_the_same_one_after_a_crash() -> None:
    ledger = Ledger(None)
    ledger.register("thief", 100)
    box = LocalBlackBox(_model(), LabelOnly(), ledger)
    images = _images(40)
    first = box.query(images)
    assert set(np.unique(first)) == {0.0, 1.0}
    assert ledger.charged("thief") == 40
    box.query(images)
    assert ledger.charged("thief") == 80, "an image asked again on purpose is charged again"
    resumed = LocalBlackBox(_model(), LabelOnly(), ledger, start_at=40)
    assert np.array_equal(resumed.query(images), first)
    assert ledger.charged("thief") == 80, "the query that a crash interrupted is not"
    with pytest.raises(OverBudget):
        resumed.query(images)
    assert (ledger.charged("thief"), resumed.remaining) == (80, 20)


def test_bad_queries_cost_nothing() -> None:
    box = LocalBlackBox(_model(), max_query_images=10)
    images: Any
    for images in (_images(0), _images(11), _images(3)[:, :, :4], _images(3).astype(np.float64)):
        with pytest.raises(BadQuery):
            box.query(images)
    assert box.ledger.charged("thief") == 0
    with pytest.raises(UnknownClient):
        LocalBlackBox(_model(), None, box.ledger, "stranger")


def test_waits_when_it_is_too_fast() -> None:
    now = [0.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds + 1e-9

    ledger = Ledger(None, clock=lambda: now[0])
    ledger.register("thief", None, RateLimit(10.0, 5))
    box = LocalBlackBox(_model(), None, ledger, sleep=sleep)
    box.query(_images(5))
    box.query(_images(5, seed=1))
    assert waits == [pytest.approx(0.5)]


def test_four_threads_on_one_client_are_charged_and_counted_exactly() -> None:
    ledger = Ledger(None)
    ledger.register("thief", 4 * 25 * 3)
    box = LocalBlackBox(_model(), None, ledger, pass_images=4)
    queries = [[_images(3, seed=25 * thread + number) for number in range(25)] for thread in range(4)]
    queries[1] = queries[0]  # the same images in two threads are two queries
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda mine: [box.query(images) for images in mine], queries))
    assert box.asked == ledger.charged("thief") == 300 and box.remaining == 0
    assert box.log.of("thief").requests == 100
    alone = LocalBlackBox(_model(), pass_images=4)
    for mine, got in zip(queries, answers, strict=True):
        for images, answer in zip(mine, got, strict=True):
            assert np.array_equal(alone.query(images), answer)


def test_a_client_cannot_begin_before_its_first_image() -> None:
    with pytest.raises(ConfigError, match="start_at=-1"):
        LocalBlackBox(_model(), start_at=-1)


@pytest.mark.parametrize(("name", "shape"), [("vgg_like", (1, 12, 12)), ("resnet18", (3, 16, 16))])
def test_small_passes_change_no_bit(name: str, shape: tuple[int, int, int]) -> None:
    model = _model(name, shape)
    plain = FixedShapePasses(model, shape, Probabilities(), pass_images=16)
    small = FixedShapePasses(model, shape, Probabilities(), pass_images=16, small_passes=True)
    images = np.random.default_rng(1).integers(0, 256, (21, *shape), dtype=np.uint8)
    whole = plain.answer([images])[0]
    for count in (1, 2, 3, 5, 9, 16, 21):
        assert np.array_equal(small.answer([images[:count]])[0], whole[:count]), count
    assert small.sizes[-1] == 16 and small.sizes == sorted(small.sizes)
    small.passes = small.rows = 0
    small.answer([images[:1]])
    assert (small.passes, small.rows) == (1, small.sizes[0])


class _Batched(torch.nn.Module):
    """A network whose answer depends on the size of the pass, as with some libraries its last bits do."""

    shape, classes, feature_size = (1, 4, 4), 2, 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2] + 1e-6 * (len(x) < 8)

    features = forward


def test_a_pass_size_with_other_bits_is_not_used() -> None:
    passes = FixedShapePasses(cast(Any, _Batched()), (1, 4, 4), Probabilities(), pass_images=16, small_passes=True)
    assert passes.sizes == [8, 16]


def test_a_lone_image_is_computed_alone_with_the_bits_of_a_full_pass() -> None:
    """Some layers of these networks give one row other bits than many; they alone compute more rows."""
    for name, shape in (("vgg_like", (3, 32, 32)), ("resnet18", (3, 16, 16))):
        model = _model(name, shape)
        passes = FixedShapePasses(model, shape, Probabilities(), pass_images=8, small_passes=True)
        plain = FixedShapePasses(model, shape, Probabilities(), pass_images=8)
        images = np.random.default_rng(2).integers(0, 256, (8, *shape), dtype=np.uint8)
        whole = plain.answer([images])[0]
        assert passes.sizes == [1, 2, 4, 8], name
        for place in range(8):
            assert np.array_equal(passes.answer([images[place : place + 1]])[0], whole[place : place + 1]), place
