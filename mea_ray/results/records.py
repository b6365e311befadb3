"""The schema of a finished trial: one JSON file, from which every table, curve and report is rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mea_ray.core.errors import ArtifactError
from mea_ray.storage.files import patiently, write_whole

SCHEMA_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Rate(_Record):
    """A success count with its Wilson interval (95 %)."""

    successes: int
    trials: int
    rate: float
    low: float
    high: float


class ModelReport(_Record):
    """What verification says of one model (victim, null model or substitute).

    Attributes:
        accuracy: On the test set, in [0, 1].
        knn_accuracy: Of an encoder: of a vote of the nearest labelled images; ``accuracy`` is its reading's.
        fidelity: Agreement with the victim on the test set; None for the victim itself.
        wsr: Watermark success rate; None without a key.
        wfpr: False positives per other geometry.
        wfpr_mean: Mean of ``wfpr`` over the geometries.
        wfpr_classes: False positives of the watermark's own mixes, of classes that the key does not name; None for a
            scheme that mixes no classes.
        p_value: Exact binomial, against the null models' rate; None for null models.
        p_value_chance: The same against chance, for a scheme whose paper tests so; None for others.
        infringes_threshold: ``wsr`` is above the paper's threshold.
        infringes_significance: ``p_value`` is at or below the chosen significance.
        source_accuracy: Accuracy on held-out clean samples of the source classes, per class name.
        source_target_probability: Mean probability of the target class there.
        calibration_error: Expected calibration error (15 bins) on the held-out source samples.
    """

    accuracy: float
    knn_accuracy: float | None = None
    fidelity: float | None = None
    wsr: Rate | None = None
    wfpr: dict[str, Rate] = Field(default_factory=dict)
    wfpr_mean: float | None = None
    wfpr_classes: Rate | None = None
    p_value: float | None = None
    p_value_chance: float | None = None
    infringes_threshold: bool | None = None
    infringes_significance: bool | None = None
    source_accuracy: dict[str, float] = Field(default_factory=dict)
    source_target_probability: float | None = None
    calibration_error: float | None = None


class RungResult(_Record):
    """One point of the robustness curve: a fresh substitute trained on ``queries`` answers."""

    budget: int
    queries: int
    report: ModelReport
    epochs: int
    seconds: float
    curves: dict[str, list[tuple[int, float]]] = Field(
        default_factory=dict, description="What the attack logged of itself: (queries so far, value) per name."
    )


class RemovalResult(_Record):
    """An attempt to remove the watermark from one model.

    Attributes:
        removal: Its name and parameters, as in the config.
        strength: How hard it tried, in the unit of its main parameter.
        tried_on: The model that it was tried on.
        before: What verification says of that model.
        after: What it says of what is left.
        seconds: Wall time of the removal.
    """

    removal: dict[str, Any]
    strength: float
    tried_on: Literal["substitute", "victim", "null_model"]
    before: ModelReport
    after: ModelReport
    seconds: float


class ReversedTrigger(_Record):
    """A trigger that a detection reverse-engineered.

    Attributes:
        label: Name of the class that it makes the inspected model answer with.
        norm: L1 norm of its mask, in pixels.
        success: Part of the images that it was made on that it turns, in the inspected model.
        on_substitute: Held-out images of other classes that it turns in the stolen model.
        picture: Mask times pattern, a PNG file in base64.
    """

    label: str
    norm: float
    success: float
    on_substitute: Rate
    picture: str


class DetectionResult(_Record):
    """An attempt to find the watermark.

    Attributes:
        detection: Its name and parameters, as in the config.
        tried_on: The model that was inspected.
        flagged: Names of the classes that it flags.
        target: Name of the class that it should have flagged; None without one.
        numbers: What it measured, by name.
        triggers: What it reverse-engineered.
        seconds: Wall time.
    """

    detection: dict[str, Any]
    tried_on: Literal["substitute", "victim", "null_model"]
    flagged: list[str] = Field(default_factory=list)
    target: str | None = None
    numbers: dict[str, float] = Field(default_factory=dict)
    triggers: list[ReversedTrigger] = Field(default_factory=list)
    seconds: float


class QueryLogRecord(_Record):
    """What the owner could have seen of one client (``blackbox.query_log``).

    Attributes:
        requests: Requests answered; one that was asked again after a failure counts once.
        images: Images answered.
        classes: Answers per predicted class.
        sampled: First images of the client, whose distances were looked at.
        distances: Number of minimal L2 distances to earlier images of the same predicted class (PRADA).
        distance_counts: Their histogram without outliers, in equal bins over ``distance_range``.
        distance_range: Least and largest of these distances; None without any.
        shapiro_w: Shapiro-Wilk statistic of their normality; None for too few, or if all are equal.
        alarm: ``shapiro_w`` is below ``alarm_below``.
        alarm_below: The owner's threshold.
        marked: Images whose answer the service marked (a watermark of answers, such as ``dawn``).
        flagged: Images that the service took for abnormal (the answer policy ``lof``).
    """

    requests: int
    images: int
    classes: list[int]
    sampled: int = 0
    distances: int = 0
    distance_counts: list[int] = Field(default_factory=list)
    distance_range: tuple[float, float] | None = None
    shapiro_w: float | None = None
    alarm: bool | None = None
    alarm_below: float = 0.9
    marked: int = 0
    flagged: int = 0


class TrialResult(_Record):
    """A finished trial."""

    schema_version: int = SCHEMA_VERSION
    trial: str
    point: dict[str, Any] = Field(
        default_factory=dict, description="Config paths that the sweep set, and their values."
    )
    config: dict[str, Any]
    victim: str = Field(description="Name (hash) of the victim artifact.")
    nulls: list[str] = Field(default_factory=list, description="Names of the null models' artifacts.")
    victim_report: ModelReport
    null_reports: list[ModelReport] = Field(default_factory=list)
    rungs: list[RungResult]
    stolen_nulls: list[RungResult] = Field(
        default_factory=list,
        description="Innocent models stolen in the same way at the largest budget: the control of the theft.",
    )
    removals: list[RemovalResult] = Field(
        default_factory=list, description="What removals left of the substitute of the largest budget, and of others."
    )
    detections: list[DetectionResult] = Field(default_factory=list, description="What detections found in which model.")
    status: Literal["finished", "stopped"] = Field("finished", description="stopped: by the sweep's scheduler.")
    queries_charged: int = Field(
        description="Images charged by the service's ledger for this trial in all, over all accounts of its thief."
    )
    query_log: dict[str, QueryLogRecord] = Field(
        default_factory=dict, description="What the owner could have seen, by client (account) of this trial's thief."
    )
    seconds: float
    device: str
    versions: dict[str, str]

    def save(self, path: Path) -> None:
        """Write aside, then rename: a reader never sees half a result."""
        write_whole(path, self.model_dump_json(indent=1))

    @classmethod
    def load(cls, path: Path) -> TrialResult:
        """Read and check a result.

        Raises:
            ArtifactError: The file is missing, damaged, or of another schema.
        """
        try:
            return cls.model_validate_json(patiently(path.read_bytes, path))
        except (OSError, ValidationError) as error:
            raise ArtifactError(
                f"{path} is no readable trial result: {error}; delete it and run with --resume"
            ) from error
