"""One experiment in one process, step by step: data, victim, null models, theft, proof. No Ray.

Each step is a function of the config and of what the steps before it made, picklable, with all of its randomness
derived from the config's seeds. The parallel program calls these very functions in its actors; ``run`` calls them one
after the other, for tests and for debugging.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mea_ray.attacks.base import Attack, Rung
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.colluding import Colluding, CountingClient, account_names, account_share
from mea_ray.blackbox.ledger import Ledger, RateLimit
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.policies import AnswerPolicy
from mea_ray.blackbox.prada import query_log_record
from mea_ray.blackbox.query_log import QueryLog
from mea_ray.config import ExperimentConfig, digest, write_yaml
from mea_ray.core.seeding import derive
from mea_ray.core.types import BlackBox, ImageSet
from mea_ray.core.versions import versions
from mea_ray.data.statistics import channel_statistics
from mea_ray.evaluation import metrics
from mea_ray.experiment.checks import Prepared, build_network, check, learning, settings
from mea_ray.experiment.detecting import detections
from mea_ray.experiment.proof import Proofs, assess, null_rate, predictions
from mea_ray.experiment.reading import read
from mea_ray.experiment.removing import Suspect, removals
from mea_ray.experiment.serving import answer_policy, split
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport, RungResult, TrialResult
from mea_ray.training.device import device as this_device
from mea_ray.training.device import device_name, fork_devices
from mea_ray.training.engine import train
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key, Watermark

__all__ = ["LocalBlackBox", "Prepared", "assess", "check", "null_rate", "predictions"]  # of other files, for who steps

OnEpoch = Callable[[dict[str, Any]], None]
"""Called after each epoch with the engine's record and the name of the ``stage``."""


@dataclass(frozen=True)
class VictimBundle:
    """A trained victim.

    Attributes:
        model: On the CPU, in eval mode.
        key: The owner's secret; None if the watermark is ``none``.
        info: Plain JSON types: ``seconds``, ``images`` and ``history`` (records of all epochs, with their stage).
    """

    model: ImageModel
    key: Key | None
    info: dict[str, Any] = field(default_factory=dict)


def prepare(config: ExperimentConfig) -> Prepared:
    """Load and split the data, see `serving.split`."""
    splits = split(config)
    return Prepared(splits, splits.victim_train.shape, splits.victim_train.classes)


def train_victim(config: ExperimentConfig, prepared: Prepared, on_epoch: OnEpoch | None = None) -> VictimBundle:
    """Train the watermarked model: draw the key, then run the scheme's stages one after the other on one model."""
    return _train_owner(config, prepared, config.victim.watermark.build(), config.victim.seed, on_epoch)


def train_null(config: ExperimentConfig, prepared: Prepared, index: int, on_epoch: OnEpoch | None = None) -> ImageModel:
    """Train the ``index``-th innocent model: as the victim, without a watermark, from another seed."""
    watermark: Watermark = WATERMARKS.build("none")
    return _train_owner(config, prepared, watermark, derive(config.victim.seed, "null", index), on_epoch).model


def budget_to_register(config: ExperimentConfig) -> int:
    """Return the images that the thief must be allowed in all: the largest budget, unless the attack asks anew."""
    attack: Attack = config.thief.attack.build()
    return attack.query_cost(config.thief.budgets)


def already_asked(config: ExperimentConfig, transfer: TransferSet) -> int:
    """Return the images that the thief has asked before, by what its transfer set holds."""
    attack: Attack = config.thief.attack.build()
    return attack.answered_images(transfer, config.thief.budgets)


def accounts_to_register(config: ExperimentConfig, client: str) -> dict[str, int]:
    """Return the thief's clients, named after ``client``, with the images that each must be allowed."""
    names, budget = account_names(client, config.thief.accounts), budget_to_register(config)
    return {name: account_share(index, len(names), budget) for index, name in enumerate(names)}


def open_blackbox(
    config: ExperimentConfig,
    client: str,
    transfer: TransferSet,
    account: Callable[[str, int], CountingClient],
    *,
    at_once: bool = False,
) -> BlackBox:
    """Return what the thief queries: its account, or all of its accounts as one.

    Args:
        config: The experiment.
        client: What the accounts are named after, see `accounts_to_register`.
        transfer: Its answers so far.
        account: Opens the account of a name that has asked so many images before.
        at_once: The accounts may be asked at the same time.
    """
    names, asked = account_names(client, config.thief.accounts), already_asked(config, transfer)
    opened = [account(name, account_share(index, len(names), asked)) for index, name in enumerate(names)]
    if len(opened) == 1:
        return opened[0]
    return Colluding(opened, budget=budget_to_register(config), start_at=asked, at_once=at_once)


