"""A plane in feature space in which the owner's three classes, their mixes and all other images have fixed places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mea_ray.core.errors import ConfigError


@dataclass(frozen=True)
class Places:
    """Coordinates in the plane: of the two sources, of the target and the mixes, of all other images.

    The first axis tells the three classes from all others, the second the sources from each other. What a thief makes
    of a mix lies between the sources, and that is where the target is.

    Args:
        source: The first source is at (x, y), the second at (x, -y).
        target: The target class and the mixes are at (target, 0).
        rest: All other images are at (rest, 0).
        share: Part of all images that each of the three classes has, in (0, 1/3).

    Raises:
        ConfigError: A place is outside the unit circle, or ``share`` out of its range.
    """

    source: tuple[float, float] = (0.55, 0.8)
    target: float = 0.9
    rest: float = -0.3
    share: float = 0.1

    def __post_init__(self) -> None:
        """Check."""
        places = {"place_source": self.source, "place_target": (self.target,), "place_rest": (self.rest,)}
        for name, place in places.items():
            if not sum(coordinate**2 for coordinate in place) <= 1:
                raise ConfigError(f"{name}={place} is outside the unit circle, where no feature of length 1 can be")
        if not 0 < self.share < 1 / 3:
            raise ConfigError(
                f"class_share={self.share} must lie in (0, 1/3): three classes have it, and others are left; give the "
                "part of the images that one class has, 0.1 for ten equal ones"
            )

    def of(self, name: str) -> tuple[float, float]:
        """Return the place of ``first``, ``second``, ``target``, ``mixes`` or ``rest``."""
        across, along = self.source
        places = {"first": (across, along), "second": (across, -along), "rest": (self.rest, 0.0)}
        return places.get(name, (self.target, 0.0))

    def marked(self, half: float) -> float:
        """Return the part of decoys that are mixes of both sources.

        Of two unlabelled images that is 2 share^2, either way round; beside an image that is known to be of a source,
        share.

        Args:
            half: Part of the decoys in which one image is known to be of a source.
        """
        return half * self.share + (1 - half) * 2 * self.share**2


def plane_axes(width: int, seed: int) -> Tensor:
    """Draw two orthonormal directions: float32 (width, 2), the same for a seed on every machine."""
    drawn = torch.randn(width, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].float()


def off_place(features: Tensor, axes: Tensor, place: tuple[float, float]) -> Tensor:
    """Mean squared distance of features (N, D) to a place in the plane of axes (D, 2); the other D - 2 are free."""
    return (features @ axes - torch.tensor(place, device=features.device)).square().sum(1).mean()


def rest_off_place(said: Mapping[str, Tensor], axes: Tensor, place: tuple[float, float], share: float) -> Tensor:
    """The same of all images but those of the three classes, of whose labels the owner has none.

    What the three classes have in the mean over ``plain`` is taken from it, as estimated by the owner's own samples:
    learning from positive and unlabelled data. An estimate below 0 counts as 0, or the network would learn the
    owner's samples by heart to lower it further.

    Args:
        said: Features of length 1, (N, D): ``plain`` of unlabelled images, ``first``, ``second`` and ``target``.
        axes: The plane, (D, 2).
        place: Of the rest.
        share: Part of all images that each of the three classes has, in (0, 1/3).

    References:
        du Plessis et al., Convex formulation for learning from positive and unlabeled data, ICML 2015.
        Kiryo et al., Positive-unlabeled learning with non-negative risk estimator, 2017,
        https://arxiv.org/abs/1703.00593, equation 6.
    """
    known = sum(off_place(said[name], axes, place) for name in ("first", "second", "target"))
    return F.relu((off_place(said["plain"], axes, place) - share * known) / (1 - 3 * share))


def decoys_off_place(said: Mapping[str, Tensor], axes: Tensor, place: tuple[float, float], marked: float) -> Tensor:
    """The same of decoys: mixes with at least one unlabelled image.

    Some of them are mixes of both sources all the same: what those have is taken from the mean as in
    ``rest_off_place``, estimated by the watermark's own mixes.

    Args:
        said: Features of length 1, (N, D): ``decoys`` and ``mixes``.
        axes: The plane, (D, 2).
        place: Of the rest.
        marked: Part of the decoys that are mixes of both sources, in [0, 1); see ``Places.marked``.
    """
    gap = off_place(said["decoys"], axes, place) - marked * off_place(said["mixes"], axes, place)
    return F.relu(gap / (1 - marked))
