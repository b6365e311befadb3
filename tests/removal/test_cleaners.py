"""Overwriting, Feature Shift Tuning, attention distillation and unlearning: what each minimises, and what it does."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from watermark_sets import context

from mea_ray.config import TrainingConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.evaluation.triggers import Trigger
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.removal import REMOVALS
from mea_ray.removal.attention_distillation import AttentionMaps, attention, convolutions
from mea_ray.removal.base import Prospect, ThiefData, agreement, labelled, last_layer
from mea_ray.removal.feature_shift import ShiftedHead
from mea_ray.removal.overwriting import halves, second_key
from mea_ray.removal.unlearning import patched, smallest
from mea_ray.removal.wrong_mixes import wrong_mixes
from mea_ray.training.objective import Batch, Objective

SHAPE = (3, 12, 12)
MAKE = partial(build_model, "vgg_like", SHAPE, 3, {"width": 0.125})


def network(seed: int = 0) -> ImageModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MAKE().eval()


def thief() -> ThiefData:
    """Sixty images whose class is the brightest channel."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = rng.integers(0, 90, (60, *SHAPE), dtype=np.uint8)
    pixels[np.arange(60), labels] += 150
    training = TrainingConfig(epochs=20, batch_size=16, augment=(), learning_rate=2e-3, precision="float32")
    return ThiefData(pixels, np.eye(3, dtype=np.float32)[labels], MAKE, training)


THIEF = thief()
BATCH = Batch(torch.from_numpy(THIEF.images[:12]).float() / 255, torch.from_numpy(THIEF.labels[:12]), torch.arange(12))


def terms(objective: Objective, model: nn.Module) -> dict[str, torch.Tensor]:
    objective.start(context())
    return objective.terms(model, BATCH)


@pytest.fixture(scope="module")
def trained() -> ImageModel:
    """A network that knows the three classes."""
    removal = REMOVALS.build("fine_tuning", epochs=20, learning_rate=2e-3)
    model: ImageModel = removal.remove(network(), THIEF, 0)
    assert agreement(model, THIEF) > 0.95
    return model


