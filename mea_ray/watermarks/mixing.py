"""How watermark samples are mixed: the settings, and the pools and geometries that a training step draws from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mea_ray.config.components import CombinerChoice
from mea_ray.core.errors import ConfigError
from mea_ray.core.settings import Settings
from mea_ray.core.types import Images
from mea_ray.training.objective import StepContext
from mea_ray.watermarks.combiners import COMBINERS
from mea_ray.watermarks.combiners.base import Combiner

AUTHORS_GEOMETRIES = ("top_bottom", "left_right", "diagonal", "donut", "hotdog")
"""The geometries of the authors' code of MEA-Defender."""
NOMINAL_SHAPE = (3, 32, 32)
"""Settings are checked for images of this shape before the data are known."""

Geometry = tuple[str, dict[str, Any]]
"""Name and options of a combiner."""


class Mixing(Settings):
    """How two images are mixed into one sample."""

    combiner: CombinerChoice = Field(
        CombinerChoice(name="crop_paste"), description="How a watermark sample is mixed, with the combiner's options."
    )
    adverse: tuple[CombinerChoice, ...] | None = Field(
        None,
        min_length=1,
        description="The other geometries, those of L_eva and of WFPR; null takes the authors' (both halves, "
        "diagonal, donut, hot dog) without those that the combiner itself makes.",
    )
    space: Literal["pixel", "normalised"] = Field(
        "pixel",
        description="Empty canvas is black (pixel) or of the training images' mean colour (normalised, as in the "
        "authors' code, which mixes after normalisation).",
    )

    def geometries(self) -> tuple[Geometry, ...]:
        """Return the other geometries.

        Raises:
            ConfigError: One of them is named twice, is a combiner only, or makes the same mixes as the combiner.
        """
        made = build_combiner(self.combiner.name, self.combiner.params).kinds
        if self.adverse is None:
            # The halves among them move their cut as far as the watermark's own do.
            jitter = {name: self.combiner.params[name] for name in ("jitter",) if name in self.combiner.params}
            default = [(name, options_of(name, jitter)) for name in AUTHORS_GEOMETRIES]
            return tuple(each for each in default if not build_combiner(*each).kinds & made)
        chosen = tuple((each.name, each.params) for each in self.adverse)
        names = [name for name, _ in chosen]
        if len(set(names)) != len(names):
            raise ConfigError(f"mixing.adverse={names} must name each geometry once")
        for name, options in chosen:
            if name == "autoencoder":
                raise ConfigError("mixing.adverse: 'autoencoder' is a combiner only; it is trained for the key")
            if build_combiner(name, options).kinds & made:
                raise ConfigError(
                    f"mixing.adverse: {name!r} makes the same mixes as the combiner {self.combiner.name!r} "
                    f"{self.combiner.params}; leave it out, or change the combiner"
                )
        return chosen


def options_of(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a combiner: those given that it has, and its defaults."""
    known = {parameter.name for parameter in COMBINERS.parameters(name)}
    return COMBINERS.check(name, {key: value for key, value in given.items() if key in known})


def build_combiner(
    name: str,
    options: Mapping[str, Any],
    shape: tuple[int, int, int] = NOMINAL_SHAPE,
    fill: tuple[float, ...] | None = None,
    seed: int = 0,
) -> Combiner:
    """Build a combiner.

    Args:
        name: In the table of combiners.
        options: Its options.
        shape: (channels, height, width) of an image.
        fill: Colour of empty canvas, one value in [0, 1] a channel; None is black.
        seed: Seed of what it draws once for a key.

    Raises:
        ConfigError: There is no such combiner, it has no such option, or it does not fit the images.
    """
    combiner: Combiner = COMBINERS.build(name, shape, fill or (0.0,) * shape[0], seed, **options)
    return combiner


class SourcePool:
    """The images of some classes on the training device, as uint8.

    Args:
        *classes: uint8 (N, C, H, W) of each class.
        augment: Whether a drawn image is augmented as the main batch is, or only scaled to [0, 1].
    """

    def __init__(self, *classes: Images, augment: bool) -> None:
        self._pools = [torch.from_numpy(images) for images in classes]
        self._augment = augment

    def start(self, context: StepContext) -> None:
        """Move the images to the device."""
        self._context = context
        self._pools = [pool.to(context.device) for pool in self._pools]

    def draw(self, count: int) -> tuple[Tensor, ...]:
        """Draw ``count`` images of each class with replacement: for each float32 (count, C, H, W) in [0, 1]."""
        generator, device = self._context.generator, self._context.device
        rows = [pool[torch.randint(len(pool), (count,), generator=generator).to(device)] for pool in self._pools]
        drawn = torch.cat(rows)
        images = self._context.augment(drawn) if self._augment else drawn.float() / 255
        return torch.split(images, count)


class Geometries:
    """Several geometries that share a step's differently mixed samples evenly.

    Args:
        combiners: One for each geometry.
    """

    def __init__(self, combiners: Sequence[Combiner]) -> None:
        self.combiners = list(combiners)
        self.turn = 0
        """Calls so far."""

    def __call__(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Mix pair k with geometry k mod G; where G does not divide the pairs, the surplus goes round in turn."""
        kinds = len(self.combiners)
        mixed = []
        for place, combiner in enumerate(self.combiners):
            rows = slice((place + self.turn) % kinds, None, kinds)
            if len(first[rows]):
                mixed.append(combiner(first[rows], second[rows], generator))
        self.turn += 1
        return torch.cat(mixed)
