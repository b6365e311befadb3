"""What a tracker is, and the set of them that can only warn."""

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
    """Shows results somewhere. It runs in the sweep's driver; it sees finished results and never a running trial."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Take the resolved config of the sweep, once, before any result."""

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Show one finished trial; a trial that was shown before (by a sweep that was interrupted) is not shown twice.

        Args:
            result: The trial's result.
            models: Folders of saved models: ``victim``, and ``substitute-<budget>`` for the rungs.
        """

    def summarize(self, results: Iterable[TrialResult]) -> None:
        """Show all results of the sweep together, once, at the end.

        Args:
            results: Can be gone through several times; they are read from disk on the way.
        """

    def close(self) -> None:
        """Finish what is open."""


class TrackerSet:
    """Several trackers as one, none of which can do harm: what fails in a tracker becomes a warning.

    Args:
        members: The trackers.
        warn: Called with one sentence for each failure.
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
            except Exception as error:  # a tracker's failure of whatever kind must not touch a result
                name, reason = type(tracker).__name__, " ".join(str(error).split())[:300]
                self.warn(f"{name} failed ({type(error).__name__}: {reason}); results are on disk and complete")


def wandb_tracker(config: TrackingConfig, folder: Path, name: str, **more: Any) -> WandbTracker:
    """Return the tracker for W&B that a ``tracking`` section asks for; ``more``: its other parameters."""
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
        warn: Called with one sentence for each failure.
        wandb: The tracker for W&B, if it is wanted; one in this process when None.
    """
    from mea_ray.tracking.files import FilesTracker

    members: list[Tracker] = [FilesTracker(folder)]
    if config.wandb != "disabled":
        members.append(wandb or wandb_tracker(config, folder, name, warn=warn))
    return TrackerSet(members, warn)
