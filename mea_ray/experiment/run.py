"""One experiment, from the victim to the result: the same steps in one process, on Ray, and in a test."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mea_ray.attacks.base import Target
from mea_ray.blackbox.query_log import ClientLog
from mea_ray.config import ExperimentConfig, digest, identity
from mea_ray.core.errors import ArtifactError
from mea_ray.core.types import Splits
from mea_ray.core.versions import versions
from mea_ray.evaluation import metrics
from mea_ray.experiment.commitment import key_record
from mea_ray.experiment.follow_up import FollowUp, Suspect, Workbench, follow
from mea_ray.experiment.journal import BEGUN
from mea_ray.experiment.leakage import Leanings, Outsider
from mea_ray.experiment.names import Names
from mea_ray.experiment.owner import repeatable_key
from mea_ray.experiment.ports import Ports, QueryService
from mea_ray.experiment.proof import Assessment, Proofs
from mea_ray.experiment.theft import Theft, account_budgets, answers_stored, open_blackbox, rung_result
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.base import ImageModel
from mea_ray.results.portable import anonymous, portable_point
from mea_ray.results.records import LeaningRecord, RungResult, SelectionRecord, TrialResult
from mea_ray.training.checkpoint import weights_digest
from mea_ray.training.device import device_name


@dataclass(frozen=True)
class Experiment:
    """One experiment: the victim is stolen with each budget, and every substitute is judged.

    Attributes:
        config: The settings.
        data: The data; ``checks.check`` has passed.
        names: Names of the trial, the victim, and the null models.
        ports: Models, query service, journal, listener.
        point: Config paths that a sweep set, and their values.
        selection: How the sweep's settings were chosen.
    """

    config: ExperimentConfig
    data: Splits
    names: Names
    ports: Ports
    point: dict[str, Any] = field(default_factory=dict)
    selection: SelectionRecord | None = None

    def run(self) -> TrialResult:
        """Run the rest of the experiment: no finished step and no query is repeated."""
        before = self.ports.journal.partial()
        started = time.perf_counter() - (before.seconds if before else 0.0)
        self.ports.models.prepare()
        with self.ports.service as service:
            run = _Run(self, service, started)
            return run.result(run.rungs({rung.budget for rung in before.rungs} if before else set()))


class KeyOfTrial(BaseModel):
    """Identifies the key with which a trial was started; None without a watermark."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    key: str | None


