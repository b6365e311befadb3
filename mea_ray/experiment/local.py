"""An experiment without Ray: in a folder from which it can be resumed, or in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.ledger import Ledger, RateLimit
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.prada import query_log_record
from mea_ray.blackbox.query_log import ClientLog, QueryLog
from mea_ray.config import ExperimentConfig, write_yaml
from mea_ray.core.errors import ArtifactError
from mea_ray.core.types import Splits
from mea_ray.experiment.answers import pass_images, service_policy
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.attack_process import parent
from mea_ray.experiment.attack_process.fork_server import FORK_SERVER
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.journal import FolderJournal, FolderSteps, MemoryJournal, Warn
from mea_ray.experiment.model_sources import StoredModels, TrainedModels
from mea_ray.experiment.names import Names
from mea_ray.experiment.ports import Listener, Models, OnEpoch, Ports, QueryService
from mea_ray.experiment.remote_service import RemoteService
from mea_ray.experiment.run import Experiment
from mea_ray.experiment.theft import Theft
from mea_ray.results.records import QueryLogRecord, TrialResult
from mea_ray.storage.remote import Storage
from mea_ray.training.device import threads


class LocalService:
    """The victim's query service in this process; implements ``ports.QueryService``.

    Args:
        config: The experiment.
        data: Its data.
        models: Source of the victim.
        ledger: The ledger's file, with the query log beside it; in memory when None.
    """

    at_once = False

    def __init__(self, config: ExperimentConfig, data: Splits, models: Models, ledger: Path | None = None) -> None:
        self.config, self.data, self.models, self.path = config, data, models, ledger

    def __enter__(self) -> LocalService:
        self.victim, key = self.models.victim()
        self.policy = service_policy(self.config, self.data, self.victim, key)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.path)
        self.log = QueryLog(None if self.path is None else f"{self.path}.queries")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ledger.close()
        self.log.close()

    def register(self, client: str, budget: int) -> None:
        """Open an account with the rate limit ``service.rate``, or change its budget."""
        rate = self.config.service.rate
        self.ledger.register(client, budget, None if rate is None else RateLimit(rate.images_per_second, rate.burst))

    def open(self, client: str, start_at: int) -> LocalBlackBox:
        """Return the black box of an account."""
        return LocalBlackBox(
            self.victim,
            self.policy,
            self.ledger,
            client,
            pass_images=pass_images(self.config),
            request_images=self.config.service.request_images,
            start_at=start_at,
            log=self.log,
            query_log_images=self.config.service.query_log_images,
        )

    def charged(self, client: str) -> int:
        """Return the images that an account has been charged."""
        return self.ledger.charged(client)

    def seen(self, client: str) -> ClientLog:
        """Return the owner's log of an account."""
        return self.log.of(client)

    def query_log(self, client: str) -> QueryLogRecord:
        """Return the owner's judgement on an account; the answers of an encoder name no class."""
        return query_log_record(self.seen(client), 1 if self.config.encodes else self.data.classes)


@dataclass(frozen=True)
class LocalRun:
    """A finished local run.

    Attributes:
        result: Its result.
        folder: Its folder, with the layout of a sweep of one trial.
        reused: The result already existed, and nothing was run.
    """

    result: TrialResult
    folder: Path
    reused: bool


def run_local(
    config: ExperimentConfig,
    name: str = "experiment",
    *,
    on_epoch: OnEpoch = lambda role, name, epoch: None,
    warn: Warn = lambda text: None,
) -> LocalRun:
    """Run an experiment without Ray, in the folder ``local/<name>-<start of the trial's name>`` of its storage.

    Names, results and artifacts equal those of a sweep of this one experiment, on the same kind of device. An
    interrupted run resumes: no finished step and no query is repeated. Everything runs in this process except the
    attack, which runs in a separate one.

    Args:
        config: The experiment.
        name: Of the folder.
        on_epoch: Called after each epoch of the victim and of the null models.
        warn: Called with a message for each damaged file, whose step is repeated.

    Returns:
        The result, which is also in ``results/`` of the folder.

    Raises:
        ConfigError: The experiment cannot be run; nothing was trained.
        DataError: Its data cannot be read.
    """
    data = load_splits(config)
    check(config, data)
    names = Names.of(config, Fingerprints.of(data, config))
    storage = Storage(config.storage)
    relative = f"local/{name}-{names.trial[:8]}"
    folder = storage.root / relative
    path = folder / "results" / f"{names.trial}.json"
    storage.claim_cache(relative, make=True)
    storage.pull_folder(f"{relative}/results")
    try:
        return LocalRun(TrialResult.load(path), folder, reused=True)
    except ArtifactError as error:
        if path.exists():
            warn(f"{error}; it is computed again")
    storage.pull_folder(f"{relative}/trials/{names.trial}")
    journal = FolderJournal(storage, f"{relative}/trials/{names.trial}", FolderSteps(storage, relative), warn)
    write_yaml(config, journal.folder / "config.yaml")
    models = StoredModels(Store(storage, warn=warn), config, data, names, on_epoch)
    service = _service(config, data, models, names, journal.transfer, folder / "ledgers" / f"{names.trial}.sqlite")
    FORK_SERVER.start()
    # The last bits of a training on a CPU depend on the number of threads: use as many as on Ray.
    with threads(config.resources.victim.cpus):
        models.prepare()
    with threads(config.resources.trial.cpus):
        result = Experiment(config, data, names, Ports(models, service, journal, Listener(), parent.steal)).run()
    result.save(path)
    storage.push(f"{relative}/results/{path.name}")
    return LocalRun(result, folder, reused=False)


def _service(
    config: ExperimentConfig,
    data: Splits,
    models: Models,
    names: Names,
    transfer: TransferSet,
    ledger: Path | None = None,
) -> AbstractContextManager[QueryService]:
    """Return the attacked service: one in this process, or the one at ``thief.blackbox.url``."""
    if config.thief.blackbox is None:
        return LocalService(config, data, models, ledger)
    classes = None if config.encodes else data.classes
    return RemoteService(config, names.trial, transfer, data.shape, classes)


def run_in_memory(config: ExperimentConfig, on_epoch: OnEpoch = lambda role, name, epoch: None) -> TrialResult:
    """Run an experiment in this process and keep only its result; raises as ``run_local``.

    The attack runs in this process, too, with access to victim, key and test images: use it with trusted attacks only.
    """
    data = load_splits(config)
    check(config, data)
    names = Names.of(config, Fingerprints.of(data, config))
    models = TrainedModels(config, data, names, on_epoch)
    journal = MemoryJournal()
    service = _service(config, data, models, names, journal.transfer)
    ports = Ports(models, service, journal, Listener(), Theft.run)
    return Experiment(config, data, names, ports).run()
