"""The schema of a finished trial: one JSON file, the source of every table, curve and report."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json, to_json

from mea_ray.core.errors import ArtifactError
from mea_ray.results.points import sort_key
from mea_ray.results.upgrade import upgraded
from mea_ray.storage.files import patiently, write_whole

SCHEMA_VERSION: Literal[2] = 2
CHECKSUM = "sha256"
"""Key of a result file's checksum, which covers the rest of the file."""
RESULTS = "results"
"""Folder of the result files, inside a sweep's folder."""

_ROUNDING = 1e-6
"""Tolerance by which a mean of float32 numbers in [0, 1] can exceed these bounds."""
Fraction = Annotated[float, Field(ge=-_ROUNDING, le=1 + _ROUNDING)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


RecordT = TypeVar("RecordT", bound=BaseModel)


def read_record(kind: type[RecordT], path: Path) -> RecordT | None:
    """Read a record; None if it is missing or damaged."""
    try:
        return kind.model_validate_json(patiently(path.read_bytes, path))
    except (OSError, ValidationError):
        return None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="strings")


class SuccessRate(_Record):
    """A number of successes in a number of trials, with a 95% interval of the rate.

    Wilson's interval, or for a WSR on mixes a bootstrap over the source images, since mixes that share an image are not
    independent.
    """

    successes: Count
    trials: Count
    rate: Fraction
    low: Fraction
    high: Fraction

    @model_validator(mode="after")
    def _successes_are_trials(self) -> SuccessRate:
        if self.successes > self.trials:
            raise ValueError(f"{self.successes} successes in {self.trials} trials")
        return self


class RankRecord(_Record):
    """The rank of a statistic among those of reference models, or of other keys.

    Attributes:
        at_least: Number of references whose statistic is at least as large.
        references: Number of references.
    """

    at_least: Count
    references: Count

    @property
    def p_value(self) -> float:
        """The rank's p-value."""
        return (1 + self.at_least) / (1 + self.references)


class ModelReport(_Record):
    """Verification of one model: a victim, a null model or a substitute.

    Attributes:
        accuracy: Accuracy on the test set.
        knn_accuracy: For encoders only: accuracy of k-nearest-neighbour classification. ``accuracy`` is that of the
            probe.
        fidelity: Agreement with the victim on the test set; None for the victim itself.
        wsr: Watermark success rate; None without a key.
        wsr_unfiltered: The same on unfiltered samples; None unless ``wsr`` is measured on chosen ones.
        wfpr: False-positive rate for each geometry other than the key's.
        wfpr_mean: Mean of ``wfpr``.
        wfpr_classes: False-positive rate on classes that are not in the key, mixed in the key's geometry; None for a
            scheme that mixes no classes.
        statistics: Statistics that distinguish stolen from innocent models, by name (see ``verification.statistic``).
        null_ranks: Rank of each statistic among the null models; empty for null models.
        key_ranks: Rank of the key by each statistic among all admissible keys, on this model.
        specificity: p-value of a test that the key's mixes score above comparison samples, by the names in ``wfpr`` and
            ``other_classes``.
        p_value: p-value of the rank of ``verification.statistic`` among the null models; None for null models.
        p_value_chance: Exact binomial test against chance, for schemes whose paper uses it; None for others.
        infringes_threshold: Whether ``wsr`` is above ``verification.threshold``.
        source_accuracy: Accuracy on held-out clean samples of the source classes, by class name.
        source_target_probability: Mean probability of the target class on these samples.
        calibration_error: Expected calibration error (15 bins) on these samples; for a scheme without source classes,
            on all test images.
    """

    accuracy: Fraction
    knn_accuracy: Fraction | None = None
    fidelity: Fraction | None = None
    wsr: SuccessRate | None = None
    wsr_unfiltered: SuccessRate | None = None
    wfpr: dict[str, SuccessRate] = Field(default_factory=dict)
    wfpr_mean: Fraction | None = None
    wfpr_classes: SuccessRate | None = None
    statistics: dict[str, float] = Field(default_factory=dict)
    null_ranks: dict[str, RankRecord] = Field(default_factory=dict)
    key_ranks: dict[str, RankRecord] = Field(default_factory=dict)
    specificity: dict[str, Fraction] = Field(default_factory=dict)
    p_value: Fraction | None = None
    p_value_chance: Fraction | None = None
    infringes_threshold: bool | None = None
    source_accuracy: dict[str, Fraction] = Field(default_factory=dict)
    source_target_probability: Fraction | None = None
    calibration_error: Fraction | None = None


class FilterRecord(_Record):
    """How the samples of a key were chosen, see ``verification.filter``; summed over several keys.

    Attributes:
        candidates: Number of candidate samples.
        passed: Number of samples known to the victim and the shadow thieves and to no null model.
        chosen: Number of samples in the key: those that passed and, if these were too few, the closest others.
        thieves: Number of shadow thieves that chose.
        null_models: Number of null models that chose; none of them is a control.
    """

    candidates: Count
    passed: Count
    chosen: Count
    thieves: Count
    null_models: Count


