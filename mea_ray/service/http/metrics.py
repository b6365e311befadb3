"""Counters of an HTTP service in the text format of Prometheus, summed over all replicas."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency histogram, in seconds."""


@dataclass
class Counts:
    """The counts of one process of a replica since its start.

    Attributes:
        requests: Requests by status code.
        images: Number of answered images.
        seconds: Sum of the response times.
        buckets: Number of requests below each bound of ``BOUNDS_S``; the last one counts longer ones.
    """

    requests: Counter[int] = field(default_factory=Counter)
    images: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))

    def add(self, status: int, seconds: float, images: int = 0) -> None:
        """Count a request to ``/v1/predict``."""
        self.requests[status] += 1
        self.images += images
        self.seconds += seconds
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1


def exposition(counts: Sequence[Counts]) -> bytes:
    """Return the counters of all processes in the format of Prometheus, without client names."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Sum(counts))
    return generate_latest(registry)


class _Sum(Collector):
    def __init__(self, counts: Sequence[Counts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        requests = CounterMetricFamily("mea_ray_requests", "Requests by status code.", labels=["status"])
        for status, number in sorted(_total(each.requests for each in self._counts).items()):
            requests.add_metric([str(status)], number)
        yield requests
        yield CounterMetricFamily("mea_ray_images", "Images answered.", sum(each.images for each in self._counts))
        latency = HistogramMetricFamily("mea_ray_request_seconds", "Time to answer a request.")
        buckets, below = [], 0
        for place, bound in enumerate((*BOUNDS_S, float("inf"))):
            below += sum(each.buckets[place] for each in self._counts)
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
        latency.add_metric([], buckets, sum(each.seconds for each in self._counts))
        yield latency


def _total(counters: Iterable[Counter[int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for each in counters:
        total.update(each)
    return total
