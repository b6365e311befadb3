"""Finds the Ray cluster of a sweep: checks the form of an address, then whether Ray answers there, within seconds.

Ray itself waits minutes for a cluster that is gone and then ends with a traceback. Here an unusable address is rejected
with one sentence that names the address, its origin, and the remedy.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mea_ray.core.errors import ConfigError

CONNECT_S = 5.0
"""Timeout for a connection to an address, in seconds."""
JOIN_S = 45.0
"""Timeout for joining a cluster that answers, in seconds; includes the import of Ray."""

_OWN = "omit --address to start Ray on this machine"
# An HTTP/2 client begins a connection with this preface and an empty SETTINGS frame (RFC 9113, section 3.4). Ray's head
# is a gRPC server, so it answers at once with a SETTINGS frame of its own, which is of type 4.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_SETTINGS_TYPE = 4
_JOIN = """
import logging, sys
import ray
try:
    ray.init(sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False)
except BaseException as error:
    print("REFUSED", " ".join(str(error.__cause__ or error).split()))
else:
    print("JOINED")
"""


@dataclass(frozen=True)
class ClusterAddress:
    """An address of a Ray cluster.

    Attributes:
        value: The address, e.g. ``head:6379``.
        source: Its origin, for messages: ``--address``, ``RAY_ADDRESS``, or a file.
    """

    value: str
    source: str

    def __str__(self) -> str:
        return f"{self.source}={self.value}"


def check(given: str | None) -> ClusterAddress | None:
    """Return the cluster to use; None to start Ray on this machine. Takes at most ``CONNECT_S``.

    Without ``given``, ``RAY_ADDRESS`` and the file left by an earlier ``ray start`` are ignored.

    Args:
        given: ``host:port``; ``auto`` for the cluster of ``RAY_ADDRESS`` or of this machine's ``ray start``; ``local``
            or None to start Ray on this machine.

    Raises:
        ConfigError: The address has another form, or nothing answers there; or there is no usable folder for the files
            of a Ray started here.
    """
    if given is None or given == "local":
        _check_temp_folder()
        return None
    address = _current_cluster() if given == "auto" else ClusterAddress(given, "--address")
    host, port = _host_and_port(address)
    _check_answer(address, host, port)
    return address


def find_cluster(given: str | None) -> str | None:
    """Check as ``check`` does, and also that this process can join.

    Returns:
        The address of the cluster; None to start Ray on this machine.

    Raises:
        ConfigError: As for ``check``; or the cluster cannot be joined.
    """
    address = check(given)
    if address is None:
        return None
    _check_join(address)
    return address.value


def temp_folder() -> tuple[Path, str]:
    """Return the folder of Ray's temporary files, and ``TMPDIR=`` or ``RAY_TMPDIR=`` if that chose it."""
    for variable in ("RAY_TMPDIR", *(["TMPDIR"] if sys.platform == "linux" else [])):
        if variable in os.environ:
            return Path(os.environ[variable]), f"{variable}="
    return Path("/tmp"), ""


def _check_temp_folder() -> None:
    """Check that Ray can create its sockets on this machine.

    Raises:
        ConfigError: The folder cannot be written, or its path is not absolute, or too long for a Unix socket.
    """
    folder, source = temp_folder()
    remedy = "set RAY_TMPDIR to a short path on a local disk, e.g. RAY_TMPDIR=/tmp"
    if not folder.is_absolute():  # also an empty one: Ray would put its files into the working directory
        raise ConfigError(f"{source}{os.environ[source[:-1]]} is not an absolute path; {remedy}")
    longest = folder / "ray" / f"session_2026-01-31_00-00-00_000000_{os.getpid()}" / "sockets" / "plasma_store"
    limit = 103 if sys.platform == "darwin" else 107  # bytes of sun_path, without the final zero
    if (too_long := len(os.fsencode(longest)) - limit) > 0:
        raise ConfigError(
            f"{source}{folder} is {too_long} bytes too long for Ray's sockets, which are created below it; {remedy}"
        )
    try:
        (folder / "ray").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{source}{folder} cannot hold Ray's files: {error.strerror}; {remedy}") from None


def _current_cluster() -> ClusterAddress:
    """Return what ``--address auto`` means.

    Raises:
        ConfigError: There is no such cluster.
    """
    if from_environment := os.environ.get("RAY_ADDRESS", ""):
        return ClusterAddress(from_environment, "RAY_ADDRESS")
    file = temp_folder()[0] / "ray" / "ray_current_cluster"
    try:
        return ClusterAddress(file.read_text(encoding="utf-8").strip(), str(file))
    except (OSError, UnicodeError):
        raise ConfigError(
            f"--address=auto: no Ray cluster was started on this machine (RAY_ADDRESS is not set, there is no {file}); "
            f"start one with `ray start --head`, give --address=host:port, or {_OWN}"
        ) from None


def _host_and_port(address: ClusterAddress) -> tuple[str, int]:
    value = address.value
    remedy = f"give the address that `ray start` printed, e.g. head:6379, or {_OWN}"
    if value.startswith("ray://"):
        raise ConfigError(f"{address}: a sweep cannot run through Ray Client; on a machine of the cluster, {remedy}")
    if value.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} is the address of Ray's dashboard and job server, which a program cannot join; {remedy}; in a "
            "command of `ray job submit` write --address=auto"
        )
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or set(host) & set("/ "):
        raise ConfigError(f"{address} is not of the form host:port; {remedy}")
    return host.strip("[]"), int(port)


def _check_answer(address: ClusterAddress, host: str, port: int) -> None:
    """Check that a gRPC server answers.

    Raises:
        ConfigError: Nothing answers, or something else.
    """
    stale = f"start the cluster, or {_OWN}"
    if address.source.endswith("ray_current_cluster"):
        stale = f"`ray stop` cleans up after a crashed `ray start`; start the cluster, or {_OWN}"
    try:
        with socket.create_connection((host, port), CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}:
                return  # the connection is encrypted: only joining shows whether it is Ray
            connection.settimeout(CONNECT_S)
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except TimeoutError:
        raise ConfigError(f"{address}: no answer within {CONNECT_S:g} s; {stale}") from None
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"{address} cannot be reached: {getattr(error, 'strerror', None) or error}; {stale}"
        ) from None
    if len(answer) < 4 or answer[3] != _SETTINGS_TYPE:
        raise ConfigError(
            f"{address}: the server there is not the head of a Ray cluster; give the address that `ray start` "
            f"printed (its port is 6379 by default), or {_OWN}"
        )


def _check_join(address: ClusterAddress) -> None:
    """Join from a child process: Ray's own attempts take minutes, and some of its failures end the process.

    Raises:
        ConfigError: The cluster rejects the process, e.g. because it runs another version of Ray or Python.
    """
    try:
        made = subprocess.run(
            [sys.executable, "-c", _JOIN, address.value],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=JOIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{address} answers, but this machine could not join within {JOIN_S:g} s; run the command on a machine of "
            f"the cluster (`ray start --address={address.value}` makes this one join), or {_OWN}"
        ) from None
    if "JOINED" in made.stdout:
        return
    _, _, reason = made.stdout.partition("REFUSED ")
    reason = " ".join(reason.split())[:300] or f"the process that tried to join ended with code {made.returncode}"
    raise ConfigError(
        f"{address} cannot be joined: {reason.rstrip('.')}; run the command on a machine of the cluster, with its Ray "
        f"and Python, or {_OWN}"
    )
