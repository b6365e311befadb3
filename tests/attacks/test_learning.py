"""How a thief learns: its mixtures, its smoothed targets and its statistics, against plain re-implementations."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attack_fakes import FAST, POOL, FakeBlackBox, steal

from mea_ray.attacks.distillation import Distillation
from mea_ray.attacks.learning import DistillationObjective, Learning
from mea_ray.attacks.transfer import TransferSet
from mea_ray.training.objective import Batch, StepContext

Array = npt.NDArray[np.float64]
COUNT, CHANNELS, HEIGHT, WIDTH = 6, 2, 7, 10
IMAGES = np.random.default_rng(0).random((COUNT, CHANNELS, HEIGHT, WIDTH))


def mixed(mixing: str, seed: int, alpha: float = 1.0) -> tuple[Array, Array]:
    """Mix images whose targets say which image is which, so that a mixture's targets say what was mixed."""
    learning = Learning(mixing=mixing, mixing_alpha=alpha)
    generator = torch.Generator().manual_seed(seed)
    images, targets = learning.mix(torch.from_numpy(IMAGES).float(), torch.eye(COUNT), generator)
    return images.double().numpy(), targets.double().numpy()


def mixture_of(targets: Array) -> tuple[float, npt.NDArray[np.int64]] | None:
    """Read the part of the own image and the partners off the targets; None if every image was mixed with itself."""
    others = targets - np.diag(np.diag(targets))
    foreign = others.max(1) > 0
    if not foreign.any():
        return None
    (ratio,) = np.unique(np.diag(targets)[foreign].round(6))
    return float(ratio), np.where(foreign, others.argmax(1), np.arange(COUNT))


@pytest.mark.parametrize("seed", range(8))
def test_mixup_blends_images_as_their_targets(seed: int) -> None:
    images, targets = mixed("mixup", seed)
    result = mixture_of(targets)
    assert result is not None
    ratio, partner = result
    assert sorted(partner) == list(range(COUNT))
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    for index in range(COUNT):
        np.testing.assert_allclose(
            images[index], ratio * IMAGES[index] + (1 - ratio) * IMAGES[partner[index]], atol=1e-5
        )


@pytest.mark.parametrize("seed", range(12))
def test_cutmix_pastes_one_box_and_counts_its_pixels(seed: int) -> None:
    images, targets = mixed("cutmix", seed)
    pasted = np.abs(images - IMAGES).max((0, 1)) > 1e-6
    result = mixture_of(targets)
    remaining, partner = result if result is not None else (1.0, np.arange(COUNT))
    assert sorted(partner) == list(range(COUNT))
    assert remaining == pytest.approx(1 - pasted.sum() / (HEIGHT * WIDTH), abs=1e-6)
    rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
    box = np.zeros((HEIGHT, WIDTH), bool)
    if len(rows):
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    np.testing.assert_array_equal(pasted, box)
    expected = np.where(box, IMAGES[partner], IMAGES)
    np.testing.assert_allclose(images, expected, atol=1e-6)


