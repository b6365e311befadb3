"""Only one driver at a time runs a sweep, on any machine: two would pay for the same answers."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

from mea_ray.core.errors import ConfigError
from mea_ray.storage import process
from mea_ray.storage.lease import Lease
from mea_ray.storage.remote import Storage

LEASES = "artifacts/leases"


@contextlib.contextmanager
def only_driver(
    storage: Storage, sweep: str, notify: Callable[[str], None], *, beat_s: float | None = None
) -> Iterator[Lease]:
    """Hold the lease on a sweep while the block runs.

    A driver that was killed on this machine is replaced immediately; one on another machine after ten missed
    heartbeats. A driver that was paused for longer, and replaced, is interrupted as by Ctrl-C when it continues.

    Args:
        storage: The sweep's storage.
        sweep: Name of the sweep.
        notify: Called with a message when this driver has to wait, or has lost the lease.
        beat_s: Seconds between heartbeats; None means 2 on a disk, 5 in an object store.

    Raises:
        ConfigError: Another driver runs the sweep.
    """
    if beat_s is None:
        beat_s = 2.0 if storage.remote is None else 5.0

    def lost() -> None:
        notify("another driver has taken over this sweep, since this one sent no heartbeat for too long; this one ends")
        _interrupt()

    lease = storage.lease(LEASES, f"sweep-{sweep}", beat_s=beat_s, expiry_s=10 * beat_s, on_lost=lost)
    folder = storage.root / LEASES
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with storage.writing():
            _take(lease, sweep, notify)
        yield lease
    finally:
        with contextlib.suppress(OSError):  # an unavailable storage: the next driver finds that this process is gone
            lease.release()
        for path in made:
            with contextlib.suppress(OSError):  # not empty: it contains artifacts by now
                path.rmdir()


def _interrupt() -> None:
    """Interrupt this process as Ctrl-C does, even if it ignores SIGINT because a script started it with &."""
    number = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    ident = threading.main_thread().ident
    if ident is not None:
        signal.pthread_kill(ident, number)


def _take(lease: Lease, sweep: str, notify: Callable[[str], None]) -> None:
    waiting = False
    while not lease.try_acquire():
        holder = lease.holder() or {}
        if holder.get("machine") == process.machine() or lease.saw_heartbeat:
            raise ConfigError(
                f"the sweep {sweep!r} is being run by {process.describe(holder)}; wait until it has ended, stop it, or "
                "choose another name (name=...)"
            )
        if not waiting:
            waiting = True
            notify(
                f"{process.describe(holder)} ran this sweep and has not reported its end; waiting up to "
                f"{lease.expiry_s:g} s for a heartbeat"
            )
        time.sleep(min(0.5, lease.beat_s / 4))
