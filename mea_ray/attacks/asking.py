"""How an attack spends its budget: every answer is kept before the next query, and none is asked for twice."""

from __future__ import annotations

import hashlib

import numpy as np

from mea_ray.attacks.transfer import Indices, TransferSet
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.types import Answers, BlackBox, FloatImages, Images


def query(blackbox: BlackBox, images: Images | FloatImages) -> Answers:
    """Ask one query and check that the answers belong to it.

    Raises:
        DataError: The black box gave another number of answers or classes.
    """
    answers = np.asarray(blackbox.query(images), np.float32)
    if answers.shape != (len(images), blackbox.classes):
        raise DataError(
            f"asked {len(images)} images of {blackbox.classes} classes, got answers of shape {answers.shape}"
        )
    return answers


def check_remaining(blackbox: BlackBox, needed: int, lost: int) -> None:
    """Refuse a budget that the black box will not answer.

    Raises:
        ConfigError: It answers fewer images than ``needed``.
    """
    remaining = blackbox.remaining
    if remaining is not None and remaining + lost < needed:
        raise ConfigError(
            f"the black box answers {remaining} more images, thief.budgets needs {needed}; raise the client's budget "
            "or lower thief.budgets"
        )


class Asker:
    """Asks the queries of a training that can be repeated; what was answered before an interruption is replayed.

    A training is a function of its seed, so one that starts again asks the same images in the same order: as far as the
    transfer set goes they are answered from it.

    Args:
        blackbox: The victim.
        transfer: Where answers are kept. Without a path nothing could be replayed, so that nothing is kept.
        chunk: Images in a query at most; answers are written once there are as many.

    Attributes:
        asked: Images answered so far, replayed or not: what the training was charged for.
    """

    def __init__(self, blackbox: BlackBox, transfer: TransferSet, chunk: int) -> None:
        self.blackbox, self.transfer, self.chunk = blackbox, transfer, chunk
        self.asked = 0
        self._indices: list[Indices] = []
        self._answers: list[Answers] = []

    def ask(self, indices: Indices, images: Images | FloatImages) -> Answers:
        """Return the answers to images.

        Args:
            indices: Their positions in the pool, int64, (N,), N >= 1.
            images: uint8 or float32 in [0, 1], (N, C, H, W).

        Raises:
            ArtifactError: The transfer set holds the answers of another training.
            OverBudget: The budget is spent; what was answered before is kept.
        """
        parts = [
            self._piece(indices[start : start + self.chunk], images[start : start + self.chunk])
            for start in range(0, len(indices), self.chunk)
        ]
        return np.concatenate(parts)

    def flush(self) -> None:
        """Write what was answered since the last chunk."""
        if self._indices and self.transfer.path is not None:
            self.transfer.append(np.concatenate(self._indices), np.concatenate(self._answers))
        self._indices, self._answers = [], []

    def _piece(self, indices: Indices, images: Images | FloatImages) -> Answers:
        start, stop = self.asked, self.asked + len(indices)
        if self.transfer.path is not None and not self._indices and start < len(self.transfer):
            if not np.array_equal(self.transfer.indices[start:stop], indices):
                raise foreign(self.transfer)
            self.asked = stop
            return self.transfer.answers[start:stop]
        answers = query(self.blackbox, images)
        self.asked = stop
        self._indices.append(indices)
        self._answers.append(answers)
        if sum(map(len, self._indices)) >= self.chunk:
            self.flush()
        return answers


def content_names(images: Images | FloatImages) -> Indices:
    """Name images that are not of the pool by their content: negative int64 (N,), equal for equal images only."""
    digests = (hashlib.sha256(image.tobytes()).digest()[:8] for image in images)
    return np.array([-1 - (int.from_bytes(digest, "big") >> 1) for digest in digests], np.int64)


def foreign(transfer: TransferSet) -> ArtifactError:
    """Return the error for a transfer set that another run filled."""
    return ArtifactError(
        f"the transfer set in {transfer.path or 'memory'} was asked in another order: it belongs to another seed, pool "
        "or training; give this run a folder of its own, or delete that one to query again (and be charged again)"
    )
