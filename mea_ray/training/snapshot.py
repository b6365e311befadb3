"""Snapshots of a training between two epochs, so that another process continues it, bit for bit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mea_ray.core.errors import MeaRayError
from mea_ray.storage.files import patiently, write_whole
from mea_ray.storage.remote import Storage
from mea_ray.training import device as devices
from mea_ray.training.objective import Objective
from mea_ray.training.progress import BestWeights

SCHEMA = 2
"""Schema version of a snapshot's content; a snapshot with another version is not used."""
SUFFIX = ".state"
EVERY_S = 60.0
"""Shortest time between two writes unless ``resources.snapshot_every_s`` says otherwise, in seconds."""


class Pace:
    """How often snapshots are written, by the trainings that share it.

    Attributes:
        every_s: Shortest time between two writes, in seconds; None writes none.
    """

    def __init__(self, every_s: float | None) -> None:
        self.every_s = math.inf if every_s is None else every_s
        self.written()

    @property
    def due(self) -> bool:
        """Whether it is time for another write."""
        return time.monotonic() - self._last >= self.every_s

    def written(self) -> None:
        """Begin to wait for the next write."""
        self._last = time.monotonic()


class SnapshotFile:
    """The file that a training's snapshots are written to.

    Args:
        path: The file.
        every_s: Shortest time between two writes, in seconds; a shorter training writes nothing. None reads and writes
            none.
        pace: Shared with other trainings, in place of ``every_s``.
        keep: Whether the file outlives its training: a later process then has the trained network from it. Otherwise it
            is removed when the training is done.
        notify: Called with a sentence when a snapshot is continued from, or cannot be.
        saved: Called after a write.
    """

    def __init__(
        self,
        path: Path,
        every_s: float | None = EVERY_S,
        *,
        pace: Pace | None = None,
        keep: bool = False,
        notify: Callable[[str], None] = lambda text: None,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.path, self.keep, self.notify, self._saved = path, keep, notify, saved
        self.pace = pace if pace is not None else Pace(every_s)

    def beside(self, name: str) -> SnapshotFile:
        """Return a file in the same folder for a training that this one is a part of."""
        path = self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}-{name}{SUFFIX}")
        return SnapshotFile(path, pace=self.pace, keep=self.keep, notify=self.notify, saved=self._saved)

    @property
    def due(self) -> bool:
        """Whether it is time for another write."""
        return self.pace.due

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a snapshot: tensors, numbers, texts, and lists and dicts of them."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        data = content.getvalue()
        write_whole(self.path, hashlib.sha256(data).digest() + data)
        self.pace.written()
        self._saved()

    def load(self) -> dict[str, Any] | None:
        """Return the last snapshot; None if there is none. A damaged one is removed: the training starts anew."""
        try:
            content = patiently(self.path.read_bytes, self.path)
        except OSError:
            return None
        digest, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != digest:
            self.discard("is damaged")
            return None
        try:
            # Loading can run no code: nothing but tensors and plain values is accepted.
            state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, ValueError, KeyError, EOFError):
            self.discard("cannot be read by this version of torch")
            return None
        return state

    def discard(self, why: str) -> None:
        """Remove a snapshot that cannot be used, and say why in one line."""
        self.notify(f"{self.path} {why}; the training begins anew")
        self.remove()

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


