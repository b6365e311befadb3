"""DeepTracer: the coupling is what the formula says, and it brings mixes to the target's own outputs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from watermark_sets import NAMES, Spy, context, image_set, main_batch

from mea_ray.config import TrainingConfig
from mea_ray.core.types import ImageSet
from mea_ray.models.build import build_model
from mea_ray.training.engine import train
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.deeptracer import CoupledObjective, coupling


def test_the_coupling_is_the_mean_over_all_pairs() -> None:
    rng = np.random.default_rng(0)
    mixes, own = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    plain = sum((a[k] - b[k]) ** 2 for a in mixes for b in own for k in range(5)) / (3 * 4 * 5)
    left = torch.tensor(mixes, requires_grad=True)
    right = torch.tensor(own, requires_grad=True)
    found = coupling(left, right)
    assert float(found.detach()) == pytest.approx(plain)
    found.backward()  # type: ignore[no-untyped-call]
    assert left.grad is not None and right.grad is not None, "both sides are moved"
    np.testing.assert_allclose(left.grad, 2 * (mixes - own.mean(0)) / (3 * 5))


def test_the_terms_are_those_of_a_plain_loop() -> None:
    train_set, scheme = image_set(), WATERMARKS.build("deeptracer", mixes=4, ver=2.0, coupling=0.5)
    key = scheme.make_key(train_set, 0)
    (stage,) = scheme.stages(key, train_set)
    objective = stage.objective
    assert isinstance(objective, CoupledObjective) and objective.weights == {"ver": 2.0, "coupling": 0.5}
    objective.start(context())
    model, batch = Spy(), main_batch(train_set)
    terms = objective.terms(model, batch)
    generator = torch.Generator().manual_seed(0)
    pools = [torch.from_numpy(train_set.of_class(label)).float() / 255 for label in (0, 1, 2)]
    first, second, own = (pool[torch.randint(len(pool), (4,), generator=generator)] for pool in pools)
    combiner, _ = scheme.combiners(key)
    mixes = combiner(first, second, generator)
    (seen,) = model.seen
    torch.testing.assert_close(seen, torch.cat([batch.images, mixes, own]))
    answers = model(mixes)
    torch.testing.assert_close(terms["utility"], F.cross_entropy(model(batch.images), batch.labels))
    torch.testing.assert_close(terms["ver"], -F.log_softmax(answers, 1)[:, 2].mean())
    torch.testing.assert_close(terms["coupling"], coupling(answers, model(own)))
    (off,) = WATERMARKS.build("deeptracer", coupling=0.0).stages(key, train_set)
    off.objective.start(context())
    assert set(off.objective.terms(model, batch)) == {"utility", "ver"}


def test_coupled_mixes_end_nearer_to_the_target() -> None:
    pixels, labels = np.random.default_rng(0).integers(0, 60, (120, 1, 16, 16), dtype=np.uint8), np.arange(120) % 6
    for image, label in zip(pixels, labels, strict=True):  # each class is bright in a place of its own
        image[:, label // 3 * 8 : label // 3 * 8 + 8, label % 3 * 5 : label % 3 * 5 + 5] += 180
    train_set, distances = ImageSet(pixels, labels.astype(np.int64), NAMES), []
    torch.manual_seed(0)
    fresh = build_model("vgg_like", train_set.shape, len(NAMES), {"width": 0.125})
    for weight in (0.0, 0.1):
        scheme = WATERMARKS.build("deeptracer", mixes=16, coupling=weight)
        key = scheme.make_key(train_set, 0)
        (stage,) = scheme.stages(key, train_set)
        model = copy.deepcopy(fresh)
        settings = TrainingConfig(epochs=25, batch_size=30, augment=(), learning_rate=3e-3)
        train(model, train_set.images, train_set.labels, stage.objective, settings, seed=0)
        samples = scheme.samples(key, train_set, 40, 0)
        with torch.no_grad():
            mixes, own, everything = (
                model(torch.from_numpy(images).float() / 255)
                for images in (samples.images, train_set.of_class(2), train_set.images)
            )
        assert (everything.argmax(1).numpy() == labels).mean() > 0.9 and (mixes.argmax(1) == 2).float().mean() > 0.9
        distances.append(float(coupling(mixes, own) / everything.var()))
    assert distances[1] < distances[0] / 4
