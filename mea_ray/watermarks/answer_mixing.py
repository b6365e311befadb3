"""How far an answer may be moved towards another one before its class changes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Wide = npt.NDArray[np.float64]
MARGIN = 0.01
"""Least lead of the top class that a change leaves, in the unit of what is mixed: probability, or nats of logits."""


def heaviest(own: Wide, other: Wide, margin: float = MARGIN) -> Wide:
    """Return the largest weight w in [0, 1] at which (1 - w) own + w other keeps the top class, float64 (N,).

    Args:
        own: (N, classes).
        other: (classes,), or (N, classes).
        margin: Least lead of the top class that w > 0 leaves. Where the lead is smaller from the start, w is 0 unless
            the change widens it.
    """
    rows, top = np.arange(len(own)), own.argmax(1)
    others = np.broadcast_to(other, own.shape)
    lead = own[rows, top][:, None] - own
    drift = others[rows, top][:, None] - others
    # The lead over a class at weight w is (1 - w) lead + w drift: a line that falls to the margin at `bound`.
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = np.where(drift < margin, (lead - margin) / (lead - drift), 1.0)
    bound[(lead < margin) & (drift < lead)] = 0.0
    bound[rows, top] = 1.0
    share: Wide = np.clip(bound, 0.0, 1.0).min(1)
    return share
