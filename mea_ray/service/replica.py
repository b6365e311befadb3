"""A replica of the victim: an actor that merges the requests of many clients into forward passes of a fixed shape.

A request goes through three stages, which run concurrently: it is checked in the event loop; charged, together with the
requests that arrived during the ledger's last call; computed in a worker thread, together with the requests that were
paid for during the last pass.

A few images that come while nothing else is under way take a shorter way: they are computed first, in the smallest
pass, and are then charged and noted in one call to the ledger, over a local socket where there is one. As always, they
are answered only when they are paid for. A pass of a few milliseconds is computed in the event loop, since waking a
thread and being woken by it takes longer than anything else could wait for the loop. To charge while the pass is
computed would take a second call for the note, which costs more than it saves. A client who was refused last is charged
first: nobody computes for a spent budget.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mea_ray.blackbox.ledger import Charge
from mea_ray.blackbox.passes import FixedShapePasses, answer_size, default_pass_images
from mea_ray.blackbox.policies import Response
from mea_ray.blackbox.query_log import LogEntry, log_entry, sample_size
from mea_ray.blackbox.validate import check_images, check_name, image_digest
from mea_ray.config import ServingConfig
from mea_ray.core.errors import MeaRayError, QueryError, ServiceUnavailable, StorageUnavailable
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.experiment.answers import answer_policy, stored_key, stored_owners_images
from mea_ray.experiment.artifacts import Artifact
from mea_ray.service.accounts import Account, check_account
from mea_ray.service.local_calls import LocalCaller
from mea_ray.service.naming import cause_of, find, ledger_name
from mea_ray.service.watch import incarnation
from mea_ray.training.checkpoint import load_model
from mea_ray.training.device import device, use_gpus, use_threads

logger = logging.getLogger(__name__)
_NOTE_PAUSES_S = (0.25, 1.0, 4.0, 16.0, 60.0)
_QUICK_PASS_S = 0.02
"""A lone image whose pass takes less time is computed in the event loop."""
_LOCAL_AGAIN_S = 5.0
"""Pause before a ledger that cannot be called over a local socket is asked for one again, as after its restart."""
_MOST_REFUSED = 100_000
"""Maximum number of clients whose last rejection is remembered."""


@dataclass
class _Request:
    """A request in flight; ``done`` counts its answered images."""

    charge: Charge
    images: Images | FloatImages
    answered: asyncio.Future[Answers]
    start: int | None


class Replica:
    """An async actor with a victim; wrapped with ``ray.remote`` where the service is started.

    Args:
        source: Artifact of the victim, or its folder; if its key marks answers, the answers are marked.
        service: Name of the service, under which its ledger is found.
        settings: Its resources, passes and answer policy.
        secret: The service's secret, see `accounts`: used to charge and to check clients' tokens.
        ledger: Handle of its ledger; None finds it by name.

    Raises:
        ArtifactError: The folder holds no readable victim.
        ConfigError: The policy does not exist or rejects its parameters, or is fitted on images that are missing.
    """

    def __init__(
        self,
        source: str | Artifact,
        service: str,
        settings: ServingConfig,
        secret: str,
        ledger: Any = None,
    ) -> None:
        use_gpus(settings.gpus_per_replica)
        use_threads(settings.cpus_per_replica)
        folder = source.folder() if isinstance(source, Artifact) else Path(source)
        model, _ = load_model(folder)
        where = device()
        images = settings.pass_images or default_pass_images(where, settings.max_batch_images)
        worded = answer_policy(
            settings.policy.build(),
            model,
            stored_key(folder),
            lambda: stored_owners_images(folder),
            pass_images=images,
        )
        self._passes = FixedShapePasses(
            model, model.shape, worded, pass_images=images, device=where, small_passes=settings.small_passes
        )
        # The first pass of a process is slow (kernel selection, memory allocation): no client should wait for it.
        # The fastest of several: a temporarily busy machine must not move all later passes to another thread.
        self._is_quick = min(self._seconds_of_a_lone_pass(model.shape) for _ in range(5)) < _QUICK_PASS_S
        self._shape, self._classes, self._source = model.shape, answer_size(model, worded), worded.source
        # By name, not by handle: arguments in the object store die with their owner, after which no restart succeeds.
        self._ledger, self._secret = find(ledger_name(service)) if ledger is None else ledger, secret
        self._max_batch_images, self._max_request_images = settings.max_batch_images, settings.max_request_images
        self._max_wait_s = settings.max_wait_ms / 1000
        self._sample = sample_size(self._shape, settings.query_log_images)
        self._local: LocalCaller | None = None
        self._next_local = 0.0
        self._leaving: set[Any] = set()
        self._refused: set[str] = set()
        self._worker = ThreadPoolExecutor(1)
        self._arrived: deque[_Request] = deque()
        self._paid: deque[_Request] = deque()
        self._paid_images = 0
        self._charging: asyncio.Task[None] | None = None
        self._computing: asyncio.Task[None] | None = None
        self._more_paid = asyncio.Event()
        self._counts = {"requests": 0, "images": 0, "refused": 0}
        self._passes.passes = self._passes.rows = 0

    def describe(self) -> dict[str, Any]:
        """Return the description for clients: length of an answer, image shape, largest request, images in a pass."""
        return {
            "classes": self._classes,
            "source": self._source,
            "image_shape": self._shape,
            "max_request_images": self._max_request_images,
            "pass_images": self._passes.pass_images,
        }

    def stats(self) -> dict[str, float]:
        """Return counts of answered requests and images, rejected requests and passes, and the mean fill in (0, 1]."""
        rows = self._passes.rows
        fill = self._counts["images"] / rows if rows else 0.0
        return {**self._counts, "passes": self._passes.passes, "mean_fill": fill}

    def incarnation(self) -> str:
        """Return an id that changes with a restart, see `watch.incarnation`."""
        return incarnation()

    async def answer(
        self, account: Account, request_id: str, images: Images | FloatImages, start: int | None = None
    ) -> Answers:
        """Check, charge and answer one request.

        Args:
            account: Name and token of the client.
            request_id: The client's id of this request; the same id with the same images is charged once.
            images: uint8 or float32 in [0, 1], (N, C, H, W), 1 <= N <= ``max_request_images``.
            start: Images that the client queried before, for the owner's log; None takes it from ``request_id``.

        Returns:
            float32 answers (N, classes).

        Raises:
            BadQuery: The images or the request id are invalid.
            WrongToken: The client's token is invalid.
            UnknownClient: The client is not registered.
            OverBudget: The request does not fit in the client's budget.
            RateLimited: The client exceeds its rate limit.
            RequestConflict: The id was used for other images.
        """
        try:
            client = check_account(self._secret, account)
            check_images(images, self._shape, self._max_request_images)
            check_name("a client's name", client)
            check_name("a request id", request_id)
            charge = Charge(client, request_id, len(images), image_digest(images))
            request = _Request(charge, images, asyncio.get_running_loop().create_future(), start)
            self._arrived.append(request)
            if self._charging is None:
                self._charging = asyncio.create_task(self._charge())
            answers = await request.answered
        except BaseException:
            self._counts["refused"] += 1
            raise
        self._counts["requests"] += 1
        self._counts["images"] += len(images)
        return answers

    async def _charge(self) -> None:
        """Charge all arrived requests, in one call to the ledger each time, until there are none."""
        try:
            if self._is_lone():
                await self._answer_lone(self._arrived.popleft())
            while self._arrived:
                requests = list(self._arrived)
                self._arrived.clear()
                for request, refusal in zip(requests, await self._outcomes(requests), strict=True):
                    self._remember(request.charge.client, refusal)
                    if refusal is not None:
                        _fail(request, refusal)
                    else:
                        self._paid.append(request)
                        self._paid_images += len(request.images)
                self._more_paid.set()
                if self._paid and self._computing is None:
                    self._computing = asyncio.create_task(self._compute())
        finally:
            self._charging = None

    async def _outcomes(self, requests: list[_Request]) -> list[MeaRayError | None]:
        """Charge requests; return an error or None for each of them."""
        try:
            charges = [request.charge for request in requests]
            outcomes: list[Any] = await self._ledger.charge_many.remote(self._secret, charges)
            return outcomes
        except Exception as error:
            return [_gone(error)] * len(requests)

    def _is_lone(self) -> bool:
        """Return whether one request has arrived, nothing else is in flight, and the smallest pass can hold it.

        A client whose last request was rejected is excluded until one of its requests is paid for.
        """
        return (
            self._computing is None
            and len(self._arrived) == 1
            and self._arrived[0].charge.client not in self._refused
            and len(self._arrived[0].images) <= self._passes.sizes[0] < self._passes.pass_images
        )

    async def _answer_lone(self, request: _Request) -> None:
        try:
            if self._is_quick:
                responses = self._passes.respond([request.images])
            else:
                loop = asyncio.get_running_loop()
                responses = await loop.run_in_executor(self._worker, self._passes.respond, [request.images])
        except Exception as error:
            _fail(request, error)
            return
        notes = [self._note(request, responses[0])]
        try:
            outcomes, noted = await self._charge_and_note(request.charge, notes)
        except Exception as error:
            _fail(request, _gone(error))
            return
        self._remember(request.charge.client, outcomes[0])
        if (refusal := outcomes[0]) is None and not noted:
            await self._noted(notes)
        if refusal is not None:
            _fail(request, refusal)
        elif not request.answered.done():
            request.answered.set_result(responses[0].answers)

    async def _charge_and_note(self, charge: Charge, notes: list[LogEntry]) -> tuple[list[Any], bool]:
        """Charge and note a lone request, over a local socket if the ledger is on this machine, else through Ray.

        A call whose connection broke is made again through Ray: the ledger charges and notes a request once.
        """
        if self._local is None and time.monotonic() >= self._next_local:
            self._local = await self._local_caller()
            self._next_local = time.monotonic() + _LOCAL_AGAIN_S
        if self._local is not None:
            try:
                outcome: tuple[list[Any], bool] = await self._local.call(
                    "charge_and_note", self._secret, [charge], notes
                )
                return outcome
            except (OSError, EOFError):
                self._local = None
        through_ray: tuple[list[Any], bool] = await self._ledger.charge_and_note.remote(self._secret, [charge], notes)
        return through_ray

    async def _local_caller(self) -> LocalCaller | None:
        """Connect to the ledger; return None if it is on another machine."""
        address = await self._ledger.local_address.remote(self._secret)
        try:
            return None if address is None else LocalCaller(address, self._secret)
        except OSError:
            return None

    def _seconds_of_a_lone_pass(self, shape: tuple[int, int, int]) -> float:
        start = time.perf_counter()
        self._passes.answer([np.zeros((1, *shape), dtype=np.uint8)])
        return time.perf_counter() - start

    def _remember(self, client: str, refusal: MeaRayError | None) -> None:
        """Remember which clients were rejected last."""
        if refusal is None:
            self._refused.discard(client)
        elif isinstance(refusal, QueryError) and len(self._refused) < _MOST_REFUSED:
            self._refused.add(client)

    async def _compute(self) -> None:
        """Answer all paid requests, batch by batch, until none is left."""
        loop = asyncio.get_running_loop()
        try:
            while self._paid:
                await self._wait_for_more()
                batch = self._next_batch()
                try:
                    parts = [request.images for request in batch]
                    responses = await loop.run_in_executor(self._worker, self._passes.respond, parts)
                except Exception as error:
                    for request in batch:
                        _fail(request, error)
                    continue
                leaving = asyncio.ensure_future(self._release(batch, responses))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
        finally:
            self._computing = None

    async def _release(self, batch: list[_Request], responses: list[Response]) -> None:
        """Send the answers to the owner's log, then to the clients; the next batch is computed meanwhile.

        If a replica dies in between, the request is repeated, and logged once. Ray repeats the message to a ledger that
        died. A message that Ray has not delivered would be lost with the replica, so its arrival is awaited.
        """
        notes = [self._note(request, each) for request, each in zip(batch, responses, strict=True)]
        await self._noted(notes)
        for request, each in zip(batch, responses, strict=True):
            if not request.answered.done():
                request.answered.set_result(each.answers)

    def _note(self, request: _Request, response: Response) -> LogEntry:
        charge = request.charge
        return log_entry(
            charge.client, charge.request_id, request.images, response, self._source, self._sample, request.start
        )

    async def _noted(self, notes: list[LogEntry]) -> None:
        """Store log entries; wait while the disk is full. Other errors of the log must not reach a client."""
        for pause in (*_NOTE_PAUSES_S, None):
            try:
                await self._ledger.note.remote(self._secret, notes)
                return
            except Exception as error:  # e.g. the ledger's actor is permanently gone, which the next charge will report
                passes = isinstance(getattr(error, "cause", None), StorageUnavailable)
                if pause is None or not passes:
                    logger.warning("answers were not written to the query log: %s", error)
                    return
            await asyncio.sleep(pause)

    async def flush_log(self) -> None:
        """Wait until the log contains everything that was answered."""
        await asyncio.gather(*self._leaving)

    async def _wait_for_more(self) -> None:
        """Wait a moment for other requests to fill the pass. Waiting for more than one full pass would gain nothing."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._max_wait_s
        enough = min(self._passes.pass_images, self._max_batch_images)
        while self._paid_images < enough and (left := deadline - loop.time()) > 0:
            self._more_paid.clear()
            try:
                await asyncio.wait_for(self._more_paid.wait(), left)
            except asyncio.TimeoutError:
                return

    def _next_batch(self) -> list[_Request]:
        """Take the oldest complete requests, up to the limit; at least one.

        Of the possible batches, the one with the fullest passes is taken: the rest is merged with new requests.
        """
        size = self._passes.pass_images
        total, best, best_fill = 0, 0, 0.0
        for count, request in enumerate(self._paid, start=1):
            if best and total + len(request.images) > self._max_batch_images:
                break
            total += len(request.images)
            fill = total / (-(-total // size) * size)
            if fill >= best_fill:
                best, best_fill = count, fill
        batch = [self._paid.popleft() for _ in range(best)]
        self._paid_images -= sum(len(request.images) for request in batch)
        return batch


def _gone(error: Exception) -> MeaRayError:
    """Return the error that a client gets when the ledger could not charge.

    Ray repeats calls to a dead ledger itself; here its disk is full or unavailable, or it is permanently gone.
    """
    if isinstance(cause := getattr(error, "cause", error), StorageUnavailable):
        return cause
    return ServiceUnavailable(f"the ledger cannot charge: {cause_of(error)}")


def _fail(request: _Request, error: Exception) -> None:
    if not request.answered.done():
        request.answered.set_exception(error)