class KeyRecord(_Record):
    """The public record of the key with which a victim was verified.

    Attributes:
        fingerprint: Start of the SHA-256 of the key, 16 hexadecimal digits.
        classes: Where its classes come from: ``chosen`` by hand, or drawn from ``system``, ``beacon`` or ``seed``;
            empty for a scheme whose key has no pair of classes.
        seed_from: Where the key's seed comes from: ``system``, or ``config`` (insecure: anyone with the config can
            rebuild the key; the case in older results).
        admissible: Number of keys that could have been drawn; None if it was not drawn.
        beacon: Value of the public beacon from which it was drawn; empty without one.
        commitment: Hash of the commitment to it; empty without one.
        committed_at: When a time-stamp authority signed the commitment, ISO 8601 in UTC; None without a time stamp.
        authority: Name of the authority.
        filter: How its samples were chosen; None if all are used.
    """

    fingerprint: str
    classes: str = ""
    seed_from: Literal["config", "system"] = "config"
    admissible: Count | None = None
    beacon: str = ""
    commitment: str = ""
    committed_at: str | None = None
    authority: str = ""
    filter: FilterRecord | None = None


class RungResult(_Record):
    """One point of the robustness curve: a substitute trained on ``queries`` answers.

    Attributes:
        budget: The query budget of this point, in images.
        queries: Number of images answered and charged.
        report: Verification of the substitute.
        epochs: Training epochs of the substitute.
        seconds: Wall time of its training, in seconds.
        curves: What the attack logged about itself: ``{name: [(queries so far, value), ...]}``.
        weights_sha256: SHA-256 of the substitute's weights; None in older results.
    """

    budget: Count
    queries: Count
    report: ModelReport
    epochs: Count
    seconds: Seconds
    curves: dict[str, list[tuple[int, float]]] = Field(default_factory=dict)
    weights_sha256: str | None = None


class RemovalResult(_Record):
    """One attempt to remove the watermark from one model.

    Attributes:
        removal: Its name and parameters, as in the config.
        strength: Its main parameter, in that parameter's unit.
        tried_on: The model to which it was applied.
        before: Verification of that model.
        after: Verification of the model after the removal.
        seconds: Wall time.
    """

    removal: dict[str, Any]
    strength: float
    tried_on: Literal["substitute", "victim", "null_model"]
    before: ModelReport
    after: ModelReport
    seconds: Seconds


class ReversedTrigger(_Record):
    """A trigger that a detection reverse-engineered.

    Attributes:
        label: Name of the class that the inspected model predicts for triggered images.
        norm: L1 norm of its mask, in pixels.
        success: Fraction of the images it was optimised on that the inspected model assigns to ``label``.
        on_substitute: Held-out images of other classes that the stolen model assigns to ``label``.
        picture: Mask times pattern, a PNG file in base64; empty if the picture was not stored.
    """

    label: str
    norm: float
    success: Fraction
    on_substitute: SuccessRate
    picture: str


class DetectionResult(_Record):
    """One attempt to find the watermark.

    Attributes:
        detection: Its name and parameters, as in the config.
        tried_on: The model that was inspected.
        flagged: Names of the classes that it flags.
        target: Name of the class that it should flag; None if the model has no target class.
        numbers: Its measurements, by name.
        triggers: The triggers that it reverse-engineered.
        seconds: Wall time.
    """

    detection: dict[str, Any]
    tried_on: Literal["substitute", "victim", "null_model"]
    flagged: list[str] = Field(default_factory=list)
    target: str | None = None
    numbers: dict[str, float] = Field(default_factory=dict)
    triggers: list[ReversedTrigger] = Field(default_factory=list)
    seconds: Seconds


class NamedKeyRecord(_Record):
    """The key that an outsider would infer from soft answers (see ``detection.leaning``).

    Attributes:
        sources: Names of its source classes.
        target: Name of its target.
        score: Mean probability of the target over the answers to the sources.
        next_score: The largest score of any other key; None if there is no other.
        true_score: Score of the owner's key; None if one of its sources never occurs in the answers, or it has no
            sources.
        true_rank: Rank of the owner's key among all keys by this score; None for a key without sources.
    """

    sources: list[str]
    target: str
    score: Fraction
    next_score: Fraction | None = None
    true_score: Fraction | None = None
    true_rank: RankRecord | None = None


class FoundSignalRecord(_Record):
    """The smooth signal that an outsider would find in soft answers (see ``detection.signal_search``).

    Attributes:
        explained: Part of the variance of the log-probabilities off the top class that it explains in answers that it
            was not fitted on; at most 1, below 0 if it predicts worse than the mean.
        true_rank: Rank of the owner's key among drawn ones by how well each predicts the signal found.
    """

    explained: float
    true_rank: RankRecord


