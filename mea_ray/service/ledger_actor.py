"""The ledger behind an actor: one per service, restarted by Ray, recovered from its journal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from mea_ray.blackbox.ledger import Charge, Ledger, RateLimit
from mea_ray.blackbox.query_log import ClientLog, LogEntry, QueryLog
from mea_ray.config import RateConfig
from mea_ray.core.errors import QueryError, StorageUnavailable
from mea_ray.service.accounts import Account, check_account, check_owner
from mea_ray.service.local_calls import Address, LocalServer
from mea_ray.service.watch import incarnation

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Actor = TypeVar("_Actor", bound="LedgerActor")


def in_turn(method: Callable[Concatenate[_Actor, _P], _R]) -> Callable[Concatenate[_Actor, _P], _R]:
    """Make a method wait for others that use the ledger or the log: local calls come from threads of their own."""

    @wraps(method)
    def waiting(self: _Actor, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with self.turn:
            return method(self, *args, **kwargs)

    return waiting


class LedgerActor:
    """A `Ledger`, the owner's query log and the description of a service; wrapped with ``ray.remote`` at its start.

    Ray restarts it with the same arguments after its process died, and repeats the calls in flight. The journal and the
    request ids ensure that nothing is lost or charged twice.

    A client can only read its own account, with its token. Everything else needs the secret, which the owner and the
    replicas have; a call without it raises ``WrongToken``.

    Args:
        path: Journal file, with the log beside it, on a file system visible to every node where the actor can be
            restarted.
        rate: Rate limit of every client; None for no limit.
        description: Description for `VictimService.connect`, stored unchanged.
        secret: The service's secret, see `accounts`.

    Attributes:
        turn: Held by whatever uses the ledger or the log.
    """

    def __init__(self, path: str, rate: RateConfig | None, description: Mapping[str, Any], secret: str) -> None:
        self.turn = threading.RLock()
        self._local: LocalServer | None = None
        self._ledger = Ledger(Path(path))
        # After the ledger: the exclusive lock on its journal also protects the log.
        self._log = QueryLog(log_path(path))
        self._rate = RateLimit(rate.images_per_second, rate.burst) if rate else None
        self._description, self._secret = dict(description), secret

    def describe(self) -> dict[str, Any]:
        """Return the description given at the start."""
        return self._description

    def incarnation(self) -> str:
        """Return an id that changes with a restart, see `watch.incarnation`."""
        return incarnation()

    def local_address(self, secret: str) -> Address | None:
        """Return where processes of this machine can call ``charge_and_note`` directly; None if they cannot."""
        check_owner(self._secret, secret)
        if self._local is None:
            self._local = LocalServer.start({"charge_and_note": self.charge_and_note}, self._secret)
        return self._local.address if self._local is not None else None

    @in_turn
    def register(self, secret: str, client: str, budget: int | None) -> None:
        """Open an account or change its budget, see `Ledger.register`."""
        check_owner(self._secret, secret)
        self._ledger.register(client, budget, self._rate)

    @in_turn
    def charge_many(self, secret: str, charges: Sequence[Charge]) -> list[QueryError | None]:
        """Charge merged requests, see `Ledger.charge_many`."""
        check_owner(self._secret, secret)
        return self._ledger.charge_many(charges)

    @in_turn
    def charge_and_note(
        self, secret: str, charges: Sequence[Charge], notes: Sequence[LogEntry]
    ) -> tuple[list[QueryError | None], bool]:
        """Charge requests, and log the answers to those that are paid for.

        Args:
            secret: The service's secret.
            charges: The requests.
            notes: The answers of each request, in the same order.

        Returns:
            The result of `charge_many`, and whether the log was written; if not, call `note`.
        """
        outcomes = self.charge_many(secret, charges)
        try:
            self._log.add([note for note, refusal in zip(notes, outcomes, strict=True) if refusal is None])
        except StorageUnavailable:
            return outcomes, False
        return outcomes, True

    @in_turn
    def note(self, secret: str, notes: Sequence[LogEntry]) -> None:
        """Log a replica's answers, see `QueryLog.add`."""
        check_owner(self._secret, secret)
        self._log.add(notes)

    @in_turn
    def seen(self, secret: str, client: str) -> ClientLog:
        """Return the log of a client. The caller evaluates it, since charges wait while this actor is busy."""
        check_owner(self._secret, secret)
        return self._log.of(client)

    @in_turn
    def remaining(self, account: Account) -> int | None:
        """Return the client's remaining budget in images; None without a budget."""
        return self._ledger.remaining(check_account(self._secret, account))

    @in_turn
    def charged(self, secret: str, client: str) -> int:
        """Return the number of images charged to the client."""
        check_owner(self._secret, secret)
        return self._ledger.charged(client)

    @in_turn
    def unpaid(self, account: Account, requests: Sequence[tuple[str, int]]) -> tuple[int, int | None, int | None]:
        """Return the number of images in ``requests`` not charged before, the remaining images, and the budget."""
        ledger, client = self._ledger, check_account(self._secret, account)
        return ledger.unpaid(client, requests), ledger.remaining(client), ledger.budget(client)

    @in_turn
    def logged(self, secret: str, client: str) -> int:
        """Return the number of a client's images in the log, see `QueryLog.images`."""
        check_owner(self._secret, secret)
        return self._log.images(client)

    @in_turn
    def forget(self, secret: str, client: str) -> None:
        """Remove a client's log; its charges remain."""
        check_owner(self._secret, secret)
        self._log.forget(client)

    @in_turn
    def copy_to(self, secret: str, path: str) -> None:
        """Write a copy of the ledger's journal, see `Ledger.copy_to`."""
        check_owner(self._secret, secret)
        self._ledger.copy_to(Path(path))

    @in_turn
    def clients(self, secret: str) -> list[str]:
        """Return the names of all clients."""
        check_owner(self._secret, secret)
        return self._ledger.clients()

    @in_turn
    def close(self) -> None:
        """Close journal and log before the actor is stopped on purpose."""
        if self._local is not None:
            self._local.close()
        self._ledger.close()
        self._log.close()


def log_path(journal: str) -> str:
    """Return the file of the query log of a ledger's journal."""
    return f"{journal}.queries"
