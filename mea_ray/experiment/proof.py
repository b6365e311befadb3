"""The basis for judging a suspect: key, victim and null models, and for some keys the owner's query log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import nn

from mea_ray.attacks.base import Attack
from mea_ray.blackbox.colluding import account_share
from mea_ray.blackbox.policies import to_uint8
from mea_ray.blackbox.query_log import ClientLog
from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ArtifactError
from mea_ray.core.types import Images, Labels
from mea_ray.experiment.answers import served
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport
from mea_ray.watermarks.base import ClientQueries, Key, Watermark


class Assessment(BaseModel):
    """Verification of a victim and of its null models, the same for all trials that share them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    victim: ModelReport
    nulls: list[ModelReport]


@dataclass(frozen=True)
class Proof:
    """The basis for judging suspects.

    Attributes:
        verifier: Verifies with the key; has no key if there is none, or if no answer was marked.
        victim: Verification of the victim, with marked answers if the service marks them.
        nulls: Verification of the null models.
        victim_labels: The victim's classes of the test images, int64 (N,).
    """

    verifier: Verifier
    victim: ModelReport
    nulls: list[ModelReport]
    victim_labels: Labels

    @property
    def key(self) -> Key | None:
        """The key that is verified with."""
        return self.verifier.key

    def judge(self, model: nn.Module, *, stolen_from: Labels | None = None) -> ModelReport:
        """Verify someone else's model.

        Args:
            model: A classifier or an encoder.
            stolen_from: Predicted classes of the test images by the model it was stolen from; None takes the victim's.
        """
        labels = self.victim_labels if stolen_from is None else stolen_from
        return self.verifier.report(self.verifier.classifier(model), victim=labels, nulls=self.nulls)


class Proofs:
    """The owner's proof at each budget.

    A watermark that is verified with the key alone has the same proof at all budgets. DAWN's is verified with the
    images whose answers were marked for the accused clients within the budget, so the victim and the null models are
    queried with these, too. They come from the owner's log, so they survive the thief's process.

    Args:
        verifier: Verifies with the owner's key.
        victim: The victim.
        nulls: Loads the null models.
        seen: Returns the owner's log of each of the thief's accounts, in order.
        assess: Called with a function that makes an ``Assessment``; may return a saved one instead.
    """

    def __init__(
        self,
        verifier: Verifier,
        victim: ImageModel,
        nulls: Callable[[], Sequence[ImageModel]],
        seen: Callable[[], Sequence[ClientLog]],
        assess: Callable[[Callable[[], Assessment]], Assessment] = lambda make: make(),
    ) -> None:
        self._verifier, self._victim = verifier, victim
        self._nulls, self._seen, self._assess = nulls, seen, assess
        self._labels = verifier.predictions(victim)
        self._made: dict[int | None, Proof] = {}

    def at(self, budget: int) -> Proof:
        """Return the proof against a thief with one of the config's budgets.

        Raises:
            ArtifactError: The log of marked answers is lost.
        """
        by_log = needs_log(self._verifier.config)
        place = budget if by_log else None
        if place not in self._made:
            self._made[place] = self._against(budget) if by_log else self._by_key()
        return self._made[place]

    def _by_key(self) -> Proof:
        assessment = self._assess(lambda: self._assessment(self._verifier, served(self._victim, self._verifier.key)))
        return Proof(self._verifier, assessment.victim, assessment.nulls, self._labels)

    def _against(self, budget: int) -> Proof:
        key = self._verifier.key
        verifier = self._verifier.with_key(
            None if key is None else accusing(self._verifier.config, key, self._seen(), budget)
        )
        assessment = self._assessment(verifier, served(self._victim, key))
        return Proof(verifier, assessment.victim, assessment.nulls, self._labels)

    def _assessment(self, verifier: Verifier, victim: nn.Module) -> Assessment:
        nulls = [verifier.report(null, victim=self._labels) for null in self._nulls()]
        return Assessment(victim=verifier.report(victim, nulls=nulls), nulls=nulls)


def marks_answers(config: ExperimentConfig) -> bool:
    """Return whether the watermark is in the service's answers instead of the model."""
    watermark: Watermark = config.victim.watermark.build()
    return watermark.marks_answers


def needs_log(config: ExperimentConfig) -> bool:
    """Return whether a suspect is verified with the accused client's queries."""
    watermark: Watermark = config.victim.watermark.build()
    return watermark.needs_log


def accusing(config: ExperimentConfig, key: Key, seen: Sequence[ClientLog], budget: int) -> Key | None:
    """Return the key that accuses the thief's accounts together, with the queries of each within ``budget``.

    Args:
        config: The experiment.
        key: The owner's key.
        seen: The log of each account, in order.
        budget: One of the config's budgets.

    Returns:
        The key; None if no answer was marked.

    Raises:
        ArtifactError: The log is lost.
    """
    if any(each.lost for each in seen):
        raise ArtifactError(
            "the owner's log with the marked answers cannot be read, so no client can be accused; run the trial in a "
            "folder of its own, on a disk that can be written"
        )
    attack: Attack = config.thief.attack.build()
    asked = attack.query_cost(tuple(each for each in config.thief.budgets if each <= budget))
    marked: dict[bytes, tuple[Images, int]] = {}
    others: dict[bytes, tuple[Images, int]] = {}
    for index, each in enumerate(seen):
        by_then = each.marks.positions < account_share(index, len(seen), asked)
        for image, label in zip(each.marks.images[by_then], each.marks.labels[by_then], strict=True):
            marked.setdefault(image.tobytes(), (image, int(label)))
        hidden = {image.tobytes() for image in each.marks.images}
        for images, labels in each.sample:
            for image, label in zip(to_uint8(images), labels, strict=True):
                if (content := image.tobytes()) not in hidden:
                    others.setdefault(content, (image, int(label)))
    shape = (0, *key.settings["shape"]) if "shape" in key.settings else (0, 0, 0, 0)

    def gathered(by_digest: Mapping[bytes, tuple[Images, int]]) -> tuple[Images, Labels]:
        images = np.stack([image for image, _ in by_digest.values()]) if by_digest else np.zeros(shape, np.uint8)
        return images, np.array([label for _, label in by_digest.values()], np.int64)

    watermark: Watermark = config.victim.watermark.build()
    return watermark.against(key, ClientQueries(*gathered(marked), *gathered(others)))
