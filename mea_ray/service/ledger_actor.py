"""The ledger behind an actor: one per service, restarted by Ray, recovered from its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mea_ray.blackbox.ledger import Charge, Ledger, RateLimit
from mea_ray.blackbox.query_log import ClientLog, LogEntry, QueryLog
from mea_ray.config import RateConfig
from mea_ray.core.errors import QueryError
from mea_ray.service.watch import incarnation


class LedgerActor:
    """A `Ledger`, the owner's query log and the description of a service; wrapped with ``ray.remote`` where it starts.

    Ray builds it again from the same arguments after its process died, and asks again what was under way; the journal
    and the request ids see to it that nothing is lost or charged twice.

    Args:
        path: Journal file, with the log beside it, on a file system that every node sees where the actor may be
            restarted.
        rate: Rate limit of every client; None for no limit.
        description: What `VictimService.connect` needs to know; kept as it is.
    """

    def __init__(self, path: str, rate: RateConfig | None, description: Mapping[str, Any]) -> None:
        self._ledger = Ledger(Path(path))
        # After the ledger: who holds its journal alone holds the log alone, too.
        self._log = QueryLog(log_path(path))
        self._rate = RateLimit(rate.images_per_second, rate.burst) if rate else None
        self._description = dict(description)

    def describe(self) -> dict[str, Any]:
        """Return the description given at the start."""
        return self._description

    def incarnation(self) -> str:
        """Return what is different after a restart, see `watch.incarnation`."""
        return incarnation()

    def register(self, client: str, budget: int | None) -> None:
        """Open an account or change its budget, see `Ledger.register`."""
        self._ledger.register(client, budget, self._rate)

    def charge_many(self, charges: Sequence[Charge]) -> list[QueryError | None]:
        """Charge merged requests, see `Ledger.charge_many`."""
        return self._ledger.charge_many(charges)

    def note(self, notes: Sequence[LogEntry]) -> None:
        """Keep what a replica answered, see `QueryLog.add`."""
        self._log.add(notes)

    def seen(self, client: str) -> ClientLog:
        """Return what was answered to a client; it is judged by who asks, for charges wait while this actor works."""
        return self._log.of(client)

    def remaining(self, client: str) -> int | None:
        """Return the images that the client may still ask; None without a budget."""
        return self._ledger.remaining(client)

    def charged(self, client: str) -> int:
        """Return the images that the client has been charged."""
        return self._ledger.charged(client)

    def unpaid(self, client: str, requests: Sequence[tuple[str, int]]) -> tuple[int, int | None, int | None]:
        """Return images of ``requests`` not charged before, images remaining, and the budget."""
        ledger = self._ledger
        return ledger.unpaid(client, requests), ledger.remaining(client), ledger.budget(client)

    def clients(self) -> list[str]:
        """Return the names of all clients."""
        return self._ledger.clients()

    def close(self) -> None:
        """Close journal and log before the actor is stopped on purpose."""
        self._ledger.close()
        self._log.close()


def log_path(journal: str) -> str:
    """Return the file of the query log of a ledger's journal."""
    return f"{journal}.queries"
