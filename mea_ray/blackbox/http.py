"""A black box behind HTTP: a bounded number of requests in flight, repeated after failures, charged once.

The counterpart of `service.client.ServiceClient` for a URL: the same request ids, errors and order. A `Wire` defines
the format of requests and answers: that of ``mea-ray serve`` is here, that of other APIs in `foreign`.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, Protocol

import httpx
import numpy as np

from mea_ray.blackbox.validate import check_images, image_digest
from mea_ray.config import ClientConfig
from mea_ray.core.errors import (
    BadQuery,
    ConfigError,
    MeaRayError,
    OverBudget,
    QueryError,
    RateLimited,
    RequestConflict,
    ServiceUnavailable,
    UnknownClient,
    first_line,
)
from mea_ray.core.types import Answers, FloatImages, Images

_NPY = "application/x-npy"
_OPENING_S = 10.0
"""Seconds to wait for an unavailable service when it is opened."""
_FIRST_PAUSE_S, _PAUSE_FACTOR, _LONGEST_PAUSE_S = 0.1, 2.0, 5.0
_AWAY = frozenset({408, 425, 500, 502, 503, 504})
"""Status codes after which the same request can succeed. Ray Serve's proxy sends 500 when a replica dies."""


@dataclass(frozen=True)
class Described:
    """A service's description of itself.

    Attributes:
        client: The service's name for the client.
        classes: Length of an answer.
        image_shape: (channels, height, width) of one image.
        max_request_images: Maximum number of images in a request; None if not given.
    """

    client: str
    classes: int
    image_shape: tuple[int, int, int]
    max_request_images: int | None


class Wire(Protocol):
    """The format of a service's requests and answers."""

    def describe(self, get: Callable[[str], httpx.Response]) -> Described:
        """Request a service's description. ``get`` fetches a path and raises the errors of `HttpBlackBox`."""
        ...

    def remaining(self, get: Callable[[str], httpx.Response]) -> int | None:
        """Return the client's remaining budget in images; None if not given."""
        ...

    def quote(self, requests: Sequence[tuple[str, int]]) -> tuple[str, Any] | None:
        """Return path and JSON of a request for a quote; None if the service gives none."""
        ...

    def request(self, request_id: str, images: Images | FloatImages) -> dict[str, Any]:
        """Return the arguments of ``httpx.Client.request`` for one request."""
        ...

    def answers(self, response: httpx.Response, images: int) -> Answers:
        """Read the answers of a successful response, float32 (N, K).

        Raises:
            ValueError: They cannot be parsed; a ``KeyError`` or ``TypeError`` means the same.
        """
        ...


class MeaRayWire:
    """The wire of ``mea-ray serve``: images and answers as ``.npy``, without loss of precision."""

    def describe(self, get: Callable[[str], httpx.Response]) -> Described:
        """See `Wire.describe`."""
        model, usage = get("/v1/model").json(), get("/v1/usage").json()
        channels, height, width = model["image_shape"]
        shape = (int(channels), int(height), int(width))
        return Described(usage["client"], int(model["answer_length"]), shape, int(model["max_request_images"]))

    def remaining(self, get: Callable[[str], httpx.Response]) -> int | None:
        """See `Wire.remaining`."""
        left: int | None = get("/v1/usage").json()["remaining"]
        return left

    def quote(self, requests: Sequence[tuple[str, int]]) -> tuple[str, Any] | None:
        """See `Wire.quote`."""
        return "/v1/quote", {"requests": [{"id": name, "images": images} for name, images in requests]}

    def request(self, request_id: str, images: Images | FloatImages) -> dict[str, Any]:
        """See `Wire.request`."""
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(images), allow_pickle=False)
        headers = {"Content-Type": _NPY, "Accept": _NPY, "Idempotency-Key": request_id}
        return {"method": "POST", "url": "/v1/predict", "content": stream.getvalue(), "headers": headers}

    def answers(self, response: httpx.Response, images: int) -> Answers:
        """See `Wire.answers`."""
        decoded: Answers = np.load(io.BytesIO(response.content), allow_pickle=False)
        return decoded


