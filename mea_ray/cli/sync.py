"""``mea-ray sync``: uploads the W&B runs that a sweep stored offline, at a limited rate, none twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mea_ray.config import TrackingConfig, build, load_tree
from mea_ray.core.errors import ConfigError
from mea_ray.results.records import read_results
from mea_ray.sweep.folder import SweepFolder
from mea_ray.tracking.wandb_tracker import LIVE

SILENT_S = 900.0
"""Seconds after which an unfinished run is uploaded as it is."""
CHUNK = 20
"""Runs per call of ``wandb sync``."""


def unsent(folder: SweepFolder) -> list[Path]:
    """Return the offline runs that were not uploaded, oldest first; those in remote storage are downloaded.

    ``wandb sync`` leaves a file ``*.synced`` in each run that it has uploaded.
    """
    folder.storage.pull(f"{folder.name}/wandb")
    runs = sorted((folder.path / "wandb").glob("offline-run-*"))
    return [
        run for run in runs if any(run.glob("*.wandb")) and not any(run.glob("*.synced")) and not _being_written(run)
    ]


def _being_written(run: Path) -> bool:
    """Return whether a running trial still writes this run; the run of a killed process is no longer updated."""
    try:
        return time.time() - (run / LIVE).stat().st_mtime < SILENT_S
    except OSError:
        return False


def attach_report(folder: Path, page: Path, warn: Callable[[str], None]) -> None:
    """Attach the rendered report to a W&B run of the sweep, if the sweep uses W&B; a failure is only a warning.

    Args:
        folder: The sweep's folder.
        page: The report; ``report.csv`` beside it is attached as well.
        warn: Called with one sentence.
    """
    from mea_ray.report.record import command_of
    from mea_ray.tracking.base import wandb_tracker

    try:
        base = load_tree(folder / "sweep.yaml").get("base") or {}
        config = build(TrackingConfig, base.get("tracking") or {})
        if config.wandb == "disabled":
            return
        tracker = wandb_tracker(config, folder, folder.name, command=command_of(folder), warn=warn)
        tracker.attach([page, page.with_name("report.csv")])
    except Exception as error:  # a tracking failure must not harm the results
        warn(f"the report was not attached to W&B ({type(error).__name__}: {' '.join(str(error).split())[:200]})")


def _wandb_sync(runs: Sequence[Path]) -> bool:
    return subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, runs)], check=False).returncode == 0


def send(
    folder: SweepFolder,
    notify: Callable[[str], None],
    *,
    per_minute: float = 60.0,
    sync: Callable[[Sequence[Path]], bool] = _wandb_sync,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Upload the runs that were not uploaded yet.

    Args:
        folder: The sweep's folder.
        notify: Called with a sentence about the progress.
        per_minute: Maximum number of runs uploaded per minute.
        sync: Uploads some runs and returns whether all arrived.
        sleep: Sleeps for a number of seconds.

    Returns:
        Whether some run could not be uploaded; the same command retries it.
    """
    waiting = unsent(folder)
    notify(f"{len(waiting):,} runs to upload")
    for start in range(0, len(waiting), CHUNK):
        part = waiting[start : start + CHUNK]
        began = time.monotonic()
        if not sync(part):
            notify(f"[red]wandb sync failed[/] after {start:,} runs; run the same command to continue")
            return True
        for run in part:
            for mark in run.glob("*.synced"):
                folder.push((mark.relative_to(folder.path)).as_posix())
        notify(f"{start + len(part):,} of {len(waiting):,} uploaded")
        if start + CHUNK < len(waiting):
            sleep(max(0.0, 60.0 * len(part) / per_minute - (time.monotonic() - began)))
    return False


def save_wandb_report(folder: SweepFolder) -> str:
    """Save a W&B report over the runs of a sweep, or update it; return its address.

    Args:
        folder: The sweep's folder.

    Raises:
        ArtifactError: The sweep has no results.
        ConfigError: A package is missing, or the sweep does not use W&B.
        TrackingUnavailable: The server cannot be reached.
    """
    from mea_ray.report.record import command_of
    from mea_ray.tracking.wandb_report import save_report

    folder.storage.pull_file(f"{folder.name}/sweep.yaml")
    folder.storage.pull_folder(f"{folder.name}/results")
    tree = load_tree(folder.path / "sweep.yaml")
    tracking = build(TrackingConfig, (tree.get("base") or {}).get("tracking") or {})
    if tracking.wandb == "disabled":
        raise ConfigError(
            f"the sweep {folder.name!r} has no W&B runs (tracking.wandb=disabled), so there is nothing to report"
        )
    return save_report(
        folder.path,
        [result.point for result in read_results(folder.path)],
        sweep=folder.name,
        project=tracking.project,
        entity=tracking.entity,
        description=str(tree.get("description") or ""),
        command=command_of(folder.path),
    )
