"""The parent's side of a suspect's process: starts it, sends images, reads answers, ends it; trusts no output."""

from __future__ import annotations

import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import SuspectError
from mea_ray.experiment.suspect.worker import send

LARGEST_ANSWER = 1 << 30
"""Maximum size of one answer, in bytes."""
IMAGES_AT_ONCE = 256
_ASKING = "asking it"


@dataclass(frozen=True)
class Limits:
    """Resource limits of a suspect's process.

    Attributes:
        memory_gb: Address space, in GiB. PyTorch alone takes about two.
        cpu_s: Total CPU time, in seconds.
        answer_s: Timeout for loading the file, and for each request, in seconds.
    """

    memory_gb: float = 16.0
    cpu_s: int = 3600
    answer_s: float = 300.0


class SuspectProcess:
    """A file's model in a separate process, without network and with resource limits. Use it in a ``with`` block.

    Args:
        kind: One of ``loaders.LOADERS``.
        path: The file.
        limits: Its resource limits.
        options: Options of the loader, plain JSON types.

    Attributes:
        about: The loader's description of the model, once it is loaded.

    Raises:
        SuspectError: The file cannot be loaded within the limits.
    """

    def __init__(self, kind: str, path: Path, limits: Limits | None = None, **options: Any) -> None:
        self.path, self.limits = path.resolve(), limits or Limits()
        self._job = {
            **options,
            "kind": kind,
            "path": str(self.path),
            "memory_bytes": int(self.limits.memory_gb * 2**30),
            "cpu_s": self.limits.cpu_s,
        }
        self.about: dict[str, Any] = {}

    def __enter__(self) -> SuspectProcess:
        self._folder = tempfile.TemporaryDirectory(prefix="mea_ray_suspect_")
        self._stderr = tempfile.TemporaryFile()
        environment = {
            "PATH": os.defpath,
            "HOME": self._folder.name,
            "TMPDIR": self._folder.name,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mea_ray.experiment.suspect.worker"],  # its working directory is empty
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd=self._folder.name,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            self._requests.write(json.dumps(self._job).encode() + b"\n")
            self._requests.flush()
            self.about, _ = self._receive("loading it")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._requests, self._answers):
            try:
                stream.close()
            except OSError:  # the pipe broke when the process ended
                continue
        self._stderr.close()
        self._folder.cleanup()

    def ask(self, images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Query the model in requests of at most ``IMAGES_AT_ONCE`` images.

        Args:
            images: float32 (N, ...), as the model expects them, N >= 1.

        Returns:
            Its outputs, float32 or int64, N rows.

        Raises:
            SuspectError: It failed, took too long, or returned another number of rows.
        """
        parts = [self._asked(images[at : at + IMAGES_AT_ONCE]) for at in range(0, len(images), IMAGES_AT_ONCE)]
        return np.concatenate(parts)

    def _asked(self, images: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        try:
            send(self._requests, {}, images)
        except OSError:
            raise SuspectError(self._ended(_ASKING)) from None
        _, given = self._receive(_ASKING)
        if given is None or given.ndim < 1 or len(given) != len(images):
            raise SuspectError(
                f"{self.path} returned {None if given is None else given.shape} for {len(images)} images; it must give "
                "one row per image"
            )
        return given

    def _receive(self, doing: str) -> tuple[dict[str, Any], npt.NDArray[Any] | None]:
        """Read one message within the time limit."""
        box: queue.Queue[tuple[dict[str, Any], bytes] | None] = queue.Queue()
        thread = threading.Thread(target=self._read_one, args=(box,), daemon=True)
        thread.start()
        try:
            received = box.get(timeout=self.limits.answer_s)
        except queue.Empty:
            self._process.kill()
            raise SuspectError(
                f"{self.path}: {doing} took more than {self.limits.answer_s:g} s; raise --seconds if that is no attack"
            ) from None
        if received is None:
            raise SuspectError(self._ended(doing))
        head, body = received
        if "error" in head:
            form = "; if it needs another input format, declare it with --preprocessing" if doing == _ASKING else ""
            raise SuspectError(f"{self.path}: {doing} failed: {str(head['error'])[:400]}{form}")
        try:
            return head, np.load(io.BytesIO(body), allow_pickle=False) if body else None
        except (ValueError, OSError, EOFError) as error:
            raise SuspectError(f"{self.path}: {doing} gave no array: {error}") from error

    def _read_one(self, box: queue.Queue[tuple[dict[str, Any], bytes] | None]) -> None:
        try:
            head = json.loads(self._answers.readline(1 << 16))
            size = int(head["bytes"])
            body = self._answers.read(size) if 0 <= size <= LARGEST_ANSWER else b""
            box.put((head, body) if len(body) == size else None)
        except (OSError, ValueError, KeyError, TypeError):
            box.put(None)

    def _ended(self, doing: str) -> str:
        """Return the reason why there is no answer."""
        code = self._process.poll()
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 2000))
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        tail = f" ({last[0][:200]})" if last else ""
        return (
            f"{self.path}: {doing} ended its process (exit {code}){tail}; it may have met a limit "
            f"({self.limits.memory_gb:g} GiB, {self.limits.cpu_s} s of CPU): raise --memory-gb if that is no attack"
        )
