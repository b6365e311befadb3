"""What the owner can say of a model, and what he needs for it: the key, the null models, and for some keys the log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mea_ray.attacks.base import Attack
from mea_ray.blackbox.colluding import account_share
from mea_ray.blackbox.policies import to_uint8
from mea_ray.blackbox.query_log import ClientLog
from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ArtifactError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Images, Labels
from mea_ray.evaluation import metrics, probes
from mea_ray.experiment.checks import Prepared
from mea_ray.experiment.reading import as_classifier, labelled
from mea_ray.experiment.serving import Served, marker_of
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport
from mea_ray.verification import proportions, verify
from mea_ray.watermarks.base import Asked, Key, Watermark


@dataclass(frozen=True)
class Proof:
    """What a suspect is held against.

    Attributes:
        key: The key that is verified with; None if there is none, or if no answer was marked.
        victim: What verification says of the victim: as it is served, if the service marks its answers.
        nulls: What it says of the null models.
    """

    key: Key | None
    victim: ModelReport
    nulls: list[ModelReport]

    @property
    def null_rate(self) -> float | None:
        """See `null_rate`."""
        return null_rate(self.nulls)


class Proofs:
    """The owner's proof at each rung of the budget.

    Of a watermark that is in the model it is the same at all of them. One that is in the answers is verified with the
    images whose answers were marked for the accused clients, as far as they had asked by then, so that the victim and
    the null models have to be asked about these, too. The owner's log has them, whatever became of the thief's process.

    Args:
        config: The experiment.
        prepared: Its data.
        key: The owner's key.
        model: The victim.
        nulls: Gives the null models.
        seen: Gives what the owner's log holds of each of the thief's clients, in the order of the accounts.
        same: The proof of a watermark in the model, if it was made before.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        prepared: Prepared,
        key: Key | None,
        model: ImageModel,
        nulls: Callable[[], Sequence[ImageModel]],
        seen: Callable[[], Sequence[ClientLog]],
        same: Proof | None = None,
    ) -> None:
        self._config, self._prepared, self._key, self._model = config, prepared, key, model
        self._nulls, self._seen, self._same = nulls, seen, same
        self._at: dict[int, Proof] = {}

    def at(self, budget: int) -> Proof:
        """Return the proof against a thief who asked within one of the config's budgets.

        Raises:
            ArtifactError: The log of marked answers is lost.
        """
        if not marks_answers(self._config):
            if self._same is None:
                self._same = prove(self._config, self._prepared, self._key, self._model, self._nulls())
            return self._same
        if budget not in self._at:
            key = None if self._key is None else accusing(self._config, self._key, self._seen(), budget)
            self._at[budget] = prove(self._config, self._prepared, key, self._model, self._nulls(), self._key)
        return self._at[budget]


def marks_answers(config: ExperimentConfig) -> bool:
    """Return whether the watermark is in the answers of the service, and not in the model."""
    watermark: Watermark = config.victim.watermark.build()
    return watermark.marks_answers


def prove(
    config: ExperimentConfig,
    prepared: Prepared,
    key: Key | None,
    model: ImageModel,
    nulls: Sequence[ImageModel],
    marked_by: Key | None = None,
) -> Proof:
    """Verify a victim and its null models.

    Args:
        config: The experiment.
        prepared: Its data.
        key: The key to verify with.
        model: The victim.
        nulls: The null models.
        marked_by: The key that the service marks its answers by; the victim is then judged by its answers.
    """
    reports = [assess(config, prepared, null, key, victim=model) for null in nulls]
    marker = marker_of(marked_by)
    served = model if marker is None else Served(model, marker)
    return Proof(key, assess(config, prepared, served, key, null_rate=null_rate(reports)), reports)


