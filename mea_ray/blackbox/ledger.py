"""The ledger of a query API: each client's budget, rate limit and charges.

A request is charged once, however often it is sent. The ledger stores each request's id with the number and the hash of
its images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from mea_ray.blackbox.journal import LedgerJournal
from mea_ray.blackbox.validate import check_name
from mea_ray.core.errors import (
    BadQuery,
    ConfigError,
    OverBudget,
    QueryError,
    RateLimited,
    RequestConflict,
    UnknownClient,
)

MOST_IMAGES = 2**53
"""Maximum budget and charge, in images: the largest integer that the journal and JSON represent exactly."""


class RateLimit(NamedTuple):
    """Token bucket: `images_per_second` in the long run, `burst` images at once after a pause."""

    images_per_second: float
    burst: int


class Charge(NamedTuple):
    """One request to be charged: client, request id (unique per client), number of images, hash of the images."""

    client: str
    request_id: str
    images: int
    digest: str


@dataclass
class _Account:
    budget: int | None
    rate: RateLimit | None
    tokens: float = 0.0
    stamp: float = 0.0
    charged: int = 0
    requests: dict[str, tuple[int, str]] = field(default_factory=dict)

    def refill(self, now: float) -> None:
        if self.rate is not None:
            # A clock that is set back neither adds nor removes tokens.
            gained = max(0.0, now - self.stamp) * self.rate.images_per_second
            self.tokens = min(float(self.rate.burst), self.tokens + gained)
        self.stamp = now


class Ledger:
    """Budgets, rate limits and charges of all clients. Not thread-safe: the caller serialises all calls.

    With a path every change is committed to a journal on disk before the call returns. Opening the same path again
    restores the ledger, even after its process was killed.

    Args:
        path: Journal file; None keeps the ledger in memory only.
        clock: A clock in seconds; the default survives a restart of the process.

    Raises:
        ArtifactError: The journal is damaged, of another schema, or held open by another ledger.
    """

    def __init__(self, path: Path | str | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._journal = LedgerJournal(Path(path)) if path is not None else None
        if self._journal is not None:
            for name, budget, images_per_second, burst, tokens, stamp in self._journal.clients():
                rate = RateLimit(images_per_second, burst) if images_per_second is not None else None
                self._accounts[name] = _Account(budget, rate, tokens, stamp)
            for name, request_id, images, digest in self._journal.requests():
                account = self._accounts[name]
                account.requests[request_id] = (images, digest)
                account.charged += images

    def register(self, client: str, budget: int | None = None, rate: RateLimit | None = None) -> None:
        """Open an account, or change its budget and rate limit. Earlier charges remain.

        Args:
            client: Name of the client, see `validate.check_name`.
            budget: Query budget in images; None for no limit.
            rate: Token bucket; None for no limit.

        Raises:
            ConfigError: The name is invalid, the budget is negative or below the client's charges, or the rate limit is
                not positive and finite.
            StorageUnavailable: The journal could not be written. Nothing was changed.
        """
        _check_terms(client, budget, rate)
        before = self._accounts.get(client)
        charged = before.charged if before else 0
        if budget is not None and budget < charged:
            raise ConfigError(
                f"client {client!r}: a budget of {budget} images is below the {charged} charged; give at least that"
            )
        now = self._clock()
        if before is None:
            account = _Account(budget, rate, float(rate.burst) if rate else 0.0, now)
        else:
            # A copy: if the journal cannot be written, the account in memory must remain as on disk.
            account = replace(before)
            account.refill(now)
            if rate is not None:
                # Registering again does not refill the bucket, which would circumvent the rate limit.
                account.tokens = min(account.tokens, float(rate.burst)) if account.rate else float(rate.burst)
            account.budget, account.rate = budget, rate
        if self._journal is not None:
            self._journal.write([(client, *self._terms(account))], [])
        self._accounts[client] = account

    def charge(self, client: str, request_id: str, images_count: int, digest: str) -> None:
        """Charge one request; a request that was charged before costs nothing.

        Raises:
            BadQuery: The name, the request id or the hash is malformed, or the number of images is below 1.
            UnknownClient: The client was never registered.
            RequestConflict: The id was charged for other images.
            OverBudget: The request exceeds the budget. Nothing is charged.
            RateLimited: The request exceeds the rate limit. Nothing is charged.
        """
        (refusal,) = self.charge_many([Charge(client, request_id, images_count, digest)])
        if refusal is not None:
            raise refusal

    def charge_many(self, charges: Sequence[Charge]) -> list[QueryError | None]:
        """Charge several requests independently, in their order, with one write to the journal.

        Returns:
            For each request None if it is paid for, else the error that `charge` would raise; then nothing was charged.
        """
        now = self._clock()
        paid: list[Charge] = []
        outcomes: list[QueryError | None] = []
        for charge in map(Charge._make, charges):
            refusal = self._refusal(charge, now)
            outcomes.append(refusal)
            if refusal is None and charge.request_id not in self._accounts[charge.client].requests:
                self._enter(charge, +1)
                paid.append(charge)
        if self._journal is not None and paid:
            touched = {charge.client: self._accounts[charge.client] for charge in paid}
            try:
                self._journal.write([(name, *self._terms(account)) for name, account in touched.items()], paid)
            except BaseException:
                # Charges that are not on disk do not count: memory must not hold more than a restart would restore.
                for charge in paid:
                    self._enter(charge, -1)
                raise
        return outcomes

    def unpaid(self, client: str, requests: Sequence[tuple[str, int]]) -> int:
        """Count the images of ``(request id, images)`` that were not charged before."""
        known = self._account(client).requests
        return sum(images for request_id, images in requests if request_id not in known)

    def remaining(self, client: str) -> int | None:
        """Return the client's remaining budget in images; None without a budget."""
        account = self._account(client)
        return None if account.budget is None else account.budget - account.charged

    def budget(self, client: str) -> int | None:
        """Return the client's budget in images; None without one."""
        return self._account(client).budget

    def charged(self, client: str) -> int:
        """Return the number of images charged to the client."""
        return self._account(client).charged

    def copy_to(self, path: Path) -> None:
        """Write a copy of the journal, for storage that outlives this machine; does nothing without a journal."""
        if self._journal is not None:
            self._journal.copy_to(path)

    def clients(self) -> list[str]:
        """Return the names of all clients, sorted."""
        return sorted(self._accounts)

    def close(self) -> None:
        """Close the journal, so that another ledger can open it."""
        if self._journal is not None:
            self._journal.close()

    def _account(self, client: str) -> _Account:
        account = self._accounts.get(client) if isinstance(client, str) else None
        if account is None:
            raise _unknown(client)
        return account

    def _refusal(self, charge: Charge, now: float) -> QueryError | None:
        if (malformed := _malformed(charge)) is not None:
            return malformed
        account = self._accounts.get(charge.client)
        if account is None:
            return _unknown(charge.client)
        before = account.requests.get(charge.request_id)
        if before is not None:
            if before == (charge.images, charge.digest):
                return None
            return RequestConflict(
                f"request id {charge.request_id!r} of client {charge.client!r} was charged for {before[0]} other "
                "images; use a new one"
            )
        if account.budget is not None and account.charged + charge.images > account.budget:
            return OverBudget(charge.client, charge.images, account.budget - account.charged, account.budget)
        if account.rate is not None:
            account.refill(now)
            # A request larger than the burst is granted by a full bucket, which then goes into debt; else it could
            # never pass.
            needed = min(charge.images, account.rate.burst)
            if account.tokens < needed:
                return RateLimited(charge.client, (needed - account.tokens) / account.rate.images_per_second)
        return None

    def _enter(self, charge: Charge, sign: int) -> None:
        account = self._accounts[charge.client]
        account.charged += sign * charge.images
        if account.rate is not None:
            account.tokens -= sign * charge.images
        if sign > 0:
            account.requests[charge.request_id] = (charge.images, charge.digest)
        else:
            del account.requests[charge.request_id]

    @staticmethod
    def _terms(account: _Account) -> tuple[int | None, float | None, int | None, float, float]:
        rate = account.rate
        return (
            account.budget,
            rate.images_per_second if rate else None,
            rate.burst if rate else None,
            account.tokens,
            account.stamp,
        )


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_IMAGES


def _check_terms(client: str, budget: int | None, rate: RateLimit | None) -> None:
    try:
        check_name("a client's name", client)
    except BadQuery as error:
        raise ConfigError(str(error)) from None
    if budget is not None and not _is_count(budget, 0):
        raise ConfigError(
            f"client {client!r}: a budget must be an integer number of images of at least 0, got {budget!r}"
        )
    if rate is not None and not (
        0 < rate.images_per_second < math.inf and _is_count(rate.burst, 1)  # NaN fails this comparison
    ):
        raise ConfigError(f"client {client!r}: {rate} must have a positive, finite rate and a burst of at least 1")


def _malformed(charge: Charge) -> BadQuery | None:
    """Return the error of a malformed charge, which would make the journal reject the whole batch."""
    try:
        check_name("a client's name", charge.client)
        check_name("a request id", charge.request_id)
        check_name("a request's hash", charge.digest)
    except BadQuery as error:
        return error
    if not _is_count(charge.images, 1):
        return BadQuery(
            f"a request must be charged for an integer number of images of at least 1, got {charge.images!r}"
        )
    return None


def _unknown(client: object) -> UnknownClient:
    return UnknownClient(f"client {str(client)[:200]!r} is not registered; register it with the service first")
