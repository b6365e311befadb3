"""Active thieves: selections against brute force, and rounds that ask what was selected."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from attack_fakes import CLASSES, FAST, POOL, FakeBlackBox, Substitute, flat, same, steal, thief_of

from mea_ray.attacks import ATTACKS, active
from mea_ray.attacks.active import Active, entropy, k_center
from mea_ray.attacks.distillation import Distillation
from mea_ray.attacks.transfer import TransferSet
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.evaluation.metrics import probabilities

Array = npt.NDArray[np.float32]
SELECTIONS = ["random", "uncertainty", "k_center", "uncertainty_k_center"]


def rows(count: int, seed: int, *, labels: bool = False) -> Array:
    drawn = np.random.default_rng(seed).dirichlet(np.full(CLASSES, 0.5), count).astype(np.float32)
    return np.eye(CLASSES, dtype=np.float32)[drawn.argmax(1)] if labels else drawn


def plain_entropy(row: Array) -> float:
    return -sum(float(p) * float(np.log(np.float64(p))) for p in row if p > 0)


def plain_k_center(points: Array, centres: Array, count: int) -> list[int]:
    """Farthest first, one distance at a time; the first of those that are equally far."""
    known, chosen = [row.astype(np.float64) for row in centres], []
    for _ in range(count):
        best, farthest = -1, -1.0
        for index, row in enumerate(points.astype(np.float64)):
            distance = min(sum((row - centre) ** 2) for centre in known)
            if index not in chosen and distance > farthest:
                best, farthest = index, distance
        chosen.append(best)
        known.append(points[best].astype(np.float64))
    return chosen


def plain_selection(attack: Active, outputs: Array, answers: Array) -> list[int]:
    count = min(attack.round_images, len(outputs))
    uncertain = sorted(range(len(outputs)), key=lambda index: -plain_entropy(outputs[index]))
    if attack.selection == "uncertainty":
        return uncertain[:count]
    if attack.selection == "k_center":
        return plain_k_center(outputs, answers, count)
    passed = uncertain[: max(count, round(attack.shortlist * attack.round_images))]
    return [passed[index] for index in plain_k_center(outputs[passed], answers, count)]


@pytest.mark.parametrize("selection", SELECTIONS[1:])
@pytest.mark.parametrize("labels", [False, True], ids=["probabilities", "labels"])
@pytest.mark.parametrize("count", [5, 12, 30])
def test_a_selection_is_what_brute_force_selects(selection: Any, labels: bool, count: int) -> None:
    attack = Active(selection=selection, round_images=count, shortlist=1.5)
    outputs, answers = rows(25, count), rows(9, 100 + count, labels=labels)
    chosen = attack.recommend(outputs, answers)
    assert chosen.dtype == np.int64 and chosen.tolist() == plain_selection(attack, outputs, answers)
    assert len(set(chosen.tolist())) == min(count, 25)


def test_k_center_blocks_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centres = rows(30, 1), rows(41, 2)
    whole = k_center(points, centres, 10)
    monkeypatch.setattr(active, "PAIRS_AT_ONCE", 100)
    np.testing.assert_array_equal(k_center(points, centres, 10), whole)


def test_k_center_chooses_each_point_once_even_where_all_are_alike() -> None:
    alike = np.repeat(rows(2, 3), 4, axis=0)
    assert k_center(alike, alike[:1], 8).tolist() == [4, 0, 1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("seed", range(6))
def test_k_center_leaves_at_most_twice_the_least_radius(seed: int) -> None:
    points, centres = rows(11, seed), rows(2, 50 + seed)

    def radius(chosen: Any) -> float:
        taken = np.concatenate([centres, points[list(chosen)]]).astype(np.float64)
        return float(np.sqrt(((points[:, None] - taken) ** 2).sum(2)).min(1).max())

    best = min(radius(chosen) for chosen in combinations(range(11), 3))
    assert radius(k_center(points, centres, 3)) <= 2 * best + 1e-9


def test_entropy_is_shannons_and_has_no_trouble_with_zeros() -> None:
    outputs = np.concatenate([rows(20, 4), rows(3, 5, labels=True), np.full((1, CLASSES), 0.25, np.float32)])
    np.testing.assert_allclose(entropy(outputs), [plain_entropy(row) for row in outputs], atol=1e-12)
    assert (entropy(outputs)[20:23] == 0).all() and entropy(outputs)[23] == pytest.approx(np.log(4))


def plain_attack(attack: Active, box: FakeBlackBox, budget: int) -> list[int]:
    order = numpy_generator(0, "queries").permutation(len(POOL)).tolist()
    queried: list[int] = order[: attack.initial]
    unasked, number = order[attack.initial :], 0
    while len(queried) < budget:
        answers, thief = box.query(POOL[queried]), thief_of(TransferSet())
        model = thief.new_model("round", number)
        assert isinstance(model, Substitute)
        epochs: dict[str, Any] = {"epochs": attack.round_epochs} if attack.round_epochs else {}
        thief.fit(model, POOL[queried], answers, "round", number, **epochs)
        visible = numpy_generator(0, "candidates", number).permutation(len(unasked))[: attack.candidates]
        considered = [unasked[position] for position in visible]
        outputs = probabilities(model, POOL[considered])
        chosen = [considered[position] for position in plain_selection(attack, outputs, answers)]
        queried += chosen
        unasked = [index for index in unasked if index not in chosen]
        number += 1
    return queried[:budget]


@pytest.mark.parametrize("selection", SELECTIONS[1:])
@pytest.mark.parametrize("answer", ["all", "label"])
def test_rounds_ask_what_is_selected(selection: Any, answer: str) -> None:
    attack = Active(selection=selection, initial=30, round_images=20, round_epochs=3, candidates=60, query_chunk=16)
    box, transfer = FakeBlackBox(budget=95, answer=answer), TransferSet()
    steal(box, [95], attack, transfer=transfer, learning={"temperature": 1.0})
    assert transfer.indices.tolist() == plain_attack(attack, FakeBlackBox(answer=answer), 95)
    assert box.charged == box.distinct() == 95


def test_the_random_control_asks_what_distillation_asks() -> None:
    control, distillation = FakeBlackBox(), FakeBlackBox()
    steal(control, [40, 150], Active(selection="random", initial=30, round_images=20), seed=3)
    steal(distillation, [150], Distillation(), seed=3)
    assert flat(control.queries) == flat(distillation.queries)


def test_uncertain_images_are_more_uncertain_than_random_ones() -> None:
    transfer = TransferSet()
    training = FAST | {"epochs": 20, "learning_rate": 0.01}
    attack = Active(selection="uncertainty", initial=100, round_images=50)
    (rung,) = steal(FakeBlackBox(), [250], attack, transfer=transfer, training=training)
    surest = transfer.answers.max(1)
    # The victim's own answers show it: what a substitute is unsure of lies near the victim's boundaries.
    assert surest[100:150].mean() < surest[:100].mean() - 0.05
    assert rung.queries == 250


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_pool_is_queried_to_its_end_and_no_further(selection: Any) -> None:
    box = FakeBlackBox()
    (rung,) = steal(box, [70], Active(selection=selection, initial=30, round_images=25), pool=POOL[:70])
    assert sorted(flat(box.queries)) == sorted(flat([POOL[:70]])) and rung.queries == 70
    with pytest.raises(ConfigError, match="holds 70 images"):
        steal(box, [71], Active(), pool=POOL[:70])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_budgets_are_nested(selection: Any) -> None:
    def attack() -> Active:
        return Active(selection=selection, initial=25, round_images=15, candidates=100, query_chunk=16)

    (alone,) = steal(FakeBlackBox(), [70], attack())
    after = steal(FakeBlackBox(), [10, 48, 70, 100], attack())
    (skipping,) = steal(FakeBlackBox(), [30, 70], attack(), skip={30})
    assert same(alone.model, after[2].model) and same(alone.model, skipping.model)


def test_a_killed_thief_goes_on_where_it_was(tmp_path: Path) -> None:
    def attack() -> Active:
        return Active(selection="uncertainty_k_center", initial=25, round_images=20, query_chunk=16)

    whole = FakeBlackBox()
    model = steal(whole, [80], attack())[0].model
    for number in range(len(whole.queries)):
        path = tmp_path / str(number)
        dying = FakeBlackBox(budget=80, fail_at=number)
        with pytest.raises(ConnectionError):
            steal(dying, [80], attack(), transfer=TransferSet(path))
        rest = FakeBlackBox(budget=80, paid=dying.paid, start_at=dying.asked)
        (rung,) = steal(rest, [80], attack(), transfer=TransferSet(path))
        assert flat(dying.queries + rest.queries) == flat(whole.queries)
        assert rest.charged == 80 and same(rung.model, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": 0}, "initial=0"),
        ({"round_images": 0}, "round_images=0"),
        ({"round_epochs": 0}, "round_epochs=0"),
        ({"candidates": 0}, "candidates=0"),
        ({"candidates": 10, "round_images": 20}, "candidates=10 must be at least round_images=20"),
        ({"shortlist": 0.5}, "shortlist=0.5"),
        ({"query_chunk": 0}, "query_chunk=0"),
        ({"selection": "margin"}, "selection"),
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ATTACKS.build("active", **options)
