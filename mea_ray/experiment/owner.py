"""The owner's work before the first query: training the victim with its watermark, and the null models without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mea_ray.config import ExperimentConfig, TrainingConfig
from mea_ray.core.seeding import derive, system_seed
from mea_ray.core.types import ImageSet, Splits
from mea_ray.data.statistics import channel_statistics
from mea_ray.evaluation import metrics
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.encoders import probe_set, with_probe
from mea_ray.experiment.names import sample_filter
from mea_ray.experiment.shadow import ShadowFilter
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.base import ImageModel
from mea_ray.models.weights import load_weights, read_state
from mea_ray.training.device import device as this_device
from mea_ray.training.device import fork_devices
from mea_ray.training.engine import TrainReport, train
from mea_ray.training.snapshot import Snapshots
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key, Watermark
from mea_ray.watermarks.key_draw import KeyDraw

OnEpoch = Callable[[dict[str, Any]], None]
"""Called with the engine's record of an epoch and the name of the ``stage``; ``resumed`` marks a resumed one."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model of the owner.

    Attributes:
        model: The network, on the CPU, in eval mode. The head of an encoder is fitted as ``verification.reading`` says.
        key: The owner's secret; None without a watermark.
        info: Plain JSON types: ``seconds``, ``images`` and ``history`` (records of all epochs, with their stage);
            ``before``, the verification of the classifier before the mark was embedded.
    """

    model: ImageModel
    key: Key | None
    info: dict[str, Any] = field(default_factory=dict)


def draw_key(config: ExperimentConfig, data: Splits) -> Key | None:
    """Draw the key of the victim, from the system's randomness by default; None without a mark.

    Its classes are drawn as ``victim.watermark.key`` says.
    """
    watermark: Watermark = config.victim.watermark.build()
    if config.victim.insecure_key_from_seed:
        return watermark.make_key(data.victim_train, derive(config.victim.seed, "key"))
    key = watermark.make_key(data.victim_train, system_seed())
    return None if key is None else replace(key, seed_from="system")


def repeatable_key(config: ExperimentConfig) -> bool:
    """Return whether ``draw_key`` is repeatable: not if the key's seed or classes come from the system's randomness."""
    if not config.victim.insecure_key_from_seed:
        return False
    draw: KeyDraw | None = getattr(config.victim.watermark.build(), "key_draw", None)
    return draw is None or draw.repeatable


def train_victim(
    config: ExperimentConfig,
    data: Splits,
    on_epoch: OnEpoch | None = None,
    key: Key | None = None,
    snapshots: Snapshots | None = None,
) -> TrainedModel:
    """Train the watermarked model: draw the key, then run the scheme's stages one after the other on one model.

    Args:
        config: The experiment.
        data: Its data.
        on_epoch: See ``OnEpoch``.
        key: A key that was drawn before; None draws it.
        snapshots: Where the training stores its state after epochs, so that another process can resume it.
    """
    section = config.victim
    watermark: Watermark = section.watermark.build()
    key = draw_key(config, data) if key is None else key
    made = _train(config, data, watermark, section.seed, section.training, on_epoch, section.weights, key, snapshots)
    if made.key is not None:
        made = replace(made, key=watermark.after_training(made.key, made.model, data.verification))
    if made.key is None or sample_filter(config) == "none":
        return made
    train_one = partial(_train_chooser, config, data, on_epoch, snapshots)
    files = (lambda: None) if snapshots is None else snapshots.next
    choice = ShadowFilter(config, data, made.model, train_one, files, on_epoch).choose(watermark, made.key)
    seconds, images = made.info["seconds"] + choice.seconds, made.info["images"] + choice.images
    spent = {"seconds": seconds, "images": images, "history": made.info["history"] + choice.history}
    return TrainedModel(made.model, choice.key, {**made.info, **spent})


def _train_chooser(
    config: ExperimentConfig, data: Splits, on_epoch: OnEpoch | None, snapshots: Snapshots | None, index: int
) -> tuple[ImageModel, TrainReport]:
    """Train a null model only for the filter: no control has its seed."""
    seed = derive(config.victim.seed, "filter", "null", index)
    made = _train_innocent(config, data, seed, on_epoch, snapshots)
    history = [{k: v for k, v in epoch.items() if k != "stage"} for epoch in made.info["history"]]
    return made.model, TrainReport(len(history), made.info["seconds"], made.info["images"], history)


def train_null(
    config: ExperimentConfig,
    data: Splits,
    index: int,
    on_epoch: OnEpoch | None = None,
    snapshots: Snapshots | None = None,
) -> TrainedModel:
    """Train the ``index``-th innocent model: like the victim, but unmarked, with another seed, from scratch."""
    return _train_innocent(config, data, derive(config.victim.seed, "null", index), on_epoch, snapshots)


def _train_innocent(
    config: ExperimentConfig, data: Splits, seed: int, on_epoch: OnEpoch | None, snapshots: Snapshots | None
) -> TrainedModel:
    watermark: Watermark = WATERMARKS.build("none")
    training = config.victim.null_training or config.victim.training
    return _train(config, data, watermark, seed, training, on_epoch, snapshots=snapshots)


def _train(
    config: ExperimentConfig,
    data: Splits,
    watermark: Watermark,
    seed: int,
    section: TrainingConfig,
    on_epoch: OnEpoch | None,
    weights: str | None = None,
    key: Key | None = None,
    snapshots: Snapshots | None = None,
) -> TrainedModel:
    owned = data.victim_train
    with torch.random.fork_rng(fork_devices(this_device())):
        torch.manual_seed(derive(seed, "weights"))
        model = build_network(config.victim.model, data.shape, data.classes)
    model.set_normalisation(*channel_statistics(owned.images))
    info: dict[str, Any] = {}
    if weights is not None:
        load_weights(model, read_state(weights), weights)
        info["before"] = Verifier(config, data, key).report(model).model_dump(mode="json")
    history: list[dict[str, Any]] = []
    seconds, images = 0.0, 0
    pretext = config.victim.pretext.build() if config.encodes else None
    stages = watermark.stages(key, owned) if pretext is None else watermark.encoder_stages(key, owned, pretext)
    for position, stage in enumerate(stages):
        training = section.changed(**stage.changes(section.epochs))

        def record(epoch: dict[str, Any], name: str = stage.name) -> None:
            if on_epoch is not None:
                on_epoch({"stage": name, **epoch})

        # Only early stopping reads the validation accuracy, so it is not computed without it.
        stops_early = training.early_stop_patience is not None
        report = train(
            model,
            stage.train.images,
            stage.train.labels,
            stage.objective,
            training,
            seed=derive(seed, "training", position),
            validate=partial(_accuracy, on=data.victim_validation) if stops_early else None,
            on_epoch=record,
            snapshots=None if snapshots is None else snapshots.next(),
        )
        history += [{"stage": stage.name, **epoch} for epoch in report.history]
        seconds, images = seconds + report.seconds, images + report.images
    key = None if key is None else watermark.learned(key, stages)
    if config.encodes:
        model = with_probe(config, probe_set(config, data), model)
    return TrainedModel(model, key, {**info, "seconds": seconds, "images": images, "history": history})


def _accuracy(model: nn.Module, *, on: ImageSet) -> float:
    return metrics.accuracy(metrics.predictions(model, on.images), on.labels)