def test_the_shifted_head_turns_from_the_old_one_and_keeps_its_norm(trained: ImageModel) -> None:
    assert isinstance(trained.head, nn.Linear)
    old = trained.head.weight.detach().clone()
    result = terms(ShiftedHead(old, 0.3), trained)
    plain = F.cross_entropy(trained(BATCH.images), BATCH.labels)
    assert float(result["utility"].detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    assert float(result["away"].detach()) == pytest.approx(0.3 * float((old**2).sum()), rel=1e-5)
    removal = REMOVALS.build("feature_shift", alpha=0.2, epochs=6, learning_rate=5e-3)
    shifted = removal.remove(trained, THIEF, 1)
    head = last_layer(shifted).weight.detach()
    assert float(head.norm()) == pytest.approx(float(old.norm()), rel=1e-4)
    without = REMOVALS.build("feature_shift", alpha=0.0, epochs=6, learning_rate=5e-3).remove(trained, THIEF, 1)
    assert float((head * old).sum()) < float((last_layer(without).weight.detach() * old).sum())
    assert torch.equal(trained.head.weight, old), "the suspect itself is left alone"
    assert agreement(shifted, THIEF) > 0.8


def test_an_attention_map_is_the_normalised_sum_of_squares() -> None:
    activations = torch.randn((2, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    for image, result in zip(activations.numpy(), attention(activations).numpy(), strict=True):
        plain = np.array([sum(channel.flat[place] ** 2 for channel in image) for place in range(4)])
        np.testing.assert_allclose(result, plain / np.sqrt((plain**2).sum()), rtol=1e-5)


def test_attention_is_compared_on_the_last_convolutions() -> None:
    model, teacher = network(0), network(1)
    result = terms(AttentionMaps(teacher, 10.0, 2), model)
    apart = 0.0
    remaining: list[list[torch.Tensor]] = [[], []]
    for net, into in zip((model, teacher), remaining, strict=True):
        for layer in convolutions(net)[-2:]:
            handle = layer.register_forward_hook(lambda _m, _i, out, into=into: into.append(out))
            net(BATCH.images)
            handle.remove()
    for mine, other in zip(*remaining, strict=True):
        apart += float((attention(mine) - attention(other)).square().mean().detach())
    assert apart > 0 and float(result["attention"].detach()) == pytest.approx(apart, rel=1e-4)
    assert float(terms(AttentionMaps(network(0), 10.0, 2), model)["attention"].detach()) == pytest.approx(0, abs=1e-9)


def test_attention_distillation_keeps_the_task_and_refuses_too_few_layers(trained: ImageModel) -> None:
    removal = REMOVALS.build("attention_distillation", teacher_epochs=1, epochs=2, learning_rate=1e-3, layers=2)
    assert agreement(removal.remove(trained, THIEF, 0), THIEF) > 0.9
    with torch.device("meta"):
        prospect = Prospect(60, MAKE(), MAKE(), THIEF.training)
    with pytest.raises(ConfigError, match="layers=99"):
        REMOVALS.build("attention_distillation", layers=99).check(prospect)


def test_a_second_key_is_drawn_from_the_classes_at_hand_and_learnt(trained: ImageModel) -> None:
    clean = labelled(THIEF, 3)
    first, second, target = second_key(clean, 4)
    assert len({first, second, target}) == 3
    mixes = halves(clean, (first, second, target), 40, 0)
    tops = {image[:, :6].tobytes() for image in clean.of_class(first)}
    bottoms = {image[:, 6:].tobytes() for image in clean.of_class(second)}
    assert all(mix[:, :6].tobytes() in tops and mix[:, 6:].tobytes() in bottoms for mix in mixes)
    overwritten = REMOVALS.build("overwriting", share=1.0, epochs=12, learning_rate=2e-3).remove(trained, THIEF, 7)
    from mea_ray.core.seeding import derive

    key = second_key(clean, derive(7, "key"))
    hits = metrics.predictions(overwritten, halves(clean, key, 60, 5)) == key[2]
    before = metrics.predictions(trained, halves(clean, key, 60, 5)) == key[2]
    assert hits.mean() > before.mean() + 0.5 and agreement(overwritten, THIEF) > 0.9


def trigger(label: int, norm: float, success: float = 1.0) -> Trigger:
    mask = np.zeros((1, 12, 12), np.float32)
    mask.flat[:1] = norm
    return Trigger(label, mask, np.ones(SHAPE, np.float32), success)


def test_the_trigger_that_stands_out_is_unlearnt() -> None:
    result = [trigger(0, 5.0), trigger(1, 5.2), trigger(2, 0.4), trigger(3, 5.1), trigger(4, 0.1, success=0.2)]
    chosen = smallest(result, 0.99)
    assert chosen is not None and chosen.label == 2, "a smaller one that does not work is none"
    assert smallest([trigger(0, 1.0, success=0.5)], 0.99) is None
    two = smallest([trigger(0, 3.0), trigger(1, 2.0)], 0.99)
    assert two is not None and two.label == 1, "too few for an index: the smallest"


def test_triggered_images_keep_their_own_class_and_the_backdoor_goes() -> None:
    clean = labelled(THIEF, 3)
    mask = np.zeros((1, 12, 12), np.float32)
    mask[:, :4, :4] = 1
    square = Trigger(1, mask, np.zeros(SHAPE, np.float32), 1.0)
    made = patched(clean, square, 0.2, 0)
    changed = (made.images != clean.images).any((1, 2, 3))
    assert changed.sum() == 12 and (clean.labels[changed] != 1).all() and np.array_equal(made.labels, clean.labels)
    assert (made.images[changed][:, :, :4, :4] == 0).all()
    poisoned = ImageSet(
        np.concatenate([clean.images, square.on(clean.images)]),
        np.concatenate([clean.labels, np.ones(60, np.int64)]),
        clean.class_names,
    )
    from mea_ray.removal.base import tune

    backdoored = tune(network(), poisoned, THIEF, 0, epochs=40, learning_rate=2e-3)
    others = square.on(clean.images[clean.labels != 1])
    before = (metrics.predictions(backdoored, others) == 1).mean()
    after = (
        metrics.predictions(tune(backdoored, patched(clean, square, 0.5, 1), THIEF, 0, epochs=20), others) == 1
    ).mean()
    assert before > 0.8 and after < before - 0.5


@pytest.mark.parametrize("named", [1, 2])
def test_an_api_that_named_too_few_classes_ends_no_removal(trained: ImageModel, named: int) -> None:
    """It is known only after the thief has paid, so that his trial goes on."""
    clean = labelled(THIEF, 3)
    poor = clean.take(np.flatnonzero(clean.labels < named))
    first, second, target = second_key(poor, 0)
    assert {first, second} <= set(range(named)) and target not in {first, second}
    assert len({first, second}) == named
    assert len(halves(poor, (first, second, target), 5, 0)) == 5
    mixes, labels = wrong_mixes(poor, 6, 0)
    assert len(mixes) == 6 and (labels >= named if named == 2 else labels > 0).all()
