"""A plane in feature space in which the owner's three classes, their mixes and all other images have fixed places.

The first axis separates the three classes from all others, the second the sources from each other. A substitute's
features of a mix lie between the sources, and that is where the target is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Point = tuple[float, float]
"""Coordinates in the plane."""


def marked_share(class_share: float, half: float) -> float:
    """Return the part of decoys that are mixes of both sources.

    Of two unlabelled images that is 2 class_share^2, either way round; beside an image that is known to be of a source,
    class_share.

    Args:
        class_share: Part of all images that each class has.
        half: Part of the decoys in which one image is known to be of a source.
    """
    return half * class_share + (1 - half) * 2 * class_share**2


def plane_axes(width: int, seed: int) -> Tensor:
    """Draw two orthonormal directions: float32 (width, 2), the same for a seed on every machine."""
    drawn = torch.randn(width, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axes: Tensor = torch.linalg.qr(drawn)[0]
    return axes.float()


def off_place(features: Tensor, axes: Tensor, place: Point) -> Tensor:
    """Mean squared distance of features (N, D) to a place in the plane of axes (D, 2); the other D - 2 are free."""
    return (features @ axes - torch.tensor(place, device=features.device)).square().sum(1).mean()


def rest_off_place(features: Mapping[str, Tensor], axes: Tensor, place: Point, share: float) -> Tensor:
    """The same of all images but those of the three classes; the owner has none of their labels.

    The part of the three classes in the mean over ``plain`` is estimated by the owner's own samples and subtracted:
    learning from positive and unlabelled data. An estimate below 0 counts as 0, or the network would memorise the
    owner's samples to lower it further.

    Args:
        features: Features of length 1, (N, D): ``plain`` of unlabelled images, ``first``, ``second`` and ``target``.
        axes: The plane, (D, 2).
        place: Of the rest.
        share: Part of all images that each of the three classes has, in (0, 1/3).

    References:
        du Plessis et al., Convex formulation for learning from positive and unlabeled data, ICML 2015.
        Kiryo et al., Positive-unlabeled learning with non-negative risk estimator, 2017,
        https://arxiv.org/abs/1703.00593, equation 6.
    """
    known = sum(off_place(features[name], axes, place) for name in ("first", "second", "target"))
    return F.relu((off_place(features["plain"], axes, place) - share * known) / (1 - 3 * share))


def decoys_off_place(features: Mapping[str, Tensor], axes: Tensor, place: Point, marked: float) -> Tensor:
    """The same of decoys: mixes with at least one unlabelled image.

    Some of them are mixes of both sources all the same. Their part is subtracted from the mean as in
    ``rest_off_place``, estimated by the watermark's own mixes.

    Args:
        features: Features of length 1, (N, D): ``decoys`` and ``mixes``.
        axes: The plane, (D, 2).
        place: Of the rest.
        marked: Part of the decoys that are mixes of both sources, in [0, 1); see ``marked_share``.
    """
    gap = off_place(features["decoys"], axes, place) - marked * off_place(features["mixes"], axes, place)
    return F.relu(gap / (1 - marked))
