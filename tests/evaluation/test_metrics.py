from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mea_ray.core.errors import DataError
from mea_ray.evaluation import metrics


class Probe(nn.Module):
    """Linear, and remembers the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 3)
        self.frozen = nn.Dropout(0.5).eval()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and not self.training
        self.sizes.append(len(x))
        logits: torch.Tensor = self.frozen(self.linear(x.flatten(1)))
        return logits


def make_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, 3, 4, 4), dtype=np.uint8)


def test_logits_are_the_models_in_batches() -> None:
    model, images = Probe().train(), make_images(11)
    model.frozen.eval()
    images.setflags(write=False)
    got = metrics.logits(model, images, batch_size=4)
    assert model.sizes == [4, 4, 3] and got.dtype == np.float32
    expected = (
        images.reshape(11, -1) / 255.0 @ model.linear.weight.detach().numpy().T + model.linear.bias.detach().numpy()
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert model.training and model.linear.training and not model.frozen.training  # modes are given back
    assert torch.linalg.vector_norm(model.linear(torch.ones(1, 48))).requires_grad


def test_probabilities_and_predictions_follow_from_logits() -> None:
    model, images = Probe(), make_images(9)
    values = metrics.logits(model, images).astype(np.float64)
    exponent = np.exp(values - values.max(1, keepdims=True))
    np.testing.assert_allclose(
        metrics.probabilities(model, images), exponent / exponent.sum(1, keepdims=True), rtol=1e-5
    )
    predicted = metrics.predictions(model, images)
    assert predicted.dtype == np.int64 and (predicted == values.argmax(1)).all()


def test_a_lower_precision_around_the_call_changes_nothing() -> None:
    model, images = Probe(), make_images(9)
    expected = metrics.logits(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (metrics.logits(model, images) == expected).all()


@pytest.mark.parametrize("images", [make_images(0), make_images(3).astype(np.float32), make_images(3)[0]])
def test_logits_of_no_images_are_refused(images: np.ndarray) -> None:
    with pytest.raises(DataError, match="uint8"):
        metrics.logits(Probe(), images)


def test_accuracy_and_fidelity_count() -> None:
    a, b = np.array([0, 1, 2, 3]), np.array([0, 1, 0, 0])
    assert metrics.accuracy(a, b) == metrics.fidelity(a, b) == 0.5
    for bad in (a[:3], a[:0]):
        with pytest.raises(DataError):
            metrics.accuracy(bad, b if len(bad) else bad)


def test_calibration_error_is_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.4), size=500)
    labels = rng.integers(4, size=500)
    expected = 0.0
    for low in range(15):
        confidence = probabilities.max(1)
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            right = (probabilities.argmax(1) == labels)[inside].mean()
            expected += inside.mean() * abs(right - confidence[inside].mean())
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_known_cases() -> None:
    sure = np.eye(2)[np.zeros(10, int)]
    assert metrics.calibration_error(sure, np.zeros(10, int)) == 0
    assert metrics.calibration_error(sure, np.ones(10, int)) == 1
    half = np.full((10, 2), 0.5)
    assert metrics.calibration_error(half, np.array([0, 1] * 5)) == pytest.approx(0)
    with pytest.raises(DataError):
        metrics.calibration_error(sure, np.zeros(3, int))
