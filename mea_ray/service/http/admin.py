"""The owner's view: a page and its data on a local port, and the update of a running service."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jinja2
import uvicorn
from fastapi import FastAPI, Header, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mea_ray.core.errors import MeaRayError, ServiceUnavailable
from mea_ray.service.http.keys import KeyStore
from mea_ray.service.http.problems import Refusal
from mea_ray.service.http.running import Running, RunningService

HOST = "127.0.0.1"
_START_S = 10.0


class Update(BaseModel):
    """The victim to serve from now on."""

    model_config = ConfigDict(extra="forbid")

    victim: str


def usage_view(service: RunningService) -> dict[str, Any]:
    """Return the content of the page: the service, and each client with its key's state and its activity."""
    keys = {record.client: record for record in KeyStore(service.spec.state).list()}
    rows = [
        {**row, "revoked": bool(keys[row["client"]].revoked) if row["client"] in keys else True}
        for row in service.usage()
    ]
    return {"service": service.spec.name, "victim": str(service.spec.victim), "clients": rows}


def create_admin(service: RunningService) -> FastAPI:
    """Return the owner's application. Pages of other sites cannot access it: the Host header is checked."""
    app = FastAPI(title="mea_ray: the owner's view", openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    app.state.running = None

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        return render(usage_view(service))

    @app.get("/usage.json")
    def usage() -> dict[str, Any]:
        return usage_view(service)

    @app.post("/update")
    def update(body: Update, x_token: Annotated[str, Header()] = "") -> dict[str, str]:
        running: Running | None = app.state.running
        if running is None or not hmac.compare_digest(x_token.encode(), running.token.encode()):
            raise Refusal(403, "token", "only the owner's commands can change the service")
        service.update(Path(body.victim))
        return {"victim": str(service.spec.victim)}

    @app.exception_handler(Refusal)
    def refused(request: Request, error: Refusal) -> Response:
        return error.response()

    @app.exception_handler(MeaRayError)
    def ours(request: Request, error: MeaRayError) -> Response:
        status = 503 if isinstance(error, ServiceUnavailable) else 422
        return Refusal(status, type(error).__name__, str(error)).response()

    return app


@contextmanager
def served(app: FastAPI, port: int) -> Iterator[str]:
    """Serve the owner's application on the loopback interface, in a thread, until the block ends.

    Args:
        app: The application.
        port: TCP port; 0 lets the system choose one.

    Raises:
        ServiceUnavailable: The port cannot be used.
    """
    config = uvicorn.Config(app, host=HOST, port=port, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    sock = _bound(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="admin", daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield f"http://{HOST}:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_START_S)
        sock.close()


def _bound(config: uvicorn.Config) -> Any:
    try:
        return config.bind_socket()
    except SystemExit:  # uvicorn ends the process when a port is taken
        raise ServiceUnavailable(
            f"port {config.port} of {HOST} is taken; choose another one with --admin-port"
        ) from None


def render(view: dict[str, Any]) -> str:
    """Return the owner's page."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mea_ray.service.http", "."), autoescape=True)
    return environment.get_template("usage.html.j2").render(**view)
