"""Sends small bodies to a replica together with the head of their request.

Ray Serve's proxy passes the head to a replica, which then calls the proxy back for the body. For one small image that
call takes longer than its forward pass. So the proxy waits for a small body and attaches it to the head, see
`SendWithHead`, where the replica reads it, see `received`. Ray Serve loads `middlewares` into its proxy if `VARIABLE`
is set when Ray is started; otherwise bodies are sent as usual.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ENVIRONMENT = {VARIABLE: f"{__name__}.middlewares"}
"""Environment variable to set before Ray is started."""
_BODY = "mea_ray.body"
_MOST_BYTES = 64 * 1024
"""Larger bodies gain nothing: Ray stores them separately from the call."""


def middlewares() -> list[Middleware]:
    """Return the middlewares for Ray Serve's proxy."""
    return [Middleware(SendWithHead)]


class SendWithHead:
    """Puts a small body into the scope of its request; the application can still receive it as usual."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or not 0 < _announced(scope) <= _MOST_BYTES:
            await self.app(scope, receive, send)
            return
        messages: list[Message] = []
        while True:
            messages.append(await receive())
            if messages[-1]["type"] != "http.request" or not messages[-1].get("more_body", False):
                break
        if messages[-1]["type"] == "http.request":
            scope[_BODY] = b"".join(message.get("body", b"") for message in messages)

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, again, send)


def received(scope: Scope, receive: Receive) -> Receive:
    """Return the ``receive`` function of a request: from the body attached to its head, if there is one."""
    body: bytes | None = scope.pop(_BODY, None)
    if body is None:
        return receive

    async def receiving() -> Message:
        nonlocal body
        if body is not None:
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}
        while (message := await receive())["type"] == "http.request":
            pass  # the same body again, from the proxy
        return message

    return receiving


def _announced(scope: Scope) -> int:
    """Return the Content-Length of a request, in bytes; 0 without one."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0
