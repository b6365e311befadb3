"""Every scheme, pretext task and weighting of losses is killed after each of its epochs, and ends the same.

A new scheme is tested here the day its line is added. One whose objective has a state that is not in ``memory`` ends
with other weights; one that says it is not ``resumable`` is trained from its start again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.cli.catalogue import table
from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.core.types import Splits
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.owner import TrainedModel, train_null, train_victim
from mea_ray.storage.remote import Storage
from mea_ray.training.snapshot import Snapshots
from mea_ray.watermarks.base import Stage, Watermark

BASE: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 8},
    "victim": {
        "insecure_key_from_seed": True,
        "model": {"name": "vgg_like", "width": 0.0625},
        "training": {"epochs": 3, "batch_size": 50, "augment": ["crop"], "crop_padding": 1},
    },
    "verification": {"shadow": {"thieves": 1, "null_models": 1}},
}
ENCODER: dict[str, Any] = {"victim.pretext": "simclr", "service.policy": "embedding"}
MEA = {"name": "mea_defender", "warmup": 0.0, "samples": {"mixes": 4, "adverse": 3}}
SETTINGS: dict[str, dict[str, Any]] = {
    "mea_defender_two_stage": {"first": {"epochs": 2, "fixed_samples": 8}},
    "ewe": {"plain_part": 0.3, "ratio": 1},
    "rehearsal": {"part": 0.34, "thieves": {"warmup": 1}},
}
"""Options with which every stage has more than one epoch."""


class Killed(Exception):
    """The process died here."""


def few(config: ExperimentConfig) -> Splits:
    data = load_splits(config)
    return replace(data, victim_train=data.victim_train.take(np.arange(150)))


def trained(config: ExperimentConfig, data: Splits, snapshots: Snapshots | None, *, dies: bool, null: bool) -> Any:
    def on_epoch(record: dict[str, Any]) -> None:
        if dies and "resumed" not in record:
            raise Killed

    return (
        train_null(config, data, 0, on_epoch, snapshots)
        if null
        else train_victim(config, data, on_epoch, None, snapshots)
    )


def killed_after_every_epoch(config: ExperimentConfig, data: Splits, folder: Path, *, null: bool) -> tuple[Any, int]:
    storage, kills = Storage(str(folder)), 0
    while True:
        torch.rand(kills + 1)  # another process has another global stream
        try:
            result = trained(config, data, Snapshots(storage, "states", every_s=0.0), dies=kills < 12, null=null)
        except Killed:
            kills += 1
        else:
            return result, kills


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(one: TrainedModel, other: TrainedModel) -> None:
    weights = other.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())
    records = [[{k: v for k, v in r.items() if k != "seconds"} for r in each.info["history"]] for each in (one, other)]
    assert records[0] == records[1] and one.info["images"] == other.info["images"]
    if one.key is not None and other.key is not None:
        assert one.key.settings == other.key.settings
        assert all(np.array_equal(value, other.key.tensors[name]) for name, value in one.key.tensors.items())


def stages(config: ExperimentConfig, data: Splits) -> list[Stage]:
    scheme: Watermark = config.victim.watermark.build()
    key = scheme.make_key(data.victim_train, 0)
    if not config.encodes:
        return scheme.stages(key, data.victim_train)
    return scheme.encoder_stages(key, data.victim_train, config.victim.pretext.build())


def goes_on(paths: dict[str, Any], folder: Path, *, null: bool = False) -> None:
    config = build(ExperimentConfig, merge(BASE, {**paths, "storage": str(folder)}))
    data = few(config)
    whole = trained(config, data, None, dies=False, null=null)
    result, kills = killed_after_every_epoch(config, data, folder, null=null)
    if all(stage.objective.resumable for stage in stages(config, data)):
        assert kills == len(whole.info["history"]), "an epoch was trained twice, or was not killed"
    same(result, whole)


@pytest.mark.parametrize("name", [name for name in table("watermarks").names() if name != "dawn"])
def test_a_scheme_goes_on(name: str, tmp_path: Path) -> None:
    scheme = table("watermarks").build(name)
    encoder = ENCODER if scheme.encoders_only else {}
    goes_on({"victim.watermark": {"name": name, **SETTINGS.get(name, {})}, **encoder}, tmp_path)


@pytest.mark.parametrize("name", [name for name in table("pretexts").names() if name != "none"])
def test_a_pretext_task_goes_on(name: str, tmp_path: Path) -> None:
    goes_on({**ENCODER, "victim.pretext": name, "victim.watermark": "mea_carrier_encoder"}, tmp_path)


@pytest.mark.parametrize("method", table("aggregators").names())
def test_a_weighting_of_losses_goes_on(method: str, tmp_path: Path) -> None:
    goes_on({"victim.watermark": {**MEA, "weights": method}}, tmp_path)


def test_a_null_model_goes_on(tmp_path: Path) -> None:
    goes_on({"victim.training.optimizer": "sgd", "victim.training.accumulate_steps": 2}, tmp_path, null=True)


def test_published_gradients_that_leak_go_on(tmp_path: Path) -> None:
    scheme = {"name": "sslguard", "batch_size": 64, "gradients": "leak"}
    goes_on({**ENCODER, "victim.watermark": scheme}, tmp_path)