def run_attack(
    config: ExperimentConfig,
    prepared: Prepared,
    blackbox: BlackBox,
    transfer: TransferSet | None = None,
    skip: Container[int] = (),
) -> Iterator[Rung]:
    """Steal the model behind ``blackbox``: one fresh substitute per budget that is not in ``skip``, smallest first.

    The attack gets the thief's pool and nothing else of the data: no test images, and of the pool's labels, which its
    publisher gave, only what an attack says it uses (Knockoff's adaptive policy).
    """
    attack: Attack = config.thief.attack.build()
    return attack.run(
        blackbox,
        prepared.splits.thief_pool.images,
        budgets=config.thief.budgets,
        make_model=partial(build_network, config.thief.model, prepared),
        training=settings(config.thief.training),
        seed=derive(config.seed, "thief"),
        transfer=transfer,
        skip=skip,
        learning=learning(config),
        labels=prepared.splits.thief_pool.labels,
    )


def steal_null(
    config: ExperimentConfig, prepared: Prepared, model: ImageModel, key: Key | None, *, null_rate: float | None
) -> RungResult:
    """Steal an innocent model as the victim is stolen, and ask the owner's key about that thief: the theft's control.

    What a thief learns from answers may look like the mark without being one (a poor substitute errs towards some
    class); only a thief of an innocent model shows how much. The same attack, images and seeds at the largest budget,
    against a query API of its own in this process.

    Args:
        config: The experiment.
        prepared: Its data.
        model: The innocent model.
        key: The key of the owner whose model it is not.
        null_rate: See `null_rate`.

    Returns:
        The largest rung; its fidelity is to ``model``.
    """
    thief = config.thief.model_copy(update={"budgets": config.thief.budgets[-1:]})
    config = config.model_copy(update={"thief": thief})
    blackbox = LocalBlackBox(model, _policy(config, prepared, model, None), pass_images=config.service.pass_images)
    (rung,) = run_attack(config, prepared, blackbox)
    return rung_result(rung, assess(config, prepared, rung.model, key, victim=model, null_rate=null_rate))


def run(config: ExperimentConfig, storage: str | Path | None = None, on_epoch: OnEpoch | None = None) -> TrialResult:
    """Run the whole experiment in this process.

    Args:
        config: The experiment.
        storage: Folder for the resolved config, the ledger, the transfer set and the result; in memory when None. An
            interrupted run that is started again in the same folder repeats no query.
        on_epoch: Called after each epoch of the victim and of the null models.

    Returns:
        The result, as the parallel program writes it.

    Raises:
        ConfigError: The experiment cannot be run; nothing was trained.
    """
    started = time.perf_counter()
    folder = Path(storage) if storage is not None else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_yaml(config, folder / "config.yaml")
    prepared = prepare(config)
    check(config, prepared)
    victim = train_victim(config, prepared, on_epoch)
    nulls = [train_null(config, prepared, index, on_epoch) for index in range(config.verification.null_models)]

    transfer = TransferSet(folder / "transfer" if folder is not None else None)
    ledger = Ledger(folder / "ledger" if folder is not None else None)
    log = QueryLog(folder / "queries" if folder is not None else None)
    accounts = accounts_to_register(config, "thief")
    proofs = Proofs(
        config, prepared, victim.key, victim.model, lambda: nulls, lambda: [log.of(client) for client in accounts]
    )
    said = predictions(config, prepared, victim.model)

    def judge(model: torch.nn.Module, budget: int = config.thief.budgets[-1]) -> ModelReport:
        proof = proofs.at(budget)
        return assess(config, prepared, model, proof.key, victim=said, null_rate=proof.null_rate)

    try:
        rate = config.service.rate
        policy = _policy(config, prepared, victim.model, victim.key)
        for client, budget in accounts.items():
            ledger.register(client, budget, RateLimit(rate.images_per_second, rate.burst) if rate is not None else None)

        def open_account(client: str, start_at: int) -> LocalBlackBox:
            return LocalBlackBox(
                victim.model,
                policy,
                ledger,
                client,
                pass_images=config.service.pass_images,
                start_at=start_at,
                log=log,
                query_log_images=config.service.query_log_images,
            )

        blackbox = open_blackbox(config, "thief", transfer, open_account)
        stolen = list(run_attack(config, prepared, blackbox, transfer))
        rungs = [rung_result(rung, judge(rung.model, rung.budget)) for rung in stolen]
        charged = sum(map(ledger.charged, accounts))
        named = 1 if config.encodes else prepared.classes
        query_log = {client: query_log_record(log.of(client), named) for client in accounts}
        proof = proofs.at(config.thief.budgets[-1])
        controls = [
            steal_null(config, prepared, model, proof.key, null_rate=proof.null_rate)
            for model in nulls[: config.verification.stolen_null_models]
        ]
        suspects = {
            "substitute": Suspect(lambda: stolen[-1].model, rungs[-1].report),
            "victim": Suspect(lambda: victim.model, proof.victim),
            "null_model": Suspect(lambda: nulls[0], proof.nulls[0]),
        }
        removed = removals(config, prepared, transfer, suspects, judge)
        found = detections(config, prepared, suspects, proof.key)
    finally:
        ledger.close()
        log.close()
    names = _names(config)
    result = TrialResult(
        trial=digest(config.resolved()),
        config=config.resolved(),
        victim=names[0],
        nulls=names[1:],
        victim_report=proof.victim,
        null_reports=proof.nulls,
        rungs=rungs,
        stolen_nulls=controls,
        removals=removed,
        detections=found,
        queries_charged=charged,
        query_log=query_log,
        seconds=time.perf_counter() - started,
        device=device_name(),
        versions=versions(),
        status="finished",
    )
    if folder is not None:
        result.save(folder / "result.json")
    return result


