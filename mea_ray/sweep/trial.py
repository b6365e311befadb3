"""One trial of a sweep: the experiment with a service on Ray, models in the storage, and the sweep's folder."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mea_ray.blackbox.colluding import account_share
from mea_ray.config import KeepConfig, write_yaml
from mea_ray.core.errors import ServiceUnavailable, UnknownClient
from mea_ray.experiment.artifacts import Store, read_info
from mea_ray.experiment.ports import Listener, OnEpoch, QueryService, Role, Step
from mea_ray.experiment.theft import account_budgets, answers_received
from mea_ray.results.numbers import trial_metrics
from mea_ray.results.records import QueryLogRecord, RungResult, SelectionRecord, TrialResult
from mea_ray.storage.files import patiently
from mea_ray.sweep import events
from mea_ray.sweep.broker import Entry, Hold, ServiceSpec
from mea_ray.sweep.folder import SweepFolder, TrialFolder
from mea_ray.sweep.plan import PlannedTrial
from mea_ray.sweep.reports import Reports

if TYPE_CHECKING:
    from mea_ray.blackbox.query_log import ClientLog
    from mea_ray.core.types import Splits
    from mea_ray.experiment.model_sources import StoredModels
    from mea_ray.service.client import ServiceClient


@dataclass(frozen=True)
class Tools:
    """The resources that a trial gets from its sweep.

    Attributes:
        folder: The sweep's folder.
        broker: Handle of the broker actor.
        on_event: Where events go.
        reports: Receives the metrics of each rung, and the loss of each epoch; the scheduler may end the process in it.
        selection: How the sweep's settings were chosen.
        keep: What remains of a finished trial.
    """

    folder: SweepFolder
    broker: Any
    on_event: events.OnEvent
    reports: Reports
    selection: SelectionRecord | None = None
    keep: KeepConfig = KeepConfig()


Work = Callable[[PlannedTrial, Callable[[], "Splits"], Tools, int, str], TrialResult]
"""The work of a trial, ``run_trial``: called with trial, data loader, tools, process id and node id."""


def run_trial(trial: PlannedTrial, load_data: Callable[[], Splits], tools: Tools, pid: int, node: str) -> TrialResult:
    """Run a trial, or the rest of it.

    Args:
        trial: The trial.
        load_data: Loads its data.
        tools: The trial's tools.
        pid: Id of this process.
        node: Ray's id of this node.

    Returns:
        The result, which is also in the sweep's folder.
    """
    from mea_ray.experiment.attack_process import parent
    from mea_ray.experiment.attack_process.fork_server import FORK_SERVER
    from mea_ray.experiment.model_sources import StoredModels
    from mea_ray.experiment.ports import Ports
    from mea_ray.experiment.run import Experiment

    tools.folder.wait()
    tools.folder.fetch_result(trial.name)
    done = tools.folder.result(trial.name)
    if done is not None:
        for rung in done.rungs:
            tools.reports.rung(trial_metrics(done, rung), rung.epochs)
        return done

    def warn(text: str) -> None:
        tools.on_event(events.Warned(f"trial {trial.name}: {text}"))

    journal = _open_journal(trial, tools, warn)
    budgets = trial.config.thief.budgets
    finished = sum(journal.rung(budget) is not None for budget in budgets)
    tools.on_event(events.TrialStarted(trial.name, trial.point, pid, node, budgets, finished, trial.victim))

    def on_substitute(epoch: int, epochs: int, loss: float) -> None:
        tools.on_event(events.SubstituteEpoch(trial.name, epoch, epochs, loss))
        tools.reports.epoch(loss)

    journal.transfer.on_epoch = on_substitute
    FORK_SERVER.start()
    data = load_data()
    on_epoch = epoch_events(trial.config.victim.training.epochs, tools.on_event)
    models = StoredModels(Store(tools.folder.storage, warn=warn), trial.config, data, trial.names, on_epoch)
    if tools.reports.with_epochs:  # a scheduler can stop the trial because of its victim's training, before any query
        tools.reports.victim(losses_of(read_info(models.victim_folder())))
    service = _service(trial, data, models, journal, tools)
    ports = Ports(models, service, journal, TrialListener(trial.name, tools), parent.steal)
    result = Experiment(trial.config, data, trial.names, ports, trial.point, tools.selection).run()
    tools.folder.save_result(result)
    tidy(journal, service, tools.keep)
    if not tools.keep.stolen_nulls:
        models.drop_stolen_nulls()
    return result


def losses_of(info: Mapping[str, Any]) -> list[float]:
    """Return the training loss of each epoch of a stored model, from its ``info.json``."""
    losses = [epoch.get("loss") for epoch in info.get("history", ())]
    return [float(loss) for loss in losses if isinstance(loss, (int, float)) and math.isfinite(loss)]


def tidy(journal: TrialFolder, service: Any, keep: KeepConfig) -> None:
    """Remove what should not remain of a trial whose result is written."""
    parts = {"substitutes": keep.substitutes, "transfer": keep.answers}
    journal.drop(*(part for part, stays in parts.items() if not stays))
    if not keep.query_logs and isinstance(service, SharedService):
        service.forget()


def _service(
    trial: PlannedTrial, data: Splits, models: StoredModels, journal: TrialFolder, tools: Tools
) -> AbstractContextManager[QueryService]:
    """Return the attacked service: the sweep's, or the one at ``thief.blackbox.url``."""
    if trial.config.thief.blackbox is None:
        return SharedService(trial, models, journal, tools)
    from mea_ray.experiment.remote_service import RemoteService

    classes = None if trial.config.encodes else data.classes
    return RemoteService(trial.config, trial.name, journal.transfer, data.shape, classes)


