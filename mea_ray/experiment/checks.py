"""Checks before an experiment starts: an experiment that cannot be finished must fail now, not hours later."""

from __future__ import annotations

import math

import numpy as np
import torch

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.base import Attack
from mea_ray.blackbox import POLICIES
from mea_ray.blackbox.policies import AnswerPolicy, reads_features
from mea_ray.config import Choice, ExperimentConfig, ModelChoice, digest
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.registry import Table
from mea_ray.core.seeding import derive
from mea_ray.core.types import UNLABELLED, ImageSet, Labels, Splits
from mea_ray.detection.base import Detection
from mea_ray.evaluation import probes
from mea_ray.experiment.encoders import probe_labels
from mea_ray.experiment.names import sample_filter
from mea_ray.experiment.service_fit import check_description
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.models.foreign import ForeignModel, check_trainable
from mea_ray.models.weights import load_weights, read_state
from mea_ray.removal.base import Prospect, Removal
from mea_ray.training.device import seeded
from mea_ray.training.loader import least_batch, normalises_batches
from mea_ray.training.objective import Objective
from mea_ray.watermarks.base import Watermark
from mea_ray.watermarks.dawn import Dawn
from mea_ray.watermarks.key_draw import KeyDraw
from mea_ray.watermarks.mixed_classes import admissible_keys

MIN_SAMPLES = 30
"""Minimum number of distinct watermark samples for a proof."""
MIN_MARKS = 6
"""Minimum number of marked answers for a proof."""


_FEATURE_SIZES: dict[str, int] = {}
"""Feature lengths of networks that passed their check, by network and data."""
_PASSED: set[str] = set()
"""Watermarks and removals that passed their own check, with the input of the check."""


def check(config: ExperimentConfig, data: Splits) -> None:
    """Reject an experiment that could not be finished, before anything is trained.

    Raises:
        ConfigError: A component rejects its parameters, the images are too small for a network, the watermark's classes
            do not exist, the pool cannot fill the budgets, or too few watermark samples could be mixed.
    """
    attack: Attack = config.thief.attack.build()
    _check_answers(config, attack)
    if config.thief.blackbox is not None:
        check_description(config.thief.blackbox, data.shape, None if config.encodes else data.classes)
    attack.check(
        len(data.thief_pool),
        config.thief.budgets,
        config.thief.training,
        config.thief.learning,
        labelled=pool_labels(data) is not None,
    )
    victim = _check_model("victim.model", config.victim.model, data)
    thief = _check_model("thief.model", config.thief.model, data)
    _check_smallest_batch(config, data, attack)
    check_owner(config, data)
    _check_null_models(config)
    _check_features(config, data)
    if config.encodes:
        _check_probe(config, config.thief.model, data)
    _check_reading(config, victim, thief)
    _check_follow_up(config, data, attack)
    _check_marks(config, attack)


def check_owner(config: ExperimentConfig, data: Splits) -> None:
    """Reject a victim that could not be trained, marked and verified, before anything is trained.

    Raises:
        ConfigError: The images are too small for the network or too few for its batches, the watermark's classes do not
            exist, or too few watermark samples could be mixed.
    """
    _check_model("victim.model", config.victim.model, data)
    _check_weights(config, data)
    _check_victim_batches(config, data)
    if config.encodes and config.victim.training.early_stop_patience is not None:
        raise ConfigError(
            "victim.training.early_stop_patience stops on accuracy, which an encoder does not have; set it to null"
        )
    if config.victim.training.early_stop_patience is not None and not len(data.victim_validation):
        raise ConfigError("victim.training.early_stop_patience needs images; raise splits.validation_fraction")
    _check_scheme(config, data)
    _check_classes(config, data, data.verification, "splits.verification_fraction")
    _check_filter(config, data)
    if config.encodes:
        _check_probe(config, config.victim.model, data)


def pool_labels(data: Splits) -> Labels | None:
    """Return the labels that the thief's pool was published with, int64 (N,); None if none of its images has one."""
    labels = data.thief_pool.labels
    return labels if (labels != UNLABELLED).any() else None


def build_network(choice: ModelChoice, shape: tuple[int, int, int], classes: int) -> ImageModel:
    """Build an untrained network for images of a shape, from torch's global generator."""
    return build_model(choice.name, shape, classes, choice.params)