class LeaningRecord(_Record):
    """What a number of the service's answers give away to an outsider.

    Attributes:
        answers: Number of answers.
        victim: The key inferred from the victim's answers; None if that is impossible, e.g. because they are labels.
        nulls: The same from each null model's answers to the same images, with the same policy: the control.
        signal: The smooth signal found in the victim's answers, if the mark is one; only for the most answers.
        signal_nulls: The same in each null model's answers.
    """

    answers: Count
    victim: NamedKeyRecord | None = None
    nulls: list[NamedKeyRecord | None] = Field(default_factory=list)
    signal: FoundSignalRecord | None = None
    signal_nulls: list[FoundSignalRecord | None] = Field(default_factory=list)


class QueryLogRecord(_Record):
    """The service's log of one client (see ``blackbox.query_log``).

    Attributes:
        requests: Requests answered. A repeated request counts once.
        images: Images answered.
        classes: Number of answers per predicted class.
        sampled: Number of the client's first images used for the distance statistic.
        distances: Number of minimal L2 distances to earlier images of the same predicted class (PRADA).
        distance_counts: Histogram of these distances without outliers, in equal bins over ``distance_range``.
        distance_range: Smallest and largest of these distances; None without any.
        shapiro_w: Shapiro-Wilk statistic of their normality; None for too few distances, or if all are equal.
        alarm: Whether ``shapiro_w`` is below ``alarm_below``.
        alarm_below: The owner's threshold.
        marked: Number of images whose answer was watermarked by the service (``dawn``).
        flagged: Number of images flagged as abnormal by the service (answer policy ``lof``).
    """

    requests: Count
    images: Count
    classes: list[int]
    sampled: Count = 0
    distances: Count = 0
    distance_counts: list[int] = Field(default_factory=list)
    distance_range: tuple[float, float] | None = None
    shapiro_w: float | None = None
    alarm: bool | None = None
    alarm_below: float = 0.9
    marked: Count = 0
    flagged: Count = 0


class SelectionRecord(_Record):
    """How the settings of a sweep were chosen (``sweep.select``).

    Attributes:
        metric: The metric of the last rung.
        mode: Whether the metric was maximised or minimised.
        constraints: ``{metric: largest value allowed}``.
        data: Images on which it was measured.
        seeds: Development seeds.
        sweep: The sweep that chose; empty if this trial belongs to it.
    """

    metric: str
    mode: Literal["max", "min"] = "max"
    constraints: dict[str, float] = Field(default_factory=dict)
    data: Literal["validation"] = "validation"
    seeds: list[int]
    sweep: str = ""


