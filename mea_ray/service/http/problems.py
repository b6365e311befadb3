"""Errors for HTTP clients: problem documents (RFC 9457) with a code for programs.

No document contains a stack trace, an image, a key, or a path of the server.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from mea_ray.core.errors import (
    BadQuery,
    MeaRayError,
    OverBudget,
    QueryError,
    RateLimited,
    RequestConflict,
    ServiceUnavailable,
    StorageUnavailable,
    UnknownClient,
)

CONTENT_TYPE = "application/problem+json"
RETRY_AFTER_S = 2.0
"""Seconds after which a client of an unavailable service should retry."""


class Problem(BaseModel):
    """A rejected request, for which nothing was charged."""

    model_config = ConfigDict(extra="allow")

    type: str = Field("about:blank", description="URI of the kind of problem.")
    title: str = Field(description="What the status code means.")
    status: int = Field(description="The status code.")
    detail: str = Field(description="What was sent, what is accepted, and what to do.")
    kind: str = Field(description="Stable name of the problem, for programs.")
    retry_after_s: float | None = Field(None, description="429 and 503: seconds to wait before a retry.")
    remaining: int | None = Field(None, description="402: remaining budget in images.")
    budget: int | None = Field(None, description="402: budget in images.")


class Refusal(Exception):
    """A request that is rejected with a status code.

    Args:
        status: The HTTP status code.
        kind: Stable name of the problem.
        detail: What was sent, what is accepted, and what to do.
        headers: Further headers.
        more: Further members of the document.
    """

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(status, kind, detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers, self.more = dict(headers or {}), more

    def response(self) -> Response:
        """Return the problem document."""
        body = {
            "type": "about:blank",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "kind": self.kind,
            **self.more,
        }
        return Response(json.dumps(body), self.status, self.headers, CONTENT_TYPE)


def unauthorised() -> Refusal:
    """Return the refusal of a request without a valid key; it does not reveal what is wrong with the key."""
    return Refusal(
        401,
        "key",
        "no valid API key; send `Authorization: Bearer KEY` with a key that the service's owner gave you",
        {"WWW-Authenticate": "Bearer"},
    )


def refusal_of(error: MeaRayError) -> Refusal:
    """Return the refusal for an error of the service."""
    if isinstance(error, OverBudget):
        detail = (
            f"{error.asked} images exceed the {error.remaining} remaining of your budget of {error.budget}; send "
            "fewer, or ask the service's owner for more"
        )
        return Refusal(402, "budget", detail, remaining=error.remaining, budget=error.budget, asked=error.asked)
    if isinstance(error, RateLimited):
        wait = error.retry_after_s
        detail = f"you exceed your rate limit; send the request again in {wait:.3f} s"
        return Refusal(429, "rate", detail, _retry(wait), retry_after_s=wait)
    if isinstance(error, RequestConflict):
        return Refusal(
            409,
            "conflict",
            "this Idempotency-Key was charged for other images; use a new one for every new request",
        )
    if isinstance(error, UnknownClient):
        return unauthorised()
    if isinstance(error, BadQuery):
        return Refusal(422, "images", str(error))
    if isinstance(error, (ServiceUnavailable, StorageUnavailable)):
        return unavailable()
    if isinstance(error, QueryError):
        return Refusal(422, "request", str(error))
    raise error


def unavailable() -> Refusal:
    """Return the refusal of a service that cannot charge or answer at the moment."""
    detail = "the service cannot answer at the moment; send the same request with the same Idempotency-Key again"
    return Refusal(503, "unavailable", detail, _retry(RETRY_AFTER_S), retry_after_s=RETRY_AFTER_S)


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
