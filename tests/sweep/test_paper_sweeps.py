"""The sweeps in the paper's setting, each run to its end on a few drawn images of the same shape for an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_data import draw

from mea_ray.config import ExperimentConfig, build, load_sweep, merge
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data.arrays import save_arrays
from mea_ray.experiment.local import run_in_memory
from mea_ray.results.records import TrialResult
from mea_ray.sweep.space import axes, experiment_at, probes

ROOT = Path(__file__).parents[2]
SHAPES = {"cifar10": (10, 3, 32), "cifar100": (100, 3, 32), "fashion_mnist": (10, 1, 28), "youtube_faces": (8, 3, 64)}
"""Classes, channels and size of each dataset; of YouTube Faces, as many persons as the test needs."""
FILES = sorted(path for path in (ROOT / "sweeps").glob("paper_*.yaml") if not path.stem.endswith("_digits"))
EPOCH = {"epochs": 1, "batch_size": 32}
FEW: dict[str, Any] = {
    "victim.training": EPOCH,
    "thief.training": EPOCH,
    "thief.budgets": [40],
    "verification.samples": 20,
    "verification.probe_images": 60,
    "splits.verification_fraction": 0.5,
    "detection.images": 20,
}


def drawn(name: str, path: Path) -> None:
    classes, channels, size = SHAPES[name]
    parts = []
    for seed, count in enumerate((max(160, 4 * classes), max(120, 12 * classes))):
        images, labels = draw(count, classes, size, channels, seed)
        parts.append(ImageSet(images, labels, tuple(f"class {label}" for label in range(classes))))
    save_arrays(path, Dataset("arrays", parts[0], parts[1]))


def small(config: ExperimentConfig, data: Path) -> ExperimentConfig:
    """Return the experiment with few images, one epoch and narrow networks; all else is as in the file."""
    changes = {**FEW, "data": {"name": "arrays", "path": str(data)}}
    changes |= {f"{owner}.model.width": 0.0625 for owner in ("victim", "thief")}
    if config.victim.watermark.name == "mea_defender_two_stage":
        few = {"epochs": 1, "fixed_samples": 8}
        changes |= {"victim.watermark.first": few, "victim.watermark.second": few}
    if config.thief.attack.name == "jbda":
        changes["thief.attack.seed_size"] = 20
    tree = merge(config.resolved(), changes)
    for method in tree["removal"]["methods"]:
        method |= {"epochs": 1} if "epochs" in method else {}
    tree["removal"]["methods"] = tree["removal"]["methods"][:4]
    tree["detection"]["methods"] = [method for method in tree["detection"]["methods"] if method["name"] == "lof"]
    for mixing in (tree["victim"]["watermark"].get("mixing", {}).get("combiner", {}),):
        mixing |= {"steps": 3, "width": 2, "latent": 8} if mixing.get("name") == "autoencoder" else {}
    return build(ExperimentConfig, tree)


def runs() -> Iterator[Any]:
    for path in FILES:
        sweep = load_sweep(path)
        # Another seed of the thief runs no other code.
        chosen = [axis for axis in axes(sweep) if axis.path != "seed"]
        for place, point in enumerate(probes(chosen) if chosen else [{}]):
            # The first point of the smallest network shows in every run of the tests that the files can be run.
            marks = () if path.stem == "paper_evasion" and not place else (pytest.mark.slow,)
            yield pytest.param(path, point, id=f"{path.stem}-{place}", marks=marks)


@pytest.mark.parametrize(("path", "point"), runs())
def test_a_sweep_of_the_paper_runs_to_its_end(path: Path, point: dict[str, Any], tmp_path: Path) -> None:
    sweep = load_sweep(path)
    config = experiment_at(sweep, point)
    drawn(config.data.name, tmp_path / "drawn.npz")
    chosen = small(config, tmp_path / "drawn.npz")
    result = run_in_memory(chosen)
    assert isinstance(result, TrialResult) and result.status == "finished"
    budget = chosen.thief.budgets[-1]
    assert 0 < result.queries_charged <= budget and len(result.rungs) == 1
    assert len(result.stolen_nulls) == chosen.verification.stolen_null_models
    wanted = len(chosen.removal.methods) * len(chosen.removal.tried_on)
    assert len(result.removals) == wanted and all(0 <= each.after.accuracy <= 1 for each in result.removals)
    reports = [result.victim_report, *result.null_reports, result.rungs[0].report]
    assert all(each.wsr is not None and np.isfinite(each.accuracy) for each in reports)


def test_the_schedules_are_those_of_the_authors() -> None:
    sweep = load_sweep(ROOT / "sweeps" / "paper_cifar10.yaml")
    first, second = (experiment_at(sweep, point) for point in probes(axes(sweep)))
    stages = first.victim.watermark.params
    assert [stages[name].epochs for name in ("first", "second")] == [100, 100]
    assert [stages[name].learning_rate for name in ("first", "second")] == [1e-3, 1e-4]
    assert second.victim.watermark.params["weights"].method == "mgda"
    for config in (first, second):
        assert config.victim.training.epochs == config.thief.training.epochs == 100
        assert config.thief.learning.temperature == 7.0 and config.thief.budgets == (50_000,)
        assert config.verification.null_models >= 1 and config.verification.stolen_null_models >= 1
    requery = load_sweep(ROOT / "sweeps" / "paper_cifar10_requery.yaml")
    assert requery.base.thief.budgets == (50_000 * 100,) and requery.base.thief.attack.params["requery"]
    assert {str(point) for point in probes(axes(requery))} == {str(point) for point in probes(axes(sweep))}
