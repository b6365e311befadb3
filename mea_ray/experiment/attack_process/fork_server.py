"""A fork server: a process with nothing but imported modules, which forks the processes of attacks.

It is spawned, not forked, so that it contains nothing of its parent's memory. A fork of it takes a hundredth of the
time that importing torch takes. There is one per parent process, started on first use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence

from mea_ray.core.errors import AttackDied
from mea_ray.experiment.attack_process.sandbox import short_environment

_PROGRAM = "from mea_ray.experiment.attack_process.fork_server import main; main({fd})"


class ForkServer:
    """The parent's handle of the fork server."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self) -> None:
        """Start the fork server without waiting for it, so that the first attack need not wait for its imports."""
        with self._turn, contextlib.suppress(OSError):
            if self._control is None or self._owner != os.getpid():
                self._start()

    def fork(self, fds: Sequence[int]) -> int:
        """Fork a process that runs a theft over these file descriptors, see ``child.serve``; return its id.

        Raises:
            AttackDied: It cannot be started.
        """
        with self._turn:
            for attempt in range(2):
                try:
                    return int(self._ask(b"fork", fds))
                except (OSError, ValueError) as error:
                    self._forget()
                    if attempt:
                        raise AttackDied(f"it could not be started ({error})") from error
        raise AssertionError("unreachable")

    def end(self, pid: int, grace_s: float = 0.0) -> int:
        """Kill a process and its children, and return its exit status.

        Args:
            pid: Its id.
            grace_s: Time to end by itself first, in seconds.

        Returns:
            Negative for a signal; 0 if it had to be killed, or is not known.
        """
        with self._turn, contextlib.suppress(OSError, ValueError):
            return int(self._ask(b"end %d %d" % (pid, round(1000 * grace_s))))
        return 0

    def _ask(self, order: bytes, fds: Sequence[int] = ()) -> bytes:
        if self._control is None or self._owner != os.getpid():
            self._start()
        assert self._control is not None
        socket.send_fds(self._control, [order], list(fds))
        answer = self._control.recv(64)
        if not answer:
            raise OSError("its fork server ended")
        return answer

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM.format(fd=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=short_environment(os.environ, sys.path),
                start_new_session=True,  # Ctrl-C is handled by the parent, which then ends it
            )
        self._control, self._owner = ours, os.getpid()

    def _forget(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control = None


FORK_SERVER = ForkServer()
"""That of this process."""


def main(fd: int) -> None:
    """Fork and end processes at the parent's request until it closes the connection; then end all that are left."""
    import torch

    from mea_ray.config import ThiefConfig, build
    from mea_ray.experiment.attack_process.child import serve

    # Modules that nearly every attack imports, loaded once; none from outside the package.
    build(ThiefConfig, {})
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    control = socket.socket(fileno=fd)
    alive: set[int] = set()
    while True:
        order, fds, _, _ = socket.recv_fds(control, 64, 3)
        if not order:
            break
        if order == b"fork":
            pid = _fork()
            if not pid:
                control.close()
                os.setsid()
                serve(*fds)
            alive.add(pid)
            answer = pid
        else:
            pid, grace_ms = map(int, order.split()[1:])
            answer = _end(pid, alive, grace_ms / 1000)
        for each in fds:
            os.close(each)
        control.sendall(b"%d" % answer)
    for pid in list(alive):
        _end(pid, alive)


def _fork() -> int:
    with warnings.catch_warnings():
        # The warning is about threads that a library started on import; none of them holds a lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _end(pid: int, alive: set[int], grace_s: float = 0.0) -> int:
    if pid not in alive:
        return 0
    alive.discard(pid)
    deadline = time.monotonic() + grace_s
    ended, status = os.waitpid(pid, os.WNOHANG)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if ended:
        return os.waitstatus_to_exitcode(status)
    os.kill(pid, signal.SIGKILL)  # it may have no group of its own yet
    os.waitpid(pid, 0)
    return 0
