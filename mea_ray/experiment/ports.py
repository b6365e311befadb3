"""The ports of an experiment: its models, the query service, and a journal of finished steps.

They can be implemented by one process with its folders, by Ray and a sweep's folder, or in memory for a test.
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
"""A step after the theft; a ``RungResult`` is the theft of a null model."""
Role = Literal["victim", "null"]
StealSome = Callable[
    ["Sequence[ImageModel]", "Sequence[TransferSet | None]", Sequence[Container[int]]], "Iterator[tuple[int, Rung]]"
]
"""Steals null models with every budget that is not skipped.

Yields the index of a null model and a rung, smallest budget first; the transfer sets receive the answers.
"""
StealNulls = Callable[[Mapping[int, Collection[int]], StealSome], "Iterator[tuple[int, Rung]]"]
"""See ``Models.stolen_nulls``."""


class Models(Protocol):
    """Source of the owner's models. Encoders have a head that is fitted according to ``verification.reading``."""

    def prepare(self) -> None:
        """Train all missing models; called before the query service is acquired."""
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
            steal: Steals null models, at most ``thief.training.stack`` at once; not called for existing ones.
        """
        ...


class QueryService(Protocol):
    """The victim behind a query API, and the owner's view of the API's clients."""

    @property
    def at_once(self) -> bool:
        """Whether several accounts can be queried at the same time, each from its own thread."""
        ...

    def register(self, client: str, budget: int) -> None:
        """Open an account, or change its budget; earlier charges remain.

        Args:
            client: Name of the account.
            budget: Maximum number of images charged in total.
        """
        ...

    def open(self, client: str, start_at: int) -> CountingClient:
        """Return the black box of an account that has already queried ``start_at`` images."""
        ...

    def charged(self, client: str) -> int:
        """Return the images that an account has been charged."""
        ...

    def seen(self, client: str) -> ClientLog:
        """Return the owner's log of an account."""
        ...

    def query_log(self, client: str) -> QueryLogRecord:
        """Return the owner's judgement on an account, see ``blackbox.query_log.record``."""
        ...


class Steps(Protocol):
    """Records of finished steps by name (``rungs/200``, ``controls/0-200``)."""

    def find(self, name: str, kind: type[RecordT]) -> RecordT | None:
        """Return a record; None if the step is not finished, or its record is damaged, so that it must be repeated."""
        ...

    def keep(self, name: str, record: BaseModel) -> None:
        """Save the record of a finished step; a restarted process finds it."""
        ...

    def unfinished(self, name: str) -> tuple[Storage, str] | None:
        """Return a storage, and its folder for the snapshots of an unfinished step; None without one."""
        ...

    def discard(self, name: str) -> None:
        """Remove the folder of ``unfinished``: the step is done."""
        ...


class Journal(Steps, Protocol):
    """The state from which an interrupted trial is resumed: its steps, answers and substitutes."""

    @property
    def shared(self) -> Steps:
        """Steps whose results other trials share (the assessment of a victim and its null models)."""
        ...

    @property
    def transfer(self) -> TransferSet:
        """The answers that the thief received."""
        ...

    def rung(self, budget: int) -> RungResult | None:
        """Return a finished rung; None if it is not finished, or if its record or its substitute is damaged."""
        ...

    def keep_rung(self, rung: RungResult, substitute: ImageModel) -> None:
        """Save a finished rung and its substitute."""
        ...

    def substitute(self, budget: int) -> ImageModel:
        """Return the substitute of a finished rung."""
        ...

    def partial(self) -> TrialResult | None:
        """Return the result of the rungs so far; None before the first."""
        ...

    def keep_partial(self, result: TrialResult) -> None:
        """Save the result of the rungs so far: the only result of a trial that a scheduler stops."""
        ...


class Listener:
    """Callbacks of an experiment; the methods of this class do nothing."""

    def on_rung(self, rung: RungResult, so_far: TrialResult, *, again: bool) -> None:
        """Handle a rung.

        Args:
            rung: The rung.
            so_far: The result of the rungs so far, already in the journal: a scheduler may end the process here.
            again: Whether an earlier process finished and reported the rung.
        """

    def on_known(self, rung: RungResult) -> None:
        """Handle a rung as soon as its substitute is judged; the steps after the last rung can take long."""

    def on_phase(self, what: str, number: int, of: int) -> None:
        """Handle the begin of a step.

        Args:
            what: ``substitute``, ``null theft``, ``removal`` or ``detection``.
            number: Its number among those, from 1.
            of: Number of those.
        """

    def on_step(self, step: Step) -> None:
        """Handle a finished step after the theft."""


OnEpoch = Callable[[Role, str, dict[str, Any]], None]
"""Called with the role and the name of a model that is being trained, and with the record of an epoch."""


@dataclass(frozen=True)
class Ports:
    """The ports of one experiment.

    Attributes:
        models: Provides victim and null models.
        service: Entered when the theft begins, left when nothing needs the victim's service any more.
        journal: Keeps finished steps.
        listener: Is called with each rung and each step.
        steal: Carries out thefts, in a separate process or in this one.
    """

    models: Models
    service: AbstractContextManager[QueryService]
    journal: Journal
    listener: Listener
    steal: Steal
