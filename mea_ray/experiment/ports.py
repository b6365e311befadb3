"""What an experiment needs from the outside: its models, the query service, and a journal of finished steps.

One process with folders of its own, Ray and a sweep's folder, or the memory of a test can each stand behind these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel

from mea_ray.results.records import (
    DetectionResult,
    QueryLogRecord,
    RecordT,
    RemovalResult,
    RungResult,
    TrialResult,
)

if TYPE_CHECKING:
    from mea_ray.attacks.base import Rung
    from mea_ray.attacks.transfer import TransferSet
    from mea_ray.blackbox.colluding import CountingClient
    from mea_ray.blackbox.query_log import ClientLog
    from mea_ray.experiment.commitment import Committed
    from mea_ray.experiment.theft import Steal
    from mea_ray.models.base import ImageModel
    from mea_ray.storage.remote import Storage
    from mea_ray.watermarks.base import Key

Step = RungResult | RemovalResult | DetectionResult
"""A step of the aftermath; a ``RungResult`` is the theft of a null model."""
Role = Literal["victim", "null"]
StealSome = Callable[
    ["Sequence[ImageModel]", "Sequence[TransferSet | None]", Sequence[Container[int]]], "Iterator[tuple[int, Rung]]"
]
"""Steals null models with every budget that each does not skip, and yields the place of one and a rung, smallest budget
first; the transfer sets get the answers."""
StealNulls = Callable[[Mapping[int, Collection[int]], StealSome], "Iterator[tuple[int, Rung]]"]
"""See ``Models.stolen_nulls``."""


class Models(Protocol):
    """Where the owner's models come from. Encoders have a head that is fitted as ``verification.reading`` says."""

    def prepare(self) -> None:
        """Have all models trained that are not there yet; called before the query service is taken."""
        ...

    def victim(self) -> tuple[ImageModel, Key | None]:
        """Return the victim and its key; None without a watermark."""
        ...

    def committed(self) -> Committed | None:
        """Return the commitment to the victim's key, checked; None if there is none."""
        ...

    def null(self, index: int) -> ImageModel:
        """Return the ``index``-th null model."""
        ...

    def stolen_nulls(self, wanted: Mapping[int, Collection[int]], steal: StealSome) -> Iterator[tuple[int, Rung]]:
        """Yield substitutes of null models with the null model's index, in any order of null models.

        Args:
            wanted: Budgets by the index of a null model.
            steal: Steals null models, at most ``thief.training.stack`` at once; not called for what is there already.
        """
        ...


class QueryService(Protocol):
    """The victim behind a query API, and what its owner sees of the API's clients."""

    @property
    def at_once(self) -> bool:
        """Whether several accounts may be asked at the same time, each from a thread of its own."""
        ...

    def register(self, client: str, budget: int) -> None:
        """Open an account, or change its budget; what was charged stays charged.

        Args:
            client: Name of the account.
            budget: Images that it may be charged in all.
        """
        ...

    def open(self, client: str, start_at: int) -> CountingClient:
        """Return the black box of an account that has asked ``start_at`` images before."""
        ...

    def charged(self, client: str) -> int:
        """Return the images that an account has been charged."""
        ...

    def seen(self, client: str) -> ClientLog:
        """Return what the owner's log holds of an account."""
        ...

    def query_log(self, client: str) -> QueryLogRecord:
        """Return the owner's judgement on an account, see ``blackbox.query_log.record``."""
        ...


class Steps(Protocol):
    """Records of finished steps by name (``rungs/200``, ``controls/0-200``)."""

    def find(self, name: str, kind: type[RecordT]) -> RecordT | None:
        """Return a record; None if the step is not done, or its record is damaged and has to be made again."""
        ...

    def keep(self, name: str, record: BaseModel) -> None:
        """Keep the record of a finished step; a process that is started again finds it."""
        ...

    def unfinished(self, name: str) -> tuple[Storage, str] | None:
        """Return a storage and a folder in it for what an unfinished step goes on from; None without one."""
        ...

    def discard(self, name: str) -> None:
        """Remove the folder of ``unfinished``: the step is done."""
        ...


class Journal(Steps, Protocol):
    """All that an interrupted trial goes on from: its steps, its answers, its substitutes."""

    @property
    def shared(self) -> Steps:
        """Steps whose results other trials share (the assessment of a victim and its null models)."""
        ...

    @property
    def transfer(self) -> TransferSet:
        """The answers that the thief received."""
        ...

    def rung(self, budget: int) -> RungResult | None:
        """Return a finished rung; None if it is not done, or if its record or its substitute is damaged."""
        ...

    def keep_rung(self, rung: RungResult, substitute: ImageModel) -> None:
        """Keep a finished rung and its substitute."""
        ...

    def substitute(self, budget: int) -> ImageModel:
        """Return the substitute of a finished rung."""
        ...

    def partial(self) -> TrialResult | None:
        """Return the result of the rungs so far; None before the first."""
        ...

    def keep_partial(self, result: TrialResult) -> None:
        """Keep the result of the rungs so far: what is left of a trial that a scheduler stops."""
        ...


class Listener:
    """Follows an experiment; this one ignores all of it."""

    def on_rung(self, rung: RungResult, so_far: TrialResult, *, again: bool) -> None:
        """Note a rung.

        Args:
            rung: The rung.
            so_far: The result of the rungs so far, which the journal has already: a scheduler may end the process here.
            again: An earlier process finished and reported the rung.
        """

    def on_known(self, rung: RungResult) -> None:
        """Note a rung as soon as its substitute is judged; what follows the last rung may take long."""

    def on_phase(self, what: str, number: int, of: int) -> None:
        """Note what begins.

        Args:
            what: ``substitute``, ``null theft``, ``removal`` or ``detection``.
            number: Which of them it is, from 1.
            of: How many there are.
        """

    def on_step(self, step: Step) -> None:
        """Note a finished step of the aftermath."""


OnEpoch = Callable[[Role, str, dict[str, Any]], None]
"""Called with the role and the name of a model that is being trained, and with the record of an epoch."""


@dataclass(frozen=True)
class Ports:
    """The outside of one experiment.

    Attributes:
        models: Provides victim and null models.
        service: Entered when the thief begins, left when everything that needs the victim's service is done.
        journal: Keeps finished steps.
        listener: Is called with each rung and each step.
        steal: Carries out thefts, in a process of their own or in this one.
    """

    models: Models
    service: AbstractContextManager[QueryService]
    journal: Journal
    listener: Listener
    steal: Steal
