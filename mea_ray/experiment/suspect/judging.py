"""The verdict on someone else's model: queried with the owner's key, ranked among null models, judged as in a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mea_ray.config import ExperimentConfig, ModelChoice
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Splits
from mea_ray.evaluation import metrics
from mea_ray.experiment.commitment import Committed, committed, key_record
from mea_ray.experiment.data import load_owners_part
from mea_ray.experiment.suspect.network import Ask, SuspectNetwork, counted, find_form, fitted
from mea_ray.experiment.suspect.opening import HowToOpen, Source, class_map, opened
from mea_ray.experiment.suspect.outputs import LABEL_STATISTICS, Kind, class_columns
from mea_ray.experiment.suspect.process import Limits
from mea_ray.experiment.verifier import Verifier
from mea_ray.experiment.victim.folder import Victim
from mea_ray.experiment.victim.nulls import NullRecord, budgets, innocent, read_nulls, stolen
from mea_ray.models.foreign import Preprocessing
from mea_ray.results.portable import cleaned, portable
from mea_ray.results.records import Count, Fraction, KeyRecord, ModelReport
from mea_ray.verification.evidence import Court
from mea_ray.verification.verdict import Evidence, Judgement, judge
from mea_ray.verification.verdict import Verdict as VerdictName


@dataclass(frozen=True)
class Terms:
    """What the owner says about a suspect.

    Attributes:
        classes: ``match``, or a file with the suspect's class names or columns; None takes the victim's order.
        outputs: Type of the suspect's outputs; None detects it.
        preprocessing: Its input format.
        architecture: Network for a file of weights; None takes the victim's.
        output: Name of the output of a file that has several.
        budget: Query budget of the claimed theft, in images: null models stolen with it are the controls. None takes
            the largest.
        seen: When the suspect was first seen; the commitment must be older. None takes the current time.
        limits: Resource limits of a file's process.
        open_url: Opens a URL.
        command: The command line, for the record.
    """

    classes: str | None = None
    outputs: Kind | None = None
    preprocessing: Preprocessing = Preprocessing()
    architecture: ModelChoice | None = None
    output: str | None = None
    budget: int | None = None
    seen: datetime | None = None
    limits: Limits = field(default_factory=Limits)
    open_url: Callable[[str], Ask] | None = None
    command: str = ""


class _VerdictPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class SuspectRecord(_VerdictPart):
    """How a suspect was queried.

    Attributes:
        name: Its name on the command line: a path, a URL, a function.
        kind: What it is.
        sha256: Of its file; empty where there is none.
        network: How its process was isolated from the network; empty for a suspect without its own process.
        outputs: Type of its outputs.
        order: Whether the order of its classes was given, matched on clean images, or assumed to be the victim's.
        columns: Its column for each of the victim's classes.
        preprocessing: Its input format.
    """

    name: str
    kind: str
    sha256: str
    network: str
    outputs: str
    order: Literal["named", "matched", "assumed"]
    columns: tuple[int, ...]
    preprocessing: dict[str, Any]


class ReasonRecord(_VerdictPart):
    """A reason for a verdict; see ``verification.verdict.Reason``."""

    verdict: VerdictName
    text: str


class StatisticRecord(_VerdictPart):
    """One statistic of the suspect, beside the victim's and the null models'.

    Attributes:
        name: Its name.
        suspect: Its value for the suspect.
        victim: For the victim; None if it was not measured.
        largest_null: The largest of the null models.
        position: Rank among the null models, from 1.
        total: Number of null models plus the suspect.
        key_position: Rank of the key among all admissible keys on this suspect, from 1; None if keys are not ranked.
        key_total: Number of admissible keys.
    """

    name: str
    suspect: float
    victim: float | None
    largest_null: float
    position: Count
    total: Count
    key_position: Count | None = None
    key_total: Count | None = None


class Verdict(_VerdictPart):
    """The verdict on one suspect, with its evidence. Rates and accuracies are in [0, 1].

    Attributes:
        verdict: See ``verification.verdict.SEVERITY``.
        reasons: Reasons, worst first.
        p_value: Combined p-value.
        significance: Largest p-value at which theft is proved.
        above_threshold: Whether the success rate is above the paper's threshold. It does not decide.
        statistic: The statistic by which models were ranked.
        date: Date of the verdict, UTC, ISO 8601.
        command: The command line.
        victim: Name of the victim.
        victim_sha256: SHA-256 of the victim's weights.
        watermark: Name of the scheme.
        key: Fingerprint of the key, and the commitment to it.
        suspect: How the suspect was queried.
        null_models: Number of innocent models that it was ranked among.
        stolen_null_models: Number of innocent models that were stolen with ``budget``, as controls.
        budget: Query budget of these, in images; None without any.
        report: Verification of the suspect.
        victim_report: Verification of the victim.
        statistics: Statistic by statistic.
        would_change: What would change the conclusion.
        notes: Remarks on the measurement.
    """

    schema_version: Literal[1] = 1
    verdict: VerdictName
    reasons: tuple[ReasonRecord, ...]
    p_value: Fraction
    significance: float
    above_threshold: bool
    statistic: str
    date: str
    command: str = ""
    victim: str
    victim_sha256: str
    watermark: str
    key: KeyRecord | None
    suspect: SuspectRecord
    null_models: Count
    stolen_null_models: Count
    budget: int | None
    report: ModelReport
    victim_report: ModelReport
    statistics: tuple[StatisticRecord, ...]
    would_change: tuple[str, ...] = Field(default=())
    notes: tuple[str, ...] = Field(default=())

    @property
    def proved(self) -> bool:
        """Whether theft is proved."""
        return self.verdict == "proved"


def verify_suspect(
    victim: Victim,
    suspect: str | Ask,
    terms: Terms | None = None,
    *,
    on_asked: Callable[[int], None] = lambda images: None,
) -> Verdict:
    """Judge a suspect with a victim's key.

    Args:
        victim: The victim, with its folder, which holds its null models and the commitment.
        suspect: A file, a folder, a URL or ``package.module:function``; or a function of float32 images (N, C, H, W).
        terms: What is known about the suspect.
        on_asked: Called with the number of images queried so far, after each request.

    Raises:
        ConfigError: The victim cannot be verified in this way, or there are no null models yet.
        DataError: The victim's data are missing, or have changed.
        SuspectError: The suspect cannot be loaded or queried, or its outputs cannot be interpreted.
        ArtifactError: A file is damaged.
    """
    terms = terms or Terms()
    _check_victim(victim)
    data = held_out(victim)
    records = read_nulls(victim)
    if not innocent(records):
        raise ConfigError(
            f"victim {victim.name!r} has no null models to rank a suspect among; train some first: mea-ray nulls "
            f"{victim.folder} --count 20"
        )
    fitting_budget(records, terms.budget)
    names, match = class_map(terms.classes)
    columns = None if names is None else class_columns(data.test.class_names, names)
    classes = data.classes if names is None else max(len(names), 1 + max(columns or (0,)))
    how = HowToOpen(
        terms.architecture or victim.config.victim.model,
        data.shape,
        classes,
        terms.output,
        terms.limits,
        terms.open_url,
    )
    if callable(suspect):
        source = Source(getattr(suspect, "__name__", type(suspect).__name__), "function")
        return _judged(victim, data, records, counted(suspect, on_asked), source, terms, columns, match)
    with opened(suspect, how) as (ask, source):
        return _judged(victim, data, records, counted(ask, on_asked), source, terms, columns, match)


def held_out(victim: Victim) -> Splits:
    """Load the data that a victim is verified with.

    Raises:
        DataError: They cannot be loaded, or are not those that the victim was trained on.
    """
    data = load_owners_part(victim.config)
    if data.fingerprint != victim.about.card.data_fingerprint:
        raise DataError(
            f"the data of victim {victim.name!r} have changed since it was trained (content {data.fingerprint}, not "
            f"{victim.about.card.data_fingerprint}); restore them, or give their location: data.path=FOLDER"
        )
    return data


def with_data(victim: Victim, config: ExperimentConfig) -> Victim:
    """Return the victim with a config that reads its data from elsewhere."""
    return replace(victim, config=config)


def _check_victim(victim: Victim) -> None:
    if victim.key is None:
        raise ConfigError(f"victim {victim.name!r} carries no watermark, so no suspect can be verified with it")
    if victim.config.encodes:
        raise ConfigError(f"victim {victim.name!r} is an encoder; verify judges classifiers")
    watermark = victim.config.victim.watermark.build()
    if watermark.needs_log:
        raise ConfigError(
            f"victim.watermark={victim.config.victim.watermark.name} is in the answers of a service and is verified "
            "with a client's queries; a sweep does that, verify does not"
        )


def _judged(
    victim: Victim,
    data: Splits,
    records: list[NullRecord],
    ask: Ask,
    source: Source,
    terms: Terms,
    columns: tuple[int, ...] | None,
    match: bool,
) -> Verdict:
    taken = fitted(terms.preprocessing, data.shape, source.input_shape, whole_numbers=source.whole_numbers)
    form, assumed = find_form(
        ask,
        data.test,
        taken=taken,
        outputs=terms.outputs,
        columns=columns,
        match=match,
    )
    nulls = innocent(records)
    verifier = Verifier(victim.config, data, victim.key)
    report = verifier.report(SuspectNetwork(ask, form), victim=verifier.predictions(victim.model), nulls=nulls)
    if form.outputs in {"labels", "top_k"}:
        report = _by_labels(report)
    budget = terms.budget if terms.budget is not None else max(budgets(records), default=None)
    controls = [] if budget is None else [record.report for record in stolen(records, budget)]
    assert victim.key is not None
    section = victim.config.verification
    court = Court(
        victim=victim.report,
        chance=metrics.chance(data.test),
        statistic=_statistic(verifier.statistic, [report, victim.report, *nulls, *controls]),
        key_drawn=victim.key.drawn,
        threshold=section.threshold,
        significance=section.significance,
    )
    now = datetime.now(timezone.utc)
    commitment = None if victim.folder is None else committed(victim.folder)
    old_enough = commitment is not None and commitment.before(terms.seen or now)
    evidence = replace(court.evidence(report, nulls, controls), committed=old_enough)
    judgement = judge([evidence], section.significance)[0]
    key = key_record(victim.key, commitment)
    return Verdict(
        verdict=judgement.verdict,
        reasons=tuple(ReasonRecord(verdict=each.verdict, text=each.text) for each in judgement.reasons),
        p_value=judgement.p_value,
        significance=section.significance,
        above_threshold=judgement.above_threshold,
        statistic=court.statistic,
        date=now.isoformat(timespec="seconds"),
        command=portable(terms.command),
        victim=victim.name,
        victim_sha256=victim.about.weights_sha256,
        watermark=victim.config.victim.watermark.label,
        key=key,
        suspect=SuspectRecord(
            name=cleaned(source.text),
            kind=source.kind,
            sha256=source.sha256,
            network=source.network,
            outputs=form.outputs,
            order="matched" if match else "assumed" if assumed else "named",
            columns=form.columns,
            preprocessing={
                **taken.preprocessing.resolved(),
                "rows_last": taken.rows_last,
                "channels": taken.channels or data.shape[0],
            },
        ),
        null_models=len(nulls),
        stolen_null_models=len(controls),
        budget=budget,
        report=report,
        victim_report=victim.report,
        statistics=tuple(_lines(report, victim.report, nulls)),
        would_change=tuple(_would_change(victim, evidence, judgement, commitment, form.outputs, section.significance)),
        notes=tuple(_notes(assumed, form.outputs, source, evidence, key)),
    )


def _by_labels(report: ModelReport) -> ModelReport:
    """Leave out statistics of probabilities, which the suspect did not give."""

    def only(answers: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in answers.items() if name in LABEL_STATISTICS}

    return report.model_copy(
        update={
            "statistics": only(report.statistics),
            "null_ranks": only(report.null_ranks),
            "key_ranks": only(report.key_ranks),
            "source_target_probability": None,
            "calibration_error": None,
        }
    )


def _statistic(wanted: str, reports: Sequence[ModelReport]) -> str:
    """Return the statistic that models are ranked by: the config's, or a label-only one if it cannot be computed."""
    by_labels = {"lean": "lean_labels", "log_probability": "paired_labels", "paired": "paired_labels"}
    for name in (wanted, by_labels.get(wanted, "wsr")):
        if all(name in report.statistics for report in reports):
            return name
    return "wsr"


