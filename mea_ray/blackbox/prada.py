"""PRADA: whether a client's sequence of queries looks like a customer's, from the owner's query log.

The distances between a customer's images are approximately normally distributed, those of synthetic queries are not.

References:
    Juuti et al., PRADA: Protecting Against DNN Model Stealing Attacks, EuroS&P 2019, https://arxiv.org/abs/1805.02628.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mea_ray.blackbox.query_log import ClientLog
from mea_ray.results.records import QueryLogRecord

PRADA_DELTA = 0.9
"""Shapiro-Wilk statistic below which an alarm is raised (the paper's delta, about 0.9)."""
MIN_DISTANCES = 100
"""Minimum number of distances for a verdict."""
BINS = 20


def query_log_record(log: ClientLog, classes: int, *, delta: float = PRADA_DELTA) -> QueryLogRecord:
    """Summarise a client's log, with PRADA's verdict on its first images.

    Args:
        log: The client's log.
        classes: Number of classes of an answer; 1 for embeddings.
        delta: Shapiro-Wilk statistic below which the distances do not look like a customer's.
    """
    counts = np.zeros(classes, np.int64)
    counts[: len(log.classes)] = log.classes
    distances = minimal_distances(log)
    judged = trimmed(distances)
    w = shapiro_w(judged)
    bins, edges = np.histogram(judged, BINS) if len(judged) else (np.zeros(0, int), np.zeros(0))
    return QueryLogRecord(
        requests=log.requests,
        images=int(counts.sum()),
        classes=counts.tolist(),
        sampled=sum(len(images) for images, _ in log.sample),
        distances=len(distances),
        distance_counts=bins.tolist(),
        distance_range=(round(float(edges[0]), 6), round(float(edges[-1]), 6)) if len(edges) else None,
        shapiro_w=w,
        alarm=None if w is None else w < delta,
        alarm_below=delta,
        marked=len(log.marks.labels),
        flagged=log.flagged,
    )


def minimal_distances(log: ClientLog) -> npt.NDArray[np.float64]:
    """Return each sampled image's L2 distance to the nearest of its class's growing set, in the order of the queries.

    The growing set of a class contains the images that were further from it than its threshold when they arrived. The
    threshold increases to the mean minus the standard deviation of the distances at which its members joined. The first
    image of a class has no distance.

    Args:
        log: The client's log.

    Returns:
        float64 (n,), in units of pixels in [0, 1].
    """
    if not log.sample:
        return np.zeros(0)
    predicted = np.concatenate([classes for _, classes in log.sample])
    flat = np.concatenate(
        [images.reshape(len(images), -1) / (255.0 if images.dtype == np.uint8 else 1.0) for images, _ in log.sample]
    ).astype(np.float64, copy=False)
    distances = np.full(len(predicted), np.nan)
    for label in np.unique(predicted):
        places = np.flatnonzero(predicted == label)
        distances[places[1:]] = _grow(flat[places])
    return np.asarray(distances[~np.isnan(distances)], np.float64)


def trimmed(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Remove distances more than three standard deviations from the mean."""
    if not len(distances):
        return distances
    near = np.abs(distances - distances.mean()) <= 3 * distances.std()
    return np.asarray(distances[near], np.float64)


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