def _open_journal(trial: PlannedTrial, tools: Tools, warn: Callable[[str], None]) -> TrialFolder:
    journal = tools.folder.trial(trial.name, warn)
    journal.pull()
    journal.folder.mkdir(parents=True, exist_ok=True)
    journal.forget_error()
    write_yaml(trial.config, journal.folder / "config.yaml")
    journal.save_point(trial.point)
    return journal


class TrialListener(Listener):
    """Reports the progress of a trial to the sweep and to Ray Tune.

    Args:
        trial: Name of the trial.
        tools: The trial's tools.
    """

    def __init__(self, trial: str, tools: Tools) -> None:
        self.trial, self.tools = trial, tools

        self._known: set[int] = set()

    def on_known(self, rung: RungResult) -> None:
        """Send the event."""
        self._known.add(rung.budget)
        self.tools.on_event(events.rung_finished(self.trial, rung))

    def on_phase(self, what: str, number: int, of: int) -> None:
        """Send the event."""
        self.tools.on_event(events.Phase(self.trial, what, number, of))

    def on_rung(self, rung: RungResult, so_far: TrialResult, *, again: bool) -> None:
        """Send the event once, and report to Tune in every process: Tune counts from zero in each."""
        if not again and rung.budget not in self._known:
            self.on_known(rung)
        self.tools.reports.rung(trial_metrics(so_far, rung), rung.epochs)

    def on_step(self, step: Step) -> None:
        """Send the event."""
        self.tools.on_event(events.tried(self.trial, step))


