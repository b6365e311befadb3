"""The engine of the HTTP service: a replica and the ledger, the same classes that serve sweeps."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mea_ray.blackbox.query_log import numbered
from mea_ray.config import ServingConfig
from mea_ray.core.errors import ArtifactError, MeaRayError, ServiceUnavailable
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.service.accounts import account
from mea_ray.service.http.keys import ApiKey
from mea_ray.service.http.ledger import Standing
from mea_ray.service.http.metrics import Counts
from mea_ray.service.naming import cause_of
from mea_ray.service.replica import Replica


@dataclass(frozen=True)
class About:
    """The public description of a victim.

    Attributes:
        name: Its name.
        shape: (channels, height, width) of one image.
        class_names: One name per class.
    """

    name: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def about_victim(folder: Path) -> About:
    """Return the public description of the victim in a folder, written by ``mea-ray train`` or an artifact of a run.

    Class names come from ``victim.json``; without it, classes are named by their indices.

    Raises:
        ArtifactError: The folder holds no readable victim.
    """
    from mea_ray.training.checkpoint import load_model

    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}; give one that `mea-ray train` wrote")
    model, _ = load_model(folder)
    name, names = folder.resolve().name, tuple(map(str, range(model.classes)))
    described = folder / "victim.json"
    if described.is_file():
        try:
            tree = json.loads(described.read_bytes())
            name, names = str(tree["name"]), tuple(map(str, tree["class_names"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{described} is damaged ({error}); restore it from a copy") from None
    if len(names) != model.classes:
        raise ArtifactError(f"{described} names {len(names)} classes, the model has {model.classes}; restore it")
    return About(name, model.shape, names)


class Engine:
    """A replica in this process, and its ledger.

    Args:
        folder: Folder of the victim.
        service: Name of the service.
        settings: Settings of forward passes and answer policy.
        secret: The service's secret, see `accounts`.
        ledger: Handle of the `HttpLedger`.
    """

    def __init__(self, folder: Path, service: str, settings: ServingConfig, secret: str, ledger: Any) -> None:
        self._replica = Replica(str(folder), service, settings, secret, ledger)
        self._ledger, self._secret = ledger, secret
        self._asked: Counter[str] = Counter()
        self._process = f"{os.uname().nodename} {os.getpid()} {uuid.uuid4().hex[:6]}"

    def describe(self) -> dict[str, Any]:
        """See `Replica.describe`."""
        return self._replica.describe()

    async def answer(self, client: str, request_id: str, images: Images | FloatImages) -> Answers:
        """Check, charge and answer one request, see `Replica.answer`.

        The owner's log is ordered by the number at the start of a request's id, as written by mea_ray's client. Images
        of other clients are numbered by this replica in the order of arrival.
        """
        start = None
        if numbered(request_id) < 0:
            start = self._asked[client]
            self._asked[client] += len(images)
        return await self._replica.answer(account(self._secret, client), request_id, images, start)

    async def set_limits(self, records: Sequence[ApiKey]) -> None:
        """Send the limits of all clients to the ledger."""
        await self._ask("set_limits", self._secret, [(record.client, record.budget, record.rate) for record in records])

    async def standing(self, client: str) -> Standing:
        """Return a client's charges and its remaining budget."""
        standing: Standing = await self._ask("standing", self._secret, client)
        return standing

    async def unpaid(self, client: str, requests: Sequence[tuple[str, int]]) -> tuple[int, int | None, int | None]:
        """Return uncharged images of ``(request id, images)``, remaining images, and the budget; None for no limit."""
        unpaid: tuple[int, int | None, int | None] = await self._ask("unpaid", account(self._secret, client), requests)
        return unpaid

    async def count(self, counts: Counts) -> None:
        """Send the counts of this process to the ledger."""
        await self._ask("count", self._secret, self._process, counts)

    async def counts(self) -> list[Counts]:
        """Return what all processes have counted."""
        counts: list[Counts] = await self._ask("counts", self._secret)
        return counts

    async def flush_log(self) -> None:
        """Wait until the log contains everything that was answered."""
        await self._replica.flush_log()

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._ledger, method).remote(*args), 30)
        except MeaRayError:
            raise
        except Exception as error:
            if isinstance(cause := getattr(error, "cause", None), MeaRayError):
                raise cause from None
            raise ServiceUnavailable(f"the ledger does not answer: {cause_of(error)}") from None