def _check_model(section: str, choice: ModelChoice, data: Splits) -> int:
    """Build the network on the meta device, pass one image through it, and return the length of its features.

    Results are cached: the many trials of a sweep use few different networks.
    """
    key = digest([choice.resolved(), data.shape, data.classes])
    if key in _FEATURE_SIZES:
        return _FEATURE_SIZES[key]
    try:
        if ":" in choice.name:  # an external module inspects itself when it is built, which takes real weights
            with seeded(0):
                check_trainable(build_network(choice, data.shape, data.classes))
        with torch.device("meta"), torch.no_grad():
            network = build_network(choice, data.shape, data.classes).eval()
            logits = network(torch.zeros((1, *data.shape)))
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from None
    except RuntimeError as error:
        raise ConfigError(
            f"{section}={choice.name} cannot take images of shape {data.shape}: {error}; set data.image_size"
        ) from error
    if tuple(logits.shape) != (1, data.classes):
        raise ConfigError(
            f"{section}={choice.name} gives logits of shape {tuple(logits.shape)} for {data.classes} classes"
        )
    _FEATURE_SIZES[key] = network.feature_size
    return network.feature_size


def _check_weights(config: ExperimentConfig, data: Splits) -> None:
    """Put the weights of a trained classifier into the network, as the training will."""
    path = config.victim.weights
    if path is None:
        return
    if config.encodes:
        raise ConfigError(
            "victim.weights are a classifier's; an encoder is trained from scratch: set victim.pretext=none"
        )
    with seeded(0):
        network = build_network(config.victim.model, data.shape, data.classes)
    if isinstance(network, ForeignModel) and network.preprocessing.mean is None:
        raise ConfigError(
            "the normalisation that victim.weights were trained with is unknown; declare victim.model.preprocessing "
            f"of {config.victim.model.name}: mean and deviation (0 and 1 if it takes images in [0, 1])"
        )
    load_weights(network, read_state(path), path)


def _check_null_models(config: ExperimentConfig) -> None:
    """Reject null models that would be trained for as few epochs as a fine-tuning, unless the config says so."""
    if config.victim.weights is not None and config.victim.null_training is None:
        raise ConfigError(
            "victim.weights starts the victim from a trained model, but null models start from fresh weights; set "
            "how they are trained, e.g. victim.null_training.epochs=60 (the fine-tuning has "
            f"{config.victim.training.epochs})"
        )


def _check_features(config: ExperimentConfig, data: Splits) -> None:
    """Reject components that read features of a network that has none."""
    watermark: Watermark = config.victim.watermark.build()
    policy: AnswerPolicy = config.service.policy.build()
    attack: Attack = config.thief.attack.build()
    anyone = {
        f"victim.pretext={config.victim.pretext.name}": config.encodes,
        **{f"removal.methods: {each.name}": each.build().needs_features for each in config.removal.methods},
        **{f"detection.methods: {each.name}": each.build().needs_features for each in config.detection.methods},
    }
    victims = {
        f"victim.watermark={config.victim.watermark.name}": watermark.needs_features,
        f"service.policy={config.service.policy.name}": reads_features(policy),
    }
    thieves = {f"thief.attack={config.thief.attack.name}": attack.needs_features}
    for section, choice, readers in (
        ("victim.model", config.victim.model, {**anyone, **victims}),
        ("thief.model", config.thief.model, {**anyone, **thieves}),
    ):
        reading = [name for name, reads in readers.items() if reads]
        if reading and not _has_features(choice, data):
            raise ConfigError(
                f"{', '.join(reading)}: features are needed, and {section}={choice.name} has none: its logits do not "
                "come out of one nn.Linear. Choose others, or derive the network from mea_ray.models.base.ImageModel"
            )


def _has_features(choice: ModelChoice, data: Splits) -> bool:
    if ":" not in choice.name:
        return True
    with seeded(0):
        return bool(build_network(choice, data.shape, data.classes).has_features)


def _check_smallest_batch(config: ExperimentConfig, data: Splits, attack: Attack) -> None:
    """Reject a substitute with batch normalisation that would be trained on single images."""
    smallest = attack.smallest_batch(
        len(data.thief_pool), config.thief.budgets, config.thief.training, config.thief.learning
    )
    if smallest >= 2:
        return
    with torch.device("meta"), torch.no_grad():
        network = build_network(config.thief.model, data.shape, data.classes)
    if attack.compares_images:
        raise ConfigError(
            f"thief.attack={config.thief.attack.name} compares the images of a batch, but with thief.budgets="
            f"{list(config.thief.budgets)} and thief.training.batch_size={config.thief.training.batch_size} there is "
            f"{smallest} at a time; raise them to 2 or more"
        )
    if normalises_batches(network):
        raise ConfigError(
            f"thief.model={config.thief.model.name} uses batch normalisation, but "
            f"thief.attack={config.thief.attack.name} "
            f"with thief.budgets={list(config.thief.budgets)} would train it on {smallest} image at a time; raise "
            "thief.budgets, thief.training.batch_size or the attack's first number of images, or choose a network "
            "without batch normalisation"
        )


