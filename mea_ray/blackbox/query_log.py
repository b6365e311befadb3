"""The owner's query log: for each client its requests, the predicted classes, and a sample of its images.

The log contains only what a client sent and received. A request is logged once, however often it is sent: its id is the
key, as in the ledger. Images are ordered by the number at the start of each request id, which the client increments. So
a client's log depends only on its queries and their answers, not on the number of replicas, on which of them answered
first, or on which were killed. A client that numbers its requests falsely can hide images from the distances, but not
from the counts.

The log is also the ledger of watermarked answers. Where the service marks its answers (`blackbox.marking`), every image
whose answer was marked is stored, with the class that the client received, even if it is not in the sample.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mea_ray.blackbox.journal import storage_error
from mea_ray.blackbox.policies import Response, Source, to_uint8
from mea_ray.blackbox.validate import check_name
from mea_ray.core.types import Answers, FloatImages, Images

logger = logging.getLogger(__name__)

SAMPLE_IMAGES = 2000
"""Number of a client's first images that are stored (3 kB each at 3 x 32 x 32), for the distances between them."""
SAMPLE_BYTES = 32 * 2**20
"""Maximum size of these images per client in bytes, as float32; of larger images, fewer are stored."""

# At most 15 digits: a longer number might not fit in the database, and no client queries a quadrillion images.
_NUMBER = re.compile(r"(?:\A|[^0-9])([0-9]{1,15})-[0-9a-f]{32}\Z")
_TABLE = """
CREATE TABLE IF NOT EXISTS requests (
    client TEXT NOT NULL, request_id TEXT NOT NULL, start INTEGER NOT NULL, classes BLOB NOT NULL,
    dtype TEXT NOT NULL, images BLOB NOT NULL, PRIMARY KEY (client, request_id)
)
"""
# A separate table, so that logs from before marked answers remain readable; few requests have a row here.
_MARKS = """
CREATE TABLE IF NOT EXISTS marks (
    client TEXT NOT NULL, request_id TEXT NOT NULL, places BLOB NOT NULL, dtype TEXT NOT NULL, images BLOB NOT NULL,
    flagged INTEGER NOT NULL, PRIMARY KEY (client, request_id)
)
"""


class LogEntry(NamedTuple):
    """One answered request.

    Attributes:
        client: Name of the client.
        request_id: Name of the request.
        start: Number of images that the client queried before, by its own count; -1 if the id holds no number.
        classes: Predicted class of each answer, uint16 (N,).
        images: The images that belong to the sample, as sent, (n, C, H, W), n <= N.
        places: Positions of the marked images among the N, uint32 (m,).
        marked: The marked images, uint8 (m, C, H, W).
        flagged: Number of images that looked abnormal to the service.
    """

    client: str
    request_id: str
    start: int
    classes: npt.NDArray[np.uint16]
    images: Images | FloatImages
    places: npt.NDArray[np.uint32]
    marked: Images
    flagged: int


class MarkedQueries(NamedTuple):
    """A client's images whose answers were marked, in the order of its requests.

    Attributes:
        images: uint8 (m, C, H, W); (0, 0, 0, 0) if there are none.
        labels: Class that the client received for each, int64 (m,).
        positions: Number of images that the client queried before each one, by its own count, int64 (m,); -1 if
            unknown.
    """

    images: Images
    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


