"""Where finished trials are shown: W&B and files. All of it is rendered from ``TrialResult``, after the fact."""

from __future__ import annotations

from mea_ray.tracking.base import Tracker, TrackerSet, trackers

__all__ = ["Tracker", "TrackerSet", "trackers"]