class Snapshots:
    """The snapshots of a model that is trained in several stages, in a folder of a storage that every node can reach.

    Each stage has a file of its own, which is there until all are done: what a stage begins with, and what it learnt
    beside the network, is restored by going through the earlier ones again. They share one pace.

    Args:
        storage: The storage.
        relative: The folder in it.
        every_s: See ``SnapshotFile``.
        notify: See ``SnapshotFile``.
    """

    def __init__(
        self,
        storage: Storage,
        relative: str,
        every_s: float | None = EVERY_S,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.storage, self.relative, self.notify = storage, relative, notify
        self.folder = storage.root / relative
        self._pace = Pace(every_s)
        self._count = 0
        self._used = False

    def next(self) -> SnapshotFile:
        """Return the file of the next stage. The same stages must be gone through in the same order every time."""
        if not self._used and self.storage.remote is not None:
            # What this node has may be of an earlier epoch than what another one wrote.
            shutil.rmtree(self.folder, ignore_errors=True)
            self.storage.pull(self.relative)
        self._used = True
        name = f"{self._count}{SUFFIX}"
        self._count += 1
        return SnapshotFile(
            self.folder / name,
            pace=self._pace,
            keep=True,
            notify=self.notify,
            saved=lambda: self.storage.push(f"{self.relative}/{name}"),
        )

    def remove(self) -> None:
        """Remove all of them: the trained model is stored elsewhere by now."""
        if self._used or self.folder.exists():
            with contextlib.suppress(FileNotFoundError):
                self.storage.delete(self.relative)


@dataclass
class TrainingState:
    """Everything that decides how a training continues after an epoch.

    Attributes:
        file: Where snapshots are written; None writes none.
        identify: Returns a digest of what the training is made of beside the initial weights. A snapshot of another
            training is not used. Called only if there is a snapshot to read or to write.
        model: The network, on its device.
        heads: Parameters that the objective trains beside the model.
        optimiser: The optimiser of both.
        generators: All random streams except torch's global ones.
        best: The best weights so far.
        objective: Its memory belongs to the state.
        scaler: Scale of float16 losses; one that is not enabled has no state.
        seconds: Wall time of earlier processes.
    """

    file: SnapshotFile | None
    identify: Callable[[], str]
    model: nn.Module
    heads: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    best: BestWeights
    objective: Objective
    scaler: torch.amp.GradScaler
    seconds: float = 0.0
    finished: bool = False

    def resume(self, on_epoch: Callable[[dict[str, Any]], None] | None) -> tuple[list[dict[str, Any]], int]:
        """Continue from the snapshot, if there is one; return the history and the number of images seen by then."""
        if self.file is None or math.isinf(self.file.pace.every_s):
            self.file = None
            return [], 0
        self._started = time.monotonic()
        self._initial = state_digest(self.model)
        stored = self.file.load()
        if stored is None:
            return [], 0
        if stored.get("schema") != SCHEMA or stored.get("name") != self.name:
            self.file.discard("is of another training")
            return [], 0
        try:
            self.objective.recall(stored["memory"])
        except MeaRayError as error:
            self.file.discard(f"cannot be used ({error})")
            return [], 0
        history, seen = self.restore(stored)
        last = history[-1]
        if on_epoch is not None:
            on_epoch({**last, "resumed": len(history)})
        elif not self.finished:
            name = self.file.path.name.removeprefix(".").removesuffix(SUFFIX)
            self.file.notify(f"{name} goes on after epoch {last['epoch']} of {last['epochs']}")
        return history, seen

    @property
    def _where(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def name(self) -> str:
        """What the training is called."""
        return hashlib.sha256(f"{self.identify()} {self._initial}".encode()).hexdigest()

    def epoch_done(self, history: list[dict[str, Any]], seen: int, *, last: bool) -> None:
        """Write a snapshot if it is time, unless the training stops here."""
        if self.file is not None and self.file.due and not last:
            self.file.save(self.snapshot(history, seen))

    def done(self, history: list[dict[str, Any]], seen: int) -> None:
        """Take the best weights; remove the snapshot of a finished training, or keep the trained network in it."""
        if self.finished:
            return
        self.best.restore()
        if self.file is None:
            return
        if not self.file.keep:
            self.file.remove()
        elif self.file.due:
            self.file.save({**self.snapshot(history, seen), "finished": True})

    def snapshot(self, history: list[dict[str, Any]], seen: int) -> dict[str, Any]:
        """Return the state as tensors and plain values.

        Args:
            history: Records of all epochs so far.
            seen: Images seen so far.
        """
        on_cpu, on_device, generators = devices.random_state(self._where, self.generators)
        return {
            "schema": SCHEMA,
            "name": self.name,
            "finished": False,
            "model": self.model.state_dict(),
            "heads": [parameter.detach() for parameter in self.heads],
            "optimiser": self.optimiser.state_dict(),
            "generators": generators,
            "global": on_cpu,
            "device": on_device,
            "best": (self.best.score, self.best.waited, self.best.state),
            "memory": self.objective.memory(),
            "scaler": self.scaler.state_dict(),
            "history": json.dumps(history),
            "seen": seen,
            "seconds": self.seconds + time.monotonic() - self._started,
        }

    def restore(self, state: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Set everything but the objective to a snapshot's state; return its history and the number of images seen."""
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for parameter, value in zip(self.heads, state["heads"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        streams = state["global"], state["device"], state["generators"]
        devices.set_random_state(self._where, self.generators, streams)
        self.best.score, self.best.waited, self.best.state = state["best"]
        if state.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.seconds, self.finished = state["seconds"], state["finished"]
        return json.loads(state["history"]), state["seen"]


def training_digest(arrays: Sequence[npt.NDArray[Any] | None], settings: Mapping[str, Any]) -> str:
    """Return a digest of a training's arrays and settings (JSON values), 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.shape} {array.dtype}".encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def state_digest(model: nn.Module) -> str:
    """Return a digest of any network's parameters and buffers, on any device, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
