"""The steps after the last rung: thefts of innocent models, removals and detections, each followed by verification."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from torch import nn

from mea_ray.attacks.base import Rung, Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import Choice, ExperimentConfig, digest, identity
from mea_ray.config.experiment import Suspect as SuspectName
from mea_ray.core.seeding import derive, numpy_generator
from mea_ray.core.types import Images, ImageSet, Labels, Splits
from mea_ray.detection.base import Detection
from mea_ray.evaluation import metrics
from mea_ray.evaluation.triggers import Trigger
from mea_ray.experiment.answers import pass_images, service_policy
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.ports import StealNulls, Step, Steps
from mea_ray.experiment.proof import Proof
from mea_ray.experiment.theft import Steal, Theft, rung_result
from mea_ray.models.base import ImageModel
from mea_ray.removal.base import Removal, ThiefData
from mea_ray.results.portable import cleaned
from mea_ray.results.records import (
    DetectionResult,
    ModelReport,
    RemovalResult,
    ReversedTrigger,
    RungResult,
)
from mea_ray.storage.files import PATIENCE
from mea_ray.training.snapshot import Snapshots
from mea_ray.verification.proportions import proportion

OnStep = Callable[[Step], None]
"""Called with each step that this process finished, not with those that an earlier one did."""


@dataclass(frozen=True)
class Suspect:
    """A model that removals and detections are tried on.

    Attributes:
        load: Loads the model; called only if a step is left.
        report: Verification of the unmodified model.
    """

    load: Callable[[], ImageModel]
    report: ModelReport


@dataclass(frozen=True)
class FollowUp:
    """Results of the steps after the last rung.

    Attributes:
        controls: Substitutes of null models, stolen in the same way with each budget.
        removals: Results of the removals.
        detections: Results of the detections.
    """

    controls: list[RungResult] = field(default_factory=list)
    removals: list[RemovalResult] = field(default_factory=list)
    detections: list[DetectionResult] = field(default_factory=list)


@dataclass(frozen=True)
class Workbench:
    """Inputs of every step after the theft.

    Attributes:
        config: The experiment.
        data: Its data.
        proof: The proof at the largest budget.
        proof_at: Returns the proof at a budget.
        transfer: The thief's transfer set.
        suspects: ``substitute``, ``victim`` and ``null_model`` to the models.
        null: Loads a null model by its index.
        stolen_nulls: See ``ports.Models``.
        steps: Store of finished steps.
        steal: Carries out thefts of null models.
        on_step: See ``OnStep``.
        on_phase: Called when a step begins, with its kind, its number, and the number of such steps.
    """

    config: ExperimentConfig
    data: Splits
    proof: Proof
    proof_at: Callable[[int], Proof]
    transfer: TransferSet
    suspects: Mapping[str, Suspect]
    null: Callable[[int], ImageModel]
    stolen_nulls: StealNulls
    steps: Steps
    steal: Steal
    on_step: OnStep = lambda step: None
    on_phase: Callable[[str, int, int], None] = lambda what, number, of: None


def follow(bench: Workbench) -> FollowUp:
    """Run all steps of the config that are not finished, in the config's order."""
    return FollowUp(steal_nulls(bench), removals(bench), detections(bench))


