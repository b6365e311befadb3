"""The same victim, thief and seeds through memory, actors and HTTP: the same substitutes, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

import mea_ray
from mea_ray.config import ExperimentConfig, SweepConfig, build, merge
from mea_ray.experiment.local import run_local
from mea_ray.experiment.steal import steal
from mea_ray.sweep.runner import run_sweep

pytestmark = pytest.mark.slow
BUDGETS = [48, 96]


def settings(storage: Path) -> dict[str, Any]:
    return {
        "storage": str(storage),
        "victim": {"insecure_key_from_seed": True, "model": TINY, "training": {"epochs": 1}},
        "thief": {"model": TINY, "training": {"epochs": 1}, "budgets": BUDGETS},
        "verification": {"samples": 50},
        "service": {"request_images": 16, "cpus_per_replica": 0.5},
        "tracking": {"wandb": "disabled"},
    }


def contents(folder: Path, name: str) -> dict[str, str]:
    """Return the SHA-256 of each file of a name below a folder, by the name of the file's own folder."""
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(name)}


def test_memory_actors_and_http_give_the_same_substitutes(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = run_local(build(ExperimentConfig, settings(tmp_path / "memory")))

    sweep = {"name": "s", "base": settings(tmp_path / "actors")}
    (actors,) = run_sweep(build(SweepConfig, sweep)).results

    (victim,) = (tmp_path / "memory" / "artifacts" / "victims").iterdir()
    with mea_ray.serve(victim, port=0, state=tmp_path / "service") as served:
        monkeypatch.setenv("MEA_RAY_KEY", served.add_client("thief", budget=max(BUDGETS)))
        blackbox = {"thief.blackbox": {"url": served.url, "key": "env:MEA_RAY_KEY"}}
        thief = build(ExperimentConfig, merge(settings(tmp_path / "http"), blackbox))
        stolen = steal(thief, tmp_path / "http" / "stolen")
        (usage,) = served.usage()
    from ray import serve

    serve.shutdown()

    substitutes = contents(memory.folder / "trials", "model.safetensors")
    assert substitutes.keys() == {str(budget) for budget in BUDGETS}
    assert contents(tmp_path / "actors" / "s" / "trials", "model.safetensors") == substitutes
    assert contents(tmp_path / "http" / "stolen", "model.safetensors") == substitutes
    assert [rung.budget for rung in stolen] == BUDGETS
    assert memory.result.queries_charged == actors.queries_charged == usage["charged"] == max(BUDGETS)
    victims = [
        contents(tmp_path / door / "artifacts" / "victims", "model.safetensors") for door in ("memory", "actors")
    ]
    assert victims[0] == victims[1] and not (tmp_path / "http" / "artifacts").exists(), "one victim, trained twice"