class HttpBlackBox:
    """A victim behind a URL; implements `types.BlackBox`. Picklable.

    Threads can share it: their queries are serialised.

    Args:
        url: URL of the service, e.g. ``https://models.example/flowers``.
        key: API key, sent as ``Authorization: Bearer``; None sends none.
        settings: Images per request, requests in flight, timeout, tolerated failures.
        start_at: Images that were queried in an earlier process and whose answers are stored.
        budget: Client-side budget in images, in addition to the service's; None for no limit.
        request_prefix: Distinguishes several streams of queries with one key.
        wire: Format of requests and answers; None for ``mea-ray serve``.
        transport: Transport of httpx; None for the network.
        sleep: Sleeps for a number of seconds.

    Attributes:
        asked: Images queried so far, including ``start_at``.

    Raises:
        ConfigError: The URL or a number is invalid, or there is no such service at the URL.
        UnknownClient: The service rejects the key.
        ServiceUnavailable: It does not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        settings: ClientConfig = ClientConfig(),
        *,
        start_at: int = 0,
        budget: int | None = None,
        request_prefix: str = "",
        wire: Wire | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if start_at < 0:
            raise ConfigError(f"start_at={start_at} must not be negative")
        self.url, self._key, self.settings, self.asked = _checked_url(url), key, settings, start_at
        self._budget, self._prefix, self._wire = budget, request_prefix, wire or MeaRayWire()
        self._transport, self._sleep = transport, sleep
        self._turn = threading.RLock()
        self._http: httpx.Client | None = None
        self._has_answered = False
        try:
            # A mistyped URL must fail immediately, unlike a service that restarts.
            self._about = self._wire.describe(lambda path: self._get(path, _OPENING_S))
        except (ValueError, KeyError, TypeError, BadQuery) as error:
            raise ConfigError(
                f"{self.url} is not a service of `mea-ray serve` ({_line(error)}); check the URL, or describe the "
                "API in "
                "a file (`thief.blackbox.api`)"
            ) from None
        most = self._about.max_request_images
        if most is not None and settings.request_images > most:
            raise ConfigError(
                f"request_images={settings.request_images} is more than the {most} that {self.url} accepts; lower "
                "`service.request_images`"
            )

    @property
    def client(self) -> str:
        """The service's name for this client."""
        return self._about.client

    @property
    def classes(self) -> int:
        """Length of an answer: number of classes, or of embedding dimensions."""
        return self._about.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self._about.image_shape

    @property
    def remaining(self) -> int | None:
        """Remaining images: the lower of the service's and the client's limit; None without either."""
        theirs = self._wire.remaining(self._get)
        own = None if self._budget is None else self._budget - self.asked
        known = [images for images in (theirs, own) if images is not None]
        return min(known) if known else None

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images in their order, see `types.BlackBox.query`.

        After an error the same query can be repeated: nothing is charged twice. Waits when the client exceeds its rate
        limit.

        Raises:
            BadQuery: The images are invalid; nothing was charged.
            UnknownClient: The service rejects the key.
            OverBudget: The images exceed the remaining budget; nothing was charged.
            ServiceUnavailable: The service did not answer, even after ``retries`` repetitions.
        """
        with self._turn:
            before = self.asked
            try:
                return np.concatenate(list(self.query_iter(images)))
            except BaseException:
                self.asked = before
                raise

    def query_iter(self, images: Images | FloatImages) -> Iterator[Answers]:
        """Like `query`, but yields the answers request by request, so that each can be stored immediately."""
        check_images(images, self.image_shape)
        if self._budget is not None and self.asked + len(images) > self._budget:
            raise OverBudget(self.client, len(images), self._budget - self.asked, self._budget)
        size = self.settings.request_images
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        names = [f"{self._prefix}{self.asked + size * place}-{image_digest(part)}" for place, part in enumerate(parts)]
        self._refuse_over_budget([(name, len(part)) for name, part in zip(names, parts, strict=True)])
        for answers in self._send_all(list(zip(names, parts, strict=True))):
            self.asked += len(answers)
            yield answers

    def close(self) -> None:
        """Close the connections; the next query opens new ones."""
        if self._http is not None:
            self._http.close()
            self._http = None

    def _refuse_over_budget(self, requests: Sequence[tuple[str, int]]) -> None:
        """Reject a query of several requests as a whole, before the first of them is charged."""
        question = self._wire.quote(requests) if len(requests) > 1 else None
        if question is None:
            return
        path, body = question
        quote = self._send(lambda: {"method": "POST", "url": path, "json": body}).json()
        if quote["remaining"] is not None and quote["unpaid"] > quote["remaining"]:
            raise OverBudget(self.client, quote["unpaid"], quote["remaining"], quote["budget"])

    def _send_all(self, requests: Sequence[tuple[str, Images | FloatImages]]) -> Iterator[Answers]:
        """Send requests concurrently and yield their answers in order; after a refusal nothing more is sent."""
        if len(requests) == 1:  # threads would take longer than a small request
            yield self._answers(*requests[0], threading.Event())
            return
        waiting, stop = iter(requests), threading.Event()

        def ask(request_id: str, images: Images | FloatImages) -> Answers:
            try:
                return self._answers(request_id, images, stop)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(min(self.settings.max_in_flight, len(requests))) as pool:
            flight: list[Future[Answers]] = [
                pool.submit(ask, *each) for each in islice(waiting, self.settings.max_in_flight)
            ]
            try:
                while flight:
                    answers = flight.pop(0).result()
                    flight.extend(pool.submit(ask, *each) for each in islice(waiting, 1))
                    yield answers
            finally:
                stop.set()
                for future in flight:
                    future.cancel()

    def _answers(self, request_id: str, images: Images | FloatImages, stop: threading.Event) -> Answers:
        response = self._send(lambda: self._wire.request(request_id, images), stop)
        try:
            answers = np.asarray(self._wire.answers(response, len(images)), np.float32)
        except (ValueError, KeyError, TypeError, IndexError, EOFError) as error:
            raise ServiceUnavailable(
                f"{self.url} gave an unreadable answer ({_line(error)}); check `thief.blackbox`"
            ) from None
        if answers.shape != (len(images), self.classes):
            raise ServiceUnavailable(
                f"{self.url} answered {list(answers.shape)} numbers to {len(images)} images, expected "
                f"{[len(images), self.classes]}"
            )
        return answers

    def _get(self, path: str, patience_s: float | None = None) -> httpx.Response:
        return self._send(lambda: {"method": "GET", "url": path}, patience_s=patience_s)

    def _send(
        self,
        make: Callable[[], dict[str, Any]],
        stop: threading.Event | None = None,
        patience_s: float | None = None,
    ) -> httpx.Response:
        """Send a request until it is answered or rejected.

        An unavailable service is retried for as long as the timeout of one answer; other failures ``retries`` times.
        """
        failures, away_since = 0, None
        patience_s = min(self.settings.request_timeout_s, patience_s or self.settings.request_timeout_s)
        while True:
            if stop is not None and stop.is_set():
                raise ServiceUnavailable("another request of this query was rejected")
            try:
                response = self._client().request(**make())
                if response.is_success:
                    self._has_answered = True
                    return response
                away = self._is_away(response.status_code)
                error: MeaRayError = self._error(response)
            except httpx.TransportError as failure:
                error = ServiceUnavailable(f"{self.url} does not answer: {_line(failure)}")
                away, response = not isinstance(failure, httpx.TimeoutException), None
            except httpx.HTTPError as failure:
                raise ServiceUnavailable(f"{self.url} does not answer: {_line(failure)}") from None
            if isinstance(error, RateLimited):
                self._sleep(error.retry_after_s)
                continue
            if isinstance(error, QueryError):
                raise error
            now = time.monotonic()
            away_since = (now if away_since is None else away_since) if away else None
            failures += 1
            waited_long = away_since is not None and now - away_since > patience_s
            if waited_long or (failures > self.settings.retries and away_since is None):
                raise ServiceUnavailable(
                    f"{error}; tried {failures} times. Answers received so far are kept, and repeating the query is "
                    "not charged twice"
                )
            pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * _PAUSE_FACTOR ** min(failures, 16))
            self._sleep(max(pause, min(_retry_after(response) or 0.0, _LONGEST_PAUSE_S)))

    def _error(self, response: httpx.Response) -> MeaRayError:
        """Return the typed error of a refusal."""
        try:
            problem = response.json()
            problem = problem if isinstance(problem, dict) else {}
        except ValueError:
            problem = {}
        detail = str(problem.get("detail") or response.reason_phrase or response.status_code)[:500]
        code = response.status_code
        if code in {401, 403}:
            return UnknownClient(f"{self.url} rejects the API key: {detail}")
        if code == 402:
            asked, remaining, budget = (int(problem.get(name) or 0) for name in ("asked", "remaining", "budget"))
            return OverBudget(self._named(), asked, remaining, budget)
        if code == 429:
            wait = problem.get("retry_after_s")
            return RateLimited(self._named(), float(wait) if wait else _retry_after(response) or 1.0)
        if code == 409:
            return RequestConflict(f"{self.url}: {detail}")
        if self._is_away(code):
            return ServiceUnavailable(f"{self.url} answered {code} ({detail})")
        return BadQuery(f"{self.url} rejected the request with {code}: {detail}")

    def _is_away(self, code: int) -> bool:
        """Return whether the service is away. A proxy has no route to one that ends or restarts, and answers 404."""
        return code in _AWAY or (code == 404 and self._has_answered)

    def _named(self) -> str:
        return self._about.client if hasattr(self, "_about") else "?"

    def _client(self) -> httpx.Client:
        if self._http is None:
            with _OPENING:
                if self._http is None:
                    headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
                    limits = httpx.Limits(max_connections=self.settings.max_in_flight + 1)
                    self._http = httpx.Client(
                        base_url=self.url,
                        headers=headers,
                        timeout=self.settings.request_timeout_s,
                        limits=limits,
                        transport=self._transport,
                    )
        return self._http

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_turn"}
        return {**state, "_http": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _turn=threading.RLock())


_OPENING = threading.Lock()


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"{url!r} is not a URL ({error}); give one like http://127.0.0.1:8000") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigError(f"{url!r} is not an http or https URL; give one like http://127.0.0.1:8000")
    if parsed.port is not None and not 0 < parsed.port < 65536:
        raise ConfigError(f"{url!r} is not a URL: the port must be 1 to 65535")
    if parsed.userinfo:
        raise ConfigError("the URL contains a password; give the key in `thief.blackbox.key`")
    return url.rstrip("/")


def _retry_after(response: httpx.Response | None) -> float | None:
    """Return the seconds of a ``Retry-After`` header, given in seconds or as a date; None without one."""
    value = "" if response is None else response.headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError):
        return None


def _line(error: Exception) -> str:
    return first_line(error) or type(error).__name__