class SharedService:
    """The victim's service, shared through the sweep's broker; implements ``ports.QueryService``.

    Args:
        trial: The trial.
        models: Provides the victim's folder.
        journal: Its transfer set holds the answers of earlier processes.
        tools: The trial's tools.
    """

    at_once = True

    def __init__(self, trial: PlannedTrial, models: StoredModels, journal: TrialFolder, tools: Tools) -> None:
        self.trial, self.models, self.journal, self.tools = trial, models, journal, tools
        self._answers = -1
        self._opened: list[ServiceClient] = []

    def __enter__(self) -> SharedService:
        from mea_ray.service.pool import VictimService

        self.models.victim_folder()  # it exists before a service is started with it
        spec = ServiceSpec.of(self.trial.config, self.trial.victim, self.tools.folder.storage)
        self.transfer = self.journal.transfer
        self._hold = Hold(self.tools.broker, self.trial.name, spec, answers=_answers, pulse=self._pulse)
        entry = self._hold.__enter__()
        try:
            self.service = VictimService.connect(*entry)
            self.check_ledger()
        except BaseException as error:
            self._hold.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hold.__exit__(kind, error, trace)

    def check_ledger(self) -> None:
        """Restart the theft if the ledger, or the owner's log beside it, lacks answers that are stored here.

        Both are files of the machine that the driver runs on; a remote storage has a copy of the ledger. Without them,
        charges would be missing, and the owner would judge the thief by only some of its queries.
        """
        if not self.journal.has_begun:  # answers of another theft are not removed here: the attack rejects them
            return
        received = answers_received(self.trial.config, self.journal.transfer)
        accounts = list(account_budgets(self.trial.config, self.trial.name))
        remote = self.journal.storage.remote is not None
        for index, account in enumerate(accounts):
            share = account_share(index, len(accounts), received)
            try:
                charged = self.service.charged(account)
            except UnknownClient:
                charged = 0
            if charged < share or (remote and share and not self.service.logged(account)):
                self.tools.on_event(
                    events.Warned(
                        f"trial {self.trial.name}: the ledger of its service was lost ({charged} of {share} answers "
                        "charged to it are on record); all of its queries are sent and charged again"
                    )
                )
                self.journal.begin_anew()
                self.transfer = self.journal.transfer
                return

    def register(self, client: str, budget: int) -> None:
        """Open an account; wait while the ledger's storage is full or unavailable."""
        patiently(lambda: self.service.register(client, budget), self.journal.folder)

    def open(self, client: str, start_at: int) -> ServiceClient:
        """Return the black box of an account."""
        self._opened.append(self.service.client(client, self.trial.config.service.client, start_at=start_at))
        return self._opened[-1]

    def charged(self, client: str) -> int:
        """Return the images that an account has been charged."""
        return self.service.charged(client)

    def seen(self, client: str) -> ClientLog:
        """Return the owner's log of an account."""
        return self.service.seen(client)

    def query_log(self, client: str) -> QueryLogRecord:
        """Return the owner's judgement on an account."""
        return self.service.query_log(client)

    def forget(self) -> None:
        """Remove this trial from the owner's log, if the service is still up."""
        from ray.exceptions import RayError

        for account in account_budgets(self.trial.config, self.trial.name):
            with contextlib.suppress(ServiceUnavailable, RayError):
                self.service.forget(account)

    def _pulse(self) -> None:
        """Report the number of answers, if it has increased since the last heartbeat."""
        answers = sum(client.asked for client in self._opened) if self._opened else len(self.transfer)
        if answers != self._answers:
            self._answers = answers
            self.tools.on_event(events.Queried(self.trial.name, answers, self.trial.queries))


def epoch_events(epochs: int, on_event: events.OnEvent) -> OnEpoch:
    """Return an ``on_epoch`` that counts the epochs of each model over all stages and sends an event for each.

    Args:
        epochs: Epochs of the config; a scheme with several stages may train more.
        on_event: Where events go.
    """
    done: dict[str, int] = {}

    def on_epoch(role: Role, name: str, record: dict[str, Any]) -> None:
        done[name] = done.get(name, 0) + int(record.get("resumed", 1))
        on_event(events.ModelEpoch(role, name, done[name], max(epochs, done[name]), dict(record)))

    return on_epoch


def _answers(entry: Entry) -> bool:
    from ray.exceptions import RayError

    from mea_ray.service.pool import VictimService

    try:
        VictimService.connect(*entry)
    except (ServiceUnavailable, RayError):
        return False
    return True
