"""The interface of trackers, and a set of trackers whose failures are only warnings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mea_ray.config import TrackingConfig
from mea_ray.results.records import TrialResult

if TYPE_CHECKING:
    from mea_ray.tracking.wandb_tracker import WandbTracker

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Logs results to a tracking system. It runs in the sweep's driver and gets finished results only."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the resolved config of the sweep, once, before any result."""

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Log one finished trial; a trial that was logged before (by an interrupted sweep) is not logged twice.

        Args:
            result: The trial's result.
            models: Folders of saved models: ``victim``, and ``substitute-<budget>`` for the rungs.
        """

    def summarize(self, results: Iterable[TrialResult]) -> None:
        """Log all results of the sweep together, once, at the end.

        Args:
            results: Can be iterated several times; read from disk lazily.
        """

    def close(self) -> None:
        """Finish open runs."""


class TrackerSet:
    """Several trackers as one; a failure of a tracker becomes a warning.

    Args:
        members: The trackers.
        warn: Called with a message for each failure.
    """

    def __init__(self, members: Iterable[Tracker], warn: Callable[[str], None] = logger.warning) -> None:
        self.members, self.warn = list(members), warn

    def log_config(self, config: Mapping[str, Any]) -> None:
        """See ``Tracker.log_config``."""
        self._each(lambda tracker: tracker.log_config(config))

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """See ``Tracker.log``."""
        self._each(lambda tracker: tracker.log(result, models))

    def summarize(self, results: Iterable[TrialResult]) -> None:
        """See ``Tracker.summarize``."""
        self._each(lambda tracker: tracker.summarize(results))

    def close(self) -> None:
        """See ``Tracker.close``."""
        self._each(lambda tracker: tracker.close())

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for tracker in self.members:
            try:
                do(tracker)
            except Exception as error:  # no failure of a tracker may affect a result
                name, reason = type(tracker).__name__, " ".join(str(error).split())[:300]
                self.warn(f"{name} failed ({type(error).__name__}: {reason}); results are on disk and complete")


def wandb_tracker(config: TrackingConfig, folder: Path, name: str, **more: Any) -> WandbTracker:
    """Return the W&B tracker of a ``tracking`` section; ``more``: its other parameters."""
    from mea_ray.tracking.wandb_tracker import WandbTracker

    assert config.wandb != "disabled"
    return WandbTracker(
        folder,
        name,
        mode=config.wandb,
        project=config.project,
        entity=config.entity,
        log_models=config.log_models,
        group=config.group,
        runs_per_minute=config.runs_per_minute,
        **more,
    )


def trackers(
    config: TrackingConfig,
    folder: Path,
    name: str,
    warn: Callable[[str], None] = logger.warning,
    wandb: Tracker | None = None,
) -> TrackerSet:
    """Return the trackers of a sweep.

    Args:
        config: The ``tracking`` section.
        folder: The sweep's folder; files and offline runs go there.
        name: The sweep's name.
        warn: Called with a message for each failure.
        wandb: The W&B tracker to use; None creates one in this process if needed.
    """
    from mea_ray.tracking.files import FilesTracker

    members: list[Tracker] = [FilesTracker(folder)]
    if config.wandb != "disabled":
        members.append(wandb or wandb_tracker(config, folder, name, warn=warn))
    return TrackerSet(members, warn)
