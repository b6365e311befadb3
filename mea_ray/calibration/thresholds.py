"""The threshold of a proof, from many innocent models, with the rate at which it accuses one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import norm

from mea_ray.core.errors import DataError
from mea_ray.verification.proportions import wilson

Known = npt.NDArray[np.float64]


class Threshold(BaseModel):
    """A threshold on WSR and what it does.

    Attributes:
        name: Where it comes from: ``paper``, ``largest``, or ``normal``.
        value: WSR above it infringes.
        accused: Innocent models, of those measured, that it accuses.
        innocent: Innocent models measured.
        accusation_rate: ``accused`` of ``innocent``.
        accusation_high: Upper end of its Wilson interval (95 %): what the few models leave possible.
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
    """Return the paper's threshold, the largest rate of an innocent model, and that of a normal fitted to them.

    Args:
        innocent: WSR of each innocent model, in [0, 1]; at least two.
        marked: WSR of each watermarked model.
        paper: The fixed threshold.
        significance: Part of innocent models that the normal's threshold accuses, in (0, 1).

    Raises:
        DataError: There are fewer than two innocent models or no watermarked one.

    References:
        Lukas et al., WRT, S&P 2022, section IV (the normal); where all rates are equal it is that rate.
    """
    if len(innocent) < 2 or not len(marked):
        raise DataError(
            f"a calibration needs 2 innocent models and a watermarked one, got {len(innocent)} and {len(marked)}"
        )
    known = np.asarray(innocent, float)
    fitted = float(known.mean() + norm.ppf(1 - significance) * known.std(ddof=1))
    values = {"paper": paper, "largest": float(known.max()), "normal": max(0.0, fitted)}
    return [_threshold(name, value, known, np.asarray(marked, float)) for name, value in values.items()]


def _threshold(name: str, value: float, innocent: Known, marked: Known) -> Threshold:
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
