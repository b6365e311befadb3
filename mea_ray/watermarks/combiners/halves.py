"""Crop-and-paste: a band of one image beside a band of the other."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mea_ray.core.errors import ConfigError
from mea_ray.watermarks.combiners.base import REFERENCE_SIZE, Combiner, Order

Offsets = Literal["random", "fixed"]
Jitter = Annotated[int, Field(ge=0, lt=REFERENCE_SIZE // 2)]


def uniform_to(high: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an integer from {0, ..., high[k] - 1} for each k, int64 (N,); ``high`` at least 1."""
    return (torch.rand(high.shape, generator=generator, dtype=torch.float64) * high).long()


def paste_rows(first: Tensor, second: Tensor, cut: Tensor, start_first: Tensor, start_second: Tensor) -> Tensor:
    """Rows [0, cut) from ``first`` starting at its row ``start_first``, the rest from ``second`` at ``start_second``.

    Args:
        first: (N, C, H, W).
        second: (N, C, H, W).
        cut: int64 (N,), rows taken from ``first``.
        start_first: int64 (N,).
        start_second: int64 (N,).
    """
    count, channels, height, width = first.shape
    row = torch.arange(height)[None]
    above = row < cut[:, None]
    index = torch.where(above, start_first[:, None] + row, start_second[:, None] + row - cut[:, None])
    index = index.to(first.device)[:, None, :, None].expand(count, channels, height, width)
    return torch.where(above.to(first.device)[:, None, :, None], first.gather(2, index), second.gather(2, index))


class CropPaste(Combiner):
    """Half of one image beside half of the other (the paper's default).

    Choose it for the paper's default.

    Along the axis that is cut, of length h: j uniform in {-jitter, ..., jitter}, cut = h // 2 + j; the first ``cut``
    rows show the first image from a row uniform in {0, ..., h - cut - 1}, the others the second from a row uniform in
    {0, ..., cut - 1}. These are the ranges of the authors' code (``utils/mixer.py``, HalfMixer), which never reach the
    last row.

    Args:
        orientation: Direction of the cut: ``horizontal`` puts one half on top of the other (the authors' code),
            ``vertical`` side by side (the paper's text), ``random`` draws for each sample.
        jitter: Largest shift of the cut, in pixels of a 32-pixel image; scaled to other sizes.
        offsets: ``random`` crops each half anywhere, ``fixed`` leaves it where it was in its image.
        order: ``random`` draws which source class comes first.
    """

    share = 0.5
    layouts = ("rows", "columns")

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        orientation: Literal["horizontal", "vertical", "random"] = "horizontal",
        jitter: Jitter = 3,
        offsets: Offsets = "random",
        order: Order = "random",
    ) -> None:
        super().__init__(shape, fill, seed, order=order)
        if min(shape[1:]) < 2:
            raise ConfigError(f"images of {shape[1]} x {shape[2]} pixels cannot be halved; at least 2 x 2 are needed")
        self.orientation = orientation
        self.jitter = jitter
        self.offsets = offsets

    @property
    def kinds(self) -> frozenset[str]:
        """Rows, columns, or both."""
        rows, columns = self.layouts
        by_orientation = {"horizontal": {rows}, "vertical": {columns}, "random": {rows, columns}}
        return frozenset(by_orientation[self.orientation])

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Paste along the drawn axis."""
        if self.orientation == "horizontal":
            return self._rows(first, second, generator)
        columns = self._rows(first.transpose(2, 3), second.transpose(2, 3), generator).transpose(2, 3)
        if self.orientation == "vertical":
            return columns.contiguous()
        flat = (torch.rand(len(first), generator=generator) < 0.5).to(first.device)[:, None, None, None]
        return torch.where(flat, self._rows(first, second, generator), columns)

    def _rows(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        count, size = len(first), first.shape[2]
        middle = min(max(int(size * self.share), 1), size - 1)
        reach = min(round(self.jitter * size / REFERENCE_SIZE), middle - 1, size - middle - 1)
        cut = middle + torch.randint(-reach, reach + 1, (count,), generator=generator)
        if self.offsets == "fixed":
            return paste_rows(first, second, cut, torch.zeros_like(cut), cut)
        return paste_rows(first, second, cut, uniform_to(size - cut, generator), uniform_to(cut, generator))


class TopBottom(CropPaste):
    """Crop-and-paste, always one half on top of the other.

    Choose it for halves that are always one on top of the other.

    Args:
        jitter: Largest shift of the cut, in pixels of a 32-pixel image.
        offsets: ``random`` crops each half anywhere, ``fixed`` leaves it in place.
        order: ``random`` draws which source class comes first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        jitter: Jitter = 3,
        offsets: Offsets = "random",
        order: Order = "random",
    ) -> None:
        super().__init__(shape, fill, seed, orientation="horizontal", jitter=jitter, offsets=offsets, order=order)


class LeftRight(CropPaste):
    """Crop-and-paste, always side by side: what the authors' code calls both "Vertical" and "RatioMix".

    Choose it for halves that are always side by side, as in the authors' code.

    Args:
        jitter: Largest shift of the cut, in pixels of a 32-pixel image.
        offsets: ``random`` crops each half anywhere, ``fixed`` leaves it in place.
        order: ``random`` draws which source class comes first.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        jitter: Jitter = 3,
        offsets: Offsets = "random",
        order: Order = "random",
    ) -> None:
        super().__init__(shape, fill, seed, orientation="vertical", jitter=jitter, offsets=offsets, order=order)


class Ratio(CropPaste):
    """Side by side at 3 : 7, as the name of the authors' RatioMixer suggests (their code cuts in the middle).

    Choose it for unequal parts, which the name of the authors' RatioMixer suggests.

    Args:
        jitter: Largest shift of the cut, in pixels of a 32-pixel image.
        share: Part of the width that the first image gets.
        order: ``random`` draws which source class comes first.
    """

    layouts = ("ratio_rows", "ratio_columns")

    def __init__(
        self,
        shape: tuple[int, int, int],
        fill: tuple[float, ...],
        seed: int,
        *,
        jitter: Jitter = 3,
        share: Annotated[float, Field(gt=0, lt=1)] = 0.3,
        order: Order = "random",
    ) -> None:
        super().__init__(shape, fill, seed, orientation="vertical", jitter=jitter, order=order)
        self.share = share
