"""One trial: victim, service, theft, proof. Every step that is done is on disk, and a restart goes on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from mea_ray.config import digest, identity, write_yaml
from mea_ray.core.errors import ServiceUnavailable
from mea_ray.experiment.artifacts import Store
from mea_ray.results.records import DetectionResult, ModelReport, RemovalResult, RungResult, TrialResult
from mea_ray.storage.files import patiently, write_whole
from mea_ray.sweep import events
from mea_ray.sweep.broker import CLIENT_FIELDS, Hold, ServiceSpec
from mea_ray.sweep.folder import SweepFolder, TrialFolder, read_model
from mea_ray.sweep.plan import PlannedTrial

if TYPE_CHECKING:
    from mea_ray.experiment.checks import Prepared
    from mea_ray.experiment.proof import Proof, Proofs
    from mea_ray.models.base import ImageModel
    from mea_ray.watermarks.base import Key

METRICS = ("wsr", "wfpr", "accuracy", "fidelity", "p_value", "queries", "victim_gap")
Report = Callable[[dict[str, float]], None]


class Assessment(BaseModel):
    """What verification says of a victim and of its null models; the same for all trials that share them.

    But of a watermark that is in the answers, whose proofs belong to one trial (``proving.Proofs``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    victim: ModelReport
    nulls: list[ModelReport]


@dataclass(frozen=True)
class Tools:
    """What a trial gets from its sweep.

    Attributes:
        folder: The sweep's folder.
        broker: Handle of the broker actor.
        on_event: Where events go.
        report: Told the metrics of each rung; the scheduler may end the process in it.
    """

    folder: SweepFolder
    broker: Any
    on_event: events.OnEvent
    report: Report


Work = Callable[[PlannedTrial, Callable[[], "Prepared"], Tools, int, str], TrialResult]
"""What a trial does, called with a trial, its data, its tools, its process and its node: ``run_trial``."""


def metrics_of(rung: RungResult, victim: ModelReport, nulls: Sequence[ModelReport]) -> dict[str, float]:
    """Return what schedulers and searchers see of a rung.

    Args:
        rung: The rung.
        victim: What verification says of the victim.
        nulls: Of its null models.

    Returns:
        The numbers of the stolen model's report; ``victim_gap``, the null models' mean accuracy less the victim's:
        what the watermark costs an honest customer, a fraction. NaN where a number does not exist (no key, say).
    """
    report = rung.report
    innocent = [null.accuracy for null in nulls]
    numbers = {
        "wsr": report.wsr.rate if report.wsr else None,
        "wfpr": report.wfpr_mean,
        "accuracy": report.accuracy,
        "fidelity": report.fidelity,
        "p_value": report.p_value,
        "queries": rung.queries,
        "victim_gap": fmean(innocent) - victim.accuracy if innocent else None,
    }
    return {name: float("nan") if value is None else float(value) for name, value in numbers.items()}


def run_trial(trial: PlannedTrial, prepared: Callable[[], Prepared], tools: Tools, pid: int, node: str) -> TrialResult:
    """Run a trial, or what is left of it.

    Args:
        trial: The trial.
        prepared: Gives its data.
        tools: What the sweep lends.
        pid: This process.
        node: Ray's id of this node.

    Returns:
        The result; it is on disk already.
    """
    started = time.perf_counter()
    tools.folder.wait()
    done = tools.folder.result(trial.name)
    if done is not None:
        for rung in done.rungs:
            tools.report(metrics_of(rung, done.victim_report, done.null_reports))
        return done
    work = tools.folder.trial(trial.name)
    work.pull()
    work.path.mkdir(parents=True, exist_ok=True)
    work.error.unlink(missing_ok=True)
    write_yaml(trial.config, work.path / "config.yaml")
    work.save_point(trial.point)
    before = read_model(TrialResult, work.partial)
    warn = partial(_warn, tools, trial.name)
    finished = work.rungs(trial.config.thief.budgets, warn)
    told = events.TrialStarted(trial.name, trial.point, pid, node, trial.config.thief.budgets, len(finished))
    tools.on_event(told)
    run = _Run(trial, prepared(), tools, work, started - (before.seconds if before else 0.0))
    run.told = {rung.budget for rung in before.rungs} if before else set()
    return run.run(finished)


def _warn(tools: Tools, trial: str, text: str) -> None:
    tools.on_event(events.Warned(f"trial {trial}: {text}"))


class _Run:
    """The state of a running trial."""

    def __init__(
        self, trial: PlannedTrial, prepared: Prepared, tools: Tools, work: TrialFolder, started: float
    ) -> None:
        from mea_ray.experiment.run import accounts_to_register

        self.trial, self.config, self.prepared = trial, trial.config, prepared
        self.tools, self.work, self.started = tools, work, started
        self.warn = partial(_warn, tools, trial.name)
        self.store = Store(tools.folder.storage, tell=self.warn)
        self.accounts = accounts_to_register(trial.config, trial.name)
        self.told: set[int] = set()
        self.controls: list[RungResult] = []
        self.removals: list[RemovalResult] = []
        self.detections: list[DetectionResult] = []

    def run(self, finished: dict[int, RungResult]) -> TrialResult:
        from mea_ray.service.pool import VictimService

        victim_folder, null_folders = self._models()
        model, key = load_victim(victim_folder)
        self.proofs = self._proofs(model, key, null_folders)
        self.aftermath = partial(self._aftermath, model, null_folders)
        spec = ServiceSpec.of(self.config, self.trial.victim, str(victim_folder))
        transfer = self._transfer()
        pulse = partial(self._pulse, transfer, [-1])
        with Hold(self.tools.broker, self.trial.name, spec, answers=_answers, pulse=pulse) as name:
            self.service = VictimService.connect(name)
            rungs = self._rungs(transfer, model, finished)
            result = self._result(rungs, "finished")
        path = self.tools.folder.result_path(self.trial.name)
        result.save(path)
        self.tools.folder.push(f"results/{path.name}")
        return result

    def _models(self) -> tuple[Path, list[Path]]:
        source = lambda: self.prepared  # noqa: E731
        names = [("victim", self.trial.victim), *(("null", name) for name in self.trial.nulls)]
        tell = [
            epoch_events(role, name, self.config.victim.training.epochs, self.tools.on_event) for role, name in names
        ]
        victim = self.store.get_or_train_victim(self.config, source, tell[0])
        nulls = [
            self.store.get_or_train_null(self.config, index, source, tell[index + 1])
            for index in range(len(self.trial.nulls))
        ]
        return victim, nulls

    def _proofs(self, model: ImageModel, key: Key | None, null_folders: list[Path]) -> Proofs:
        """Return what the thief is held against; assessed once for all trials that share it, if they can."""
        from mea_ray.experiment.proof import Proof, Proofs, marks_answers
        from mea_ray.training.checkpoint import load_model

        config = self.config
        make = partial(
            Proofs,
            config,
            self.prepared,
            key,
            model,
            lambda: [load_model(folder)[0] for folder in null_folders],
            lambda: [self.service.seen(account) for account in self.accounts],
        )
        if marks_answers(config):
            return make()  # once there are queries
        made_by = [self.trial.victim, *self.trial.nulls, self.trial.data, config.seed, identity(config.verification)]
        path = self.tools.folder.path / "assessments" / f"{digest(made_by)}.json"
        found = read_model(Assessment, path)
        if found is None:
            proof = make().at(config.thief.budgets[-1])
            found = Assessment(victim=proof.victim, nulls=proof.nulls)
            write_whole(path, found.model_dump_json(indent=1))
        return make(Proof(key, found.victim, found.nulls))

    def _transfer(self) -> Any:
        from mea_ray.attacks.transfer import TransferSet

        return TransferSet(self.work.transfer, on_damage=self.warn)

    def _rungs(
        self,
        transfer: Any,
        model: ImageModel,
        finished: dict[int, RungResult],
    ) -> list[RungResult]:
        from mea_ray.experiment import run as pipeline
        from mea_ray.training.checkpoint import save_model

        config, name = self.config, self.trial.name
        for account, allowed in self.accounts.items():
            patiently(partial(self.service.register, account, allowed), self.work.path)
        done: list[RungResult] = []
        if len(finished) == len(config.thief.budgets):
            self.aftermath(transfer, done=[finished[budget] for budget in config.thief.budgets])
        for budget in config.thief.budgets:  # the scheduler counts rungs, so it hears of those from before again
            if budget in finished:
                done.append(finished[budget])
                self._tell(done)
        if len(done) == len(config.thief.budgets):
            return done
        section = config.service.model_dump(include=set(CLIENT_FIELDS))

        def open_account(account: str, start_at: int) -> Any:
            return self.service.client(account, **section, start_at=start_at)

        blackbox = pipeline.open_blackbox(config, name, transfer, open_account, at_once=True)
        said = pipeline.predictions(config, self.prepared, model)
        for rung in pipeline.run_attack(config, self.prepared, blackbox, transfer, skip=set(finished)):
            proof = self.proofs.at(rung.budget)
            report = pipeline.assess(
                config, self.prepared, rung.model, proof.key, victim=said, null_rate=proof.null_rate
            )
            result = pipeline.rung_result(rung, report)
            save_model(self.work.substitute(rung.budget), rung.model, {"role": "substitute", "trial": name})
            self.work.save_rung(result)
            done.append(result)
            self.work.push()
            if len(done) == len(config.thief.budgets):  # the scheduler may end this process at the last rung
                self.aftermath(transfer, done=done)
            self._tell(done)
        return sorted(done, key=lambda rung: rung.budget)

    def _aftermath(
        self,
        model: ImageModel,
        null_folders: list[Path],
        transfer: Any,
        *,
        done: list[RungResult],
    ) -> None:
        """Do what follows the last rung: thefts of null models, removals, detections."""
        from mea_ray.experiment import run as pipeline
        from mea_ray.experiment.detecting import detections
        from mea_ray.experiment.removing import Suspect, removals
        from mea_ray.training.checkpoint import load_model

        config, largest = self.config, max(done, key=lambda rung: rung.budget)
        proof = self.proofs.at(largest.budget)
        self.controls = self._steal_nulls(null_folders, proof)
        if not config.removal.methods and not config.detection.methods:
            return
        said = pipeline.predictions(config, self.prepared, model)
        judge = partial(pipeline.assess, config, self.prepared, key=proof.key, victim=said, null_rate=proof.null_rate)
        stolen = self.work.substitute(largest.budget)
        suspects = {
            "substitute": Suspect(lambda: load_model(stolen)[0], largest.report),
            "victim": Suspect(lambda: model, proof.victim),
            "null_model": Suspect(lambda: load_model(null_folders[0])[0], proof.nulls[0]),
        }

        def keep(name: str, result: RemovalResult | DetectionResult) -> None:
            if isinstance(result, RemovalResult):
                self.work.save_removal(name, result)
            else:
                self.work.save_detection(name, result)
            self.work.push()
            self.tools.on_event(events.tried(self.trial.name, result))

        self.removals = removals(
            config,
            self.prepared,
            transfer,
            suspects,
            lambda left: judge(model=left),
            find=self.work.removal,
            keep=keep,
        )
        self.detections = detections(config, self.prepared, suspects, proof.key, find=self.work.detection, keep=keep)

    def _steal_nulls(self, null_folders: list[Path], proof: Proof) -> list[RungResult]:
        """Steal null models in the same way, in this process: their owner's service is no part of the experiment."""
        from mea_ray.experiment.run import steal_null
        from mea_ray.training.checkpoint import load_model

        stolen = []
        for index, folder in enumerate(null_folders[: self.config.verification.stolen_null_models]):
            control = self.work.control(index)
            if control is None:
                model = load_model(folder)[0]
                control = steal_null(self.config, self.prepared, model, proof.key, null_rate=proof.null_rate)
                self.work.save_control(index, control)
                self.work.push()
                self.tools.on_event(events.tried(self.trial.name, control))
            stolen.append(control)
        return stolen

    def _tell(self, done: list[RungResult]) -> None:
        """Report the newest rung. The scheduler may end this process here, so what there is becomes a result before.

        A rung that an earlier process told is reported to the scheduler, which counts them, and to nobody else.
        """
        rung = done[-1]
        status = "finished" if len(done) == len(self.config.thief.budgets) else "stopped"
        partial_result = self._result(done, status)
        partial_result.save(self.work.partial)
        if rung.budget not in self.told:
            self.tools.on_event(events.rung_finished(self.trial.name, rung))
        self.tools.report(metrics_of(rung, partial_result.victim_report, partial_result.null_reports))

    def _result(self, rungs: list[RungResult], status: Any) -> TrialResult:
        from mea_ray.core.versions import versions
        from mea_ray.training.device import device_name

        proof = self.proofs.at(max(rung.budget for rung in rungs))
        return TrialResult(
            trial=self.trial.name,
            point=self.trial.point,
            config=self.config.resolved(),
            victim=self.trial.victim,
            nulls=list(self.trial.nulls),
            victim_report=proof.victim,
            null_reports=proof.nulls,
            rungs=rungs,
            stolen_nulls=self.controls,
            removals=self.removals,
            detections=self.detections,
            status=status,
            queries_charged=sum(map(self.service.charged, self.accounts)),
            query_log={account: self.service.query_log(account) for account in self.accounts},
            seconds=time.perf_counter() - self.started,
            device=device_name(),
            versions=versions(),
        )

    def _pulse(self, transfer: Any, last: list[int]) -> None:
        if len(transfer) != last[0]:
            last[0] = len(transfer)
            self.tools.on_event(events.Queried(self.trial.name, last[0], self.trial.queries))


def load_victim(folder: Path) -> tuple[ImageModel, Key | None]:
    """Load a victim and its key; the key is None for a victim without a watermark."""
    from mea_ray.training.checkpoint import load_model
    from mea_ray.watermarks.base import Key

    return load_model(folder)[0], Key.load(folder) if (folder / "key.json").exists() else None


def epoch_events(role: Any, name: str, epochs: int, on_event: events.OnEvent) -> Callable[[dict[str, Any]], None]:
    """Return an ``on_epoch`` that counts epochs over all stages and tells each."""
    done = [0]

    def on_epoch(record: dict[str, Any]) -> None:
        done[0] += 1
        on_event(events.ModelEpoch(role, name, done[0], max(epochs, done[0]), dict(record)))

    return on_epoch


def _answers(name: str) -> bool:
    from ray.exceptions import RayError

    from mea_ray.service.pool import VictimService

    try:
        VictimService.connect(name)
    except (ServiceUnavailable, RayError):
        return False
    return True
