"""Several models stolen at once: what each theft alone gives, up to rounding, whatever process it runs in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import without_durations

from mea_ray.attacks.base import Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import AttackFailed
from mea_ray.experiment.attack_process import parent
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.theft import Theft
from mea_ray.models.build import build_model
from mea_ray.training import stack as stacks

TINY = {"name": "vgg_like", "width": 0.0625}


def theft(attack: Any = "distillation", stack: int = 3, models: int = 3) -> tuple[Theft, list[LocalBlackBox]]:
    tree = {
        "data": {"name": "digits", "image_size": 8},
        "victim": {"model": TINY},
        "thief": {
            "attack": attack,
            "model": TINY,
            "budgets": [48, 96],
            "training": {"epochs": 2, "stack": stack, "precision": "float32", "crop_padding": 2},
        },
    }
    settings = build(ExperimentConfig, tree)
    data = load_splits(settings)
    boxes = []
    for seed in range(models):
        torch.manual_seed(seed)
        model = build_model("vgg_like", data.shape, data.classes, {"width": 0.0625})
        ledger = Ledger()
        ledger.register("thief", 96)
        boxes.append(LocalBlackBox(model, None, ledger, "thief"))
    return Theft.of(settings, data), boxes


def stacked_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    whole = stacks.train_stack

    def counted(trainings: Any, **more: Any) -> Any:
        sizes.append(len(trainings))
        return whole(trainings, **more)

    monkeypatch.setattr(stacks, "train_stack", counted)
    return sizes


def charged(boxes: list[LocalBlackBox]) -> list[int]:
    return [box.ledger.charged("thief") for box in boxes]


@pytest.mark.parametrize("attack", ["distillation", {"name": "knockoff", "policy": "random"}, "jbda"])
def test_each_substitute_is_that_of_its_theft_alone(attack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = stacked_sizes(monkeypatch)
    one, boxes = theft(attack)
    together = list(one.run([Target(box) for box in boxes]))
    assert [(place, rung.budget) for place, rung in together] == [(p, b) for b in (48, 96) for p in range(3)]
    assert sizes == [3, 3] and charged(boxes) == [96] * 3
    _, boxes = theft(attack)
    for place, box in enumerate(boxes):
        alone = [rung for _, rung in one.run([Target(box)])]
        for rung, expected in zip([r for at, r in together if at == place], alone, strict=True):
            assert (rung.budget, rung.queries, rung.epochs) == (expected.budget, expected.queries, expected.epochs)
            for name, value in expected.model.state_dict().items():
                torch.testing.assert_close(rung.model.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_with_a_stack_of_one_they_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = stacked_sizes(monkeypatch)
    one, boxes = theft(stack=1, models=2)
    together = list(one.run([Target(box) for box in boxes]))
    _, boxes = theft(stack=1, models=2)
    alone = [[rung for _, rung in one.run([Target(box)])] for box in boxes]
    assert sizes == []
    for place, rung in together:
        expected = alone[place][(48, 96).index(rung.budget)].model.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in rung.model.state_dict().items())


def test_finished_work_is_left_out_and_stored_answers_are_not_queried_again(tmp_path: Path) -> None:
    one, boxes = theft(models=2)
    first = [TransferSet(tmp_path / str(place)) for place in range(2)]
    whole = list(one.run([Target(*each) for each in zip(boxes, first, strict=True)]))
    _, again = theft(models=2)
    second = [TransferSet(tmp_path / str(place)) for place in range(2)]
    left = list(one.run([Target(again[0], second[0], (48,)), Target(again[1], second[1], (48, 96))]))
    assert [(place, rung.budget) for place, rung in left] == [(0, 96)] and charged(again) == [0, 0]
    (expected,) = [rung for place, rung in whole if place == 0 and rung.budget == 96]
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(left[0][1].model.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_an_attack_that_trains_while_it_queries_steals_one_model_after_the_other() -> None:
    attack = {"name": "distillation", "requery": True}
    one, boxes = theft(attack, models=2)
    assert [(place, rung.budget) for place, rung in one.run([Target(box, skip=(48,)) for box in boxes])] == [
        (0, 96),
        (1, 96),
    ]


def test_a_process_of_its_own_gives_the_same_and_charges_each_model(tmp_path: Path) -> None:
    one, boxes = theft(models=2)
    here = list(one.run([Target(box) for box in boxes]))
    _, boxes = theft(models=2)
    transfers = [TransferSet(tmp_path / str(place)) for place in range(2)]
    apart = list(parent.steal(one, [Target(*each) for each in zip(boxes, transfers, strict=True)]))
    assert [(place, rung.budget, rung.queries) for place, rung in apart] == [
        (place, rung.budget, rung.queries) for place, rung in here
    ]
    for (_, rung), (_, expected) in zip(apart, here, strict=True):
        state = rung.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected.model.state_dict().items())
    assert charged(boxes) == [96, 96] and [len(each) for each in transfers] == [96, 96]
    assert not np.array_equal(transfers[0].answers, transfers[1].answers)


@pytest.mark.parametrize("place", [2, -1, "0", None, True])
def test_a_message_about_no_black_box_ends_the_theft(place: Any) -> None:
    one, boxes = theft(models=2)
    relay = parent._Relay(None, 0, one, boxes, [[48], [48]])  # type: ignore[arg-type]
    with pytest.raises(AttackFailed, match="of 2"):
        relay._place({"box": place})


@pytest.mark.slow
def test_controls_of_an_experiment_are_stolen_together_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = stacked_sizes(monkeypatch)

    def result(stack: int) -> Any:
        tree = {
            "data": {"name": "digits", "image_size": 8},
            "victim": {"model": TINY, "training": {"epochs": 1}},
            "thief": {"model": TINY, "budgets": [50, 100], "training": {"epochs": 1, "stack": stack}},
            "verification": {"null_models": 3, "stolen_null_models": 3, "samples": 50},
        }
        return run_in_memory(build(ExperimentConfig, tree))

    one, stacked = result(1), result(2)
    assert sizes == [2, 2]  # two of the three at each budget; the third is stolen alone
    assert [(r.budget, r.queries) for r in stacked.stolen_nulls] == [(b, b) for _ in range(3) for b in (50, 100)]
    for rung, expected in zip(stacked.stolen_nulls, one.stolen_nulls, strict=True):
        assert rung.report.accuracy == pytest.approx(expected.report.accuracy, abs=0.05)
    same = [without_durations(each.model_dump()) for each in (one, stacked)]
    assert same[0]["rungs"] == same[1]["rungs"] and same[0]["victim_report"] == same[1]["victim_report"]
