from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, config, without_durations

from mea_ray.attacks.base import Rung, Target
from mea_ray.config import ExperimentConfig
from mea_ray.core.types import Splits
from mea_ray.experiment import artifacts, stolen_nulls
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.local import run_in_memory, run_local
from mea_ray.experiment.model_sources import StoredModels, TrainedModels
from mea_ray.experiment.names import Names
from mea_ray.experiment.ports import StealSome
from mea_ray.experiment.stolen_nulls import KIND
from mea_ray.experiment.theft import Theft
from mea_ray.training.checkpoint import load_model, weights_digest
from mea_ray.training.device import one_thread


def small(storage: Path, **more: Any) -> ExperimentConfig:
    tiny = {"victim__model": TINY, "victim__training__epochs": 1, "thief__model": TINY, "thief__training__epochs": 1}
    counts = {"verification__null_models": 2, "verification__stolen_null_models": 2, "verification__samples": 50}
    return config(storage=str(storage), thief__budgets=[48, 96], **{**tiny, **counts, **more})


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    """Local runs judge models in one thread; with another number the last bits of a report differ."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return load_splits(small(tmp_path_factory.mktemp("data")))


def names_of(experiment: ExperimentConfig, data: Splits) -> Names:
    return Names.of(experiment, Fingerprints.of(data, experiment))


def sources(experiment: ExperimentConfig, data: Splits) -> StoredModels:
    return StoredModels(Store(experiment.storage), experiment, data, names_of(experiment, data))


class Thief:
    """Steals null models in this process; notes what it was asked for, and may stop after a rung."""

    def __init__(self, experiment: ExperimentConfig, data: Splits, last: int | None = None) -> None:
        from mea_ray.blackbox.local import LocalBlackBox
        from mea_ray.experiment.answers import service_policy

        self.skipped: list[set[int]] = []
        self.answered: list[int] = []
        self.at_once: list[int] = []

        def steal(models: Any, transfers: Any, skips: Any) -> Iterator[tuple[int, Rung]]:
            self.at_once.append(len(models))
            self.skipped += [{budget for budget in experiment.thief.budgets if budget in skip} for skip in skips]
            self.answered += [0 if transfer is None else len(transfer) for transfer in transfers]
            boxes = [LocalBlackBox(model, service_policy(experiment, data, model, None)) for model in models]
            for place, rung in Theft.of(experiment, data).run(
                [Target(*each) for each in zip(boxes, transfers, skips, strict=True)]
            ):
                yield place, rung
                if (place, rung.budget) == (len(models) - 1, last):
                    raise KeyboardInterrupt

        self.steal: StealSome = steal


def digests(rungs: Iterator[tuple[int, Rung]]) -> dict[tuple[int, int], str]:
    return {(index, rung.budget): weights_digest(rung.model) for index, rung in rungs}  # type: ignore[arg-type]


def test_trials_with_other_watermarks_share_them_and_get_the_results_they_would_get_alone(
    tmp_path: Path, data: Splits
) -> None:
    first, second = small(tmp_path), small(tmp_path, victim__watermark={"name": "mea_defender", "target_class": 5})
    stolen = list(sources(first, data).stolen_nulls({0: [48, 96], 1: [48, 96]}, Thief(first, data).steal))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts" / KIND).glob("*/info.json")}
    assert len(written) == 4, "two null models, two budgets"
    shared, alone = run_local(second).result, run_in_memory(second)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts" / KIND).glob("*/info.json")} == written
    assert without_durations(shared.model_dump()) == without_durations(alone.model_dump())
    assert [rung.seconds for rung in shared.stolen_nulls] == [rung.seconds for _, rung in stolen], (
        "what the theft took is still known"
    )
    assert not list((tmp_path / "artifacts" / "states").glob(f"{KIND}*")), "its answers are removed"


def test_they_are_those_of_an_experiment_in_memory(tmp_path: Path, data: Splits) -> None:
    experiment = small(tmp_path)
    wanted = {0: [96], 1: [48, 96]}
    memory = TrainedModels(experiment, data, names_of(experiment, data))
    assert digests(memory.stolen_nulls(wanted, Thief(experiment, data).steal)) == digests(
        sources(experiment, data).stolen_nulls(wanted, Thief(experiment, data).steal)
    )


def test_an_interrupted_theft_goes_on_after_its_last_budget_with_the_answers_it_had(
    tmp_path: Path, data: Splits
) -> None:
    experiment = small(tmp_path)
    whole = digests(sources(small(tmp_path / "whole"), data).stolen_nulls({0: [48, 96]}, Thief(experiment, data).steal))
    with pytest.raises(KeyboardInterrupt):
        list(sources(experiment, data).stolen_nulls({0: [48, 96]}, Thief(experiment, data, last=48).steal))
    thief = Thief(experiment, data)
    assert digests(sources(experiment, data).stolen_nulls({0: [48, 96]}, thief.steal)) == whole
    assert thief.skipped == [{48}] and thief.answered[0] >= 48


def test_several_are_stolen_at_once_if_they_may_be_stacked(tmp_path: Path, data: Splits) -> None:
    experiment = small(tmp_path, verification__null_models=3, thief__training__stack=2)
    wanted = {0: [48, 96], 1: [96], 2: [48, 96]}
    with pytest.raises(KeyboardInterrupt):
        list(sources(experiment, data).stolen_nulls(wanted, Thief(experiment, data, last=48).steal))
    thief = Thief(experiment, data)
    names = digests(sources(experiment, data).stolen_nulls(wanted, thief.steal))
    assert set(names) == {(index, budget) for index, budgets in wanted.items() for budget in budgets}
    assert thief.at_once == [2, 1] and thief.skipped == [{48}, {48}, set()]
    again = Thief(experiment, data)
    assert digests(sources(experiment, data).stolen_nulls(wanted, again.steal)) == names and not again.at_once


def test_a_damaged_one_is_stolen_again(tmp_path: Path, data: Splits) -> None:
    experiment = small(tmp_path)
    whole = digests(sources(experiment, data).stolen_nulls({0: [48, 96]}, Thief(experiment, data).steal))
    folder = next(
        path for path in (tmp_path / "artifacts" / KIND).iterdir() if '"budget": 96' in (path / "info.json").read_text()
    )
    (folder / "model.safetensors").write_bytes(b"damaged")
    thief = Thief(experiment, data)
    assert digests(sources(experiment, data).stolen_nulls({0: [48, 96]}, thief.steal)) == whole
    assert thief.skipped == [{48}]
    shutil.rmtree(folder)
    assert (
        digests(sources(experiment, data).stolen_nulls({0: [96]}, Thief(experiment, data).steal))[0, 96]
        == (whole[0, 96])
    )


def test_what_another_process_is_stealing_comes_last_and_is_not_stolen_twice(tmp_path: Path, data: Splits) -> None:
    experiment = small(tmp_path)
    other, thief = Thief(experiment, data), Thief(experiment, data)
    begun, go_on = threading.Event(), threading.Event()

    def slow(models: Any, transfers: Any, skips: Any) -> Iterator[tuple[int, Rung]]:
        begun.set()
        assert go_on.wait(60)
        yield from other.steal(models, transfers, skips)

    elsewhere = threading.Thread(target=lambda: list(sources(experiment, data).stolen_nulls({0: [48, 96]}, slow)))
    elsewhere.start()
    assert begun.wait(60)
    taken = []
    for index, rung in sources(experiment, data).stolen_nulls({0: [48, 96], 1: [48, 96]}, thief.steal):
        taken.append((index, rung.budget))
        go_on.set()
    elsewhere.join(60)
    assert taken == [(1, 48), (1, 96), (0, 48), (0, 96)]
    assert len(other.skipped) == len(thief.skipped) == 1


@pytest.mark.parametrize(
    ("change", "shared"),
    [
        ({"victim__watermark": "composite"}, True),
        ({"victim__insecure_key_from_seed": False}, True),
        ({"removal__methods": ["quantisation"]}, True),
        ({"seed": 1}, False),
        ({"victim__seed": 1}, False),
        ({"thief__training__epochs": 2}, False),
        ({"thief__training__stack": 2}, False),
        ({"thief__learning__answers": "argmax"}, False),
        ({"service__policy": "label_only"}, False),
        ({"splits__thief_pool": "disjoint"}, False),
    ],
)
def test_their_name_follows_from_all_that_makes_them(
    tmp_path: Path, data: Splits, change: dict[str, Any], shared: bool
) -> None:
    assert (names_of(small(tmp_path), data).theft == names_of(small(tmp_path, **change), data).theft) == shared


def test_they_can_be_dropped(tmp_path: Path, data: Splits) -> None:
    models = sources(small(tmp_path), data)
    assert len(digests(models.stolen_nulls({0: [48]}, Thief(models.config, data).steal))) == 1
    models.drop_stolen_nulls()
    assert not list((tmp_path / "artifacts" / KIND).iterdir())


def test_one_that_another_trial_drops_while_it_is_read_is_stolen_again(
    tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = sources(small(tmp_path), data)
    whole = digests(models.stolen_nulls({0: [48, 96]}, Thief(models.config, data).steal))
    read = load_model

    def too_late(folder: Path) -> Any:
        monkeypatch.setattr(stolen_nulls, "load_model", read)
        models.drop_stolen_nulls()
        return read(folder)

    monkeypatch.setattr(stolen_nulls, "load_model", too_late)
    assert digests(models.stolen_nulls({0: [48, 96]}, Thief(models.config, data).steal)) == whole


def test_what_is_there_is_checked_once_and_then_loaded(
    tmp_path: Path, data: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small(tmp_path)
    checked: list[Path] = []
    wanted = {0: [48, 96], 1: [48, 96]}
    stolen = digests(sources(experiment, data).stolen_nulls(wanted, Thief(experiment, data).steal))
    monkeypatch.setattr(artifacts, "check", checked.append)
    assert digests(sources(experiment, data).stolen_nulls(wanted, Thief(experiment, data).steal)) == stolen
    assert len([folder for folder in checked if folder.parent.name == KIND]) == 4
