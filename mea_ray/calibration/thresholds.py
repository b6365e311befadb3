"""Thresholds on the watermark success rate from many innocent models, with the rate at which each accuses one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm

from mea_ray.core.errors import DataError
from mea_ray.verification.proportions import wilson

Rates = npt.NDArray[np.float64]


class Threshold(BaseModel):
    """A threshold on WSR and the errors it makes.

    Attributes:
        name: How it was set: ``paper``, ``largest``, or ``normal``.
        value: A model with a WSR above it is accused.
        accused: Number of innocent models that it accuses.
        innocent: Number of innocent models measured.
        accusation_rate: ``accused`` divided by ``innocent``.
        accusation_high: Upper end of the 95 % Wilson interval of ``accusation_rate``.
        recognised: Part of the watermarked models that it recognises.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    value: float = Field(ge=0)
    accused: int
    innocent: int
    accusation_rate: float
    accusation_high: float
    recognised: float


def thresholds(
    innocent: Sequence[float], marked: Sequence[float], *, paper: float = 0.3, significance: float = 0.05
) -> list[Threshold]:
    """Return three thresholds: the paper's, the largest innocent rate, and a quantile of a normal distribution.

    Args:
        innocent: WSR of each innocent model, in [0, 1]; at least two.
        marked: WSR of each watermarked model, in [0, 1]; at least one.
        paper: The paper's fixed threshold.
        significance: Part of innocent models above the normal's threshold, in (0, 1). If all innocent rates are equal,
            the threshold is that rate.

    Raises:
        DataError: There are fewer than two innocent models, or no watermarked one.

    References:
        Lukas et al., WRT, S&P 2022, section IV (the normal distribution).
    """
    if len(innocent) < 2 or not len(marked):
        raise DataError(
            f"a calibration needs 2 innocent models and a watermarked one, got {len(innocent)} and {len(marked)}"
        )
    known = np.asarray(innocent, float)
    fitted = float(known.mean() + norm.ppf(1 - significance) * known.std(ddof=1))
    values = {"paper": paper, "largest": float(known.max()), "normal": max(0.0, fitted)}
    return [_threshold(name, value, known, np.asarray(marked, float)) for name, value in values.items()]


def _threshold(name: str, value: float, innocent: Rates, marked: Rates) -> Threshold:
    accused = int((innocent > value).sum())
    return Threshold(
        name=name,
        value=value,
        accused=accused,
        innocent=len(innocent),
        accusation_rate=accused / len(innocent),
        accusation_high=wilson(accused, len(innocent))[1],
        recognised=float((marked > value).mean()),
    )
