"""The owner's measurements of models; samples that all models share are drawn only once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

from torch import nn

from mea_ray.config import ExperimentConfig
from mea_ray.core.seeding import derive
from mea_ray.core.types import ImageSet, Labels, Splits, StatisticName
from mea_ray.evaluation import metrics, probes
from mea_ray.experiment.encoders import probe_set, with_probe
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport
from mea_ray.verification import several, verify
from mea_ray.watermarks.base import Key, KeyedSignal, Watermark, WatermarkSamples
from mea_ray.watermarks.chosen_samples import ChosenSamples, chosen_of
from mea_ray.watermarks.mixed_classes import MixedClasses
from mea_ray.watermarks.pairs import MixedPairs, mixed_pairs
from mea_ray.watermarks.several_keys import SeveralKeys


class Verifier:
    """Judges models with one key, on held-out data only.

    The watermark samples, and the labelled images on which encoders' heads are fitted, are the same for all judged
    models, so they are drawn on first use and cached.

    Args:
        config: The experiment.
        data: Its data.
        key: The key to verify with; None leaves out everything that needs one.
        watermark: Its scheme; None takes the config's.
    """

    def __init__(
        self, config: ExperimentConfig, data: Splits, key: Key | None, watermark: Watermark | None = None
    ) -> None:
        self.config, self.data, self.key = config, data, key
        self._watermark: Watermark = config.victim.watermark.build() if watermark is None else watermark
        self._drawn: dict[str, WatermarkSamples] = {}

    def with_key(self, key: Key | None) -> Verifier:
        """Return a verifier with another key for the same data."""
        return Verifier(self.config, self.data, key)

    @property
    def statistic(self) -> StatisticName:
        """The statistic by which models and keys are ranked: the config's choice, or the scheme's default."""
        wanted = self.config.verification.statistic
        return self._watermark.statistic if wanted == "auto" else wanted

    @cached_property
    def pairs(self) -> MixedPairs | None:
        """The source images of the watermark samples, and mixes to compare them with; None for other schemes."""
        if self.key is None or not isinstance(self._watermark, MixedClasses):
            return None
        count, seed = self.config.verification.samples, derive(self.config.seed, "verification")
        return mixed_pairs(self.key, self.data.verification, count, seed)

    @cached_property
    def signal(self) -> KeyedSignal | None:
        """The mark's signal in answers to clean images; None for other schemes."""
        return None if self.key is None else self._watermark.signal(self.key, self.data.verification)

    @cached_property
    def chosen(self) -> ChosenSamples | None:
        """The samples that were chosen for the key before any suspect was known; None if all are used."""
        chosen = None if self.key is None else chosen_of(self.key)
        return None if chosen is None else chosen.first(self.config.verification.samples)

    @cached_property
    def _each(self) -> list[Verifier]:
        """A verifier for each of several keys; none for a single key."""
        if self.key is None or not isinstance(self._watermark, SeveralKeys):
            return []
        parts = zip(SeveralKeys.parts(self.key), self._watermark.schemes, strict=True)
        return [Verifier(self.config, self.data, part, scheme) for part, scheme in parts]

    @cached_property
    def probe_set(self) -> ImageSet:
        """The labelled images on which encoders' heads are fitted."""
        return probe_set(self.config, self.data)

    def samples(self, stream: str = "verification") -> WatermarkSamples | None:
        """Return held-out watermark samples; None without a key.

        Args:
            stream: Name of the random stream; the same name gives the same samples.

        Raises:
            DataError: The held-out images are too few, or not of the key's shape.
        """
        if self.key is None:
            return None
        if stream not in self._drawn:
            self._drawn[stream] = self._watermark.samples(
                self.key, self.data.verification, self.config.verification.samples, derive(self.config.seed, stream)
            )
        return self._drawn[stream]

    def classifier(self, model: nn.Module) -> nn.Module:
        """Return a classifier unchanged; of an encoder, a copy with a head as set by ``verification.reading``.

        Fitting takes a pass over the labelled images: call this once per model and judge the returned one.
        """
        return with_probe(self.config, self.probe_set, model) if self.config.encodes else model

    def predictions(self, model: nn.Module) -> Labels:
        """Return a classifier's predicted classes of the test images, int64 (N,): the reference for fidelity.

        Args:
            model: See ``report``.
        """
        return metrics.predictions(model, self.data.test.images)

    def report(
        self, model: nn.Module, *, victim: Labels | None = None, nulls: Sequence[ModelReport] = ()
    ) -> ModelReport:
        """Measure one model.

        Args:
            model: A classifier, or an encoder from ``classifier`` or from the owner's training.
            victim: The victim's ``predictions``; None leaves out the fidelity.
            nulls: Reports of the null models, among which the model is ranked; empty for null models themselves.

        Raises:
            ConfigError: The model helped to choose the key's samples.
        """
        if self._each:
            settings = self.config.verification
            return several.merged(
                [each.report(model, victim=victim) for each in self._each],
                nulls=[null.statistics for null in nulls],
                statistic=self.statistic,
                threshold=settings.threshold,
            )
        key, chosen = self.key, self.chosen
        if chosen is not None:
            chosen.refuse(model)
        voted = None
        if self.config.encodes:
            assert isinstance(model, ImageModel)
            voted = probes.knn_accuracy(model, self.probe_set, self.data.test)
        return verify.report(
            partial(metrics.logits, model),
            self.data.test,
            samples=self.samples(),
            pairs=self.pairs,
            victim=victim,
            nulls=[null.statistics for null in nulls],
            statistic=self.statistic,
            threshold=self.config.verification.threshold,
            knn_accuracy=voted,
            recognise=None if key is None else self._watermark.recogniser(key, model),
            chance=None if key is None else self._watermark.chance(key),
            signal=self.signal,
            chosen=chosen,
        )
