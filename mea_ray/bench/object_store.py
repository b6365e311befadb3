"""An S3 server on loopback that counts its requests, for measurements and tests: moto's, in a thread."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from mea_ray.core.errors import ConfigError

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "loopback",
    "AWS_SECRET_ACCESS_KEY": "loopback",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Environment variables for a client of the server, which accepts any credentials."""


@dataclass
class Traffic:
    """The requests to a server.

    Attributes:
        requests: Requests by HTTP method.
        sent: Bytes in the bodies of requests.
        received: Bytes in the bodies of answers.
    """

    requests: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    received: int = 0

    @property
    def total(self) -> int:
        """Requests of all methods."""
        return sum(self.requests.values())

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.requests - before.requests, self.sent - before.sent, self.received - before.received)


class LoopbackS3:
    """A server with one empty bucket; use it in a ``with`` block.

    Args:
        bucket: Name of the bucket.

    Raises:
        ConfigError: moto is not installed.
    """

    def __init__(self, bucket: str = "bucket") -> None:
        self.bucket = bucket
        self.log: list[tuple[str, str]] = []
        """Method and path with query of every request."""
        self._traffic = Traffic()
        self._lock = threading.Lock()

    def __enter__(self) -> LoopbackS3:
        try:
            from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
            from werkzeug.serving import WSGIRequestHandler, make_server
        except ImportError:
            raise ConfigError(
                "the S3 server of this measurement is moto, which is not installed; pip install 'moto[server]'"
            ) from None
        app = DomainDispatcherApplication(create_backend_app)

        class Silent(WSGIRequestHandler):
            def log_request(self, *args: Any) -> None:
                return

        counted = self._counted(app)
        self._server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Silent)
        self._thread = threading.Thread(target=self._server.serve_forever, name="loopback-s3", daemon=True)
        self._thread.start()
        self._create_bucket()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    def location(self, folder: str = "") -> str:
        """Return the URI of a folder of the bucket, for ``storage``."""
        path = "/".join(filter(None, [self.bucket, folder]))
        return f"s3://{path}?scheme=http&endpoint_override={self.endpoint}"

    def traffic(self) -> Traffic:
        """Return the requests so far."""
        with self._lock:
            return Traffic(Counter(self._traffic.requests), self._traffic.sent, self._traffic.received)

    def _create_bucket(self) -> None:
        import httpx

        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=loopback/20200101/us-east-1/s3/aws4_request"}
        httpx.put(f"http://{self.endpoint}/{self.bucket}", headers=headers, timeout=120).raise_for_status()
        self._traffic = Traffic()
        self.log.clear()

    def _counted(self, app: Any) -> Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]:
        def count(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
            parts: list[bytes] = list(app(environ, start))
            with self._lock:
                method = str(environ["REQUEST_METHOD"])
                self.log.append((method, f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"))
                self._traffic.requests[method] += 1
                # A client that signs its chunks tells how long the content is without the signatures.
                length = environ.get("HTTP_X_AMZ_DECODED_CONTENT_LENGTH") or environ.get("CONTENT_LENGTH")
                self._traffic.sent += int(length or 0)
                if method != "HEAD":
                    self._traffic.received += sum(map(len, parts))
            return parts

        return count


def environment() -> Mapping[str, str]:
    """Return the variables that processes need to use the server."""
    return dict(CREDENTIALS)
