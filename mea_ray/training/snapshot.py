"""Snapshots of a training between two epochs, so that another process continues it, bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mea_ray.storage.files import patiently, write_whole
from mea_ray.training.progress import BestWeights


class SnapshotFile:
    """The file that a training's snapshots are written to.

    Args:
        path: The file. It is removed when the training is done.
        every_s: Shortest time between two writes, in seconds. A shorter training writes nothing.
    """

    def __init__(self, path: Path, every_s: float = 30.0) -> None:
        self.path, self.every_s = path, every_s
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another write."""
        return time.monotonic() - self._last >= self.every_s

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a snapshot: tensors, numbers, texts, and lists and dicts of them."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        data = content.getvalue()
        write_whole(self.path, hashlib.sha256(data).digest() + data)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return the last snapshot; None if there is none or it is damaged: then the training starts from scratch."""
        try:
            content = patiently(self.path.read_bytes, self.path)
        except OSError:
            return None
        digest, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        # Loading can run no code: nothing but tensors and plain values is accepted.
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        return state

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


@dataclass
class TrainingState:
    """Everything that decides how a training continues after an epoch.

    Attributes:
        file: Where snapshots are written; None writes none.
        name: Identifies the training. A snapshot of another training is ignored.
        model: The network, on its device.
        heads: Parameters that the objective trains beside the model.
        optimiser: The optimiser of both.
        generators: All random streams except torch's global ones.
        best: The best weights so far.
    """

    file: SnapshotFile | None
    name: str
    model: nn.Module
    heads: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    best: BestWeights

    def resume(self) -> tuple[list[dict[str, Any]], int]:
        """Continue from the snapshot, if there is one; return the history and the number of images seen by then."""
        found = self.file.load() if self.file is not None else None
        return self.restore(found) if found is not None and found["name"] == self.name else ([], 0)

    def epoch_done(self, history: list[dict[str, Any]], seen: int, *, last: bool) -> None:
        """Write a snapshot if it is time, unless the training stops here."""
        if self.file is not None and self.file.due and not last:
            self.file.save(self.snapshot(history, seen))

    def done(self) -> None:
        """Remove the snapshot of a finished training."""
        if self.file is not None:
            self.file.remove()

    def snapshot(self, history: list[dict[str, Any]], seen: int) -> dict[str, Any]:
        """Return the state as tensors and plain values.

        Args:
            history: Records of all epochs so far.
            seen: Images seen so far.
        """
        return {
            "name": self.name,
            "model": self.model.state_dict(),
            "beside": [parameter.detach() for parameter in self.heads],
            "optimiser": self.optimiser.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
            "global": torch.get_rng_state(),
            "device": _device_state(self.model),
            "best": (self.best.score, self.best.waited, self.best.state),
            "history": json.dumps(history),
            "seen": seen,
        }

    def restore(self, state: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Set everything to a snapshot's state; return its history and the number of images seen."""
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for parameter, value in zip(self.heads, state["beside"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])
        for generator, stream in zip(self.generators, state["generators"], strict=True):
            generator.set_state(stream)
        torch.set_rng_state(state["global"])
        where = next(self.model.parameters()).device
        if state["device"] is not None and where.type != "cpu":
            getattr(torch, where.type).set_rng_state(state["device"], where)
        self.best.score, self.best.waited, self.best.state = state["best"]
        return json.loads(state["history"]), state["seen"]


def _device_state(model: nn.Module) -> torch.Tensor | None:
    where = next(model.parameters()).device
    if where.type == "cpu":
        return None
    state: torch.Tensor = getattr(torch, where.type).get_rng_state(where)
    return state
