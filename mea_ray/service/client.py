"""The thief's side of the service: a black box that pipelines requests and survives dead replicas.

A request's id consists of the number of images queried before it and a hash of its images. So a query that is repeated
after a failure has the same ids and is charged once, while an image that is queried again on purpose has a higher count
and is charged again. A client that resumes in a new process starts the count after its stored answers (``start_at``):
images that were charged but whose answers were not stored are then answered free of charge.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from mea_ray.blackbox.validate import check_images, image_digest
from mea_ray.config import ClientConfig
from mea_ray.core.errors import ConfigError, MeaRayError, OverBudget, ServiceUnavailable
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.service.accounts import Account
from mea_ray.service.flight import Request, send_all
from mea_ray.service.naming import find, ledger_name


class ServiceClient:
    """A victim behind its service; implements `types.BlackBox`. Picklable: it finds its actors again by name.

    Threads can share a client: their queries are serialised. Two copies of a client count independently; give them
    different client names or prefixes.

    Args:
        service: Name of the service.
        account: Name and token of a client that the service's owner registered, see `VictimService.account`.
        request_images: Images per request; ``query`` splits longer queries.
        max_in_flight: Maximum number of requests in flight.
        request_timeout_s: Timeout for one answer, or for a dead replica's restart, before the request is repeated, in
            seconds.
        retries: Maximum number of repetitions of a request after failures.
        start_at: Images that this client queried in an earlier process, whose answers are stored.
        request_prefix: Distinguishes several streams of queries of one client.

    Raises:
        ServiceUnavailable: There is no such service.
        ConfigError: ``request_images`` is larger than the service accepts, or a number is out of range.
    """

    def __init__(
        self,
        service: str,
        account: Account,
        settings: ClientConfig = ClientConfig(),
        *,
        start_at: int = 0,
        request_prefix: str = "",
    ) -> None:
        if start_at < 0:
            raise ConfigError(f"start_at={start_at} must not be negative")
        self.service, self.account, self.asked, self.request_prefix = service, account, start_at, request_prefix
        self.settings = settings
        self._turn = threading.RLock()
        self._ledger: Any = None
        self._handles: dict[str, Any] = {}
        description = self._ask_ledger("describe")
        self._replicas: tuple[str, ...] = tuple(description["replicas"])
        self._classes: int = description["classes"]
        channels, height, width = description["image_shape"]
        self._shape: tuple[int, int, int] = channels, height, width
        if settings.request_images > description["max_request_images"]:
            raise ConfigError(
                f"request_images={settings.request_images} is more than the {description['max_request_images']} that "
                "the service accepts; lower `service.request_images` or raise `service.max_request_images`"
            )

    @property
    def client(self) -> str:
        """Name of the client."""
        return self.account.client

    @property
    def classes(self) -> int:
        """Length of an answer: number of classes, or of embedding dimensions."""
        return self._classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self._shape

    @property
    def remaining(self) -> int | None:
        """Images that may still be queried; None without a budget."""
        left: int | None = self._ask_ledger("remaining", self.account)
        return left

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images in their order, see `types.BlackBox.query`.

        After an error the same query can be repeated: nothing is charged twice. Waits when the client exceeds its rate
        limit.

        Raises:
            BadQuery: The images are invalid; nothing was charged.
            UnknownClient: The client is not registered.
            WrongToken: The client's token is invalid.
            OverBudget: The images exceed the remaining budget; nothing was charged.
            ServiceUnavailable: No replica answered, even after ``retries`` repetitions.
        """
        with self._turn:
            before = self.asked
            try:
                return np.concatenate(list(self.query_iter(images)))
            except BaseException:
                self.asked = before
                raise

    def query_iter(self, images: Images | FloatImages) -> Iterator[Answers]:
        """Like `query`, but yields the answers request by request, so that each can be stored immediately.

        ``asked`` counts the images whose answers were yielded: after an error, continue with the rest. Exhaust the
        iterator before this client's next query; other threads must not use the client meanwhile.
        """
        check_images(images, self._shape)
        requests = self._split(images)
        if len(requests) > 1:
            # The ledger rejects a single request as a whole; several must be rejected before the first is charged.
            ids = [(request.request_id, len(request.images)) for request in requests]
            unpaid, remaining, budget = self._ask_ledger("unpaid", self.account, ids)
            if remaining is not None and unpaid > remaining:
                raise OverBudget(self.client, unpaid, remaining, budget)
        for request, answers in zip(requests, self._send(requests), strict=True):
            self.asked += len(request.images)
            yield answers

    def request(self, request_id: str, images: Any) -> Answers:
        """Send one request unchanged, with an id of the caller's choice and without client-side checks."""
        return next(self._send([Request(request_id, images)]))

    def _send(self, requests: list[Request]) -> Iterator[Answers]:
        return send_all(
            requests,
            self._replicas,
            self._handles,
            self.account,
            max_in_flight=self.settings.max_in_flight,
            timeout_s=self.settings.request_timeout_s,
            retries=self.settings.retries,
        )

    def _split(self, images: Images | FloatImages) -> list[Request]:
        requests = []
        for start in range(0, len(images), self.settings.request_images):
            part = images[start : start + self.settings.request_images]
            requests.append(Request(f"{self.request_prefix}{self.asked + start}-{image_digest(part)}", part))
        return requests

    def _ask_ledger(self, method: str, *args: Any) -> Any:
        if self._ledger is None:
            self._ledger = find(ledger_name(self.service))
        try:
            # Ray repeats the call itself after the ledger died and was restarted.
            return ray.get(getattr(self._ledger, method).remote(*args), timeout=self.settings.request_timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, MeaRayError):
                raise error.cause from None
            raise
        except RayError as error:
            self._ledger = None  # A service started again under this name has another ledger.
            raise ServiceUnavailable(f"the ledger of service {self.service!r} does not answer: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_turn"}
        return {**state, "_ledger": None, "_handles": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())
