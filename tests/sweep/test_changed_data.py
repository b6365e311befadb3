"""Data that changed under the same settings: other names, and a sweep that was started with the old ones refuses."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from report_results import trial

from mea_ray.config import ExperimentConfig, SweepConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.data import Contents
from mea_ray.experiment.local import run_local
from mea_ray.experiment.names import Names
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.plan import check_same, plan
from mea_ray.sweep.runner import run_sweep

TINY = {"name": "vgg_like", "width": 0.0625}


def draw(folder: Path, *, swapped: bool = False, count: int = 30) -> Path:
    """Draw one, two and three bars in the folders a, b and c; swapped: those of a are in c and the other way round."""
    shutil.rmtree(folder, ignore_errors=True)
    for place, name in enumerate("abc"):
        bars = (2 - place if swapped else place) + 1
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng(1000 * bars + number).integers(0, 60, (12, 12), dtype=np.uint8)
            pixels[:, 2 : 2 + 3 * bars : 3] = 220
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def tree(path: str | Path, storage: Path, **more: Any) -> dict[str, Any]:
    return {
        "storage": str(storage),
        "data": {"name": "image_folder", "path": str(path), "image_size": 12, "test_fraction": 0.4},
        "victim": {"model": TINY, "watermark": {"name": "mea_defender", "source_classes": [0, 1], "target_class": 2}},
        "thief": {"model": TINY, "budgets": [16]},
        "verification": {"samples": 16},
        "tracking": {"wandb": "disabled"},
        **more,
    }


def named(path: str | Path, **more: Any) -> Names:
    config = build(ExperimentConfig, tree(path, Path("storage"), **more))
    return Names.of(config, Contents().of(config))


def test_other_pictures_under_the_same_path_give_other_models(tmp_path: Path) -> None:
    training = {"epochs": 1, "batch_size": 32, "augment": []}
    settings = tree(draw(tmp_path / "data"), tmp_path / "s")
    settings["victim"]["training"] = settings["thief"]["training"] = training
    config = build(ExperimentConfig, settings)
    first = run_local(config)
    draw(tmp_path / "data", swapped=True)
    second = run_local(config)
    assert not second.reused and first.folder != second.folder
    assert first.result.victim != second.result.victim and first.result.nulls != second.result.nulls
    assert len(list((tmp_path / "s" / "artifacts" / "victims").iterdir())) == 2
    draw(tmp_path / "data")
    assert run_local(config).reused, "the old pictures are back, and so is all that was made from them"


@pytest.mark.parametrize("where", ["victim", "removal"])
def test_datasets_that_components_name_are_known_by_content(tmp_path: Path, where: str) -> None:
    def of(folder: Path) -> Names:
        inner = {"name": "image_folder", "path": str(folder), "image_size": 12, "test_fraction": 0.4}
        more: dict[str, Any]
        if where == "removal":
            step = {"name": "transfer_learning", "dataset": inner}
            more = {"removal": {"methods": [{"name": "chain", "steps": [step]}]}}
        else:
            scheme = {"name": "cfw", "dataset": inner, "kept_apart": 1}
            more = {"victim": {"model": TINY, "watermark": scheme}}
        return named(draw(tmp_path / "data"), **more)

    first, copied = of(draw(tmp_path / "other")), of(draw(tmp_path / "copy"))
    changed = of(draw(tmp_path / "other", swapped=True))
    assert first == copied, "the same pictures in another folder are the same experiment"
    assert changed.trial != first.trial
    assert (changed.victim != first.victim) == (where == "victim")
    assert changed.nulls == first.nulls


def test_a_sweep_whose_inner_dataset_changed_is_not_resumed(tmp_path: Path) -> None:
    draw(tmp_path / "data")
    inner = {"name": "image_folder", "path": str(draw(tmp_path / "other")), "image_size": 12, "test_fraction": 0.4}
    base = tree(
        tmp_path / "data", tmp_path / "s", removal={"methods": [{"name": "transfer_learning", "dataset": inner}]}
    )
    sweep = build(SweepConfig, {"name": "changed", "base": base})
    plan(sweep).save(tmp_path / "plan.json")
    check_same(tmp_path / "plan.json", plan(sweep))
    draw(tmp_path / "other", swapped=True)
    with pytest.raises(ConfigError, match="other have changed since this sweep was started"):
        check_same(tmp_path / "plan.json", plan(sweep))


def test_a_relative_path_means_the_pictures_of_its_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = {}
    for place, swapped in (("here", False), ("there", True), ("copy", False)):
        draw(tmp_path / place / "data", swapped=swapped)
        monkeypatch.chdir(tmp_path / place)
        collected[place] = named("data")
    assert collected["here"] == collected["copy"] == named(tmp_path / "here" / "data")
    assert collected["here"].victim != collected["there"].victim


def test_another_pool_gives_another_trial_of_the_same_victim(tmp_path: Path) -> None:
    draw(tmp_path / "data")
    draw(tmp_path / "pool")
    pool = {"splits": {"thief_pool": {"name": "image_folder", "path": str(tmp_path / "pool"), "test_fraction": 0.2}}}
    before = named(tmp_path / "data", **pool)
    draw(tmp_path / "pool", count=31)
    after = named(tmp_path / "data", **pool)
    assert before.trial != after.trial and before.data != after.data
    assert (before.victim, before.nulls) == (after.victim, after.nulls)


def test_another_shard_gives_another_victim(tmp_path: Path) -> None:
    def shard(number: int, of: int) -> None:
        pixels = np.random.default_rng(number).integers(0, 255, (24, 12, 12), dtype=np.uint8)
        rows = [{"image": {"bytes": png(image)}, "label": index % 3} for index, image in enumerate(pixels)]
        for part in ("train", "test"):
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{part}-{number:05d}-of-{of:05d}.parquet")

    shard(0, 1)
    data = {"data": {"name": "parquet", "path": str(tmp_path), "image_size": 12}}
    before = named(tmp_path, **data)
    for path in tmp_path.glob("*.parquet"):
        path.unlink()
    shard(0, 2)
    shard(1, 2)
    assert named(tmp_path, **data).victim != before.victim


def png(image: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


OPTUNA = {
    "space": {"thief.training.momentum": {"uniform": [0.1, 0.5]}},
    "search": {"name": "optuna", "samples": 1},
}


def started(tmp_path: Path, more: dict[str, Any], *, finished: bool) -> SweepConfig:
    """A sweep that was started with the pictures in ``data``, and ended or was interrupted."""
    base = tree(draw(tmp_path / "data"), tmp_path / "s")
    sweep = build(SweepConfig, {"name": "bars", "base": base, **more})
    folder = SweepFolder(sweep.base.storage, sweep.name)
    planned = plan(sweep)
    folder.open(sweep, planned, resume=False)
    if finished:
        made = trial(planned.trials[0].name, config=sweep.base.resolved())
        folder.save_result(made.model_copy(update={"point": planned.trials[0].point}))
    return sweep


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("more", [{}, OPTUNA], ids=["grid", "optuna"])
def test_a_sweep_is_not_resumed_with_other_data(
    tmp_path: Path, ray_session: None, more: dict[str, Any], finished: bool
) -> None:
    sweep = started(tmp_path, more, finished=finished)
    before = sorted(path for path in tmp_path.rglob("*") if "data" not in path.parts)
    draw(tmp_path / "data", swapped=True)
    with pytest.raises(ConfigError, match=rf"the data behind data.path={tmp_path / 'data'} have changed since"):
        run_sweep(sweep, resume=True)
    assert sorted(path for path in tmp_path.rglob("*") if "data" not in path.parts) == before


def test_a_sweep_is_not_resumed_with_another_pool(tmp_path: Path, ray_session: None) -> None:
    pool = {"name": "image_folder", "path": str(draw(tmp_path / "pool")), "test_fraction": 0.2}
    sweep = started(tmp_path, {"space": {"splits.thief_pool": {"grid": [pool]}}}, finished=False)
    draw(tmp_path / "pool", count=31)
    with pytest.raises(ConfigError, match=rf"the data behind .*path={tmp_path / 'pool'} have changed since"):
        run_sweep(sweep, resume=True)


def test_a_finished_sweep_is_displayed_without_its_data(tmp_path: Path) -> None:
    sweep = started(tmp_path, {}, finished=True)
    shutil.rmtree(tmp_path / "data")
    assert len(run_sweep(sweep, resume=True).results) == 1


def test_data_that_moved_are_the_same(tmp_path: Path) -> None:
    sweep = started(tmp_path, {}, finished=True)
    os.rename(tmp_path / "data", tmp_path / "moved")
    moved = build(SweepConfig, {"name": "bars", "base": tree(tmp_path / "moved", tmp_path / "s")})
    assert len(run_sweep(moved, resume=True).results) == 1
    assert run_sweep(moved, resume=True).failed == {}
    with pytest.raises(ConfigError, match="--resume"):
        run_sweep(sweep)