def accusing(config: ExperimentConfig, key: Key, seen: Sequence[ClientLog], budget: int) -> Key | None:
    """Return the key that accuses the thief's clients together, with what each had asked within ``budget`` by then.

    Args:
        config: The experiment.
        key: The owner's key.
        seen: What the log holds of each client, in the order of the accounts.
        budget: One of the config's budgets.

    Returns:
        The key; None if no answer was marked.

    Raises:
        ArtifactError: The log is lost.
    """
    if any(each.lost for each in seen):
        raise ArtifactError(
            "the owner's log with the marked answers cannot be read, so that nobody can be accused; run the trial in a "
            "folder of its own, whose disk can be written"
        )
    attack: Attack = config.thief.attack.build()
    asked = attack.query_cost(tuple(each for each in config.thief.budgets if each <= budget))
    marked: dict[bytes, tuple[Images, int]] = {}
    others: dict[bytes, tuple[Images, int]] = {}
    for index, each in enumerate(seen):
        by_then = each.marks.positions < account_share(index, len(seen), asked)
        for image, told in zip(each.marks.images[by_then], each.marks.labels[by_then], strict=True):
            marked.setdefault(image.tobytes(), (image, int(told)))
        hidden = {image.tobytes() for image in each.marks.images}
        for images, classes in each.sample:
            for image, told in zip(to_uint8(images), classes, strict=True):
                if (content := image.tobytes()) not in hidden:
                    others.setdefault(content, (image, int(told)))
    shape = (0, *key.settings["shape"]) if "shape" in key.settings else (0, 0, 0, 0)

    def gathered(found: Mapping[bytes, tuple[Images, int]]) -> tuple[Images, Labels]:
        images = np.stack([image for image, _ in found.values()]) if found else np.zeros(shape, np.uint8)
        return images, np.array([told for _, told in found.values()], np.int64)

    watermark: Watermark = config.victim.watermark.build()
    return watermark.against(key, Asked(*gathered(marked), *gathered(others)))


def assess(
    config: ExperimentConfig,
    prepared: Prepared,
    model: torch.nn.Module,
    key: Key | None,
    *,
    victim: torch.nn.Module | Labels | None = None,
    null_rate: float | None = None,
) -> ModelReport:
    """Verify one model on held-out data only.

    Args:
        config: The experiment.
        prepared: Its data.
        model: The model under judgement.
        key: The owner's key; None leaves out all that needs one.
        victim: The victim, or its predictions on the test images, for the fidelity.
        null_rate: See ``null_rate``; None for the victim's null models themselves.
    """
    voted = None
    model = as_classifier(config, prepared, model)
    if config.encodes:
        assert isinstance(model, ImageModel)
        voted = probes.knn_accuracy(model, labelled(config, prepared), prepared.splits.test)
    samples = recognise = chance = None
    if key is not None:
        watermark: Watermark = config.victim.watermark.build()
        chance = watermark.chance(key)
        seed = derive(config.seed, "verification")
        samples = watermark.samples(key, prepared.splits.verification, config.verification.samples, seed)
        recognise = watermark.recogniser(key, model)
    if isinstance(victim, torch.nn.Module):
        victim = predictions(config, prepared, victim)
    return verify.report(
        partial(metrics.logits, model),
        prepared.splits.test,
        samples=samples,
        victim=victim,
        null_rate=null_rate,
        threshold=config.verification.threshold,
        significance=config.verification.significance,
        knn_accuracy=voted,
        recognise=recognise,
        chance=chance,
    )


def predictions(config: ExperimentConfig, prepared: Prepared, model: torch.nn.Module) -> Labels:
    """Return the classes that a model gives the test images, int64 (N,): what fidelity is measured against."""
    return metrics.predictions(as_classifier(config, prepared, model), prepared.splits.test.images)


def null_rate(reports: list[ModelReport]) -> float | None:
    """Return the rate to hold against a suspect, from the null models' reports; None if they have no WSR."""
    rates = [report.wsr for report in reports if report.wsr is not None]
    return proportions.null_rate(rates) if rates else None
