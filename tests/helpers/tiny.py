"""Small experiments and sweeps on digits, for tests that run a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mea_ray.config import ExperimentConfig, SweepConfig, build, merge

SMALL = {
    "data.image_size": 12,
    "victim.insecure_key_from_seed": True,
    "victim.training.learning_rate": 2e-3,
    "victim.model.width": 0.25,
    "victim.training.epochs": 12,
    "victim.training.augment": [],
    "victim.training.batch_size": 64,
    "thief.model.width": 0.25,
    "thief.training.epochs": 10,
    "thief.training.augment": [],
    "thief.training.batch_size": 64,
    "thief.budgets": [200, 900],
    "thief.attack.query_chunk": 128,
}


def config(**changes: Any) -> ExperimentConfig:
    """The small experiment; in keyword names ``__`` stands for a dot."""
    tree = {
        "data": "digits",
        "victim": {"model": "vgg_like", "watermark": "mea_defender"},
        "thief": {"model": "vgg_like", "attack": "distillation"},
    }
    paths = {key.replace("__", "."): value for key, value in changes.items()}
    return build(ExperimentConfig, merge(tree, {**SMALL, **paths}))


def without_durations(value: Any) -> Any:
    """A result as plain JSON types, without how long things took and on what."""
    if isinstance(value, dict):
        return {k: without_durations(v) for k, v in value.items() if k not in {"seconds", "device", "versions", "date"}}
    return [without_durations(item) for item in value] if isinstance(value, list) else value


TINY = {"name": "vgg_like", "width": 0.0625}


def tiny_sweep(storage: Path, accounts: int = 1, **more: Any) -> SweepConfig:
    """Two budgets on digits with networks that train in a second; the rate makes the questions take a while."""
    base = {
        "storage": str(storage),
        "victim": {"model": TINY, "training": {"epochs": 1}, "insecure_key_from_seed": True},
        "thief": {"model": TINY, "training": {"epochs": 1}, "budgets": [48, 96], "accounts": accounts},
        "verification": {"samples": 50, "stolen_null_models": 1},
        "removal": {"methods": [{"name": "pruning", "rate": 0.5}, "quantisation"]},
        "detection": {"methods": ["lof"], "images": 100},
        "service": {
            "cpus_per_replica": 0.5,
            "request_images": 16,
            "rate": {"images_per_second": 16, "burst": 16},
        },
        "tracking": {"wandb": "disabled"},
    }
    return build(SweepConfig, {"name": "s", "base": base, "space": {"seed": {"grid": [0, 1, 2]}}, **more})