def _lines(report: ModelReport, victim: ModelReport, nulls: Sequence[ModelReport]) -> list[StatisticRecord]:
    lines = []
    for name, value in sorted(report.statistics.items()):
        rank, key = report.null_ranks.get(name), report.key_ranks.get(name)
        if rank is None:
            continue
        lines.append(
            StatisticRecord(
                name=name,
                suspect=value,
                victim=victim.statistics.get(name),
                largest_null=max(null.statistics[name] for null in nulls if name in null.statistics),
                position=rank.at_least + 1,
                total=rank.references + 1,
                key_position=None if key is None else key.at_least + 1,
                key_total=None if key is None else key.references + 1,
            )
        )
    return lines


def _would_change(
    victim: Victim,
    evidence: Evidence,
    judgement: Judgement,
    commitment: Committed | None,
    outputs: Kind,
    significance: float,
) -> list[str]:
    """List what would change the conclusion, the most practicable first."""
    place = victim.folder if victim.folder is not None else "VICTIM"
    reasons = []
    if judgement.verdict == "proved":
        first = evidence.null_models.total
        reasons.append(
            f"One innocent model in {first} that scores as high as the suspect would double the p-value by models; "
            f"train more to be surer: mea-ray nulls {place} --count {2 * first}"
        )
        reasons.append("An older commitment by somebody else to a key that also recognises the suspect.")
        return reasons
    if evidence.committed is False:
        reasons.append(
            f"A commitment that is older than the suspect: mea-ray commit {place} --tsa URL (for the next one)"
            if commitment is None
            else f"A time stamp that is older than the suspect: mea-ray commit {place} --tsa URL"
        )
    needed = int(1 / significance)
    if evidence.p_value > significance and evidence.null_models.at_least == 0 and evidence.null_models.total < needed:
        reasons.append(
            f"More null models, if none of them scores as high as the suspect: mea-ray nulls {place} --count "
            f"{needed - 1}"
        )
    if evidence.stolen_null_models is None or not evidence.stolen_null_models.references:
        reasons.append(
            f"Innocent models that were stolen in the way you claim: mea-ray nulls {place} --stolen 8 --budget IMAGES"
        )
    if evidence.null_models.at_least:
        reasons.append(
            f"{evidence.null_models.at_least} of {evidence.null_models.references} innocent models score at least as "
            "high as the suspect; no number of further models makes such a rank significant."
        )
    if not evidence.key_drawn:
        reasons.append(
            "A victim whose key was drawn at random (victim.watermark.key): its rank among keys is a proof by itself."
        )
    if outputs in {"labels", "top_k"}:
        reasons.append(
            "The suspect's probabilities: labels carry less information, so they need more models for the same "
            "certainty."
        )
    return reasons


