"""Requests in flight: pipelined over the replicas, bounded in number, repeated when a replica dies or is late."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from mea_ray.core.errors import QueryError, RateLimited, ReplicasAway, ServiceUnavailable, StorageUnavailable
from mea_ray.core.types import Answers
from mea_ray.service.accounts import Account
from mea_ray.service.naming import find
from mea_ray.storage.files import PATIENCE

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0
_FIRST_RETRY_S, _RETRY_FACTOR, _LONGEST_RETRY_S = 0.25, 4.0, 60.0
_STORAGE_PAUSE_S = 2.0


@dataclass
class Request:
    """One request: its id, its images, and its failures.

    Attributes:
        failures: Number of failed or late answers.
        down_since: Time since which replicas are unreachable for it; None while they are reachable.
        stored_since: Time since which the ledger's storage is full or unavailable for it; None if it never was.
        pauses: Number of pauses for unreachable replicas.
        avoid: Replica that failed it last; another one is preferred.
    """

    request_id: str
    images: Any
    failures: int = 0
    down_since: float | None = None
    stored_since: float | None = None
    pauses: int = 0
    avoid: str | None = None


@dataclass
class _InFlight:
    index: int
    replica: str
    deadline: float


def send_all(
    requests: Sequence[Request],
    replicas: Sequence[str],
    handles: dict[str, Any],
    account: Account,
    *,
    max_in_flight: int,
    timeout_s: float,
    retries: int,
) -> Iterator[Answers]:
    """Send requests and yield their answers in order, as soon as each is available.

    Args:
        requests: The requests, each with its own id.
        replicas: Names of the replica actors.
        handles: Cached handles of replicas; updated for the next call.
        account: The client's account.
        max_in_flight: Requests under way at once.
        timeout_s: Timeout for one answer, or for the restart of replicas when none is left, in seconds.
        retries: Tolerated failures of one request; each pause before a repetition is four times as long as the last.

    Raises:
        QueryError: The service rejects the next request in order; the answers before it have been yielded.
        ServiceUnavailable: A request failed more often than is tolerated.
        ReplicasAway: Its replicas were down longer than ``timeout_s``.
        StorageUnavailable: The ledger's storage was full or unavailable longer than this process waits for storage.
    """
    return _Pipeline(requests, replicas, handles, account, max_in_flight, timeout_s, retries).run()


class _Pipeline:
    _turn = itertools.count()

    def __init__(
        self,
        requests: Sequence[Request],
        replicas: Sequence[str],
        handles: dict[str, Any],
        account: Account,
        max_in_flight: int,
        timeout_s: float,
        retries: int,
    ) -> None:
        self.requests, self.account = requests, account
        self.replicas = handles
        for name in replicas:
            if name not in handles:
                self._find(name)
        self.service = replicas[0].rpartition("/replica/")[0] if replicas else "?"
        self.max_in_flight, self.timeout_s, self.retries = max_in_flight, timeout_s, retries
        self.flights: dict[Any, _InFlight] = {}
        self.later: list[tuple[float, int]] = []
        self.outcomes: dict[int, Answers | Exception] = {}
        self.launched = 0
        self.refused = self.warned = self.warned_storage = False
        self.ledger = ""

    def _find(self, name: str) -> None:
        try:
            self.replicas[name] = find(name)
        except ServiceUnavailable:
            self.replicas.pop(name, None)

    def run(self) -> Iterator[Answers]:
        for index in range(len(self.requests)):
            while index not in self.outcomes:
                self._send_more(index)
                self._wait()
            outcome = self.outcomes.pop(index)
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome

    def _send_more(self, oldest: int) -> None:
        now = time.monotonic()
        while self.later and self.later[0][0] <= now:
            self._ask(heapq.heappop(self.later)[1])
        # Answers that wait for an older one are also bounded.
        while (
            not self.refused
            and self.launched < min(len(self.requests), oldest + 4 * self.max_in_flight)
            and len(self.flights) + len(self.later) < self.max_in_flight
        ):
            self._ask(self.launched)
            self.launched += 1

    def _ask(self, index: int) -> None:
        request = self.requests[index]
        avoid = request.avoid
        if not self.replicas:
            self.outcomes[index] = ServiceUnavailable(
                f"service {self.service!r} has ended: none of its replicas can be found; start it again, then repeat "
                "the query: answers received so far are kept, and nothing is charged twice"
            )
            return
        load = dict.fromkeys(self.replicas, 0)
        for flight in self.flights.values():
            if flight.replica in load:
                load[flight.replica] += 1
        names = sorted(load, key=lambda name: (name == avoid, load[name]))
        equal = [name for name in names if (name == avoid, load[name]) == (names[0] == avoid, load[names[0]])]
        name = equal[next(self._turn) % len(equal)]
        reference = self.replicas[name].answer.remote(self.account, request.request_id, request.images)
        self.flights[reference] = _InFlight(index, name, time.monotonic() + self.timeout_s)

    def _wait(self) -> None:
        """Wait for the next events, then handle them all."""
        now = time.monotonic()
        events = [flight.deadline for flight in self.flights.values()] + [when for when, _ in self.later[:1]]
        if not events:
            return
        pause = max(0.0, min(events) - now)
        if self.flights:
            done, _ = ray.wait(list(self.flights), num_returns=1, timeout=pause)
        else:
            done = []
            time.sleep(pause)
        for reference in done:
            self._receive(reference, self.flights.pop(reference))
        now = time.monotonic()
        for reference, flight in list(self.flights.items()):
            if flight.deadline <= now:
                del self.flights[reference]
                self._failed(flight, f"no answer from {flight.replica} in {self.timeout_s} s")

    def _receive(self, reference: Any, flight: _InFlight) -> None:
        request = self.requests[flight.index]
        try:
            self.outcomes[flight.index] = ray.get(reference)
            if self.warned_storage and request.stored_since is not None:
                self.warned_storage = False
                PATIENCE.notify_back(Path(self.ledger))
        except RayTaskError as error:
            if isinstance(error.cause, RateLimited):
                self._again(flight.index, error.cause.retry_after_s)
            elif isinstance(error.cause, QueryError):
                self.outcomes[flight.index] = error.cause
                # Later requests would fail as well, or be charged although the caller has to change something first.
                self.refused = True
            elif isinstance(error.cause, StorageUnavailable) and PATIENCE.seconds:
                self._no_storage(flight.index, error.cause)
            else:
                self._failed(flight, str(error.cause or error))
        except RayError as error:
            self._unreachable(flight, request, str(error))

    def _unreachable(self, flight: _InFlight, request: Request, reason: str) -> None:
        """The replica died during the request, or is being restarted: use another one, or wait for its restart."""
        now = time.monotonic()
        self._find(flight.replica)
        request.down_since = now if request.down_since is None else request.down_since
        if now - request.down_since > self.timeout_s:
            # Not repeated: a trial that gives up frees the resources that the replica may be waiting for.
            self._give_up(flight.index, f"its replicas have been down for {self.timeout_s:g} s", ReplicasAway)
        elif request.pauses == 0 and len(self.replicas) > 1:
            request.pauses = 1
            request.avoid = flight.replica
            self._ask(flight.index)
        else:
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**request.pauses)
            request.pauses += 1
            self._again(flight.index, pause)

    def _failed(self, flight: _InFlight, reason: str) -> None:
        request = self.requests[flight.index]
        request.failures += 1
        if request.failures > self.retries:
            self._give_up(flight.index, f"it failed {request.failures} times on one request, last: {reason}")
        else:
            request.avoid = flight.replica
            if request.failures == 2 and not self.warned:
                self.warned = True
                PATIENCE.notify(f"service {self.service}: {reason.splitlines()[0][:200]}; repeated, charged once")
            # Some failures need time to recover, e.g. a ledger whose disk is full or unavailable.
            pause = min(_LONGEST_RETRY_S, _FIRST_RETRY_S * _RETRY_FACTOR ** (request.failures - 1))
            self._again(flight.index, pause)

    def _no_storage(self, index: int, error: StorageUnavailable) -> None:
        """The ledger cannot write: not a failure of the service, and waited for like any file of the storage."""
        request, now = self.requests[index], time.monotonic()
        if request.stored_since is None:
            request.stored_since = now
        if not self.warned_storage:
            self.warned_storage, self.ledger = True, error.place
            PATIENCE.notify_waiting(Path(error.place), error.why)
        waited = now - request.stored_since
        if waited >= PATIENCE.seconds:
            place = str(PATIENCE.place(Path(error.place)))
            self.outcomes[index] = StorageUnavailable(place, error.why, waited, error.reason)
            self.refused = True
        else:
            self._again(index, min(_STORAGE_PAUSE_S, PATIENCE.seconds))

    def _give_up(self, index: int, why: str, kind: type[ServiceUnavailable] = ServiceUnavailable) -> None:
        self.outcomes[index] = kind(
            f"service {self.service!r}: {why}; answers received so far are kept, and repeating the query is not "
            "charged twice"
        )
        self.refused = True

    def _again(self, index: int, pause_s: float) -> None:
        heapq.heappush(self.later, (time.monotonic() + pause_s, index))
