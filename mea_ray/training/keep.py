"""The state of a training on disk, epoch by epoch, so that another process goes on with it, bit for bit."""

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
from mea_ray.training.progress import Best


class Keep:
    """Where a training keeps its state, and how often.

    Args:
        path: The file; removed when the training is done.
        every_s: Least seconds between two writes: a training that is shorter writes nothing.
    """

    def __init__(self, path: Path, every_s: float = 30.0) -> None:
        self.path, self.every_s = path, every_s
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for another write."""
        return time.monotonic() - self._last >= self.every_s

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state: tensors, numbers, texts, and lists and dicts of them."""
        content = io.BytesIO()
        torch.save(dict(state), content)
        data = content.getvalue()
        write_whole(self.path, hashlib.sha256(data).digest() + data)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Return what was kept; None if there is nothing, or it is damaged: then the training begins anew."""
        try:
            content = patiently(self.path.read_bytes, self.path)
        except OSError:
            return None
        digest, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != digest:
            return None
        # Loading can run no code: nothing but tensors and plain values is accepted.
        kept: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        return kept

    def done(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)


@dataclass
class Running:
    """What a training consists of between two epochs.

    Attributes:
        keep: Where it is kept; None keeps nothing.
        name: What training it is; a state of another one is not taken up.
        model: The network, on its device.
        beside: What the objective trains beside it.
        optimiser: Its optimiser.
        generators: All random streams but torch's global ones.
        best: The best weights so far.
    """

    keep: Keep | None
    name: str
    model: nn.Module
    beside: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    best: Best

    def begin(self) -> tuple[list[dict[str, Any]], int]:
        """Take up what was kept; return the history and the images seen, of a training that begins: nothing."""
        kept = self.keep.load() if self.keep is not None else None
        return self.take_up(kept) if kept is not None and kept["name"] == self.name else ([], 0)

    def epoch_done(self, history: list[dict[str, Any]], seen: int, *, last: bool) -> None:
        """Keep the state, if it is time, and unless the training stops here."""
        if self.keep is not None and self.keep.due and not last:
            self.keep.save(self.state(history, seen))

    def done(self) -> None:
        """Forget what was kept."""
        if self.keep is not None:
            self.keep.done()

    def state(self, history: list[dict[str, Any]], seen: int) -> dict[str, Any]:
        """Return all that decides how the training goes on."""
        return {
            "name": self.name,
            "model": self.model.state_dict(),
            "beside": [parameter.detach() for parameter in self.beside],
            "optimiser": self.optimiser.state_dict(),
            "generators": [generator.get_state() for generator in self.generators],
            "global": torch.get_rng_state(),
            "device": _device_state(self.model),
            "best": (self.best.score, self.best.waited, self.best.state),
            "history": json.dumps(history),
            "seen": seen,
        }

    def take_up(self, state: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """Go on from a state of this training; returns its history and the images seen."""
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for parameter, kept in zip(self.beside, state["beside"], strict=True):
                parameter.copy_(kept)
        self.optimiser.load_state_dict(state["optimiser"])
        for generator, kept in zip(self.generators, state["generators"], strict=True):
            generator.set_state(kept)
        torch.set_rng_state(state["global"])
        where = next(self.model.parameters()).device
        if state["device"] is not None and where.type != "cpu":
            getattr(torch, where.type).set_rng_state(state["device"], where)
        score, waited, weights = state["best"]
        self.best.score, self.best.waited, self.best.state = score, waited, weights
        return json.loads(state["history"]), state["seen"]


def _device_state(model: nn.Module) -> torch.Tensor | None:
    where = next(model.parameters()).device
    return None if where.type == "cpu" else getattr(torch, where.type).get_rng_state(where)