def rung_result(rung: Rung, report: ModelReport) -> RungResult:
    """Return one point of the robustness curve."""
    return RungResult(
        budget=rung.budget,
        queries=rung.queries,
        report=report,
        epochs=rung.epochs,
        seconds=rung.seconds,
        curves={name: list(points) for name, points in rung.curves.items()},
    )


def _policy(config: ExperimentConfig, prepared: Prepared, model: ImageModel, key: Key | None) -> AnswerPolicy:
    """Return what the service of a model answers by, whose owner has this key."""
    return answer_policy(
        config.service.policy.build(),
        model,
        key,
        lambda: prepared.splits.victim_train.images,
        pass_images=config.service.pass_images,
    )


def _train_owner(
    config: ExperimentConfig, prepared: Prepared, watermark: Watermark, seed: int, on_epoch: OnEpoch | None
) -> VictimBundle:
    owned, validation = prepared.splits.victim_train, prepared.splits.victim_validation
    key = watermark.make_key(owned, derive(seed, "key"))
    with torch.random.fork_rng(fork_devices(this_device())):
        torch.manual_seed(derive(seed, "weights"))
        model = build_network(config.victim.model, prepared)
    model.set_normalisation(*channel_statistics(owned.images))
    history: list[dict[str, Any]] = []
    seconds, images = 0.0, 0
    pretext = config.victim.pretext.build() if config.encodes else None
    stages = watermark.stages(key, owned) if pretext is None else watermark.encoder_stages(key, owned, pretext)
    for position, stage in enumerate(stages):
        keywords = settings(config.victim.training, stage.changes(config.victim.training.epochs))

        def record(epoch: dict[str, Any], name: str = stage.name) -> None:
            history.append({"stage": name, **epoch})
            if on_epoch is not None:
                on_epoch(dict(history[-1]))

        report = train(
            model,
            stage.train.images,
            stage.train.labels,
            stage.objective,
            seed=derive(seed, "training", position),
            # Without early stop nobody reads the validation accuracy, so that it is not paid for.
            validate=partial(_accuracy, on=validation) if keywords["early_stop_patience"] is not None else None,
            on_epoch=record,
            **keywords,
        )
        seconds, images = seconds + report.seconds, images + report.images
    key = None if key is None else watermark.learned(key, stages)
    if config.encodes:
        model = read(config, prepared, model)
    return VictimBundle(model, key, {"seconds": seconds, "images": images, "history": history})


def _accuracy(model: torch.nn.Module, *, on: ImageSet) -> float:
    return metrics.accuracy(metrics.predictions(model, on.images), on.labels)


def _names(config: ExperimentConfig) -> list[str]:
    """Name the victim and its null models by what made them; in this process nothing is stored under these names."""
    tree = config.resolved()
    made_by = {name: tree[name] for name in ("data", "splits", "victim")}
    nulls = [digest({**made_by, "null": index}) for index in range(config.verification.null_models)]
    return [digest(made_by), *nulls]
