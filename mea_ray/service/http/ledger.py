"""The ledger of an HTTP service: that of sweeps, plus per-client limits and the counters of all replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mea_ray.blackbox.ledger import RateLimit
from mea_ray.blackbox.prada import query_log_record
from mea_ray.results.records import QueryLogRecord
from mea_ray.service.accounts import check_owner
from mea_ray.service.http.metrics import Counts
from mea_ray.service.ledger_actor import LedgerActor, in_turn


class Standing(NamedTuple):
    """A client's charges and remaining budget, in images; None without a budget."""

    charged: int
    budget: int | None
    remaining: int | None


class HttpLedger(LedgerActor):
    """A `LedgerActor` with per-client limits, which also sums the counters of the replicas."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counts: dict[str, Counts] = {}

    @in_turn
    def set_limits(self, secret: str, limits: Sequence[tuple[str, int | None, RateLimit | None]]) -> None:
        """Open accounts, or change their limits; a budget below the charges counts as spent.

        Args:
            secret: The service's secret.
            limits: Client, budget in images, rate limit; the service's own rate limit when None.
        """
        check_owner(self._secret, secret)
        known = set(self._ledger.clients())
        for client, budget, rate in limits:
            charged = self._ledger.charged(client) if client in known else 0
            self._ledger.register(client, None if budget is None else max(budget, charged), rate or self._rate)

    @in_turn
    def standing(self, secret: str, client: str) -> Standing:
        """Return a client's charges and its remaining budget.

        Raises:
            UnknownClient: There is no such client.
        """
        check_owner(self._secret, secret)
        ledger = self._ledger
        return Standing(ledger.charged(client), ledger.budget(client), ledger.remaining(client))

    @in_turn
    def count(self, secret: str, process: str, counts: Counts) -> None:
        """Store the counts of one process of a replica since its start."""
        check_owner(self._secret, secret)
        self._counts[process] = counts

    @in_turn
    def counts(self, secret: str) -> list[Counts]:
        """Return the counters of all processes since this ledger started, including those that ended."""
        check_owner(self._secret, secret)
        return list(self._counts.values())

    @in_turn
    def usage(self, secret: str, classes: int) -> list[dict[str, Any]]:
        """Return the owner's view of all clients: charges, class histogram, PRADA's statistic, outliers.

        Args:
            secret: The service's secret.
            classes: Number of classes of an answer; 1 for embeddings.
        """
        check_owner(self._secret, secret)
        rows = []
        for client in self._ledger.clients():
            log: QueryLogRecord = query_log_record(self._log.of(client), classes)
            rows.append({"client": client, **self.standing(secret, client)._asdict(), "log": log.model_dump()})
        return rows
