"""Snapshots of a data-free attack between two iterations, so that another process continues it, bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mea_ray.attacks.generator_game import GeneratorGame
from mea_ray.training.snapshot import SnapshotFile, state_digest

SCHEMA = 1
"""Schema version of a snapshot's content; a snapshot with another version is not used."""


class GameSnapshots:
    """Writes the state of a game, and restores it in another process.

    A snapshot holds both networks and optimisers, the random streams, the replay memory, the curves, and how many
    images were charged by then. The answers stay in the transfer set, which is written first.

    Args:
        game: The game, at its start.
        file: Where snapshots are written; None writes none.
    """

    def __init__(self, game: GeneratorGame, file: SnapshotFile | None) -> None:
        self.game = game
        self.file = None if file is None or math.isinf(file.pace.every_s) else file
        self._name = "" if self.file is None else _name(game)
        self._begun = 0

    def resume(self) -> None:
        """Restore the last snapshot, unless it is of another game or later than the next rung that is wanted."""
        stored = self.file.load() if self.file is not None else None
        if self.file is None or stored is None:
            return
        if stored.get("schema") != SCHEMA or stored.get("name") != self._name:
            self.file.discard("is of another attack")
            return
        thief, queries = self.game.thief, int(stored["queries"])
        if thief.first_wanted is not None and queries > thief.first_wanted:
            self.file.discard(f"is of {queries} queries, and a substitute of {thief.first_wanted} is wanted")
        elif queries > len(thief.transfer) or self._answers(stored["begun"], queries) != stored["answers"]:
            self.file.discard(f"is of {queries} queries, whose answers are not the stored ones")
        else:
            self._restore(stored)
            self.file.notify(f"the attack goes on after {queries} queries")

    def iteration_done(self) -> None:
        """Write a snapshot if it is time."""
        if self.file is None:
            return
        if self.file.due:
            self.game.thief.transfer.flush()
            self.file.save(self._state())
        self._begun = self.game.thief.queries_spent

    def _answers(self, start: int, stop: int) -> str:
        return self.game.thief.transfer.digest(start, stop)

    def _state(self) -> dict[str, Any]:
        game, thief = self.game, self.game.thief
        queries = thief.queries_spent
        return {
            "schema": SCHEMA,
            "name": self._name,
            "queries": queries,
            # What the last iteration queried follows from all answers before, so these stand for all.
            "begun": self._begun,
            "answers": self._answers(self._begun, queries),
            "student": game.student.state_dict(),
            "generator": game.generator.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in game.optimisers.items()},
            "streams": [stream.get_state() for stream in game.streams],
            "replay": _filled(game),
            "counts": [game.stored, game.iterations, game.updates],
            "seconds": game.seconds,
            "logs": json.dumps([game.sums, thief.curves]),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        game, thief = self.game, self.game.thief
        game.student.load_state_dict(state["student"])
        game.generator.load_state_dict(state["generator"])
        for name, optimiser in game.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        for stream, value in zip(game.streams, state["streams"], strict=True):
            stream.set_state(value)
        game.stored, game.iterations, game.updates = state["counts"]
        if state["replay"] is not None:
            images, answers = state["replay"]
            game.make_memory(images.shape[1:], answers.shape[1])
            assert game.memory is not None
            game.memory[0][: len(images)] = images
            game.memory[1][: len(answers)] = answers.numpy()
        game.seconds = state["seconds"]
        game.sums, curves = json.loads(state["logs"])
        thief.curves.update({name: [(at, value) for at, value in points] for name, points in curves.items()})
        thief.queries_spent = self._begun = state["queries"]


def _filled(game: GeneratorGame) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the part of the replay memory that is in use."""
    if game.memory is None:
        return None
    size = min(game.stored, len(game.memory[0]))
    return game.memory[0][:size].clone(), torch.from_numpy(np.array(game.memory[1][:size]))


def _name(game: GeneratorGame) -> str:
    """Return a digest of all that a game follows from, but its answers."""
    thief, measure = game.thief, type(getattr(game.disagreement, "__self__", game.disagreement))
    parts = [
        f"{measure.__module__}.{measure.__qualname__}",
        repr(game.game),
        thief.learning.model_dump_json(),
        repr((game.clip, thief.seed, thief.classes, thief.image_shape)),
        state_digest(game.student),
        state_digest(game.generator),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
