"""Regions of images that a network attends to (Grad-CAM), and images with such regions erased."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.core.types import Images, Labels
from mea_ray.training import device as devices
from mea_ray.training.augment import to_float

AREA = (0.02, 0.4)
"""Smallest and largest share of an image's area that is erased, as in random erasing (Zhong et al., 2020)."""
RATIO = (0.3, 3.3)
"""Smallest and largest ratio of the rectangle's height to its width."""


def grad_cam(model: nn.Module, images: Images, labels: Labels) -> npt.NDArray[np.float32]:
    """Return Grad-CAM maps of a class: float32 (N, H, W), not negative, each with a sum of 1.

    The map is relu(sum_k a_k A_k) of the last convolution's channels A_k, where a_k is the mean over positions of the
    gradient of the class's logit. It is resized to the image. A map that is zero everywhere is replaced by a uniform
    one.

    Args:
        model: A network with a convolution; moved to the device of this process, in eval mode.
        images: uint8 (N, C, H, W).
        labels: The classes, int64 (N,).

    References:
        Selvaraju et al., Grad-CAM, ICCV 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2.
    """
    where = devices.device()
    model.to(where).eval()
    last = [module for module in model.modules() if isinstance(module, nn.Conv2d)][-1:]
    if not last:
        return np.full((len(images), *images.shape[2:]), 1 / math.prod(images.shape[2:]), np.float32)
    seen: list[Tensor] = []
    handle = last[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with devices.exact(), torch.enable_grad():
            logits = model(to_float(torch.tensor(images).to(where)).requires_grad_()).float()
            chosen = logits.gather(1, torch.from_numpy(labels).to(where)[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, seen[-1])
    finally:
        handle.remove()
    attention = F.relu((gradient.mean((2, 3), keepdim=True) * seen[-1].detach()).sum(1, keepdim=True))
    attention = F.interpolate(attention.float(), images.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    total = attention.sum((1, 2), keepdim=True)
    uniform = torch.full_like(attention, 1 / attention[0].numel())
    return torch.where(total > 0, attention / total.clamp_min(1e-12), uniform).cpu().numpy()


def erased(images: Images, attention: npt.NDArray[np.float32] | None, generator: np.random.Generator) -> Images:
    """Erase one rectangle of each image, filled with random pixels: uint8 (N, C, H, W).

    Args:
        images: uint8 (N, C, H, W).
        attention: Probability that a pixel is the rectangle's centre, (N, H, W); None makes all pixels equally
            likely.
        generator: Draws area, ratio, centre and pixels.
    """
    count, channels, height, width = images.shape
    changed = images.copy()
    area = generator.uniform(*AREA, size=count) * height * width
    ratio = np.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1]), size=count))
    tall = np.clip(np.round(np.sqrt(area * ratio)), 1, height).astype(np.int64)
    wide = np.clip(np.round(np.sqrt(area / ratio)), 1, width).astype(np.int64)
    places = generator.random((count,))
    if attention is None:
        centres = (places * height * width).astype(np.int64)
    else:
        summed = attention.reshape(count, -1).astype(np.float64).cumsum(1)
        centres = (summed < places[:, None] * summed[:, -1:]).sum(1).clip(max=height * width - 1)
    for image, centre, rows, columns in zip(changed, centres, tall, wide, strict=True):
        top = int(np.clip(centre // width - rows // 2, 0, height - rows))
        left = int(np.clip(centre % width - columns // 2, 0, width - columns))
        noise = generator.integers(0, 256, (channels, rows, columns), dtype=np.uint8)
        image[:, top : top + rows, left : left + columns] = noise
    return changed
