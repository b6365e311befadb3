"""The HTTP API as an ASGI application: authentication, parsing, charging and answering."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mea_ray import __version__
from mea_ray.blackbox.validate import LONGEST_NAME, check_name
from mea_ray.config import ServingConfig
from mea_ray.core.errors import MeaRayError
from mea_ray.service.http import openapi
from mea_ray.service.http.bodies import ACCEPTED, NPY, Reader, content_type
from mea_ray.service.http.engine import About, Engine
from mea_ray.service.http.keys import ApiKey, KeyRing
from mea_ray.service.http.metrics import Counts, exposition
from mea_ray.service.http.problems import Refusal, refusal_of, unauthorised
from mea_ray.service.http.replies import Replies, npy, wanted
from mea_ray.service.http.settings import HttpLimits
from mea_ray.service.http.small_bodies import received

logger = logging.getLogger("mea_ray.http")
_COUNT_EVERY_S = 1.0


class Usage(BaseModel):
    """The charges of a client."""

    client: str
    charged: int = Field(description="Images charged so far.")
    budget: int | None = Field(description="Query budget in images; null for no limit.")
    remaining: int | None = Field(description="Remaining budget in images; null for no limit.")
    images_per_second: float | None = Field(description="Sustained rate in images per second; null for no limit.")
    burst: int | None = Field(description="Images that can be queried at once after a pause; null for no limit.")


class PricedRequest(BaseModel):
    """A request for which a client wants a quote."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(min_length=1, max_length=LONGEST_NAME, description="Its Idempotency-Key.")
    images: int = Field(ge=1, le=2**31, description="Its number of images.")


class QuoteRequest(BaseModel):
    """Requests that a client is about to send."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests: list[PricedRequest] = Field(min_length=1, max_length=100_000)


class Quote(BaseModel):
    """The current price of these requests: requests that were charged before cost nothing."""

    unpaid: int = Field(description="Images that would be charged.")
    remaining: int | None = Field(description="Remaining budget in images; null for no limit.")
    budget: int | None = Field(description="Query budget in images; null for no limit.")


class Model(BaseModel):
    """The public description of the model."""

    name: str
    image_shape: list[int] = Field(description="Channels, height and width of the model's input.")
    classes: list[str] = Field(description="Names of the classes, in the order of the scores.")
    answer_length: int = Field(description="Numbers in an answer: classes, or the length of an embedding.")
    policy: str = Field(description="Answer policy: what an answer reveals.")
    max_request_images: int
    max_request_bytes: int
    max_json_bytes: int
    max_image_pixels: int
    accepts: list[str] = Field(description="Content types of a request.")


class Health(BaseModel):
    """Whether the service can charge and answer."""

    status: str = "ok"


@dataclass
class Api:
    """The state of one process of the service.

    Attributes:
        about: The public description of the model.
        engine: Replica and ledger.
        keys: The API keys.
        settings: Settings of answer policy and forward passes.
        limits: Limits of requests.
    """

    about: About
    engine: Engine
    keys: KeyRing
    settings: ServingConfig
    limits: HttpLimits

    def __post_init__(self) -> None:
        described = self.engine.describe()
        self.answer_length = int(described["classes"])
        self.reader = Reader(self.about.shape, int(described["max_request_images"]), self.limits)
        policy = self.settings.policy
        top = int(policy.params["k"]) if policy.name == "top_k" else None
        self.replies = Replies(self.about.name, policy.name, described["source"], self.about.class_names, top)
        self.counts = Counts()
        self._limits_sent: tuple[ApiKey, ...] | None = None
        self._counted = 0.0
        self._background: set[asyncio.Task[None]] = set()

    async def client(self, credentials: HTTPAuthorizationCredentials | None) -> ApiKey:
        """Return the client's key record; changed limits are sent to the ledger first.

        Raises:
            Refusal: 401, without a valid key.
        """
        record = None if credentials is None else self.keys.find(credentials.credentials)
        if record is None:
            raise unauthorised()
        if (changed := self.keys.records) is not self._limits_sent:
            await self.engine.set_limits(changed)
            self._limits_sent = changed
        return record

    async def predict(self, request: Request, client: ApiKey, request_id: str, form: str) -> Response:
        """Read, charge and answer one request."""
        body = await self.reader.receive(request.stream(), request.headers)
        images = await self.reader.images(body, request.headers)
        answers = await self.engine.answer(client.client, request_id, images)
        request.state.images = len(answers)
        headers = {"Idempotency-Key": request_id}
        if form == NPY:
            return Response(npy(answers), headers=headers, media_type=NPY)
        text = await run_in_threadpool(lambda: json.dumps(self.replies.tree(answers), ensure_ascii=False))
        return Response(text, headers=headers, media_type="application/json")

    def count(self, status: int, seconds: float, images: int) -> None:
        """Count a request, and periodically send the counts to the ledger."""
        self.counts.add(status, seconds, images)
        if (now := time.monotonic()) - self._counted > _COUNT_EVERY_S:
            self._counted = now
            task = asyncio.ensure_future(self.push_counts())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def push_counts(self) -> None:
        """Send the counts of this process to the ledger."""
        try:
            await self.engine.count(self.counts)
        except MeaRayError as error:
            logger.warning("counters were not sent to the ledger: %s", error)


_bearer = HTTPBearer(auto_error=False, description="The API key that the service's owner gave you.")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Identifies this request. Send the same key when you repeat the request after a failure: it is "
        "charged once. "
        "Letters, digits and any of _.:/+@=-",
        max_length=LONGEST_NAME,
        pattern=r"^[A-Za-z0-9_.:/+@=-]+$",
    ),
]


def create_app(api: Api) -> FastAPI:
    """Return the application of one process."""
    app = FastAPI(
        title=f"mea_ray: {api.about.name}",
        version=__version__,
        description="Predictions of one model, charged per image.",
        redoc_url=None,
        responses=openapi.common_responses(),
    )

    @app.post("/v1/predict", **openapi.predict_route(api.about.shape))
    async def predict(request: Request, bearer: Bearer, idempotency_key: IdempotencyKey = None) -> Response:
        """Classify images. The usual headers set the content types of the body and of the answer."""
        client = await api.client(bearer)
        form = wanted(request.headers.get("accept"))
        content_type(request.headers)
        return await api.predict(request, client, idempotency_key or uuid.uuid4().hex, form)

    @app.get("/v1/usage", response_model=Usage, responses=openapi.refusals(401, 503))
    async def usage(bearer: Bearer) -> Usage:
        """Your charges and your remaining budget."""
        client = await api.client(bearer)
        standing = await api.engine.standing(client.client)
        rate = client.rate
        return Usage(
            client=client.client,
            **standing._asdict(),
            images_per_second=rate.images_per_second if rate else None,
            burst=rate.burst if rate else None,
        )

    @app.post("/v1/quote", response_model=Quote, responses=openapi.refusals(400, 401, 413, 415, 422, 503))
    async def quote(bearer: Bearer, asked: QuoteRequest) -> Quote:
        """The current price of requests. Nothing is charged."""
        client = await api.client(bearer)
        for each in asked.requests:
            check_name("an Idempotency-Key", each.id)
        unpaid, remaining, budget = await api.engine.unpaid(
            client.client, [(each.id, each.images) for each in asked.requests]
        )
        return Quote(unpaid=unpaid, remaining=remaining, budget=budget)

    @app.get("/v1/model", response_model=Model, responses=openapi.refusals(401, 503))
    async def model(bearer: Bearer) -> Model:
        """The model's input and output."""
        await api.client(bearer)
        return Model(
            name=api.about.name,
            image_shape=list(api.about.shape),
            classes=list(api.about.class_names),
            answer_length=api.answer_length,
            policy=api.settings.policy.name,
            max_request_images=api.reader.most_images,
            max_request_bytes=api.limits.max_request_bytes,
            max_json_bytes=api.limits.max_json_bytes,
            max_image_pixels=api.limits.max_image_pixels,
            accepts=list(ACCEPTED),
        )

    @app.get("/healthz", response_model=Health, responses=openapi.refusals(503))
    async def healthz() -> Health:
        """Whether the service can charge and answer."""
        await api.engine.counts()
        return Health()

    @app.get("/metrics", **openapi.metrics_route())
    async def metrics() -> Response:
        """Counters for Prometheus, over all replicas, without client names."""
        await api.push_counts()
        return Response(exposition(await api.engine.counts()), media_type="text/plain; version=0.0.4")

    _refuse_in_our_words(app)
    app.add_middleware(_Guard, api=api)
    return app