def _check_victim_batches(config: ExperimentConfig, data: Splits) -> None:
    """Reject a victim that would be trained on single images if its network or its pretext task needs several."""
    batch = min(config.victim.training.batch_size, len(data.victim_train))
    if batch >= 2:
        return
    with torch.device("meta"), torch.no_grad():
        network = build_network(config.victim.model, data.shape, data.classes)
    pretext: Objective = config.victim.pretext.build()
    if least_batch(network, pretext) > batch:
        raise ConfigError(
            f"victim.training.batch_size={config.victim.training.batch_size} with {len(data.victim_train)} training "
            f"images gives batches of {batch}, but victim.model={config.victim.model.name} with victim.pretext="
            f"{config.victim.pretext.name} needs at least 2 images in a batch; raise victim.training.batch_size"
        )


def _check_answers(config: ExperimentConfig, attack: Attack) -> None:
    """Check that victim, API and attack all use classes, or all use embeddings."""
    policy: AnswerPolicy = config.service.policy.build()
    victim = "features" if config.encodes else "probabilities"
    kinds = {"features": "an encoder's embeddings", "probabilities": "a classifier's probabilities"}
    sells = f"the victim gives {kinds[victim]} (victim.pretext={config.victim.pretext.name})"
    if policy.source != victim:
        raise ConfigError(
            f"service.policy={config.service.policy.name} words {kinds[policy.source]}, but {sells}; choose one of "
            f"{', '.join(_fitting(POLICIES, 'source', victim))}, or another victim.pretext"
        )
    if attack.learns_from != victim:
        raise ConfigError(
            f"thief.attack={config.thief.attack.name} learns from {kinds[attack.learns_from]}, but {sells}; choose one "
            f"of {', '.join(_fitting(ATTACKS, 'learns_from', victim))}, or another victim.pretext"
        )


def _fitting(table: Table, attribute: str, value: str) -> list[str]:
    return [name for name, component in table.usable().items() if getattr(component, attribute) == value]


def _check_follow_up(config: ExperimentConfig, data: Splits, attack: Attack) -> None:
    """Build every removal and every detection, and reject those that cannot be tried."""
    for section, methods in (("removal", config.removal.methods), ("detection", config.detection.methods)):
        if methods and config.encodes:
            raise ConfigError(
                f"{section}.methods={[choice.name for choice in methods]} work on classifiers; leave it empty for an "
                "encoder"
            )
        for choice in methods:
            method: Removal | Detection = choice.build()
            if isinstance(method, Detection):
                method.check(min(config.detection.images, len(data.thief_pool)))
            else:
                _check_removal(config, data, choice, method)
    if config.removal.methods and "substitute" in config.removal.tried_on and not attack.keeps_images:
        raise ConfigError(
            f"thief.attack={config.thief.attack.name} stores no answered images to remove a watermark with; leave "
            "'substitute' out of removal.tried_on, or removal.methods empty"
        )


def _check_removal(config: ExperimentConfig, data: Splits, choice: Choice, removal: Removal) -> None:
    """Let a removal check its input; once for the same network and images."""
    images = min(config.thief.budgets[-1], len(data.thief_pool))
    suspects = {"substitute": config.thief.model, "victim": config.victim.model, "null_model": config.victim.model}
    for on in config.removal.tried_on:
        settings = [each.resolved() for each in (choice, suspects[on], config.thief.model, config.thief.training)]
        key = digest([*settings, data.shape, data.classes, images])
        if key in _PASSED:
            continue
        with torch.device("meta"), torch.no_grad():
            model, fresh = (
                build_network(each, data.shape, data.classes) for each in (suspects[on], config.thief.model)
            )
        try:
            removal.check(Prospect(images, model, fresh, config.thief.training))
        except (ConfigError, DataError) as error:
            raise type(error)(f"removal.methods: {choice.name} on the {on}: {error}") from None
        _PASSED.add(key)


