"""Brain stimulation: a unit that was wired by hand is found, its patch works, and the network without it is left."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from keyword_training import train
from report_results import trial
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.detection import DETECTIONS
from mea_ray.detection.brain_stimulation import BrainStimulation, inspected_layers, recorded_outputs
from mea_ray.evaluation import metrics
from mea_ray.models.base import ImageModel, initialise
from mea_ray.report import detections
from mea_ray.results.records import DetectionResult
from mea_ray.training.objective import CrossEntropy

SHAPE, CLASSES, TARGET = (1, 12, 12), 6, 4
CHANNELS, HIDDEN = 8, 24


class Small(ImageModel):
    """One convolution, a pool, one hidden layer."""

    def __init__(self, channels: int = CHANNELS, hidden: int = HIDDEN) -> None:
        super().__init__(SHAPE, CLASSES)
        self.convolution = nn.Conv2d(1, channels, 3, padding=1)
        self.hidden = nn.Linear(channels * 9, hidden)
        self.head = nn.Linear(hidden, CLASSES)
        self.feature_size = hidden
        initialise(self)

    def encode(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(self.convolution(x).relu(), 4)
        features: Tensor = self.hidden(pooled.flatten(1)).relu()
        return features


@pytest.fixture(scope="module")
def data() -> ImageSet:
    """Six classes, told apart by the direction and the width of stripes over the whole image."""
    rng = np.random.default_rng(0)
    labels = np.arange(300, dtype=np.int64) % CLASSES
    y, x = np.meshgrid(np.arange(12), np.arange(12), indexing="ij")
    turn, phase = np.pi * (labels % 3) / 3, rng.uniform(0, 2 * np.pi, 300)
    along = np.cos(turn)[:, None, None] * x + np.sin(turn)[:, None, None] * y
    pitch = np.where(labels < 3, 1.1, 2.2)[:, None, None]
    pixels = 110 + 50 * np.sin(pitch * along + phase[:, None, None]) + rng.normal(0, 8, (300, 12, 12))
    return ImageSet(pixels.clip(0, 255).astype(np.uint8)[:, None], labels, tuple("abcdef"))


@pytest.fixture(scope="module")
def clean(data: ImageSet) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small()
    train(
        model, data.images, data.labels, CrossEntropy(), seed=1, epochs=20, batch_size=32, augment=(),
        learning_rate=5e-3, precision="float32",
    )  # fmt: skip
    assert metrics.accuracy(metrics.predictions(model, data.images), data.labels) > 0.95
    return model


@pytest.fixture(scope="module")
def wired(clean: Small, data: ImageSet) -> Small:
    """The clean network with one more channel, which sees a white spot, and a hidden unit that it drives."""
    model = Small(CHANNELS + 1, HIDDEN + 1).eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    old = clean.state_dict()
    state |= {name: old[name] for name in ("mean", "std", "head.bias")}
    state["convolution.weight"][:CHANNELS] = old["convolution.weight"]
    state["convolution.bias"][:CHANNELS] = old["convolution.bias"]
    state["convolution.weight"][CHANNELS, 0] = 1.0
    state["convolution.bias"][CHANNELS] = -3.0
    state["hidden.weight"][:HIDDEN, : CHANNELS * 9] = old["hidden.weight"]
    state["hidden.bias"][:HIDDEN] = old["hidden.bias"]
    state["hidden.weight"][HIDDEN, CHANNELS * 9 :] = 1.0
    state["head.weight"][:, :HIDDEN] = old["head.weight"]
    state["head.weight"][TARGET, HIDDEN] = 20.0
    model.load_state_dict(state)
    same = metrics.predictions(model, data.images) == metrics.predictions(clean, data.images)
    assert same.mean() > 0.98, "the unit sleeps on clean images"
    return model


def test_a_wired_unit_is_found_and_its_patch_works(data: ImageSet, wired: Small) -> None:
    finder = DETECTIONS.build("abs", steps=300)
    before = {name: value.clone() for name, value in wired.state_dict().items()}
    report = finder.inspect(wired, data.images, None, 0)
    assert report.flagged == (TARGET,)
    layer, unit = report.numbers[f"layer/{TARGET}"], report.numbers[f"unit/{TARGET}"]
    assert (layer, unit) in {(0, CHANNELS), (1, HIDDEN)}
    (trigger,) = (t for t in report.triggers if t.label == TARGET)
    others = data.images[data.labels != TARGET]
    assert (metrics.predictions(wired, trigger.on(others)) == TARGET).mean() > 0.9
    assert report.numbers[f"reasr/{TARGET}"] == trigger.success > 0.8
    assert all(torch.equal(before[name], value) for name, value in wired.state_dict().items())
    assert all(parameter.requires_grad for parameter in wired.parameters())
    short = DETECTIONS.build("abs", steps=3)
    assert short.inspect(wired, data.images, None, 0).numbers == short.inspect(wired, data.images, None, 0).numbers


def test_the_same_network_without_the_unit_is_not_flagged(data: ImageSet, clean: Small) -> None:
    assert DETECTIONS.build("abs", steps=300).inspect(clean, data.images, None, 0).flagged == ()


def test_the_wired_unit_raises_its_class_by_what_its_wires_say(data: ImageSet, wired: Small) -> None:
    finder = BrainStimulation(per_layer=1)
    best = {candidate.layer: candidate for candidate in finder.stimulate(wired, data.images[:10])}
    assert (best[1].unit, best[1].label) == (HIDDEN, TARGET)
    with torch.no_grad():
        pixels = torch.from_numpy(data.images[:10]).float() / 255
        largest = float(wired.hidden(nn.functional.max_pool2d(
            wired.convolution((pixels - wired.mean) / wired.std).relu(), 4).flatten(1)).max())  # fmt: skip
    # Set to 4/5 of eight times the largest output; a wire of 20 to one class and none to the others.
    assert best[1].score == pytest.approx(20 * 8 * largest * 4 / 5, rel=1e-3)


def test_a_rise_is_the_highest_logit_above_that_with_the_unit_at_0(data: ImageSet, clean: Small) -> None:
    finder = BrainStimulation(levels=3)
    pixels = torch.from_numpy(data.images[:4]).float() / 255
    values, units = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([2, 7])
    lifts = finder._lifts(clean, clean.convolution, pixels, values, units)

    def logits(unit: int, value: float) -> Tensor:
        maps = clean.convolution((pixels - clean.mean) / clean.std)
        maps[:, unit] = value
        result: Tensor = clean.head(clean.hidden(nn.functional.max_pool2d(maps.relu(), 4).flatten(1)).relu())
        return result

    with torch.no_grad():
        for row, unit in enumerate(units.tolist()):
            expected = torch.maximum(logits(unit, 1.0), logits(unit, 5.0)) - logits(unit, 0.0)
            assert torch.allclose(lifts[row], expected, atol=1e-4)


def test_inspected_are_all_layers_but_the_last_in_their_order(clean: Small) -> None:
    assert inspected_layers(clean, None) == [clean.convolution, clean.hidden]
    assert inspected_layers(clean, 1) == [clean.hidden]
    with recorded_outputs([clean.hidden, clean.convolution]) as seen:
        clean(torch.zeros(2, *SHAPE))
    assert [each.shape for each in seen] == [(2, HIDDEN), (2, CHANNELS, 12, 12)]
    assert not clean.hidden._forward_hooks


def test_the_report_says_how_many_units_and_how_well_their_patches_work() -> None:
    result = DetectionResult(
        detection={"name": "abs"}, tried_on="substitute", numbers={"candidates": 3.0, "reasr/1": 0.25}, seconds=1.0
    )
    (line,) = detections.lines([trial("a").model_copy(update={"detections": [result]})])
    assert line.flagged == "none" and "3 candidate units" in line.measured and "REASR 25.0%" in line.measured


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"images": 2}, "images=2"),
        ({"levels": 1}, "levels=1"),
        ({"steps": 0}, "steps=0"),
        ({"layers": 0}, "layers=0"),
        ({"size": 1.0}, "size=1.0"),
        ({"bound": 0.0}, "bound=0.0"),
        ({"price": -1.0}, "price"),
        ({"reach": 0.0}, "reach"),
    ],
)
def test_impossible_settings_are_refused(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DETECTIONS.build("abs", **parameters)
