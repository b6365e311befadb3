"""The query API in one process: the same checks, ledger, passes and policies as the service, without actors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.passes import FixedShapePasses, answer_size
from mea_ray.blackbox.policies import AnswerPolicy, Probabilities
from mea_ray.blackbox.query_log import SAMPLE_IMAGES, QueryLog, log_entry, sample_size
from mea_ray.blackbox.validate import check_images, image_digest
from mea_ray.core.errors import ConfigError, OverBudget, RateLimited
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.models.base import ImageModel


class LocalBlackBox:
    """A victim behind a query API in this process; implements `types.BlackBox`.

    Every query is charged, even for images queried before: a request id contains the number of images that this client
    queried before it. To repeat a query that a crash interrupted, start at the same number (``start_at``); it is then
    charged once. Threads can share a client: their queries are serialised.

    Args:
        model: The victim.
        policy: What an answer reveals; None for all probabilities.
        ledger: The ledger; None makes a new one in which the client is registered without a budget.
        client: Name of the client; must be registered in the given ledger.
        pass_images: Images in every forward pass; None chooses by device.
        max_query_images: Maximum number of images in one query; None for no limit.
        request_images: Images per request: a longer query is split, as by the service's client. None never splits.
        start_at: Number of images that this client has queried before.
        log: The owner's query log; None makes a new one in memory.
        query_log_images: Number of a client's first images whose distances the log measures.
        sleep: Sleeps for a number of seconds when the client exceeds its rate limit.

    Attributes:
        asked: Images queried so far, including ``start_at``.

    Raises:
        ConfigError: ``start_at`` is negative.
        UnknownClient: The client is not registered in the given ledger.
    """

    def __init__(
        self,
        model: ImageModel,
        policy: AnswerPolicy | None = None,
        ledger: Ledger | None = None,
        client: str = "thief",
        *,
        pass_images: int | None = None,
        max_query_images: int | None = None,
        request_images: int | None = None,
        start_at: int = 0,
        log: QueryLog | None = None,
        query_log_images: int = SAMPLE_IMAGES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if start_at < 0:
            raise ConfigError(f"start_at={start_at} must be at least 0: it counts images queried before")
        policy = policy if policy is not None else Probabilities()
        self._classes, self._shape = answer_size(model, policy), model.shape
        self._source = policy.source
        if ledger is None:
            ledger = Ledger(None)
            ledger.register(client)
        ledger.charged(client)
        self.ledger, self.client, self.asked = ledger, client, start_at
        self._passes = FixedShapePasses(model, self._shape, policy, pass_images=pass_images)
        self.log, self._sample = log if log is not None else QueryLog(), sample_size(self._shape, query_log_images)
        self._max_query_images, self._request_images, self._sleep = max_query_images, request_images, sleep
        self._turn = threading.Lock()

    @property
    def classes(self) -> int:
        """Length of an answer: the number of classes, or of an encoder's features."""
        return self._classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self._shape

    @property
    def remaining(self) -> int | None:
        """Remaining budget in images; None without a budget."""
        return self.ledger.remaining(self.client)

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images and charge them, see `types.BlackBox.query`. Waits when the client exceeds its rate limit."""
        check_images(images, self._shape, self._max_query_images)
        size = self._request_images or len(images)
        with self._turn:
            before = self.asked
            requests = [
                (f"{before + start}-{image_digest(part)}", part)
                for start in range(0, len(images), size)
                for part in [images[start : start + size]]
            ]
            self._refuse_over_budget(requests)
            try:
                return np.concatenate([self._request(name, part) for name, part in requests])
            except BaseException:
                self.asked = before
                raise

    def _refuse_over_budget(self, requests: Sequence[tuple[str, Images | FloatImages]]) -> None:
        """Reject a query of several requests as a whole, before the first of them is charged."""
        budget, remaining = self.ledger.budget(self.client), self.remaining
        if len(requests) == 1 or budget is None or remaining is None:
            return
        unpaid = self.ledger.unpaid(self.client, [(name, len(part)) for name, part in requests])
        if unpaid > remaining:
            raise OverBudget(self.client, unpaid, remaining, budget)

    def _request(self, request_id: str, images: Images | FloatImages) -> Answers:
        self._charge(request_id, len(images), request_id.partition("-")[2])
        response = self._passes.respond([images])[0]
        self.log.add([log_entry(self.client, request_id, images, response, self._source, self._sample)])
        self.asked += len(images)
        return response.answers

    def _charge(self, request_id: str, images: int, digest: str) -> None:
        while True:
            try:
                return self.ledger.charge(self.client, request_id, images, digest)
            except RateLimited as limited:
                self._sleep(limited.retry_after_s)