class TrialResult(_Record):
    """A finished trial.

    Attributes:
        schema_version: Version of this schema.
        trial: Name of the trial. It is also the name of the file.
        point: The config paths that the sweep set, and their values.
        config: The resolved config.
        victim: Name of the victim artifact.
        nulls: Names of the null models' artifacts.
        victim_report: Verification of the victim.
        null_reports: Verification of the null models.
        rungs: The robustness curve, one entry per budget.
        stolen_nulls: Null models stolen in the same way with each budget: the control of the theft.
        removals: Results of removals on the substitute of the largest budget, and on other models.
        detections: Results of detections.
        leaning: The key that an outsider would infer from 30, 100 and 1,000 answers; empty for encoders, whose answers
            are not probabilities, and in older results.
        status: ``stopped`` if the sweep's scheduler ended the trial early.
        selection: How the settings were chosen; None if not recorded.
        chance: Accuracy of always predicting the most frequent class of the test set; None in older results.
        statistic: Statistic by which models and keys are ranked (see ``verification.statistic``); None in older
            results, where it is in the config.
        key_drawn: Whether the key was drawn at random from all admissible keys. The ranks of a key that was chosen by
            hand do not give p-values.
        key: Fingerprint, draw and commitment of the key; None without a watermark, and in older results.
        victim_sha256: SHA-256 of the victim's weights; None in older results.
        date: Day and time (UTC) at which the result was made, ISO 8601; empty in older results.
        queries_charged: Images charged for this trial by the service's ledger, over all accounts of its thief.
        answers_stored: Number of answers in the thief's transfer set; None in older results. If it differs from the
            charges, the trial is void.
        query_log: The service's log, by account of the thief.
        seconds: Wall time of the trial, in seconds.
        device: Name of the GPU, or ``cpu``.
        versions: Versions of Python and of the packages that the result depends on; ``commit`` of a git checkout.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    trial: str = Field(min_length=1)
    point: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any]
    victim: str
    nulls: list[str] = Field(default_factory=list)
    victim_report: ModelReport
    null_reports: list[ModelReport] = Field(default_factory=list)
    rungs: list[RungResult]
    stolen_nulls: list[RungResult] = Field(default_factory=list)
    removals: list[RemovalResult] = Field(default_factory=list)
    detections: list[DetectionResult] = Field(default_factory=list)
    leaning: list[LeaningRecord] = Field(default_factory=list)
    status: Literal["finished", "stopped"] = "finished"
    selection: SelectionRecord | None = None
    chance: Fraction | None = None
    statistic: str | None = None
    key_drawn: bool = False
    key: KeyRecord | None = None
    victim_sha256: str | None = None
    date: str = ""
    queries_charged: Count
    answers_stored: Count | None = None
    query_log: dict[str, QueryLogRecord] = Field(default_factory=dict)
    seconds: Seconds
    device: str
    versions: dict[str, str]

    @property
    def unaccounted(self) -> tuple[int, int] | None:
        """Numbers of images charged and answers stored, if they differ: then the trial is void."""
        stored = self.answers_stored
        return None if stored in {None, self.queries_charged} else (self.queries_charged, stored or 0)

    def save(self, path: Path) -> None:
        """Write the file with its checksum atomically."""
        tree = json.loads(self.model_dump_json())
        write_whole(path, json.dumps({**tree, CHECKSUM: _checksum(tree)}, indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: Path) -> TrialResult:
        """Read and check a result.

        Args:
            path: The file; it must be named after the trial.

        Raises:
            ArtifactError: The file is missing, damaged or changed, has another schema version, holds a number out of
                range, or is a copy of another trial's result.
        """
        remedy = "delete it and run the sweep again with --resume"
        try:
            content, changed = _checked(patiently(path.read_bytes, path))
            result = cls.model_validate_json(upgraded(content))
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{path} is not a readable trial result ({_first_problem(error)}); {remedy}") from error
        if result.trial != path.stem:
            raise ArtifactError(f"{path} holds the result of another trial, {result.trial!r}; {remedy}")
        if changed:
            raise ArtifactError(f"{path} was changed after it was written: its checksum differs; {remedy}")
        return result


def _checked(content: bytes) -> tuple[bytes, bool]:
    """Return a file's content without its checksum, and whether that differs; records and older results have none."""
    try:
        tree = from_json(content)  # three times as fast as json.loads
        checksum = tree.pop(CHECKSUM)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return content, False  # the schema check reports the problem
    return to_json(tree, inf_nan_mode="constants"), checksum != _checksum(tree)


def _checksum(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _first_problem(error: OSError | ValidationError) -> str:
    """Return what is wrong with a file, in one line."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if where == "schema_version":
        return f"schema version {first['input']!r}, this version of mea_ray reads {SCHEMA_VERSION}"
    return f"{where}: {first['msg']}" if where else first["msg"]


def read_results(folder: Path) -> list[TrialResult]:
    """Read every trial result of a sweep.

    Args:
        folder: The sweep's folder, which contains ``results/*.json``, or its ``results`` folder.

    Returns:
        The trials, ordered by what the sweep set.

    Raises:
        ArtifactError: The folder cannot be read or holds no result, or a result is not usable (see
            ``TrialResult.load``).
    """
    hint = "give the folder that `mea-ray sweep` printed"
    if not folder.exists():
        raise ArtifactError(f"{folder} does not exist; {hint}")
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file, not the folder of a sweep; {hint}")
    inside = folder / RESULTS
    try:
        paths = sorted(path for path in (inside if inside.is_dir() else folder).iterdir() if path.match("[!.]*.json"))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read ({error.strerror}); {hint}") from error
    if not paths:
        raise ArtifactError(f"there are no trial results ({RESULTS}/*.json) in {folder}; {hint}")
    with _no_collection():
        results = [TrialResult.load(path) for path in paths]
    _refuse_copies(results, inside if inside.is_dir() else folder)
    return sorted(results, key=lambda result: (sort_key(result.point), result.trial))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the garbage collector: it would repeatedly scan the results, none of which are garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _refuse_copies(results: Sequence[TrialResult], folder: Path) -> None:
    """Reject a copy of a result under another trial's name: it would count twice."""
    alike: dict[tuple[object, ...], list[TrialResult]] = {}
    for result in (each for each in results if each.date):  # every real result has one
        known = (result.date, result.seconds, result.victim_report.accuracy, result.victim_report.fidelity)
        alike.setdefault(known, []).append(result)
    seen: dict[str, str] = {}
    for result in (each for some in alike.values() if len(some) > 1 for each in some):
        first = seen.setdefault(result.model_dump_json(exclude={"trial"}), result.trial)
        if first != result.trial:
            raise ArtifactError(
                f"{folder / result.trial}.json is a copy of {first}.json under another name; delete it and run the "
                "sweep again with --resume"
            )
