"""The process in which an untrusted file is loaded and queried: ``python -m mea_ray.experiment.suspect.worker``.

It has no network, limited memory, time and file sizes, an empty environment and its own working directory.
Requests come on stdin and answers go to stdout: a line of JSON, then the number of ``.npy`` bytes given in it. Output
of the file's own code goes to stderr.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import first_line

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
Ask = Callable[[npt.NDArray[np.float32]], Any]


def without_network() -> str:
    """Cut off the network: by a namespace without interfaces if the kernel allows it, else by a hook inside Python.

    Returns:
        ``namespace`` or ``python``.
    """
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET):
            if libc.unshare(flags) == 0:
                return "namespace"
    sys.addaudithook(_refuse_network)
    return "python"


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    if event in {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"}:
        raise PermissionError(f"a suspect's file may not use the network ({event})")


def limit(memory_bytes: int, cpu_s: int, file_bytes: int = 1 << 20) -> None:
    """Limit the resources of this process; the kernel enforces the limits."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard),) * 2)


def send(stream: IO[bytes], head: dict[str, Any], array: npt.NDArray[Any] | None = None) -> None:
    """Write a line of JSON and, with ``bytes`` in it, an array."""
    body = b""
    if array is not None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        body = buffer.getvalue()
    stream.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n" + body)
    stream.flush()


def read_exactly(stream: IO[bytes], size: int) -> bytes:
    """Read exactly ``size`` bytes.

    Raises:
        EOFError: The other side is gone.
    """
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


def open_suspect(job: dict[str, Any]) -> tuple[Ask, dict[str, Any]]:
    """Load the file of a job; return a function that queries it, and a description of its input."""
    from mea_ray.experiment.suspect import loaders

    return loaders.LOADERS[job["kind"]](Path(job["path"]), job)


def main() -> None:
    """Load the suspect named in the first line, then answer until stdin is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    job = json.loads(requests.readline())
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    limit(job["memory_bytes"], job["cpu_s"])
    network = without_network()
    try:
        ask, about = open_suspect(job)
    except BaseException as error:
        send(answers, {"error": f"{type(error).__name__}: {first_line(error)}"})
        return
    send(answers, {"ready": True, "network": network, **about})
    while line := requests.readline():
        images = np.load(io.BytesIO(read_exactly(requests, json.loads(line)["bytes"])), allow_pickle=False)
        try:
            given = np.asarray(ask(images))
            if given.dtype.kind not in "fiu":
                raise TypeError(f"the model returns {given.dtype}, not numbers")
            send(answers, {}, given.astype(np.float32 if given.dtype.kind == "f" else np.int64))
        except BaseException as error:
            send(answers, {"error": f"{type(error).__name__}: {first_line(error)}"})


if __name__ == "__main__":
    main()
