"""What a plan says of time, memory and room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from golden import MadeUp
from tiny import TINY

from mea_ray.cli.main import main
from mea_ray.cli.options import OK, USAGE
from mea_ray.config import KeepConfig, SweepConfig, build
from mea_ray.experiment import owner
from mea_ray.experiment.data import load_splits, splits_key
from mea_ray.sweep import estimate as module
from mea_ray.sweep.broker import demand_of
from mea_ray.sweep.estimate import Measured, estimate, free_disk, room, thief_key, victim_key
from mea_ray.sweep.plan import draft, plan
from mea_ray.training import engine


def sweep(**base: Any) -> SweepConfig:
    training = {"epochs": 4, "augment": []}
    tree = {
        "victim": {"model": TINY, "training": training},
        "thief": {"model": TINY, "training": training, "budgets": [100, 300]},
        "verification": {"null_models": 2, "stolen_null_models": 1},
        **base,
    }
    return build(SweepConfig, {"name": "s", "base": tree, "space": {"seed": {"grid": [0, 1, 2]}}})


def test_the_estimate_is_images_times_epochs_times_what_was_measured() -> None:
    chosen = sweep()
    base = chosen.base
    measured = Measured(
        seconds={victim_key(base): 0.5, thief_key(base): 0.25},
        weights={victim_key(base): 1000, thief_key(base): 10},
        data={splits_key(base): 77},
        sizes={splits_key(base): 60},
    )
    result = estimate(plan(chosen, MadeUp()), measured)
    assert result is not None and result.complete
    assert result.models_s == pytest.approx((1 + 2) * 0.5 * 60 * 4)
    assert result.substitutes_s == pytest.approx(3 * 0.25 * 2 * (100 + 300) * 4)
    assert result.data == 77 and result.disk == 3 * 1000 + (3 + 3) * 2 * 10
    few = estimate(plan(chosen, MadeUp()), measured, KeepConfig(stolen_nulls=False))
    assert few is not None and few.disk == 3 * 1000 + 3 * 2 * 10
    assert estimate(plan(chosen, MadeUp()), Measured()) is None


def test_stolen_null_models_that_trials_share_count_once() -> None:
    tree = {**sweep().resolved(), "space": {"victim.watermark.target_class": {"grid": [2, 3, 4]}}}
    chosen = build(SweepConfig, tree)
    base = chosen.base
    keys = {thief_key(base): 0.25} | {victim_key(trial.config): 0.5 for trial in plan(chosen, MadeUp()).trials}
    measured = Measured(seconds=keys, weights=dict.fromkeys(keys, 1), sizes={splits_key(base): 60})
    result = estimate(plan(chosen, MadeUp()), measured)
    assert result is not None and result.substitutes_s == pytest.approx(0.25 * (3 + 1) * (100 + 300) * 4)


def test_an_adaptive_search_is_estimated_by_its_probes() -> None:
    tree = sweep().resolved()
    space = {"thief.training.momentum": {"uniform": [0.1, 0.5]}}
    search = {"name": "optuna", "samples": 10}
    chosen = build(SweepConfig, {**tree, "space": space, "search": search})
    base = chosen.base
    keys = {victim_key(base): 0.5, thief_key(base): 0.25}
    measured = Measured(seconds=dict(keys), weights=dict.fromkeys(keys, 1), sizes={splits_key(base): 60})
    result = estimate(plan(chosen, MadeUp()), measured)
    assert result is not None and result.substitutes_s == pytest.approx(10 * 0.25 * 800 * 4)


def test_a_few_steps_are_measured_of_each_kind_of_model_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    train = engine.train

    def counted(model: Any, images: Any, *rest: Any, **keywords: Any) -> Any:
        seen.append(len(images))
        return train(model, images, *rest, **keywords)

    monkeypatch.setattr(owner, "train", counted)
    measured, config = Measured(), sweep().base
    data = load_splits(config)
    measured.measure(config, data)
    measured.measure(config, data)
    assert set(measured.seconds) == set(measured.weights) == {victim_key(config), thief_key(config)}
    assert all(value > 0 for value in measured.seconds.values()) and measured.weights[thief_key(config)] > 1000
    assert len(seen) == 1 and seen[0] <= module.BATCHES * 128 < len(data.victim_train)
    assert measured.sizes == {splits_key(config): len(data.victim_train)}
    assert measured.data[splits_key(config)] > data.victim_train.images.nbytes


def test_room_is_what_a_run_would_find() -> None:
    chosen = sweep(resources={"trial": {"cpus": 2}})
    demand = demand_of(chosen, [each.config for each in draft(chosen)])
    assert room(demand, {"CPU": 8}) == (3, "")
    at_once, why = room(demand, {"CPU": 2})
    assert at_once == 0 and "the sweep needs 3 CPUs, the cluster has 2" in why


def test_free_space_is_looked_at_where_the_folder_will_be(tmp_path: Path) -> None:
    assert free_disk(str(tmp_path / "not" / "yet")) == free_disk(str(tmp_path)) > 0


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    model = "{name: vgg_like, width: 0.0625}"
    file.write_text(
        f"name: small\nbase:\n  storage: {tmp_path / 's'}\n  victim: {{model: {model}}}\n"
        f"  thief: {{model: {model}, budgets: [50]}}\n",
        encoding="utf-8",
    )
    return file


def test_the_command_checks_and_says_time_memory_and_room(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(sweep_file)]) == OK
    output = capsys.readouterr().out
    for line in ("training", "memory", "storage", "room"):
        assert f"\n {line} " in output
    assert not (tmp_path / "s").exists(), "a plan writes nothing"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("thief.budgets=[100000]", "thief.budgets"),
        ("victim.watermark.target_class=17", "class 17"),
        ("splits.validation_fraction=0.9", "validation_fraction"),
    ],
)
def test_the_command_refuses_what_a_run_refuses(
    sweep_file: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(sweep_file), override]) == USAGE
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_its_data_a_sweep_is_planned_and_not_checked(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = str(tmp_path / "nothing")
    assert main(["plan", str(sweep_file), "data={name: image_folder, path: " + here + ", image_size: 16}"]) == OK
    output = " ".join(capsys.readouterr().out.split())
    assert "not checked" in output and "nothing" in output and "trials 1" in output


def test_too_small_a_machine_is_reported(
    sweep_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", str(sweep_file), "resources.trial.gpus=64"]) == OK
    output = " ".join(capsys.readouterr().out.split())
    assert "is too small" in output and "64 GPUs" in output
