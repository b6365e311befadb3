"""Calls of an actor's methods over a Unix socket, for work that takes less time than a call through Ray.

The actor must be on the same machine. Only its own methods are called, with the same arguments as through Ray, so a
caller can always fall back to Ray: if the actor is on another node or has died, or the system has no such sockets.

The sockets have no file, but a random name in Linux's abstract namespace, which ends with the process. Messages are
pickled, so both sides check that the other process belongs to the same user, and the server unpickles only what begins
with the service's secret.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import pickle
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

_LENGTH = struct.Struct("!Q")
_PEER = struct.Struct("3i")
_MOST_BYTES = 2**31
Address = str
"""Name of a socket in the abstract namespace, without its leading zero byte."""


class LocalServer:
    """Answers local calls in threads of its own, one thread per connection, until its process ends.

    Args:
        methods: The methods that can be called, by name. They are called from several threads at once.
        secret: The service's secret, which callers must show.
    """

    def __init__(self, methods: dict[str, Callable[..., Any]], secret: str) -> None:
        self._methods, self._secret = methods, secret.encode()
        self.address: Address = f"mea_ray-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen()
        threading.Thread(target=self._accept, name="local calls", daemon=True).start()

    @classmethod
    def start(cls, methods: dict[str, Callable[..., Any]], secret: str) -> LocalServer | None:
        """Start a server; None if the system has no abstract sockets."""
        return cls(methods, secret) if sys.platform == "linux" else None

    def close(self) -> None:
        """Accept no more connections."""
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="local calls", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                _check_user(connection)
                while True:
                    message = _receive(connection)
                    prefix, call = message[: len(self._secret)], message[len(self._secret) :]
                    if not hmac.compare_digest(prefix, self._secret):
                        return
                    name, args = pickle.loads(call)  # noqa: S301 - of a process that knows the secret
                    connection.sendall(_framed(pickle.dumps(self._outcome(name, args))))
            except (OSError, EOFError):
                return  # the caller ended, or falls back to Ray

    def _outcome(self, name: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
        try:
            return True, self._methods[name](*args)
        except Exception as error:
            return False, error


class LocalCaller:
    """A connection to a `LocalServer`, used from one event loop. Calls are made one after the other.

    Args:
        address: The server's address.
        secret: The service's secret.

    Raises:
        OSError: There is no such server on this machine, or it belongs to another user.
    """

    def __init__(self, address: Address, secret: str) -> None:
        self._secret = secret.encode()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(f"\0{address}")
            _check_user(self._socket)
            self._socket.setblocking(False)
        except BaseException:
            self._socket.close()
            raise

    async def call(self, name: str, *args: Any) -> Any:
        """Call a method of the server; its error is raised as itself.

        Raises:
            OSError: The connection broke. The call may have been made, and this caller is closed.
            EOFError: The server closed the connection, as when its process dies; otherwise as above.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, _framed(self._secret + pickle.dumps((name, args))))
            (length,) = _LENGTH.unpack(await self._receive(loop, _LENGTH.size))
            succeeded, outcome = pickle.loads(await self._receive(loop, length))  # noqa: S301 - of a process of the same user
        except BaseException:  # an answer that was not waited for must not be taken for that of the next call
            self.close()
            raise
        if not succeeded:
            raise outcome
        return outcome

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    async def _receive(self, loop: asyncio.AbstractEventLoop, length: int) -> bytes:
        parts, left = [], _checked(length)
        while left:
            part = await loop.sock_recv(self._socket, left)
            if not part:
                raise EOFError("the server closed the connection")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def _framed(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, _checked(length))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        raise EOFError("the caller closed the connection")
    return data


def _checked(length: int) -> int:
    if length > _MOST_BYTES:
        raise OSError(f"a message of {length} bytes is longer than the {_MOST_BYTES} that are accepted")
    return length


def _check_user(connection: socket.socket) -> None:
    """Refuse a process of another user."""
    _, user, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if user != os.geteuid():
        raise PermissionError(f"the other process belongs to user {user}")
