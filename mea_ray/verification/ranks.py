"""The p-value of a suspect by its rank among reference models: exact for any statistic, whatever its distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import DataError

Values = Sequence[float] | npt.NDArray[np.floating]


@dataclass(frozen=True)
class Rank:
    """The rank of a suspect's statistic among those of reference models or keys.

    Attributes:
        at_least: References whose statistic is at least the suspect's. A tie counts against the owner.
        references: Number of references.
        what: What is ranked, in the plural: ``models`` or ``keys``.

    Raises:
        DataError: ``at_least`` does not lie in [0, references].
    """

    at_least: int
    references: int
    what: str = "models"

    def __post_init__(self) -> None:
        if not 0 <= self.at_least <= self.references:
            raise DataError(f"at_least={self.at_least} must lie between 0 and the {self.references} references")

    @property
    def position(self) -> int:
        """Rank of the suspect among all, from 1; ties rank the suspect last."""
        return self.at_least + 1

    @property
    def total(self) -> int:
        """Number of references and the suspect together."""
        return self.references + 1

    @property
    def p_value(self) -> float:
        """Probability of this rank or a better one if suspect and references are exchangeable; in (0, 1]."""
        return self.position / self.total

    @property
    def floor(self) -> float:
        """Smallest p-value that this number of references allows."""
        return 1 / self.total

    def sentence(self) -> str:
        """Return the rank as text: ``rank 2 of 21 models (p = 0.095)``; for the best rank that p cannot be smaller."""
        p = f"p cannot be below {self.floor:.2g}" if self.position == 1 else f"p = {self.p_value:.2g}"
        return f"rank {self.position:,} of {self.total:,} {self.what} ({p})"


def rank_among(value: float, references: Values, what: str = "models") -> Rank:
    """Rank a suspect's statistic among those of independent reference models.

    Args:
        value: The suspect's statistic. Larger values speak for theft.
        references: The same statistic of each reference model. With none, the p-value is 1.
        what: What is ranked, in the plural.

    Returns:
        The rank, with p = (1 + number of references >= value) / (number of references + 1).

    Raises:
        DataError: A statistic is not a number.

    References:
        B. V. North, D. Curtis and P. C. Sham, A note on the calculation of empirical P values from Monte Carlo
        procedures, Am. J. Hum. Genet. 71 (2002).
    """
    known = np.asarray(references, np.float64)
    if np.isnan(value) or np.isnan(known).any():
        raise DataError(f"a statistic is not a number: the suspect's is {value}, the references' are {known.tolist()}")
    return Rank(int((known >= value).sum()), known.size, what)
