"""How well each statistic separates stolen models from innocent ones: the table from which a default is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from mea_ray.core.errors import DataError


class Separation(BaseModel):
    """One statistic on innocent and on stolen models.

    Attributes:
        statistic: Its name, see ``mea_ray.verification.statistic``.
        innocent: Number of innocent models.
        stolen: Number of stolen, marked models.
        auc: Area under the ROC curve, in [0, 1]; 0.5 is chance.
        tpr_at_0: Part of the stolen models above every innocent one.
        tpr_at_1: Part of the stolen models above a threshold that accuses at most 1% of the innocent ones. With fewer
            than 100 innocent models it equals ``tpr_at_0``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    statistic: str
    innocent: int
    stolen: int
    auc: float
    tpr_at_0: float
    tpr_at_1: float


def separation(statistic: str, innocent: Sequence[float], stolen: Sequence[float]) -> Separation:
    """Measure how well a statistic separates stolen models from innocent ones.

    Args:
        statistic: Its name.
        innocent: Its value on each innocent model, at least one.
        stolen: Its value on each stolen model, at least one; larger speaks for theft.

    Raises:
        DataError: There is no innocent or no stolen model, or a value is not finite.
    """
    values = np.concatenate([np.asarray(innocent, np.float64), np.asarray(stolen, np.float64)])
    if not len(innocent) or not len(stolen) or not np.isfinite(values).all():
        raise DataError(
            f"{statistic}: finite values of at least one innocent and one stolen model are needed, got "
            f"{len(innocent)} and {len(stolen)}: {values.tolist()}"
        )
    # From ranks (Mann-Whitney U): scikit-learn's ROC takes a second and a half to import, in every report.
    above = float(pd.Series(values).rank()[len(innocent) :].sum()) - len(stolen) * (len(stolen) + 1) / 2
    highest = np.sort(values[: len(innocent)])[::-1]
    return Separation(
        statistic=statistic,
        innocent=len(innocent),
        stolen=len(stolen),
        auc=above / (len(innocent) * len(stolen)),
        tpr_at_0=float((values[len(innocent) :] > highest[0]).mean()),
        tpr_at_1=float((values[len(innocent) :] > highest[len(innocent) // 100]).mean()),
    )


def separations(innocent: Sequence[Mapping[str, float]], stolen: Sequence[Mapping[str, float]]) -> list[Separation]:
    """Measure every statistic that all models have, the best first: by TPR at no false accusation, then by AUC."""
    names = set.intersection(*(set(each) for each in (*innocent, *stolen))) if innocent and stolen else set()
    rows = [
        separation(name, [each[name] for each in innocent], [each[name] for each in stolen]) for name in sorted(names)
    ]
    return sorted(rows, key=lambda each: (-each.tpr_at_0, -each.auc))