NO_MARKED_QUERIES = MarkedQueries(np.zeros((0, 0, 0, 0), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class ClientLog:
    """The log of one client.

    Attributes:
        requests: Number of requests.
        classes: Answers per predicted class, int64 (K,).
        sample: The first images in their order, each request's (n, C, H, W) with its predicted classes uint16 (n,).
        marks: All images whose answers were marked.
        flagged: Number of images that looked abnormal to the service.
        lost: Whether the log could not be read or written, so that nothing is known.
    """

    requests: int
    classes: npt.NDArray[np.int64]
    sample: list[tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]]
    marks: MarkedQueries = NO_MARKED_QUERIES
    flagged: int = 0
    lost: bool = False


def sample_size(shape: tuple[int, int, int], images: int = SAMPLE_IMAGES) -> int:
    """Return the number of stored images per client: ``images``, or as many as fit in ``SAMPLE_BYTES``."""
    return min(images, SAMPLE_BYTES // (4 * int(np.prod(shape))))


def predicted_classes(answers: Answers, source: Source) -> npt.NDArray[np.uint16]:
    """Return the class of each answer, uint16 (N,).

    Embeddings have no class. All images then count as class 0, and distances are measured among all of them.

    Args:
        answers: float32 (N, K).
        source: ``source`` of the answer policy.
    """
    if source != "probabilities":
        return np.zeros(len(answers), np.uint16)
    classes: npt.NDArray[np.uint16] = answers.argmax(1).astype(np.uint16)
    return classes


def log_entry(
    client: str,
    request_id: str,
    images: Images | FloatImages,
    response: Response,
    source: Source,
    sample: int,
    start: int | None = None,
) -> LogEntry:
    """Make the log entry of an answered request.

    Args:
        client: Name of the client.
        request_id: Name of the request.
        images: The queried images, (N, C, H, W).
        response: The answers. If the policy hides the order of two classes from the client, it is also hidden in the
            log.
        source: ``source`` of the answer policy.
        sample: See ``sample_size``.
        start: Number of images that the client queried before; None takes it from the request's id.
    """
    if start is None:
        start = numbered(request_id)
    stored = max(0, sample - start) if start >= 0 else 0
    places = np.flatnonzero(response.marked).astype(np.uint32)
    return LogEntry(
        client,
        request_id,
        start,
        predicted_classes(response.answers, source),
        images[:stored],
        places,
        to_uint8(images[places]),
        int(response.flagged.sum()),
    )


def numbered(request_id: str) -> int:
    """Return the number of images queried before a request, from the request's id; -1 without one."""
    number = _NUMBER.search(request_id)
    return int(number[1]) if number else -1


class QueryLog:
    """Log entries of all clients. Not thread-safe: the caller serialises all calls.

    A log that cannot be opened or read is not an error: it warns once, and logs nothing.

    Args:
        path: SQLite file, continued if it exists; None for memory. It survives a crash of its process, but not of the
            machine, because writes do not wait for the disk.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._database: sqlite3.Connection | None = None
        self._path = Path(path or ":memory:")
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # An actor can run its constructor and its calls in different threads, though never two at once.
            self._database = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            # As for the ledger's journal: without shared memory, hence also safe on network file systems.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=OFF"):
                self._database.execute(f"PRAGMA {pragma}")
            for table in (_TABLE, _MARKS):
                self._database.execute(table)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def add(self, entries: Sequence[LogEntry]) -> None:
        """Store entries; one whose request was logged before is ignored.

        Raises:
            BadQuery: A client's name or a request id is malformed, see `validate.check_name`; nothing was stored.
            StorageUnavailable: The disk is full or unreachable; nothing was stored, and the call can be repeated.
        """
        entries = [LogEntry._make(each) for each in entries]
        for each in entries:
            check_name("a client's name", each.client)
            check_name("a request id", each.request_id)
        if self._database is None:
            return
        rows = [
            (e.client, e.request_id, e.start, e.classes.tobytes(), _format(e.images), e.images.tobytes())
            for e in entries
        ]
        marks = [
            (e.client, e.request_id, e.places.tobytes(), _format(e.marked), e.marked.tobytes(), e.flagged)
            for e in entries
            if len(e.places) or e.flagged
        ]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._database.executemany("INSERT OR IGNORE INTO marks VALUES (?, ?, ?, ?, ?, ?)", marks)
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise storage_error(self._path, error) from error
        except sqlite3.Error as error:
            self._give_up(error)

    def of(self, client: str) -> ClientLog:
        """Return the log of a client; an empty one if it never queried."""
        nothing = ClientLog(0, np.zeros(0, np.int64), [], lost=True)
        if self._database is None:
            return nothing
        try:
            rows = self._database.execute(
                "SELECT classes, dtype, images FROM requests WHERE client = ? ORDER BY start, request_id", (client,)
            ).fetchall()
            marks = self._database.execute(
                "SELECT start, classes, places, marks.dtype, marks.images, flagged FROM marks JOIN requests "
                "USING (client, request_id) WHERE client = ? ORDER BY start, request_id",
                (client,),
            ).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return nothing
        predicted = [np.frombuffer(classes, np.uint16) for classes, _, _ in rows]
        counts = np.bincount(np.concatenate(predicted)) if predicted else np.zeros(0, np.int64)
        sample = []
        for classes, (_, form, content) in zip(predicted, rows, strict=True):
            if content:
                images = _images(content, form)
                sample.append((images, classes[: len(images)]))
        flagged = sum(row[-1] for row in marks)
        return ClientLog(len(rows), counts.astype(np.int64), sample, _marked_queries(marks), flagged)

    def images(self, client: str) -> int:
        """Return the number of a client's images in the log; 0 if the log is lost."""
        if self._database is None:
            return 0
        try:
            rows = self._database.execute("SELECT SUM(LENGTH(classes)) FROM requests WHERE client = ?", (client,))
            return int(rows.fetchone()[0] or 0) // np.dtype(np.uint16).itemsize
        except sqlite3.Error as error:
            self._give_up(error)
            return 0

    def forget(self, client: str) -> None:
        """Remove all entries of a client; their space in the file is reused."""
        if self._database is None:
            return
        try:
            for table in ("requests", "marks"):
                self._database.execute(f"DELETE FROM {table} WHERE client = ?", (client,))  # noqa: S608
        except sqlite3.OperationalError as error:
            raise storage_error(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("the query log is lost (%s); answers and charges are not affected", error)
        self.close()


def _marked_queries(rows: Sequence[tuple[int, bytes, bytes, str, bytes, int]]) -> MarkedQueries:
    """Read rows of marked images: start, classes, places, type and shape, images, number of flagged ones."""
    images, labels, positions = [], [], []
    for start, classes, places, form, content, _ in rows:
        where = np.frombuffer(places, np.uint32).astype(np.int64)
        if len(where):
            images.append(_images(content, form))
            labels.append(np.frombuffer(classes, np.uint16)[where].astype(np.int64))
            positions.append(where + start if start >= 0 else np.full(len(where), -1))
    if not images:
        return NO_MARKED_QUERIES
    return MarkedQueries(np.concatenate(images), np.concatenate(labels), np.concatenate(positions))


def _images(content: bytes, form: str) -> npt.NDArray[Any]:
    dtype, *shape = form.split(",")
    return np.frombuffer(content, dtype).reshape(-1, *map(int, shape))


def _format(images: npt.NDArray[Any]) -> str:
    return ",".join([images.dtype.str, *map(str, images.shape[1:])])
