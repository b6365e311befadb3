"""Calls between processes of one machine over a Unix socket, for those that a call of a Ray actor would slow down.

Where a lone image takes 3 ms to compute, the call that charges it takes as long through Ray, and a third of that here.
Only an actor's own methods are called, under Ray's name and with Ray's arguments, so that a caller can always fall back
to Ray: when the actor is on another node or has died, or the system has no such sockets.

The sockets have no file, but a random name in Linux's abstract namespace, which ends with the process. Both sides check
that the other belongs to the same user: messages are pickled.
"""

from __future__ import annotations

import asyncio
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
        methods: What may be called, by name. They are called from several threads at once.
    """

    def __init__(self, methods: dict[str, Callable[..., Any]]) -> None:
        self._methods = methods
        self.address: Address = f"mea_ray-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen()
        threading.Thread(target=self._accept, name="local calls", daemon=True).start()

    @classmethod
    def start(cls, methods: dict[str, Callable[..., Any]]) -> LocalServer | None:
        """Start a server; None where the system has no abstract sockets."""
        return cls(methods) if sys.platform == "linux" else None

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
                    name, args = pickle.loads(_receive(connection))  # noqa: S301 - of a process of the same user
                    connection.sendall(_framed(self._outcome(name, args)))
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
        address: Of the server.

    Raises:
        OSError: There is no such server on this machine, or it belongs to another user.
    """

    def __init__(self, address: Address) -> None:
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
            OSError: The connection broke; the call may have been made. The caller is closed.
            EOFError: So it is if the server died.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._socket, _framed((name, args)))
            (length,) = _LENGTH.unpack(await self._receive(loop, _LENGTH.size))
            succeeded, outcome = pickle.loads(await self._receive(loop, length))  # noqa: S301 - as above
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


def _framed(message: object) -> bytes:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
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
