"""Outputs of networks on images, and the metrics of every table and curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mea_ray.core.errors import DataError
from mea_ray.core.types import Images, ImageSet
from mea_ray.models.base import ImageModel
from mea_ray.training import device as devices
from mea_ray.training.augment import to_float

Predictions = npt.NDArray[np.integer[Any]]


def logits(
    model: nn.Module, images: Images, *, batch_size: int = 512, device: torch.device | None = None
) -> npt.NDArray[np.float32]:
    """Compute the logits of images, in float32 and eval mode, in batches of a fixed size.

    Args:
        model: The network. Its device and mode are restored afterwards.
        images: uint8, (N, C, H, W), N >= 1.
        batch_size: Images per forward pass.
        device: Where to compute; None takes the device of this process.

    Returns:
        float32, (N, classes).

    Raises:
        DataError: The images are not uint8 (N, C, H, W), or there are none.
    """
    return _outputs(model, model, images, batch_size, device)


def features(
    model: ImageModel, images: Images, *, batch_size: int = 512, device: torch.device | None = None
) -> npt.NDArray[np.float32]:
    """Compute the features of images: float32, (N, feature_size); arguments and errors as ``logits``."""
    return _outputs(model, model.features, images, batch_size, device)


def _outputs(
    model: nn.Module,
    compute: Callable[[Tensor], Tensor],
    images: Images,
    batch_size: int,
    device: torch.device | None,
) -> npt.NDArray[np.float32]:
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise DataError(f"expected at least one image, uint8 (N, C, H, W); got {images.dtype} {images.shape}")
    where = device if device is not None else devices.device()
    home = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), where)
    modes = {module: module.training for module in model.modules()}
    model.to(where).eval()
    try:
        # Channels-last images make a forward pass on a CPU 1.5 times as fast, whatever the layout of the weights.
        nhwc = bool(getattr(model, "channels_last", True))
        with devices.retain_freed_memory(), torch.inference_mode(), torch.autocast(where.type, enabled=False):
            parts = [
                compute(to_float(torch.tensor(images[start : start + batch_size]).to(where), nhwc)).float().cpu()
                for start in range(0, len(images), batch_size)
            ]
    finally:
        model.to(home)
        for module, training in modes.items():
            module.training = training
    return torch.cat(parts).numpy()


def probabilities(
    model: nn.Module, images: Images, *, batch_size: int = 512, device: torch.device | None = None
) -> npt.NDArray[np.float32]:
    """Return the softmax of ``logits``: float32, (N, classes), rows sum to 1."""
    values = logits(model, images, batch_size=batch_size, device=device)
    return torch.from_numpy(values).softmax(1).numpy()


def predictions(
    model: nn.Module, images: Images, *, batch_size: int = 512, device: torch.device | None = None
) -> npt.NDArray[np.int64]:
    """Return the class of the largest of ``logits``: int64, (N,)."""
    classes: npt.NDArray[np.int64] = logits(model, images, batch_size=batch_size, device=device).argmax(1)
    return classes.astype(np.int64)


def accuracy(predicted: Predictions, labels: Predictions) -> float:
    """Return the fraction of predictions that equal the label, in [0, 1].

    Raises:
        DataError: The two differ in shape or are empty.
    """
    if predicted.shape != labels.shape or not predicted.size:
        raise DataError(
            f"expected as many predictions as labels, at least one; got {predicted.shape} and {labels.shape}"
        )
    return float((predicted == labels).mean())


def fidelity(a: Predictions, b: Predictions) -> float:
    """Return the fraction of images that two models classify alike, in [0, 1]; same errors as ``accuracy``."""
    return accuracy(a, b)


def chance(test: ImageSet) -> float:
    """Return the accuracy of always predicting the most frequent class, in [0, 1].

    Raises:
        DataError: There are no images.
    """
    if not len(test):
        raise DataError("there are no test images to measure an accuracy on")
    return float(np.bincount(test.labels).max() / len(test))


def calibration_error(probabilities: npt.NDArray[np.floating[Any]], labels: Predictions, bins: int = 15) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over bins of confidence, weighted by size.

    Args:
        probabilities: (N, classes), rows sum to 1, N >= 1.
        labels: (N,).
        bins: Number of equal bins of (0, 1]. A confidence on a border belongs to the bin below it.

    References:
        Guo et al., On Calibration of Modern Neural Networks, 2017, https://arxiv.org/abs/1706.04599, equation 3.

    Raises:
        DataError: The shapes do not fit, there are no images, or ``bins`` is below 1.
    """
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),) or not len(labels) or bins < 1:
        raise DataError(
            f"expected probabilities (N, classes) and labels (N,), N >= 1, and bins >= 1; got "
            f"{probabilities.shape}, {labels.shape}, bins={bins}"
        )
    confidence = probabilities.max(1).astype(np.float64)
    gap = (probabilities.argmax(1) == labels) - confidence
    which = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    # sum over bins of (n_b / N) * |mean gap of b| is the sum of |summed gap of b| / N
    return float(np.abs(np.bincount(which, weights=gap, minlength=bins)).sum() / len(labels))
