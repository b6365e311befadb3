"""Every entry of every table goes through the path of a trial, is killed once in the middle, and goes on in its folder.

The entry point is the one of ``mea-ray run --local``. A new component is tested here the day its line is added: it
needs a line in ``SETTINGS`` only if its defaults are made for larger data. Watermarks, combiners, models, datasets and
pretext tasks are killed while the victim is trained, attacks and answer policies in a query, removals and detections in
their own work.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_data import written

from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.cli.catalogue import TABLES, table
from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.checks import build_network, check
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import LocalRun, run_local
from mea_ray.experiment.ports import OnEpoch
from mea_ray.experiment.theft import run_attack

pytestmark = pytest.mark.slow

TINY = {"name": "vgg_like", "width": 0.0625}
BASE: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 8},
    "splits": {"validation_fraction": 0.1},
    "victim": {
        "insecure_key_from_seed": True,
        "model": TINY,
        "watermark": "none",
        "training": {"epochs": 1, "batch_size": 256, "augment": []},
    },
    "thief": {"model": TINY, "budgets": [16, 40], "training": {"epochs": 1, "batch_size": 16, "augment": []}},
    "service": {"request_images": 8},
    "verification": {"samples": 40, "shadow": {"thieves": 1, "null_models": 1}},
    "detection": {"images": 100},
}
ENCODER = {"victim.pretext": "simclr", "service.policy": "embedding", "thief.attack": "feature_distillation"}
"""What makes victim and thief encoders; used for entries that refuse classifiers."""
SECTION = {
    "watermarks": "victim.watermark",
    "pretexts": "victim.pretext",
    "combiners": "victim.watermark.combiner",
    "attacks": "thief.attack",
    "removals": "removal.methods",
    "detections": "detection.methods",
    "models": "victim.model",
    "datasets": "data",
    "policies": "service.policy",
}
KINDS = [kind for kind in TABLES if kind in SECTION]
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("attacks", "active"): {"initial": 10, "round_images": 10},
    ("attacks", "black_box_dissector"): {"initial": 10, "round_images": 10, "variants": 2},
    ("attacks", "cloud_leak"): {"initial": 10, "round_images": 10, "candidates": 20, "steps": 2},
    ("attacks", "jbda"): {"seed_size": 10},
    ("attacks", "dfme"): {"batch_size": 2, "generator": {"width": 4}},
    ("attacks", "maze"): {"batch_size": 2, "generator": {"width": 4, "directions": 2}, "replay": {"images": 20}},
    ("detections", "abs"): {"images": 3, "candidates": 1, "per_layer": 1, "steps": 5},
    ("detections", "neural_cleanse"): {"steps": 5},
    ("combiners", "autoencoder"): {"steps": 5, "width": 2, "latent": 8},
    **{("models", name): {"width": 0.0625} for name in table("models").names()},
    ("removals", "attention_distillation"): {"teacher_epochs": 1, "epochs": 1, "layers": 2},
    ("removals", "unlearning"): {"steps": 5},
    ("removals", "transfer_learning"): {"images": 40, "epochs": 1},
    ("watermarks", "honeytrace"): {"triggers": 20, "neighbours": 5},
    ("watermarks", "rehearsal"): {"mixes": 4, "thieves": {"warmup": 1}},
    ("watermarks", "dawn"): {"rate": 0.4},
    ("watermarks", "sslguard"): {"batch_size": 64},
}
"""Parameters of entries whose defaults are made for larger data."""
ON_ENCODERS = {("watermarks", name) for name in ("mea_carrier_encoder", "mea_defender_encoder", "sslguard")}
"""Entries that are made for encoders, and whose check does not say so."""


def changes(kind: str, name: str) -> dict[str, Any]:
    """Return the config paths that put an entry into the experiment, with their values."""
    entry: Any = {"name": name, **SETTINGS.get((kind, name), {})}
    if kind in {"removals", "detections"}:
        entry = [entry]
    if kind == "combiners":
        return {"victim.watermark": {"name": "mea_carrier", "mixing": {"combiner": entry}}}
    if kind == "models":
        return {"victim.model": entry, "thief.model": entry}
    return {SECTION[kind]: entry, **(ENCODER if (kind, name) in ON_ENCODERS else {})}


def configured(paths: dict[str, Any], storage: Path) -> ExperimentConfig:
    """Return the small experiment with some settings; of encoders if the entry is made for these."""
    for more in ({}, ENCODER):
        config = build(ExperimentConfig, merge(BASE, {**more, **paths, "storage": str(storage)}))
        try:
            check(config, load_splits(config))
        except ConfigError as error:
            if more or "victim.pretext" not in str(error):
                raise
        else:
            return config
    raise AssertionError("unreachable")


class Killed(Exception):
    """The process died here."""


def comparable(run: LocalRun) -> Any:
    """Return a result without what a clock or a folder decides."""

    def plain(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: plain(item) for key, item in tree.items() if key not in {"seconds", "storage", "date"}}
        return [plain(item) for item in tree] if isinstance(tree, list) else tree

    return plain(json.loads(run.result.model_dump_json()))


def run_twice(
    entry: str,
    whole: ExperimentConfig,
    killed: ExperimentConfig,
    kill: Callable[[], None] = lambda: None,
    on_epoch: OnEpoch = lambda role, name, epoch: None,
) -> LocalRun:
    """Run an experiment at once, and once more with a kill in the middle; both must end with the same result.

    Args:
        entry: Names the folders: two entries may make the same experiment.
        whole: The experiment.
        killed: The same, in a storage of its own if the victim is to be made again.
        kill: Arranges the death, or
        on_epoch: dies while the victim is trained.
    """
    expected = run_local(whole, f"{entry}-whole")
    kill()
    with pytest.raises(Killed):
        run_local(killed, f"{entry}-killed", on_epoch=on_epoch)
    resumed = run_local(killed, f"{entry}-killed")
    assert not resumed.reused
    assert comparable(resumed) == comparable(expected)
    assert [rung.budget for rung in resumed.result.rungs] == [16, 40]
    assert all(0 < rung.queries <= rung.budget for rung in resumed.result.rungs)
    charged = charges(resumed)
    assert sum(charged.values()) == resumed.result.queries_charged > 0
    assert {client: log.images for client, log in resumed.result.query_log.items()} == charged
    return resumed


def charges(run: LocalRun) -> dict[str, int]:
    ledger = Ledger(run.folder / "ledgers" / f"{run.result.trial}.sqlite")
    try:
        return {client: ledger.charged(client) for client in ledger.clients()}
    finally:
        ledger.close()


def die_once(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, at: int) -> None:
    """Have the ``at``-th call of a method do its work, and the process die before anybody learns of it."""
    works, calls = getattr(owner, method), [0]

    def dying(self: Any, *args: Any, **more: Any) -> Any:
        done = works(self, *args, **more)
        calls[0] += 1
        if calls[0] == at:
            raise Killed
        return done

    monkeypatch.setattr(owner, method, dying)


def entries(*kinds: str) -> pytest.MarkDecorator:
    pairs = [(kind, name) for kind in kinds for name in table(kind).names()]
    return pytest.mark.parametrize(("kind", "name"), pairs, ids=[f"{kind}-{name}" for kind, name in pairs])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage whose victims serve all trials that do not change them."""
    return tmp_path_factory.mktemp("shared")


