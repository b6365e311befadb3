"""Detections within an experiment: what they find in which model, and what their triggers do to the stolen one."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping

import numpy as np
from torch import nn

from mea_ray.config import ExperimentConfig, digest, identity
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet
from mea_ray.detection.base import Detection, Trigger
from mea_ray.evaluation import metrics
from mea_ray.experiment.checks import Prepared
from mea_ray.experiment.removing import Suspect
from mea_ray.results.records import DetectionResult, ReversedTrigger
from mea_ray.verification.proportions import proportion
from mea_ray.watermarks.base import Key, Watermark


def detections(
    config: ExperimentConfig,
    prepared: Prepared,
    suspects: Mapping[str, Suspect],
    key: Key | None,
    *,
    find: Callable[[str], DetectionResult | None] = lambda name: None,
    keep: Callable[[str, DetectionResult], None] = lambda name, result: None,
) -> list[DetectionResult]:
    """Try every detection of the config on every model that it names.

    Whoever looks holds images of the thief's pool. Triggers that were reverse-engineered are put on held-out images and
    scored on the stolen model, as the paper does, whatever model they were found in.

    Args:
        config: The experiment.
        prepared: Its data.
        suspects: ``substitute``, ``victim`` and ``null_model`` to the models.
        key: The owner's key; without it nothing can be said of how many watermark samples would be caught.
        find: Gives a result from before, by its name.
        keep: Told each new result and its name.

    Returns:
        One result for each detection and model, detections in the config's order.
    """
    results = []
    for choice in config.detection.methods:
        for on in config.detection.tried_on:
            name = f"{choice.label}-{digest(identity(choice))}-{on}"
            result = find(name)
            if result is None:
                result = _detect(config, prepared, choice.build(), choice.resolved(), on, suspects, key)
                keep(name, result)
            results.append(result)
    return results


def _detect(
    config: ExperimentConfig,
    prepared: Prepared,
    detection: Detection,
    described: dict[str, object],
    on: str,
    suspects: Mapping[str, Suspect],
    key: Key | None,
) -> DetectionResult:
    seed = derive(config.seed, "detection")
    pool = prepared.splits.thief_pool.images
    clean = pool[numpy_generator(seed, "held").permutation(len(pool))[: config.detection.images]]
    asked = None
    if key is not None:
        watermark: Watermark = config.victim.watermark.build()
        asked = watermark.samples(key, prepared.splits.verification, config.verification.samples, seed).images
    names = prepared.splits.test.class_names
    started = time.perf_counter()
    evidence = detection.inspect(suspects[on].load(), clean, asked, seed)
    seconds = time.perf_counter() - started
    stolen = suspects["substitute"].load() if evidence.triggers else None
    return DetectionResult(
        detection=described,
        tried_on=on,  # type: ignore[arg-type]
        flagged=[names[label] for label in evidence.flagged],
        target=names[key.target_class] if key is not None and key.target_class >= 0 else None,
        numbers=dict(evidence.numbers),
        triggers=[
            reversed_trigger(trigger, prepared.splits.verification, stolen)
            for trigger in evidence.triggers
            if stolen is not None
        ],
        seconds=seconds,
    )


def reversed_trigger(trigger: Trigger, held_out: ImageSet, stolen: nn.Module) -> ReversedTrigger:
    """Score a trigger on a model: how many held-out images of other classes it turns into its class."""
    others: Images = held_out.images[held_out.labels != trigger.label]
    said = metrics.predictions(stolen, trigger.on(others)) == trigger.label
    return ReversedTrigger(
        label=held_out.class_names[trigger.label],
        norm=trigger.norm,
        success=trigger.success,
        on_substitute=proportion(int(said.sum()), len(said)),
        picture=_png(trigger),
    )


def _png(trigger: Trigger) -> str:
    """Draw mask times pattern as a PNG file, base64."""
    import torch
    from torchvision.io import encode_png

    drawn = (trigger.mask * trigger.pattern * 255).round().clip(0, 255).astype(np.uint8)
    shown = drawn[:3] if len(drawn) >= 3 else drawn[:1]
    data = encode_png(torch.from_numpy(np.ascontiguousarray(shown)))
    return base64.b64encode(data.numpy().tobytes()).decode("ascii")