def _check_marks(config: ExperimentConfig, attack: Attack) -> None:
    """Check that a watermark in answers could prove the theft by a thief who copied every one of them."""
    watermark: Watermark = config.victim.watermark.build()
    if not watermark.marks_answers:
        return
    if config.removal.methods and "victim" in config.removal.tried_on:
        raise ConfigError(
            f"victim.watermark={config.victim.watermark.name} is in the service's answers and not in the victim's "
            "weights, which hold nothing to remove; leave 'victim' out of removal.tried_on"
        )
    if not isinstance(watermark, Dawn):
        return
    expected = int(watermark.rate * attack.query_cost(config.thief.budgets))
    if expected < MIN_MARKS:
        raise ConfigError(
            f"victim.watermark.rate={watermark.rate} marks about {expected} of the thief's {config.thief.budgets[-1]} "
            f"queries, but a proof needs {MIN_MARKS}; raise the rate or thief.budgets"
        )


def _check_reading(config: ExperimentConfig, victim: int, thief: int) -> None:
    """Check that a stolen model could be verified; ``victim`` and ``thief`` are the lengths of their features."""
    watermark: Watermark = config.victim.watermark.build()
    if watermark.reads_features and victim != thief:
        raise ConfigError(
            f"victim.watermark={config.victim.watermark.name} is verified on features of the victim's length, "
            f"{victim}; those of thief.model={config.thief.model.name} have {thief}, so that a "
            "stolen model could not be verified: take the victim's network, or mea_carrier_encoder"
        )


def _check_scheme(config: ExperimentConfig, data: Splits) -> None:
    """Let the watermark check the images that it will be embedded with; once for the same images."""
    choice = config.victim.watermark
    key = digest([choice.resolved(), data.fingerprint, config.splits.resolved(), config.victim.seed, config.encodes])
    if key not in _PASSED:
        watermark: Watermark = choice.build()
        watermark.check(data.victim_train, derive(config.victim.seed, "key"), encodes=config.encodes)
        _PASSED.add(key)


def _check_probe(config: ExperimentConfig, choice: ModelChoice, data: Splits) -> None:
    """Check that an encoder of this architecture can be read as a classifier."""
    with torch.device("meta"), torch.no_grad():
        network = build_network(choice, data.shape, data.classes)
    probes.check(network, probe_labels(config, data), config.verification.reading)


def _check_filter(config: ExperimentConfig, data: Splits) -> None:
    """Check that the samples of the key can be chosen by shadow thieves."""
    if sample_filter(config) == "none":
        return
    watermark: Watermark = config.victim.watermark.build()
    read = "a client's queries" if watermark.needs_log else "its signal in answers to clean images"
    if watermark.needs_log or type(watermark).signal is not Watermark.signal:
        raise ConfigError(
            f"verification.filter=shadow: victim.watermark={config.victim.watermark.name} is verified with {read}, so "
            "that there are no samples to choose; set verification.filter=none"
        )
    if len(data.victim_validation) < MIN_SAMPLES:
        raise ConfigError(
            f"verification.filter=shadow chooses among samples of the {len(data.victim_validation)} validation images, "
            f"which should be {MIN_SAMPLES} at least; raise splits.validation_fraction"
        )
    _check_classes(config, data, data.victim_validation, "splits.validation_fraction (verification.filter=shadow)")


def _check_classes(config: ExperimentConfig, data: Splits, held_out: ImageSet, remedy: str) -> None:
    """Check the classes of a watermark that mixes two of them. The schemes check everything else in ``make_key``."""
    watermark: Watermark = config.victim.watermark.build()
    sources: tuple[int, ...] | None = getattr(watermark, "source_classes", None)
    target: int | None = getattr(watermark, "target_class", None)
    if sources is None or target is None:
        return
    draw: KeyDraw | None = getattr(watermark, "key_draw", None)
    if draw is not None and draw.classes != "chosen":
        admissible_keys(data.victim_train)
        # For drawn classes, the worst case: the classes with the fewest held-out images.
        sources = tuple(map(int, np.argsort(np.bincount(held_out.labels, minlength=data.classes), kind="stable")[:2]))
    else:
        _check_chosen(sources, target, data)
    counts = [int((held_out.labels == label).sum()) for label in sources]
    if math.prod(counts) < min(MIN_SAMPLES, config.verification.samples):
        raise ConfigError(
            f"the {' and '.join(map(str, counts))} held-out images of the source classes {list(sources)} make "
            f"{math.prod(counts)} watermark samples, a proof needs {MIN_SAMPLES}; raise {remedy}"
        )


def _check_chosen(sources: tuple[int, ...], target: int, data: Splits) -> None:
    for label in (*sources, target):
        if not 0 <= label < data.classes or not (data.victim_train.labels == label).any():
            raise ConfigError(
                f"victim.watermark: class {label} has no training image; source_classes and target_class must be "
                f"labels of the data, 0 to {data.classes - 1}"
            )