@entries("attacks", "policies")
def test_a_trial_killed_in_a_query_asks_nothing_twice(
    kind: str, name: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(changes(kind, name), shared)
    run = run_twice(f"{kind}-{name}", config, config, lambda: die_once(monkeypatch, LocalBlackBox, "query", at=2))
    assert run.result.queries_charged == max(rung.queries for rung in run.result.rungs) <= 40


@entries("attacks")
def test_an_attack_follows_from_its_seed(kind: str, name: str, tmp_path: Path) -> None:
    config = configured(changes(kind, name), tmp_path)
    data = load_splits(config)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        victim = build_network(config.victim.model, data.shape, data.classes).eval()
    policy = config.service.policy.build()
    weights = []
    for seed in (0, 0, 1):
        seeded = config.model_copy(update={"seed": seed})
        *_, rung = run_attack(seeded, data, LocalBlackBox(victim, policy, pass_images=16))
        weights.append(torch.cat([weight.flatten() for weight in rung.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@entries("removals", "detections")
def test_a_trial_killed_after_its_rungs_repeats_only_what_it_lost(
    kind: str, name: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(changes(kind, name), shared)
    method = {"removals": "remove", "detections": "inspect"}[kind]
    component: Any = table(kind).resolve(name)
    run = run_twice(f"{kind}-{name}", config, config, lambda: die_once(monkeypatch, component, method, at=2))
    assert [each.tried_on for each in run.result.removals + run.result.detections] == ["substitute", "null_model"]


@entries("watermarks", "combiners", "models", "pretexts")
def test_a_trial_killed_while_it_trains_its_victim_makes_the_same_one(kind: str, name: str, tmp_path: Path) -> None:
    twice(changes(kind, name), tmp_path)


@entries("datasets")
def test_a_trial_on_any_dataset(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"name": name, **SETTINGS.get((kind, name), written(name, tmp_path / "files", monkeypatch))}
    twice({"data": data}, tmp_path)


def twice(paths: dict[str, Any], folder: Path) -> None:
    def killer(role: str, name: str, epoch: dict[str, Any]) -> None:
        if role == "victim":
            raise Killed

    whole = configured(paths, folder / "whole")
    run_twice("entry", whole, whole.model_copy(update={"storage": str(folder / "killed")}), on_epoch=killer)
