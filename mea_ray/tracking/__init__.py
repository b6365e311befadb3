"""Experiment tracking of finished trials: W&B and files, rendered from ``TrialResult``."""

from __future__ import annotations

from mea_ray.tracking.base import Tracker, TrackerSet, trackers

__all__ = ["Tracker", "TrackerSet", "trackers"]