def steal_nulls(bench: Workbench) -> list[RungResult]:
    """Steal the configured number of null models with every budget, and verify each substitute with the owner's key.

    A substitute can appear marked without a mark: a poor one errs towards some class. How much is measured by stealing
    innocent models with the same budget. Attack, images and seeds are those of the victim's thief; each null model has
    its own query API in this process.

    Returns:
        The rungs of one null model after the other, smallest budget first; their fidelity is to the null model.
    """
    count = bench.config.verification.stolen_null_models
    places = [(index, budget) for index in range(count) for budget in bench.config.thief.budgets]
    stored = {place: bench.steps.find(_control(*place), RungResult) for place in places}
    done = {place: rung for place, rung in stored.items() if rung is not None}
    wanted: dict[int, list[int]] = {}
    for index, budget in places:
        if (index, budget) not in done:
            wanted.setdefault(index, []).append(budget)
    answers: dict[int, Labels] = {}
    begun = 0

    def steal(
        models: Sequence[ImageModel], transfers: Sequence[TransferSet | None], skips: Sequence[Container[int]]
    ) -> Iterator[tuple[int, Rung]]:
        nonlocal begun
        bench.on_phase("null theft", begun + 1, len(wanted))
        begun += len(models)
        return _steal_together(bench, models, transfers, skips)

    for index, rung in bench.stolen_nulls(wanted, steal) if wanted else ():
        if index not in answers:
            answers[index] = bench.proof.verifier.predictions(bench.null(index))
        report = bench.proof_at(rung.budget).judge(rung.model, stolen_from=answers[index])
        done[index, rung.budget] = result = rung_result(rung, report)
        bench.steps.keep(_control(index, rung.budget), result)
        bench.on_step(result)
    return [done[place] for place in places]


def _control(index: int, budget: int) -> str:
    return f"controls/{index}-{budget}"


def _steal_together(
    bench: Workbench,
    models: Sequence[ImageModel],
    transfers: Sequence[TransferSet | None],
    skips: Sequence[Container[int]],
) -> Iterator[tuple[int, Rung]]:
    """Steal innocent models as the victim is stolen; yield the index of a model and one of its rungs."""
    config, data = bench.config, bench.data
    theft = Theft.of(config, data)
    boxes = [
        LocalBlackBox(model, service_policy(config, data, model, None), pass_images=pass_images(config))
        for model in models
    ]
    targets = [Target(*each) for each in zip(boxes, transfers, skips, strict=True)]
    return bench.steal(theft, targets)


def removals(bench: Workbench) -> list[RemovalResult]:
    """Try every removal of the config on every model that it names."""
    config = bench.config
    results: list[RemovalResult] = []
    holders: dict[str, tuple[ImageModel, ThiefData]] = {}  # each model is queried once with all of the thief's images
    of = len(config.removal.methods) * len(config.removal.tried_on)
    for choice in config.removal.methods:
        for on in config.removal.tried_on:
            name = step_name("removals", choice, on)
            result = bench.steps.find(name, RemovalResult)
            if result is None:
                bench.on_phase("removal", len(results) + 1, of)
                if on not in holders:
                    model = bench.suspects[on].load()
                    asked = None if on == "substitute" else model
                    holders[on] = model, holdings(config, bench.data, bench.transfer, asked)
                model, thief = holders[on]
                result = _remove(bench, choice, on, model, replace(thief, snapshots=_snapshots(bench, name)))
                bench.steps.keep(name, result)
                bench.steps.discard(name)
                bench.on_step(result)
            results.append(result)
    return results


def _snapshots(bench: Workbench, name: str) -> Snapshots | None:
    """Return where a step stores its training snapshots; None in memory."""
    place = bench.steps.unfinished(name)
    if place is None:
        return None
    return Snapshots(*place, bench.config.resources.snapshot_every_s, PATIENCE.notify)


def _remove(bench: Workbench, choice: Choice, on: SuspectName, model: ImageModel, thief: ThiefData) -> RemovalResult:
    removal: Removal = choice.build()
    started = time.perf_counter()
    left = removal.remove(model, thief, derive(bench.config.seed, "removal"))
    seconds = time.perf_counter() - started
    return RemovalResult(
        removal=cleaned(choice.resolved()),
        strength=removal.strength,
        tried_on=on,
        before=bench.suspects[on].report,
        after=bench.proof.judge(left),
        seconds=seconds,
    )


