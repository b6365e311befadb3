"""The filter of the key's samples: shadow thieves must know them, null models must not. No suspect is involved.

After DeepTracer. It works for every scheme whose samples follow from the key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.query_attack import QueryAttack
from mea_ray.config import ExperimentConfig, LearningConfig, ModelChoice
from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers, ImageSet, Splits
from mea_ray.data.statistics import channel_statistics
from mea_ray.evaluation import metrics
from mea_ray.experiment.answers import served
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.encoders import probe_set, with_probe
from mea_ray.models.base import ImageModel
from mea_ray.training.engine import TrainReport, train
from mea_ray.training.snapshot import SnapshotFile
from mea_ray.watermarks.base import Key, Watermark
from mea_ray.watermarks.chosen_samples import ChosenSamples, Votes, body_digest, select, with_chosen
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.pairs import mixed_pairs
from mea_ray.watermarks.several_keys import SeveralKeys

OnEpoch = Callable[[dict[str, Any]], None]
"""Called with the engine's record of an epoch and the name of the ``stage``."""
TrainNull = Callable[[int], tuple[ImageModel, TrainReport]]
"""Trains the null model with an index, from a seed that no control has."""


@dataclass(frozen=True)
class ChosenKey:
    """A key with its chosen samples, and the cost of choosing them.

    Attributes:
        key: The key.
        seconds: Training time of the models that chose, in seconds.
        images: Number of images that they were trained on.
        history: Records of all epochs, with their stage.
    """

    key: Key
    seconds: float
    images: int
    history: list[dict[str, Any]]


class ShadowFilter:
    """Trains the models that choose, and chooses.

    Candidates are mixed from the owner's validation images, which no model is trained on. A shadow thief learns from
    the victim's answers to the owner's training images, as its customers get them, with the victim's training settings
    and at temperature 1.

    Args:
        config: The experiment.
        data: Its data; the thief's pool, the verification and the test images are not used.
        model: The victim.
        train_null: Trains a null model.
        snapshots: Returns the file for the next training's snapshots; None saves none.
        on_epoch: Called after each epoch of a shadow thief.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        data: Splits,
        model: ImageModel,
        train_null: TrainNull,
        snapshots: Callable[[], SnapshotFile | None],
        on_epoch: OnEpoch | None = None,
    ) -> None:
        self.config, self.data, self.model = config, data, model
        self.train_null, self.snapshots, self.on_epoch = train_null, snapshots, on_epoch
        self.settings = config.verification.shadow
        self.seed = derive(config.victim.seed, "filter")
        self.reports: list[tuple[str, TrainReport]] = []

    def choose(self, watermark: Watermark, key: Key) -> ChosenKey:
        """Return the key with its chosen samples; each of several keys gets its own."""
        nulls = [self._null(index) for index in range(self.settings.null_models)]
        answers = self._answers(key)
        thieves = [self._thief(index, answers) for index in range(self.settings.thieves)]
        choose = partial(self._chosen, thieves=thieves, nulls=nulls)
        if isinstance(watermark, SeveralKeys):
            schemes = zip(watermark.schemes, SeveralKeys.parts(key), strict=True)
            chosen = SeveralKeys.with_parts(key, [choose(scheme, part) for scheme, part in schemes])
        else:
            chosen = choose(watermark, key)
        history = [{"stage": name, **epoch} for name, report in self.reports for epoch in report.history]
        seconds, images = (sum(getattr(r, what) for _, r in self.reports) for what in ("seconds", "images"))
        return ChosenKey(chosen, seconds, images, history)

    def _null(self, index: int) -> ImageModel:
        model, report = self.train_null(index)
        self.reports.append((f"filter: null model {index + 1}", report))
        return model

    @cached_property
    def _attack(self) -> QueryAttack:
        attack: QueryAttack = ATTACKS.build("feature_distillation" if self.config.encodes else "distillation")
        return attack

    def _answers(self, key: Key) -> Answers:
        images = self.data.victim_train.images
        if self.config.encodes:
            return metrics.features(self.model, images)
        return metrics.probabilities(served(self.model, key), images)

    def _thief(self, index: int, answers: Answers) -> ImageModel:
        owned, name = self.data.victim_train.images, f"filter: shadow thief {index + 1}"
        networks: tuple[ModelChoice, ...] = self.settings.models or (self.config.victim.model,)
        with torch.random.fork_rng([]):
            torch.manual_seed(derive(self.seed, "thief", index))
            model = build_network(networks[index % len(networks)], self.data.shape, self.data.classes)
        model.set_normalisation(*channel_statistics(owned))
        learning = self._attack.learning(LearningConfig(temperature=None if self.config.encodes else 1.0))
        changes = {**self._attack.training_overrides, "early_stop_patience": None}
        on_epoch = self.on_epoch
        report = train(
            model,
            owned,
            None,
            self._attack.objective(learning, answers),
            self.config.victim.training.changed(**changes),
            seed=derive(self.seed, "training", index),
            on_epoch=None if on_epoch is None else lambda epoch: on_epoch({"stage": name, **epoch}),
            snapshots=self.snapshots(),
        )
        self.reports.append((name, report))
        return model

    def _chosen(self, watermark: Watermark, key: Key, thieves: list[ImageModel], nulls: list[ImageModel]) -> Key:
        held_out, count = self.data.victim_validation, self.settings.candidates
        seed = derive(self.seed, "candidates")
        images = watermark.samples(key, held_out, count, seed).images
        positions = mixed_pairs(key, held_out, count, seed).positions if isinstance(watermark, MixedClasses) else None

        def votes(model: nn.Module) -> Votes:
            read = with_probe(self.config, self._labelled, model) if self.config.encodes else model
            recognise = watermark.recogniser(key, read)
            if recognise is not None:
                return recognise(images)
            successes: Votes = metrics.predictions(read, images) == key.target_class
            return successes

        chosen, passed = select(
            votes(served(self.model, key)),
            np.stack(list(map(votes, thieves))),
            np.stack(list(map(votes, nulls))),
            self.settings.agreement,
        )
        return with_chosen(
            key,
            ChosenSamples(
                images=images[chosen],
                positions=None if positions is None else positions[chosen],
                candidates=len(images),
                passed=passed,
                thieves=len(thieves),
                null_models=len(nulls),
                choosers=tuple(map(body_digest, [*thieves, *nulls])),
            ),
        )

    @cached_property
    def _labelled(self) -> ImageSet:
        return probe_set(self.config, self.data)