def _notes(assumed: bool, outputs: Kind, source: Source, evidence: Evidence, key: KeyRecord | None) -> list[str]:
    notes = []
    if key is not None and key.seed_from == "config":
        notes.append(
            "The key follows from victim.seed, so anyone with the victim's config can rebuild it. That is for "
            "experiments only: train the victim without victim.insecure_key_from_seed."
        )
    if assumed:
        low = evidence.accuracy < evidence.least_accuracy
        hint = "; its accuracy is low, so the order may differ: try --classes match" if low else ""
        notes.append(f"The order of the suspect's classes was assumed to be the victim's{hint}.")
    if outputs == "labels":
        notes.append("The suspect gives only labels, so only statistics of labels count.")
    if outputs == "top_k":
        notes.append("The suspect hides the smaller probabilities, so only statistics of labels count.")
    if source.network == "python":
        notes.append(
            "This system does not allow network namespaces: native code in the file could have used the network."
        )
    return notes


def fitting_budget(records: list[NullRecord], budget: int | None) -> None:
    """Reject a budget with which no null model was stolen.

    Raises:
        ConfigError: There is none; the message lists the available budgets.
    """
    known = budgets(records)
    if budget is not None and budget not in known:
        raise ConfigError(
            f"no null model was stolen with {budget} queries; there are {known or 'none'}; make some with: "
            f"mea-ray nulls VICTIM --stolen 8 --budget {budget}"
        )
