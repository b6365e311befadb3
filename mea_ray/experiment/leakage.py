"""What the owner's API gives away: the key that an outsider would infer from a few of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from pydantic import BaseModel, ConfigDict

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Answers, Images, Splits
from mea_ray.detection.leaning import name_key
from mea_ray.detection.signal_search import find_signal
from mea_ray.experiment.answers import pass_images, service_policy
from mea_ray.models.base import ImageModel
from mea_ray.results.records import FoundSignalRecord, LeaningRecord, NamedKeyRecord, RankRecord
from mea_ray.verification.ranks import rank_among
from mea_ray.watermarks.base import Key, KeyedSignal
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
        signal: The key's signal in answers to clean images; None if the mark is no such signal. Then the outsider also
            searches the most answers for a smooth signal, without knowing the key.
    """

    config: ExperimentConfig
    data: Splits
    key: Key | None
    signal: KeyedSignal | None = None

    def look(self, victim: ImageModel, nulls: Sequence[ImageModel]) -> list[LeaningRecord]:
        """Return the keys inferred from the answers of the victim and of each null model, one record per count."""
        marked = self._answers(victim, self.key)
        innocent = [self._answers(null, None) for null in nulls]
        counts = sorted({min(count, len(marked)) for count in ANSWERS})
        records = [
            LeaningRecord(
                answers=count,
                victim=self._name(marked[:count]),
                nulls=[self._name(answers[:count]) for answers in innocent],
            )
            for count in counts
        ]
        if self.signal is not None:
            signals = {"signal": self._search(marked), "signal_nulls": [self._search(each) for each in innocent]}
            records[-1] = records[-1].model_copy(update=signals)
        return records

    def _answers(self, model: ImageModel, key: Key | None) -> Answers:
        policy = service_policy(self.config, self.data, model, key)
        return LocalBlackBox(model, policy, pass_images=pass_images(self.config)).query(self._queries)

    @cached_property
    def _queries(self) -> Images:
        pool = self.data.thief_pool.images
        order = numpy_generator(derive(self.config.seed, "outsider"), "asked").permutation(len(pool))
        queries: Images = pool[order[: max(ANSWERS)]]
        return queries

    def _search(self, answers: Answers) -> FoundSignalRecord | None:
        """Search for a signal, and rank the owner's key by what is found, as a suspect's answers are."""
        signal = find_signal(answers, self._queries, derive(self.config.seed, "signal search"))
        if signal is None or self.signal is None:
            return None
        scores = self.signal.scores(signal.at(self.signal.images).astype(np.float32))
        rank = rank_among(float(scores[0]), scores[1:], "keys")
        true_rank = RankRecord(at_least=rank.at_least, references=rank.references)
        return FoundSignalRecord(explained=signal.explained, true_rank=true_rank)

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
