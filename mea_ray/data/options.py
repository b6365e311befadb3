"""Ranges of options that several loaders share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

ImageSize = Annotated[int, Field(ge=1, le=4096)]
"""Height and width in pixels."""
Fraction = Annotated[float, Field(gt=0, lt=1)]
"""Fraction of the images, in (0, 1)."""
Count = Annotated[int, Field(ge=1, le=10**9)]
"""A number of images."""
Channels = Literal[1, 3]
"""Grey or colour."""
