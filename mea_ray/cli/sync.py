"""``mea-ray sync``: the W&B runs that a sweep stored offline, sent at a limited rate, none twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mea_ray.sweep.folder import SweepFolder

CHUNK = 20
"""Runs of one call of ``wandb sync``."""


def unsent(folder: SweepFolder) -> list[Path]:
    """Return the offline runs that were not sent, the oldest first; those of a remote storage are fetched.

    ``wandb sync`` leaves a file ``*.synced`` in what it has sent.
    """
    folder.storage.pull(f"{folder.name}/wandb")
    runs = sorted((folder.path / "wandb").glob("offline-run-*"))
    return [run for run in runs if any(run.glob("*.wandb")) and not any(run.glob("*.synced"))]


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
    """Send what was not sent.

    Args:
        folder: The sweep's folder.
        notify: Called with a sentence about the progress.
        per_minute: Runs sent in a minute, at most.
        sync: Sends some runs and says whether all arrived.
        sleep: Waits so many seconds.

    Returns:
        Whether something could not be sent; the same command tries it again.
    """
    waiting = unsent(folder)
    notify(f"{len(waiting):,} runs to send")
    for start in range(0, len(waiting), CHUNK):
        part = waiting[start : start + CHUNK]
        began = time.monotonic()
        if not sync(part):
            notify(f"[red]wandb sync failed[/] after {start:,} runs; the same command goes on")
            return True
        for run in part:
            for mark in run.glob("*.synced"):
                folder.push((mark.relative_to(folder.path)).as_posix())
        notify(f"{start + len(part):,} of {len(waiting):,} sent")
        if start + CHUNK < len(waiting):
            sleep(max(0.0, 60.0 * len(part) / per_minute - (time.monotonic() - began)))
    return False
