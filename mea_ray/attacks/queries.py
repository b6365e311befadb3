"""How queries are sent: within a budget, and so that no image is ever charged twice.

``BudgetedQueries`` runs an attack's generator of queries up to a budget. ``CachedQueries`` serves a training that
queries in every step. Both store every answer in the transfer set before they send the next query, and take from it
what was answered before an interruption.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mea_ray.attacks.thief import Queries, Query, Thief
from mea_ray.attacks.transfer import Indices, TransferSet, content_names, foreign_transfer_set
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.types import Answers, BlackBox, FloatImages, Images

QUERIES_PER_FILE = 16
"""Queries much smaller than a chunk share a file of the transfer set. Less than chunk / 16 answers wait in memory."""


def send(blackbox: BlackBox, images: Images | FloatImages) -> Answers:
    """Send one query and check its answers: float32 (N, classes).

    Raises:
        DataError: The black box gave another number of answers or classes.
    """
    answers = np.asarray(blackbox.query(images), np.float32)
    if answers.shape != (len(images), blackbox.classes):
        raise DataError(
            f"queried {len(images)} images of {blackbox.classes} classes, got answers of shape {answers.shape}"
        )
    return answers


def check_remaining(blackbox: BlackBox, needed: int, lost: int) -> None:
    """Refuse a budget that the black box will not answer.

    Args:
        blackbox: The victim.
        needed: Images that the attack will still query.
        lost: Images that may have been charged before an interruption without their answers being stored. Querying
            them again is free.

    Raises:
        ConfigError: The black box answers fewer images than ``needed``.
    """
    remaining = blackbox.remaining
    if remaining is not None and remaining + lost < needed:
        raise ConfigError(
            f"the black box answers {remaining} more images, thief.budgets needs {needed}; raise the client's budget "
            "or lower thief.budgets"
        )


class BudgetedQueries:
    """Runs an attack's queries up to a budget.

    Queries are cut at every budget, so that no rung depends on answers beyond its own.

    Args:
        queries: The attack's generator.
        thief: Whose budget is spent; ``queries_spent`` and ``transfer`` follow every answer.
        blackbox: The victim.
        chunk: Images in a query at most.
    """

    def __init__(self, queries: Queries, thief: Thief, blackbox: BlackBox, chunk: int) -> None:
        if not hasattr(queries, "send"):
            raise DataError(
                f"`queries` returned {type(queries).__name__}; write it as a generator: `answers = yield images`"
            )
        self.queries, self.thief, self.blackbox, self.chunk = queries, thief, blackbox, chunk
        self.query: Query | None = None
        self.answers: list[Answers] = []
        self.exhausted = False

    def spend(self, limit: int) -> None:
        """Query until ``limit`` images are answered, or the attack has nothing left to query."""
        while self.thief.queries_spent < limit and self.advance():
            assert self.query is not None
            done = sum(map(len, self.answers))
            left = len(self.query.images) - done
            affordable = limit - self.thief.queries_spent
            if self.query.whole and left > affordable:
                break
            count = min(left, affordable, self.chunk)
            self.answers.append(self._answer(self.query, done, done + count))
        self.thief.transfer.flush()

    def advance(self) -> bool:
        """Return the answers of a completed query to the attack, and take its next; False if there is none."""
        if self.exhausted or (self.query is not None and sum(map(len, self.answers)) < len(self.query.images)):
            return not self.exhausted
        try:
            yielded: Any = (
                self.queries.send(np.concatenate(self.answers)) if self.query is not None else next(self.queries)
            )
            self.query = self.thief.query(yielded)
        except StopIteration:
            self.exhausted = True
        self.answers = []
        return not self.exhausted

    def close(self) -> None:
        """Store what was answered, and end the generator."""
        self.queries.close()
        self.thief.transfer.flush()

    def _answer(self, query: Query, start: int, stop: int) -> Answers:
        """Answer a part of a query: from the transfer set as far as it goes, then by the black box."""
        thief, transfer = self.thief, self.thief.transfer
        images: Images | FloatImages = np.ascontiguousarray(query.images[start:stop])  # type: ignore[assignment]
        # A probe from the pool is named like a made image, or substitutes would be trained on it.
        of_pool = query.indices is not None and query.learn
        names = query.indices[start:stop] if query.indices is not None and of_pool else content_names(images)
        known = min(max(len(transfer) - thief.queries_spent, 0), len(images))
        parts = []
        if known:
            stored = slice(thief.queries_spent, thief.queries_spent + known)
            trained_on = transfer.for_training(stored.stop)[stored]
            if not np.array_equal(transfer.indices[stored], names[:known]) or not (trained_on == query.learn).all():
                raise foreign_transfer_set(transfer)
            parts.append(transfer.answers[stored])
        if known < len(images):
            answers = send(self.blackbox, images[known:])
            made = images[known:].astype(np.uint8) if query.learn and not of_pool else None
            transfer.append(names[known:], answers, made=made, at_once=False)
            # A file for each query, unless an attack queries image by image.
            if transfer.unwritten * QUERIES_PER_FILE >= self.chunk:
                transfer.flush()
            parts.append(answers)
        thief.queries_spent += len(images)
        return np.concatenate(parts)


class CachedQueries:
    """Queries of a training that is repeated from its start after an interruption.

    A training is a function of its seed: when it starts again, it queries the same images in the same order. As far as
    the transfer set goes they are answered from there.

    Args:
        blackbox: The victim.
        transfer: Where answers are stored. Without a path nothing could be replayed, so nothing is stored.
        chunk: Images in a query at most. Answers are written once there are as many.

    Attributes:
        queries_spent: Images answered so far, replayed ones included: what the training was charged for.
    """

    def __init__(self, blackbox: BlackBox, transfer: TransferSet, chunk: int) -> None:
        self.blackbox, self.transfer, self.chunk = blackbox, transfer, chunk
        self.queries_spent = 0
        self._indices: list[Indices] = []
        self._answers: list[Answers] = []

    def query(self, indices: Indices, images: Images | FloatImages) -> Answers:
        """Return the answers to images, float32 (N, K).

        Args:
            indices: Their positions in the pool, int64, (N,), N >= 1.
            images: uint8 or float32 in [0, 1], (N, C, H, W).

        Raises:
            ArtifactError: The transfer set holds the answers of another training.
            OverBudget: The budget is spent; earlier answers are stored.
        """
        parts = [
            self._chunk(indices[start : start + self.chunk], images[start : start + self.chunk])
            for start in range(0, len(indices), self.chunk)
        ]
        return np.concatenate(parts)

    def flush(self) -> None:
        """Write what was answered since the last chunk."""
        if self._indices and self.transfer.path is not None:
            self.transfer.append(np.concatenate(self._indices), np.concatenate(self._answers))
        self._indices, self._answers = [], []

    def skip(self, answered: int) -> None:
        """Go on after the first ``answered`` images, for a training that has learnt from them already.

        Raises:
            ArtifactError: The transfer set holds fewer answers.
        """
        if len(self.transfer) < answered:
            raise ArtifactError(
                f"{self.transfer.path or 'memory'} holds {len(self.transfer)} answers, {answered} were learnt from"
            )
        self.queries_spent = answered

    def _chunk(self, indices: Indices, images: Images | FloatImages) -> Answers:
        start, stop = self.queries_spent, self.queries_spent + len(indices)
        if self.transfer.path is not None and not self._indices and start < len(self.transfer):
            if not np.array_equal(self.transfer.indices[start:stop], indices):
                raise foreign_transfer_set(self.transfer)
            self.queries_spent = stop
            return self.transfer.answers[start:stop]
        answers = send(self.blackbox, images)
        self.queries_spent = stop
        self._indices.append(indices)
        self._answers.append(answers)
        if sum(map(len, self._indices)) >= self.chunk:
            self.flush()
        return answers
