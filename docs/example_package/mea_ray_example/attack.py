"""An attack that looks twice where the victim is unsure."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief


class Shifted(QueryAttack):
    """Query the pool, and once more, shifted by a few pixels, the images that the victim is least sure of.

    Args:
        batch: Images of the pool in one step.
        share: Share of them that is queried again.
        pixels: Pixels that these are shifted to the right.
    """

    def __init__(
        self,
        *,
        batch: Annotated[int, Field(ge=1)] = 50,
        share: Annotated[float, Field(ge=0, le=1)] = 0.2,
        pixels: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        self.batch, self.share, self.pixels = batch, share, pixels

    def queries(self, thief: Thief) -> Queries:
        """Yield positions in the pool, then images of our own; each ``yield`` returns the answers."""
        order = thief.random_order()
        for start in range(0, len(order), self.batch):
            positions = order[start : start + self.batch]
            answers = yield positions
            unsure = np.argsort(answers.max(axis=1), kind="stable")[: round(self.share * len(positions))]
            if len(unsure):
                yield np.roll(thief.pool[positions[unsure]], self.pixels, axis=3)