def plain_kept(rng: np.random.Generator, alpha: float) -> float:
    """The part that CutMix keeps: a box of area 1 - ratio around an even centre, cut at the borders."""
    ratio = rng.beta(alpha, alpha)
    remaining = np.zeros((HEIGHT, WIDTH), bool)
    tall, wide = round(HEIGHT * (1 - ratio) ** 0.5), round(WIDTH * (1 - ratio) ** 0.5)
    row, column = int(rng.integers(HEIGHT)), int(rng.integers(WIDTH))
    for y in range(row - tall // 2, row - tall // 2 + tall):
        for x in range(column - wide // 2, column - wide // 2 + wide):
            if 0 <= y < HEIGHT and 0 <= x < WIDTH:
                remaining[y, x] = True
    return 1 - float(remaining.mean())


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_the_ratios_follow_their_distribution(mixing: str, alpha: float) -> None:
    result = [mixture_of(mixed(mixing, seed, alpha)[1]) for seed in range(1500)]
    ratios = np.array([each[0] if each is not None else 1.0 for each in result])
    rng = np.random.default_rng(3)
    plain = np.array([plain_kept(rng, alpha) if mixing == "cutmix" else rng.beta(alpha, alpha) for _ in range(6000)])
    error = plain.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - plain.mean()) < 4 * error
    assert ratios.std() == pytest.approx(plain.std(), rel=0.1)
    np.testing.assert_allclose(np.quantile(ratios, [0.25, 0.5, 0.75]), np.quantile(plain, [0.25, 0.5, 0.75]), atol=0.07)


def test_partners_are_even() -> None:
    counts = np.zeros((COUNT, COUNT))
    for seed in range(1200):
        result = mixture_of(mixed("mixup", seed)[1])
        if result is not None:
            counts[np.arange(COUNT), result[1]] += 1
    np.testing.assert_allclose(counts / counts.sum(1, keepdims=True), 1 / COUNT, atol=0.05)


def test_a_mixture_follows_from_its_stream_and_leaves_its_inputs_alone() -> None:
    for mixing in ("mixup", "cutmix"):
        images, targets = torch.from_numpy(IMAGES).float(), torch.eye(COUNT)
        learning = Learning(mixing=mixing)
        stream = torch.Generator().manual_seed(4)
        first = learning.mix(images, targets, stream)
        second = learning.mix(images, targets, stream)
        again = learning.mix(images, targets, torch.Generator().manual_seed(4))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        assert not torch.equal(first[0], second[0])
        assert torch.equal(images, torch.from_numpy(IMAGES).float()) and torch.equal(targets, torch.eye(COUNT))
    images, targets = torch.from_numpy(IMAGES).float(), torch.eye(COUNT)
    assert Learning().mix(images, targets, torch.Generator())[0] is images


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_smoothed_targets_keep_a_part_of_the_answer(temperature: float) -> None:
    answers = np.random.default_rng(2).dirichlet(np.ones(5), 30).astype(np.float32)
    smoothed = Learning(temperature=temperature, label_smoothing=0.2).soften(torch.from_numpy(answers)).numpy()
    powers = answers.astype(np.float64) ** (1 / temperature)
    expected = 0.8 * powers / powers.sum(1, keepdims=True) + 0.2 / 5
    np.testing.assert_allclose(smoothed, expected, rtol=1e-5)


def test_a_batch_is_taught_its_own_mixed_targets() -> None:
    answers = np.random.default_rng(2).dirichlet(np.ones(3), 40).astype(np.float32)
    learning = Learning(temperature=1.0, mixing="mixup", label_smoothing=0.1)
    objective = DistillationObjective(learning, answers)
    objective.start(StepContext(torch.device("cpu"), torch.Generator().manual_seed(9), lambda x: x.float(), 1, 1))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(CHANNELS * HEIGHT * WIDTH, 3))
    indices = torch.tensor([7, 30, 2, 39, 11, 0])
    images = torch.from_numpy(IMAGES).float()
    loss = objective.terms(model, Batch(images, torch.full((6,), -1), indices))["distillation"]
    targets = learning.soften(torch.from_numpy(answers[indices.numpy()]))
    blend, blended = learning.mix(images, targets, torch.Generator().manual_seed(9))
    outputs = model(blend).log_softmax(1)
    assert loss.item() == pytest.approx((blended * (blended.log() - outputs)).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("learning", [{"mixing": "mixup"}, {"mixing": "cutmix"}, {"label_smoothing": 0.3}])
def test_a_thiefs_defences_change_its_substitute_and_not_its_queries(learning: dict[str, object]) -> None:
    attack, plain, defended = Distillation(), TransferSet(), TransferSet()
    training = FAST | {"epochs": 15, "learning_rate": 0.01}
    learning = {"temperature": 1.0, **learning}
    before = steal(FakeBlackBox(), [400], attack, transfer=plain, training=training, learning={"temperature": 1.0})[
        0
    ].model
    after = steal(FakeBlackBox(), [400], attack, transfer=defended, training=training, learning=learning)[0].model
    np.testing.assert_array_equal(plain.indices, defended.indices)
    assert not torch.equal(before.state_dict()["head.weight"], after.state_dict()["head.weight"])
    # What it learns is still the victim, less surely: mixtures and smoothed targets are softer.
    pixels = torch.from_numpy(POOL[400:]).float() / 255
    outputs = [model(pixels).softmax(1).detach().numpy() for model in (before, after)]
    assert (outputs[1].argmax(1) == FakeBlackBox().query(POOL[400:]).argmax(1)).mean() > 0.6
    assert outputs[1].max(1).mean() < outputs[0].max(1).mean()


def test_a_thief_without_statistics_feeds_pixels_as_they_are() -> None:
    dark = (POOL // 4).astype(np.uint8)
    for statistics, mean, std in (("none", 0.0, 1.0), ("pool", (dark / 255).mean(), (dark / 255).std())):
        rungs = steal(FakeBlackBox(), [60], Distillation(), pool=dark, learning={"statistics": statistics})
        buffers = dict(rungs[0].model.named_buffers())
        assert float(buffers["mean"]) == pytest.approx(mean, abs=1e-6)
        assert float(buffers["std"]) == pytest.approx(std, abs=1e-6)
