"""What the owner of a query API sees of each client: requests, predicted classes, and how far apart the images lie.

The log is kept where the answers are made and holds what was sent and said, nothing that the thief knows besides. A
request is noted once however often it is asked: its id is its key, as in the ledger. The order of the images is the one
in which the client numbers its requests (the ids begin with it). So a record depends on what a client asked and was
told, and on nothing else: not on the number of replicas, on which of them answered first, nor on who was killed
meanwhile. A client that numbers falsely could hide images from the distances (not from the counts).

It is the ledger of marked answers, too: where the service marks what it says (`blackbox.marking`), every image whose
answer was marked is kept, with the class that the client was told for it, whatever the sample holds.
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

from mea_ray.blackbox.journal import passing
from mea_ray.blackbox.policies import Source, Told, eight_bits
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.results.records import QueryLogRecord

logger = logging.getLogger(__name__)

SAMPLE_IMAGES = 2000
"""First images of a client whose distances are looked at; they are kept as they were sent (3 kB at 3 x 32 x 32)."""
SAMPLE_BYTES = 32 * 2**20
"""Most that these images may take for one client, counted as float32; larger images are therefore fewer."""
PRADA_DELTA = 0.9
"""Below this Shapiro-Wilk statistic the owner is alarmed (the paper's delta, about 0.9)."""
MIN_DISTANCES = 100
"""Fewest distances that are judged."""
BINS = 20

_NUMBER = re.compile(r"(\d+)-[0-9a-f]{32}$")
_TABLE = """
CREATE TABLE IF NOT EXISTS requests (
    client TEXT NOT NULL, request_id TEXT NOT NULL, start INTEGER NOT NULL, classes BLOB NOT NULL,
    dtype TEXT NOT NULL, images BLOB NOT NULL, PRIMARY KEY (client, request_id)
)
"""
# Of their own, so that a log of before there were marks can go on; few requests have a row here.
_MARKS = """
CREATE TABLE IF NOT EXISTS marks (
    client TEXT NOT NULL, request_id TEXT NOT NULL, places BLOB NOT NULL, dtype TEXT NOT NULL, images BLOB NOT NULL,
    flagged INTEGER NOT NULL, PRIMARY KEY (client, request_id)
)
"""


class Note(NamedTuple):
    """One answered request.

    Attributes:
        client: Who asked.
        request_id: Name of the request.
        start: Images that the client asked before, by its own numbering; -1 if the id does not tell.
        classes: Predicted class of each answer, uint16 (N,).
        images: Those of the images that belong to the sample, as they were sent, (n, C, H, W), n <= N.
        places: Which of the N images were marked, uint32 (m,).
        marked: These images, uint8 (m, C, H, W).
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


class Marks(NamedTuple):
    """The images that a client asked and whose answers were marked, in the order of the requests.

    Attributes:
        images: uint8 (m, C, H, W); (0, 0, 0, 0) without any.
        told: Class that the client was told for each, int64 (m,).
        positions: Images that the client asked before each one, by its own numbering, int64 (m,); -1 if unknown.
    """

    images: Images
    told: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


NO_MARKS = Marks(np.zeros((0, 0, 0, 0), np.uint8), np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Seen:
    """What was noted of one client.

    Attributes:
        requests: Number of requests.
        classes: Answers per predicted class, int64 (K,).
        sample: The first images in their order, each request's (n, C, H, W) with its predicted classes uint16 (n,).
        marks: All images whose answers were marked.
        flagged: Number of images that looked abnormal to the service.
        lost: The log could not be read or written, so that nothing is known.
    """

    requests: int
    classes: npt.NDArray[np.int64]
    sample: list[tuple[npt.NDArray[Any], npt.NDArray[np.uint16]]]
    marks: Marks = NO_MARKS
    flagged: int = 0
    lost: bool = False


def sample_size(shape: tuple[int, int, int], images: int = SAMPLE_IMAGES) -> int:
    """Return how many images of a client are kept: ``images``, or what fits in ``SAMPLE_BYTES``."""
    return min(images, SAMPLE_BYTES // (4 * int(np.prod(shape))))


def said(answers: Answers, source: str) -> Answers:
    """Return what the log takes for the classes of answers.

    Embeddings name no class: all images count as one, and PRADA's distances are those among all of them.

    Args:
        answers: float32 (N, K).
        source: ``source`` of the answer policy.
    """
    return answers if source == "probabilities" else np.ones((len(answers), 1), np.float32)


def note(client: str, request_id: str, images: Images | FloatImages, told: Told, source: Source, sample: int) -> Note:
    """Make the note of an answered request.

    Args:
        client: Who asked.
        request_id: Name of the request.
        images: What was asked, (N, C, H, W).
        told: What was answered: the owner's log is of answers, so a policy that hides the order of two classes hides it
            here, too.
        source: ``source`` of the answer policy.
        sample: See ``sample_size``.
    """
    number = _NUMBER.search(request_id)
    start = int(number[1]) if number else -1
    kept = max(0, sample - start) if number else 0
    classes = said(told.answers, source).argmax(1).astype(np.uint16)
    places = np.flatnonzero(told.marked).astype(np.uint32)
    marked = eight_bits(images[places])
    return Note(client, request_id, start, classes, images[:kept], places, marked, int(told.flagged.sum()))


class QueryLog:
    """Notes of all clients. Not thread-safe: one owner calls it, one call at a time.

    A log that cannot be opened or read does no harm: it says so once, and forgets.

    Args:
        path: SQLite file, continued if it is there; in memory when None. It survives the death of its process (not that
            of the machine: nothing waits for the disk).
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self._database: sqlite3.Connection | None = None
        self._path = Path(path or ":memory:")
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # An actor may run its constructor and its calls in different threads, though never two at once.
            self._database = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            # As for the ledger's journal: without shared memory, hence safe on network file systems, too.
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=OFF"):
                self._database.execute(f"PRAGMA {pragma}")
            for table in (_TABLE, _MARKS):
                self._database.execute(table)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def add(self, notes: Sequence[Note]) -> None:
        """Keep notes; one whose request was noted before is ignored.

        Raises:
            StorageUnavailable: The disk is full or away; nothing was kept, and it may be tried again.
        """
        if self._database is None:
            return
        made = [Note._make(each) for each in notes]
        rows = [
            (n.client, n.request_id, n.start, n.classes.tobytes(), _kind(n.images), n.images.tobytes()) for n in made
        ]
        marks = [
            (n.client, n.request_id, n.places.tobytes(), _kind(n.marked), n.marked.tobytes(), n.flagged)
            for n in made
            if len(n.places) or n.flagged
        ]
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany("INSERT OR IGNORE INTO requests VALUES (?, ?, ?, ?, ?, ?)", rows)
            self._database.executemany("INSERT OR IGNORE INTO marks VALUES (?, ?, ?, ?, ?, ?)", marks)
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise passing(self._path, error) from error
        except sqlite3.Error as error:
            self._give_up(error)

    def seen(self, client: str) -> Seen:
        """Return what was noted of a client; of one that never asked, nothing."""
        found = Seen(0, np.zeros(0, np.int64), [], lost=True)
        if self._database is None:
            return found
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
            return found
        said = [np.frombuffer(classes, np.uint16) for classes, _, _ in rows]
        counts = np.bincount(np.concatenate(said)) if said else np.zeros(0, np.int64)
        sample = []
        for classes, (_, kind, content) in zip(said, rows, strict=True):
            if content:
                images = _images(content, kind)
                sample.append((images, classes[: len(images)]))
        flagged = sum(row[-1] for row in marks)
        return Seen(len(rows), counts.astype(np.int64), sample, _marks(marks), flagged)

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _give_up(self, error: Exception) -> None:
        logger.warning("the query log is lost (%s); answers and charges are not touched", error)
        self.close()


def record(seen: Seen, classes: int, *, delta: float = PRADA_DELTA) -> QueryLogRecord:
    """Judge what was seen of a client: PRADA (Juuti et al. 2019, arXiv 1805.02628), on its first images.

    Args:
        seen: What was noted.
        classes: Number of classes that an answer may name; 1 for embeddings.
        delta: Shapiro-Wilk statistic below which the distances do not look like a customer's.
    """
    counts = np.zeros(classes, np.int64)
    counts[: len(seen.classes)] = seen.classes
    distances = minimal_distances(seen)
    judged = trimmed(distances)
    w = shapiro_w(judged)
    bins, edges = np.histogram(judged, BINS) if len(judged) else (np.zeros(0, int), np.zeros(0))
    return QueryLogRecord(
        requests=seen.requests,
        images=int(counts.sum()),
        classes=counts.tolist(),
        sampled=sum(len(images) for images, _ in seen.sample),
        distances=len(distances),
        distance_counts=bins.tolist(),
        distance_range=(round(float(edges[0]), 6), round(float(edges[-1]), 6)) if len(edges) else None,
        shapiro_w=w,
        alarm=None if w is None else w < delta,
        alarm_below=delta,
        marked=len(seen.marks.told),
        flagged=seen.flagged,
    )


def minimal_distances(seen: Seen) -> npt.NDArray[np.float64]:
    """Return each sampled image's L2 distance to the nearest of its class's growing set, in the order of the queries.

    The growing set of a class is made of the images that lay further from it than its threshold, which rises to the
    mean less the standard deviation of the distances of its members when they joined; the first image of a class has
    no distance.

    Args:
        seen: What was noted of a client.

    Returns:
        float64 (n,), in units of pixels in [0, 1].
    """
    if not seen.sample:
        return np.zeros(0)
    said = np.concatenate([classes for _, classes in seen.sample])
    flat = np.concatenate(
        [images.reshape(len(images), -1) / (255.0 if images.dtype == np.uint8 else 1.0) for images, _ in seen.sample]
    ).astype(np.float64, copy=False)
    found = np.full(len(said), np.nan)
    for label in np.unique(said):
        places = np.flatnonzero(said == label)
        found[places[1:]] = _grow(flat[places])
    return found[~np.isnan(found)]


def trimmed(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Leave out what lies further than three standard deviations from the mean."""
    if not len(distances):
        return distances
    return distances[np.abs(distances - distances.mean()) <= 3 * distances.std()]


def shapiro_w(distances: npt.NDArray[np.float64]) -> float | None:
    """Return the Shapiro-Wilk statistic, near 1 for a normal distribution.

    None for fewer than ``MIN_DISTANCES`` distances, or if all are equal.
    """
    if len(distances) < MIN_DISTANCES or np.ptp(distances) < 1e-9:
        return None
    from scipy.stats import shapiro

    return round(float(shapiro(distances).statistic), 6)


def _grow(images: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the distances of all images but the first, (n, d) -> (n - 1,), of one class in their order."""
    squares = np.einsum("nd,nd->n", images, images)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * images @ images.T, 0))
    members, joined, threshold = [0], [0.0], 0.0
    nearest = np.empty(len(images) - 1)
    for place in range(1, len(images)):
        nearest[place - 1] = distance = apart[place, members].min()
        if distance > threshold:
            members.append(place)
            joined.append(float(distance))
            threshold = max(threshold, float(np.mean(joined) - np.std(joined)))
    return nearest


def _marks(rows: Sequence[tuple[int, bytes, bytes, str, bytes, int]]) -> Marks:
    """Read rows of marked images: start, classes, places, type and shape, images, number of flagged ones."""
    images, told, positions = [], [], []
    for start, classes, places, kind, content, _ in rows:
        where = np.frombuffer(places, np.uint32).astype(np.int64)
        if len(where):
            images.append(_images(content, kind))
            told.append(np.frombuffer(classes, np.uint16)[where].astype(np.int64))
            positions.append(where + start if start >= 0 else np.full(len(where), -1))
    if not images:
        return NO_MARKS
    return Marks(np.concatenate(images), np.concatenate(told), np.concatenate(positions))


def _images(content: bytes, kind: str) -> npt.NDArray[Any]:
    dtype, *shape = kind.split(",")
    return np.frombuffer(content, dtype).reshape(-1, *map(int, shape))


def _kind(images: npt.NDArray[Any]) -> str:
    return ",".join([images.dtype.str, *map(str, images.shape[1:])])
