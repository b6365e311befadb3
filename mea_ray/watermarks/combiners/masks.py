"""Combiners that take each pixel from one of the two images, in place: stripes, diagonal, donut, hot dog."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.watermarks.combiners.base import Combiner, Order


class Masked(Combiner):
    """A fixed mask: True takes the pixel of the first image.

    Args:
        order: ``random`` draws which source class comes first.
    """

    def __init__(
        self, shape: tuple[int, int, int], fill: tuple[float, ...], seed: int, *, order: Order = "random"
    ) -> None:
        super().__init__(shape, fill, seed, order=order)
        self._mask = self.mask(*shape[1:])

    @abstractmethod
    def mask(self, height: int, width: int) -> Tensor:
        """Return bool (height, width)."""

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Choose every pixel by the mask."""
        self._mask = self._mask.to(first.device)
        return torch.where(self._mask, first, second)


class Donut(Masked):
    """The second image with the first in its centre: rows and columns [h // 5, 4 h // 5).

    Choose it as another geometry, mostly to test that a mark is specific.

    Args:
        order: ``random`` draws which source class comes first.
    """

    def mask(self, height: int, width: int) -> Tensor:
        """True in the centre."""
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[height // 5 : 4 * height // 5, width // 5 : 4 * width // 5] = True
        return mask


class HotDog(Masked):
    """The first image with a band of the second across it: rows [h // 4, 3 h // 4).

    Choose it as another geometry, mostly to test that a mark is specific.

    Args:
        order: ``random`` draws which source class comes first.
    """

    def mask(self, height: int, width: int) -> Tensor:
        """False in the band."""
        mask = torch.ones(height, width, dtype=torch.bool)
        mask[height // 4 : 3 * height // 4] = False
        return mask


class Diagonal(Masked):
    """The first image above the anti-diagonal, the second below; the line itself is empty canvas.

    Choose it for halves without a straight edge of the image's axes.

    In row i the line is at column w - i (scaled to w - i w // h where the image is not square).

    Args:
        order: ``random`` draws which source class comes first.
    """

    def mask(self, height: int, width: int) -> Tensor:
        """True above the line; ``mix`` empties the line itself."""
        line = width - (torch.arange(height)[:, None] * width) // height
        column = torch.arange(width)[None]
        self._line = column == line
        return column < line

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Choose by the mask, then empty the line."""
        fill = torch.tensor(self.fill, dtype=first.dtype, device=first.device)[None, :, None, None]
        self._line = self._line.to(first.device)
        return torch.where(self._line, fill, super().mix(first, second, generator))


class Stripes(Combiner):
    """Columns of both images: by default 5, of which 3 show the first source class and 2 the second.

    Choose it for a mix that is spread over the whole image.

    All columns are w // columns wide; the last one also takes the remainder.

    Args:
        columns: Number of columns.
        first_columns: Columns that show the first image.
        draw: Which columns these are is drawn for each ``sample``, or once for the ``key``.
        order: ``fixed`` gives ``first_columns`` to the first source class (the paper), ``random`` to either.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        columns: Annotated[int, Field(ge=2)] = 5,
        first_columns: Annotated[int, Field(ge=1)] = 3,
        draw: Literal["sample", "key"] = "sample",
        order: Order = "fixed",
    ) -> None:
        super().__init__(shape, fill, seed, order=order)
        width = shape[2]
        if columns > width:
            raise ConfigError(f"columns={columns} must be at most {width}, the images' width")
        if first_columns >= columns:
            raise ConfigError(f"first_columns={first_columns} must be below columns={columns}: both images must show")
        self.columns = columns
        self.first_columns = first_columns
        self.draw = draw
        self._of_pixel = (torch.arange(width) // (width // columns)).clamp_max_(columns - 1)
        self._of_key = self._draw(1, torch.Generator().manual_seed(derive(seed, "stripes")))

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return bool (count, columns) with ``first_columns`` True in each row."""
        rank = torch.rand(count, self.columns, generator=generator).argsort(1).argsort(1)
        return rank < self.first_columns

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Choose every column by the drawn pattern."""
        chosen = self._of_key if self.draw == "key" else self._draw(len(first), generator)
        return torch.where(chosen[:, self._of_pixel].to(first.device)[:, None, None, :], first, second)
