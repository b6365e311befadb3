"""What the owner's API gives away: the key that an outsider would infer from a few of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Answers, Splits
from mea_ray.detection.leaning import name_key
from mea_ray.experiment.answers import pass_images, service_policy
from mea_ray.models.base import ImageModel
from mea_ray.results.records import LeaningRecord, NamedKeyRecord, RankRecord
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.several_keys import SeveralKeys

ANSWERS = (30, 100, 1000)
"""Numbers of answers that an outsider has."""


class Leanings(BaseModel):
    """Results shared by all trials with the same victim, null models, service and seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    records: list[LeaningRecord]


@dataclass(frozen=True)
class Outsider:
    """Someone who knows the scheme and a few answers, and infers a key.

    The answers are to images of the thief's pool, drawn at random. The models are queried in this process, through the
    answer policy of the service, so no account is charged.

    Attributes:
        config: The experiment.
        data: Its data.
        key: The owner's key; None without a watermark.
    """

    config: ExperimentConfig
    data: Splits
    key: Key | None

    def look(self, victim: ImageModel, nulls: Sequence[ImageModel]) -> list[LeaningRecord]:
        """Return the keys inferred from the answers of the victim and of each null model, one record per count."""
        marked = self._answers(victim, self.key)
        innocent = [self._answers(null, None) for null in nulls]
        counts = sorted({min(count, len(marked)) for count in ANSWERS})
        return [
            LeaningRecord(
                answers=count,
                victim=self._name(marked[:count]),
                nulls=[self._name(answers[:count]) for answers in innocent],
            )
            for count in counts
        ]

    def _answers(self, model: ImageModel, key: Key | None) -> Answers:
        pool = self.data.thief_pool.images
        order = numpy_generator(derive(self.config.seed, "outsider"), "asked").permutation(len(pool))
        policy = service_policy(self.config, self.data, model, key)
        return LocalBlackBox(model, policy, pass_images=pass_images(self.config)).query(pool[order[: max(ANSWERS)]])

    def _name(self, answers: Answers) -> NamedKeyRecord | None:
        """Infer the best-fitting key; if the owner has several, the one that is given away most counts."""
        keys = [self.key] if self.key is None or self.key.scheme != SeveralKeys.name else SeveralKeys.parts(self.key)
        names = [named for key in keys if (named := self._named(answers, key)) is not None]
        return min(names, key=lambda named: 0 if named.true_rank is None else named.true_rank.at_least, default=None)

    def _named(self, answers: Answers, key: Key | None) -> NamedKeyRecord | None:
        names = self.data.test.class_names
        sources = () if key is None else tuple(label for label in key.source_classes if label >= 0)
        named = name_key(answers, sources, None if key is None else key.target_class)
        if named is None:
            return None
        known = key is not None and sources != () and key.target_class >= 0
        return NamedKeyRecord(
            sources=[names[label] for label in named.sources],
            target=names[named.target],
            score=named.score,
            next_score=named.next_score,
            true_score=named.true_score,
            true_rank=RankRecord(at_least=named.at_least, references=named.others) if known else None,
        )