class _Run:
    """One process's run of the rest of an experiment.

    Args:
        experiment: The experiment.
        service: The victim's query service.
        started: When it began, by ``time.perf_counter``, less what earlier processes took.
    """

    def __init__(self, experiment: Experiment, service: QueryService, started: float) -> None:
        self.config, self.data, self.names = experiment.config, experiment.data, experiment.names
        self.point, self.selection = experiment.point, experiment.selection
        self.ports, self.journal = experiment.ports, experiment.ports.journal
        self.service, self.started = service, started
        self.accounts = account_budgets(self.config, self.names.trial)
        self.victim, self.key = self.ports.models.victim()
        self.committed = self.ports.models.committed()
        self.victim_sha256 = weights_digest(self.victim)
        self._check_key()
        self.verifier = Verifier(self.config, self.data, self.key)
        self.proofs = Proofs(self.verifier, self.victim, self._nulls, self._seen, self._assess)
        self.follow_up = FollowUp()

    def _check_key(self) -> None:
        """Reject a trial whose answers come from a victim with another key: names do not depend on the drawn key.

        Raises:
            ArtifactError: The victim and its key were removed and made again since the trial was started.
        """
        # Without its tensors: a scheme learns some of them, and other hardware learns others.
        drawn = (
            None
            if self.key is None
            else digest([self.key.scheme, self.key.seed, self.key.source_classes, self.key.target_class])
        )
        own = KeyOfTrial(key=drawn)
        known = self.journal.find(BEGUN, KeyOfTrial)
        if known is None:
            self.journal.keep(BEGUN, own)
        elif known != own:
            raise ArtifactError(
                f"trial {self.names.trial} was started with a victim that has another key, and its answers come from "
                f"that one; restore keys/{self.names.victim} in the storage from a copy, or delete the trial's "
                "folder to start it again"
            )

    def rungs(self, reported: set[int]) -> list[RungResult]:
        """Run the remaining rungs and the steps after the last; return all rungs, by ascending budget.

        Args:
            reported: Budgets of the rungs that an earlier process reported.
        """
        for account, budget in self.accounts.items():
            self.service.register(account, budget)
        budgets = self.config.thief.budgets
        done = [rung for budget in budgets if (rung := self.journal.rung(budget)) is not None]
        if len(done) == len(budgets):
            self.follow_up = self._follow(done[-1])
        for place in range(len(done)):  # a scheduler counts rungs, so the earlier ones are reported again
            self._report(done[: place + 1], again=done[place].budget in reported)
        for rung in self._steal(skip={rung.budget for rung in done}):
            done.append(rung)
            self.ports.listener.on_known(rung)
            if len(done) == len(budgets):  # before it is reported: a scheduler may end this process at the last rung
                self.follow_up = self._follow(max(done, key=lambda each: each.budget))
            self._report(done, again=False)
        self.journal.transfer.forget_snapshots()  # an earlier process may have been killed right after its last rung
        return sorted(done, key=lambda rung: rung.budget)

    def result(self, rungs: list[RungResult], status: Literal["finished", "stopped"] = "finished") -> TrialResult:
        """Return the result of the rungs so far."""
        proof = self.proofs.at(max(rung.budget for rung in rungs))
        return TrialResult(
            trial=self.names.trial,
            point=portable_point(self.point),
            config=anonymous(self.config.resolved()),
            victim=self.names.victim,
            nulls=list(self.names.nulls),
            victim_report=proof.victim,
            null_reports=proof.nulls,
            rungs=rungs,
            stolen_nulls=self.follow_up.controls,
            removals=self.follow_up.removals,
            detections=self.follow_up.detections,
            leaning=self.leaning,
            status=status,
            selection=self.selection,
            chance=metrics.chance(self.data.test),
            statistic=proof.verifier.statistic,
            key_drawn=proof.key is not None and proof.key.drawn,
            key=key_record(self.key, self.committed),
            victim_sha256=self.victim_sha256,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            queries_charged=sum(map(self.service.charged, self.accounts)),
            answers_stored=answers_stored(self.journal.transfer),
            query_log={account: self.service.query_log(account) for account in self.accounts},
            seconds=time.perf_counter() - self.started,
            device=device_name(),
            versions=versions(),
        )

    def _steal(self, skip: set[int]) -> Iterator[RungResult]:
        """Spend the budget; judge and save each substitute."""
        if len(skip) == len(self.config.thief.budgets):
            return
        service, transfer = self.service, self.journal.transfer
        blackbox = open_blackbox(self.config, self.names.trial, transfer, service.open, at_once=service.at_once)
        # Closed at once when a scheduler ends this trial at a rung: the attack must not go on.
        with contextlib.ExitStack() as stack:
            rungs = self.ports.steal(Theft.of(self.config, self.data), [Target(blackbox, transfer, skip)])
            if isinstance(rungs, Generator):
                stack.callback(rungs.close)
            number, of = len(skip) + 1, len(self.config.thief.budgets)
            self.ports.listener.on_phase("substitute", number, of)
            for _, rung in rungs:
                result = rung_result(rung, self.proofs.at(rung.budget).judge(rung.model))
                assert isinstance(rung.model, ImageModel)
                self.journal.keep_rung(result, rung.model)
                yield result
                number += 1
                if number <= of:
                    self.ports.listener.on_phase("substitute", number, of)

    def _follow(self, largest: RungResult) -> FollowUp:
        """Run the steps after the last rung."""
        proof, models, journal = self.proofs.at(largest.budget), self.ports.models, self.journal
        suspects = {
            "substitute": Suspect(lambda: journal.substitute(largest.budget), largest.report),
            "victim": Suspect(lambda: self.victim, proof.victim),
            "null_model": Suspect(lambda: models.null(0), proof.nulls[0]),
        }
        return follow(
            Workbench(
                config=self.config,
                data=self.data,
                proof=proof,
                proof_at=self.proofs.at,
                transfer=journal.transfer,
                suspects=suspects,
                null=models.null,
                stolen_nulls=models.stolen_nulls,
                steps=journal,
                steal=self.ports.steal,
                on_step=self.ports.listener.on_step,
                on_phase=self.ports.listener.on_phase,
            )
        )

    def _report(self, done: list[RungResult], *, again: bool) -> None:
        """Save the result so far, then report the newest rung: the scheduler may end the process there."""
        so_far = self.result(done, "finished" if len(done) == len(self.config.thief.budgets) else "stopped")
        self.journal.keep_partial(so_far)
        self.ports.listener.on_rung(done[-1], so_far, again=again)

    def _assess(self, make: Callable[[], Assessment]) -> Assessment:
        """Return the assessment of victim and null models; computed once for all trials that share them."""
        names, shared = self.names, self.journal.shared
        verification = {k: v for k, v in identity(self.config.verification).items() if k != "commitment"}
        made_by: list[Any] = [names.victim, *names.nulls, names.data, self.config.seed, verification]
        made_by += self._drawn()
        assessment = shared.find(f"assessments/{digest(made_by)}", Assessment)
        if assessment is None:
            assessment = make()
            shared.keep(f"assessments/{digest(made_by)}", assessment)
        return assessment

    @cached_property
    def leaning(self) -> list[LeaningRecord]:
        """What the answers give away; computed once for all trials that share the models, the service and the seed."""
        config, names, shared = self.config, self.names, self.journal.shared
        if config.encodes:
            return []
        made_by = [names.victim, *names.nulls, names.data, config.seed, identity(config.service.policy)]
        made_by += self._drawn()
        step = f"assessments/leaning-{digest(made_by)}"
        leanings = shared.find(step, Leanings)
        if leanings is None:
            outsider = Outsider(config, self.data, self.key, self.verifier.signal)
            leanings = Leanings(records=outsider.look(self.victim, self._nulls()))
            shared.keep(step, leanings)
        return leanings.records

    def _drawn(self) -> list[str]:
        """Return what distinguishes keys that were drawn under the same names."""
        return [] if self.key is None or repeatable_key(self.config) else [self.key.digest()]

    def _nulls(self) -> list[ImageModel]:
        return [self.ports.models.null(index) for index in range(self.config.verification.null_models)]

    def _seen(self) -> list[ClientLog]:
        return [self.service.seen(account) for account in self.accounts]