def _refuse_in_our_words(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return error.response()

    async def ours(request: Request, error: Exception) -> Response:
        assert isinstance(error, MeaRayError)
        return refusal_of(error).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first["loc"])
        status = 400 if first["type"] == "json_invalid" else 422
        return Refusal(status, "request", f"{where}: {first['msg']}; see /docs").response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return Refusal(error.status_code, "request", f"{error.detail}; see /docs", error.headers).response()

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        Refusal: refused,
        MeaRayError: ours,
        RequestValidationError: invalid,
        StarletteHTTPException: http,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


class _Guard:
    """Counts and logs requests, bounds bodies, and turns unexpected errors into problem documents.

    The log holds method, path, status, images and time: no key, no image, no query string.
    """

    def __init__(self, app: ASGIApp, api: Api) -> None:
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        scope.setdefault("state", {})

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, self._bounded(scope, received(scope, receive)), sending)
        except Refusal as refusal:
            await refusal.response()(scope, receive, sending)
        except Exception:
            number = uuid.uuid4().hex[:8]
            logger.exception("error %s in %s %s", number, scope["method"], scope["path"])
            if not status:
                detail = f"the service failed; report this number to its owner: {number}"
                await Refusal(500, "bug", detail).response()(scope, receive, sending)
        finally:
            seconds, images = time.perf_counter() - started, scope["state"].get("images", 0)
            if scope["path"] == "/v1/predict":
                self.api.count(status, seconds, images if status == 200 else 0)
            logger.info("%s %s %d %d images %.1f ms", scope["method"], scope["path"], status, images, 1e3 * seconds)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Stop reading a body that is larger than every limit, on any route."""
        most, size = self.api.limits.max_request_bytes, 0

        async def receiving() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                # FastAPI's own type: it treats any other as a body that cannot be parsed.
                raise HTTPException(413, f"the body is larger than the {most} bytes that are accepted")
            return message

        return receiving
