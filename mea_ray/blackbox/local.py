"""The query API in one process: the same checks, ledger, passes and policies as the service, without actors."""

from __future__ import annotations

import time
from collections.abc import Callable

from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.passes import FixedShapePasses, answer_size
from mea_ray.blackbox.policies import Policy, Probabilities
from mea_ray.blackbox.query_log import SAMPLE_IMAGES, QueryLog, note, sample_size
from mea_ray.blackbox.validate import check_images, image_digest
from mea_ray.core.errors import RateLimited
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.models.base import ImageModel


class LocalBlackBox:
    """A victim behind a query API in this process; implements `types.BlackBox`.

    Every query is charged, also for images asked before: request ids count the images that this client asked. To ask
    a query again that a crash interrupted, begin at the count it began at (``start_at``); it is then charged once.

    Args:
        model: The victim.
        policy: What an answer holds; all probabilities when None.
        ledger: Where charges go; a fresh one without a budget when None, in which the client is registered.
        client: Name of the client in the ledger; must be registered there.
        pass_images: Images in every forward pass; None chooses by device.
        max_query_images: Images in one query at most; None for no limit.
        start_at: Images that this client has asked before.
        log: The owner's query log; a fresh one in memory when None.
        query_log_images: First images of a client whose distances the log keeps.
        sleep: How to wait, in seconds, when the client is over its rate.

    Raises:
        UnknownClient: The client is not registered in the given ledger.
    """

    def __init__(
        self,
        model: ImageModel,
        policy: Policy | None = None,
        ledger: Ledger | None = None,
        client: str = "thief",
        *,
        pass_images: int | None = None,
        max_query_images: int | None = None,
        start_at: int = 0,
        log: QueryLog | None = None,
        query_log_images: int = SAMPLE_IMAGES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
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
        self._max_query_images, self._sleep = max_query_images, sleep

    @property
    def classes(self) -> int:
        """Numbers in an answer: classes, or the length of an embedding."""
        return self._classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self._shape

    @property
    def remaining(self) -> int | None:
        """Images that may still be asked; None without a budget."""
        return self.ledger.remaining(self.client)

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images and charge them, see `types.BlackBox.query`. Waits when the client is over its rate."""
        check_images(images, self._shape, self._max_query_images)
        digest = image_digest(images)
        request_id = f"{self.asked}-{digest}"
        while True:
            try:
                self.ledger.charge(self.client, request_id, len(images), digest)
                break
            except RateLimited as limited:
                self._sleep(limited.retry_after_s)
        told = self._passes.tell([images])[0]
        self.log.add([note(self.client, request_id, images, told, self._source, self._sample)])
        self.asked += len(images)
        return told.answers