def holdings(config: ExperimentConfig, data: Splits, transfer: TransferSet, asked: ImageModel | None) -> ThiefData:
    """Return the remover's data: the thief's images and their answers, at the largest budget.

    The answers of the victim's API would carry the mark into a null model, so a null model is queried itself. A
    data-free thief has stored no image: then the pool is used, and ``check`` rejects removals on its substitute.

    Args:
        config: The experiment.
        data: Its data.
        transfer: The thief's transfer set.
        asked: The model to query; None takes the API's answers.
    """
    pool, budget = data.thief_pool.images, config.thief.budgets[-1]
    count = min(budget, len(transfer))
    images = transfer.training_images(pool, count)
    answers = transfer.prefix(count)[1][transfer.for_training(count)]
    if not len(images):
        images = pool[:budget]
    if asked is not None:
        answers = metrics.probabilities(asked, images)
    make_model = partial(build_network, config.thief.model, data.shape, data.classes)
    return ThiefData(images, answers, make_model, config.thief.training)


def detections(bench: Workbench) -> list[DetectionResult]:
    """Try every detection of the config on every model that it names.

    The detector uses images of the thief's pool. Reverse-engineered triggers are applied to held-out images and scored
    on the stolen model, as in the paper, whichever model they come from.
    """
    results: list[DetectionResult] = []
    of = len(bench.config.detection.methods) * len(bench.config.detection.tried_on)
    for choice in bench.config.detection.methods:
        for on in bench.config.detection.tried_on:
            name = step_name("detections", choice, on)
            result = bench.steps.find(name, DetectionResult)
            if result is None:
                bench.on_phase("detection", len(results) + 1, of)
                result = _detect(bench, choice, on)
                bench.steps.keep(name, result)
                bench.on_step(result)
            results.append(result)
    return results


def _detect(bench: Workbench, choice: Choice, on: SuspectName) -> DetectionResult:
    config, data, key = bench.config, bench.data, bench.proof.key
    detection: Detection = choice.build()
    seed = derive(config.seed, "detection")
    pool = data.thief_pool.images
    clean = pool[numpy_generator(seed, "held").permutation(len(pool))[: config.detection.images]]
    samples = bench.proof.verifier.samples("detection")
    names = data.test.class_names
    started = time.perf_counter()
    evidence = detection.inspect(bench.suspects[on].load(), clean, None if samples is None else samples.images, seed)
    seconds = time.perf_counter() - started
    stolen = bench.suspects["substitute"].load() if evidence.triggers else None
    return DetectionResult(
        detection=cleaned(choice.resolved()),
        tried_on=on,
        flagged=[names[label] for label in evidence.flagged],
        target=names[key.target_class] if key is not None and key.target_class >= 0 else None,
        numbers=dict(evidence.numbers),
        triggers=[
            reversed_trigger(trigger, data.verification, stolen) for trigger in evidence.triggers if stolen is not None
        ],
        seconds=seconds,
    )


def step_name(kind: str, choice: Choice, on: str) -> str:
    """Name a step by its component, the component's parameters, and the model that it is tried on."""
    return f"{kind}/{choice.label}-{digest(identity(choice))}-{on}"


def reversed_trigger(trigger: Trigger, held_out: ImageSet, stolen: nn.Module) -> ReversedTrigger:
    """Score a trigger on a model: how many held-out images of other classes it turns into its class."""
    others: Images = held_out.images[held_out.labels != trigger.label]
    turned = metrics.predictions(stolen, trigger.on(others)) == trigger.label
    return ReversedTrigger(
        label=held_out.class_names[trigger.label],
        norm=trigger.norm,
        success=trigger.success,
        on_substitute=proportion(int(turned.sum()), len(turned)),
        picture=_png(trigger),
    )


def _png(trigger: Trigger) -> str:
    """Draw mask times pattern as a PNG file, base64."""
    import torch
    from torchvision.io import encode_png

    drawn = (trigger.mask * trigger.pattern * 255).round().clip(0, 255).astype(np.uint8)
    channels = drawn[:3] if len(drawn) >= 3 else drawn[:1]
    data = encode_png(torch.from_numpy(np.ascontiguousarray(channels)))
    return base64.b64encode(data.numpy().tobytes()).decode("ascii")
