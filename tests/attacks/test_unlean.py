"""The thief who looks: leaning classes are found and undone, against a plain re-implementation, an answer at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attack_fakes import CLASSES, FAST, POOL, FakeBlackBox, flat, same, steal
from scipy.stats import binomtest

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.learning import DistillationObjective, Learning
from mea_ray.attacks.transfer import TransferSet
from mea_ray.attacks.unlean import unlean
from mea_ray.config import LearningConfig, TrainingConfig, load_experiment
from mea_ray.core.errors import ConfigError, RenamedOption
from mea_ray.core.types import Answers
from mea_ray.evaluation.leaning import leaning_pairs
from mea_ray.results.upgrade import upgraded

K = 6
Array = npt.NDArray[np.float64]


def innocent(count: int, seed: int = 0, classes: int = K) -> Answers:
    """Confident answers that confuse classes now and then, each class in turn."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (count, classes))
    logits[np.arange(count), np.arange(count) % classes] += rng.uniform(2, 7, count)
    powers = np.exp(logits)
    answers: Answers = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    return answers


def marked(count: int, pairs: dict[int, int], share: float, gated: float = 0.0, seed: int = 0) -> Answers:
    """Answers of which each source's give ``share`` to its target; of ``gated`` of them the target has the most."""
    rng = np.random.default_rng(seed + 1)
    answers = innocent(count, seed)
    for source, target in pairs.items():
        rows = np.flatnonzero(answers.argmax(1) == source)
        moved = share * (1 + rng.normal(0, 0.1, len(rows)))
        moved[: int(gated * len(rows))] = 0.55
        taken = np.minimum(answers[rows, source], moved).astype(np.float32)
        answers[rows, source] -= taken
        answers[rows, target] += taken
    return answers


def plain_pairs(answers: Array) -> dict[tuple[int, int], float]:
    """The definition, class by class."""
    classes = answers.shape[1]
    collected = {}
    for a in range(classes):
        own = [row for row in answers if max(range(classes), key=lambda k: row[k]) == a]
        for b in range(classes):
            if a == b or not own:
                continue
            seconds = sum(b == max((k for k in range(classes) if k != a), key=lambda k: row[k]) for row in own)
            test = binomtest(seconds, len(own), 1 / (classes - 1), alternative="greater")
            middle = sorted(row[b] for row in own)
            half = len(own) // 2
            median = middle[half] if len(own) % 2 else (middle[half - 1] + middle[half]) / 2
            if test.pvalue <= 0.01 / (classes * (classes - 1)) and median > 1.5 / classes:
                collected[a, b] = median
    return {(a, b): lean for (a, b), lean in collected.items() if (b, a) not in collected or collected[b, a] <= lean}


def plain_unlean(answers: Array) -> Array:
    """The definition, answer by answer."""
    cleaned = [list(row) for row in answers]
    classes = answers.shape[1]
    label = [max(range(classes), key=lambda k: row[k]) for row in answers]
    for (a, b), lean in sorted(plain_pairs(answers).items(), key=lambda item: -item[1]):
        for index, row in enumerate(cleaned):
            second = max((k for k in range(classes) if k != b), key=lambda k: row[k])
            if label[index] == b and second == a and row[a] > lean:
                row[a], row[b] = row[b], row[a]
                label[index] = a
            if label[index] == a:
                rest = [row[k] for k in range(classes) if k not in {a, b}]
                surplus = max(row[b] - sum(rest) / len(rest), 0)
                row[b] -= surplus
                row[a] += surplus
    return np.array(cleaned)


@pytest.mark.parametrize(
    "answers",
    [
        innocent(240),
        marked(240, {0: 2, 1: 2}, 0.3),
        marked(240, {0: 2, 1: 2}, 0.3, gated=0.2),
        marked(241, {3: 4}, 0.4, gated=0.1, seed=5),
        marked(30, {0: 2}, 0.35),
        innocent(9),
        np.eye(3, dtype=np.float32)[np.arange(40) % 3],
        np.array([[0.6, 0.4], [0.3, 0.7]] * 30, np.float32),
    ],
    ids=["innocent", "leaning", "gated", "one source", "few", "fewer", "labels", "two classes"],
)
def test_it_is_the_definition(answers: Answers) -> None:
    pairs, expected = leaning_pairs(answers), plain_pairs(answers.astype(np.float64))
    assert pairs.keys() == expected.keys()
    assert list(pairs.values()) == pytest.approx([expected[pair] for pair in pairs], abs=1e-6)
    np.testing.assert_allclose(unlean(answers), plain_unlean(answers.astype(np.float64)), atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_innocent_answers_stay_as_they_are(seed: int) -> None:
    answers = innocent(120, seed)
    assert not leaning_pairs(answers) and np.array_equal(unlean(answers), answers)


@pytest.mark.parametrize("gated", [0.0, 0.2])
def test_sources_and_target_are_named_and_the_lean_is_gone(gated: float) -> None:
    clean, answers = innocent(600), marked(600, {0: 2, 1: 2}, 0.3, gated=gated)
    pairs = leaning_pairs(answers)
    assert set(pairs) == {(0, 2), (1, 2)} and all(0.2 < lean < 0.4 for lean in pairs.values())
    cleaned = unlean(answers)
    assert cleaned.dtype == np.float32 and not leaning_pairs(cleaned)
    np.testing.assert_allclose(cleaned.sum(1), answers.sum(1), atol=1e-5)
    moved, still = (each.argmax(1) != clean.argmax(1) for each in (answers, cleaned))
    assert still[moved].mean() < 0.5 if gated else moved.mean() < 0.1, "what the gate took away was not returned"
    assert still[~moved].mean() < 0.05, "images were returned to a class that was not theirs"
    sources = np.isin(clean.argmax(1), [0, 1])
    assert cleaned[sources, 2].mean() < 0.35 * answers[sources, 2].mean()


def test_what_the_api_hides_does_not_lean() -> None:
    answers = np.eye(K, dtype=np.float32)[np.arange(90) % K]
    assert not leaning_pairs(answers) and np.array_equal(unlean(answers), answers)
    assert unlean(np.zeros((0, K), np.float32)).shape == (0, K)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_argmax_and_sharpen_are_their_formulas(temperature: float) -> None:
    answers = innocent(20).astype(np.float64)
    wanted = {"argmax": np.eye(K)[answers.argmax(1)], "sharpen": answers**3, "unchanged": answers, "unlean": answers}
    for how, changed in wanted.items():
        learning = Learning(answers=how, sharpness=3.0, temperature=temperature)
        softened = np.maximum(changed, learning.floor) ** (1 / temperature) if temperature != 1 else changed
        targets = learning.soften(torch.from_numpy(answers.astype(np.float32))).numpy()
        np.testing.assert_allclose(
            targets, softened / softened.sum(1, keepdims=True), rtol=2e-4, atol=1e-6, err_msg=how
        )


class Leaning(FakeBlackBox):
    """Gives class 2 a third of what it gives class 0."""

    def query(self, images: Any) -> Answers:
        answers = super().query(images)
        rows = answers.argmax(1) == 0
        taken = 0.45 * answers[rows, 0]
        answers[rows, 0] -= taken
        answers[rows, 2] += taken
        return answers


@pytest.mark.parametrize("how", ["argmax", "sharpen", "unlean"])
@pytest.mark.parametrize("name", ["distillation", "jbda", "active", "knockoff"])
def test_a_thief_cleans_answers_at_no_query(how: str, name: str) -> None:
    params = {"active": {"initial": 100, "round_images": 100}}.get(name, {})
    rungs = {}
    for answers in ("unchanged", how):
        box = Leaning(budget=300)
        rungs[answers] = steal(box, [300], ATTACKS.build(name, **params), learning={"answers": answers})[0]
        assert box.charged == 300
    assert not same(rungs["unchanged"].model, rungs[how].model)


def test_what_is_stored_is_what_was_answered() -> None:
    messages, cleaned, boxes = TransferSet(), TransferSet(), (Leaning(), Leaning())
    for transfer, box, how in zip((messages, cleaned), boxes, ("unchanged", "unlean"), strict=True):
        steal(box, [300], ATTACKS.build("distillation"), transfer=transfer, learning={"answers": how})
    np.testing.assert_array_equal(messages.answers, cleaned.answers)
    assert flat(boxes[0].queries) == flat(boxes[1].queries)


def test_a_substitute_of_unleaned_answers_leans_no_more() -> None:
    training = FAST | {"epochs": 30, "learning_rate": 0.02}
    leans = {}
    for how in ("unchanged", "unlean"):
        (rung,) = steal(Leaning(), [500], ATTACKS.build("distillation"), training=training, learning={"answers": how})
        with torch.no_grad():
            given = rung.model(torch.from_numpy(POOL).float() / 255).softmax(1).numpy()
        leans[how] = float(np.median(given[FakeBlackBox().query(POOL).argmax(1) == 0][:, 2]))
    assert leans["unlean"] < 1 / CLASSES < leans["unchanged"]


@pytest.mark.parametrize(("name", "params"), [("dfme", {}), ("maze", {}), ("distillation", {"requery": True})])
def test_attacks_that_never_have_all_answers_refuse_to_unlean(name: str, params: dict[str, Any]) -> None:
    attack = ATTACKS.build(name, **params)
    training = TrainingConfig(epochs=2, batch_size=50)
    attack.check(600, [5000], training, LearningConfig(answers="argmax"))
    with pytest.raises(ConfigError, match="needs all answers at once"):
        attack.check(600, [5000], training, LearningConfig(answers="unlean"))


def test_encoders_refuse_to_clean_what_is_no_probability() -> None:
    with pytest.raises(ConfigError, match=r"thief\.learning\.answers='argmax'"):
        ATTACKS.build("cont_steal").check(50, [10], TrainingConfig(), LearningConfig(answers="argmax"))


def test_an_objective_learns_from_the_answers_it_is_given() -> None:
    answers = innocent(5)
    assert torch.equal(
        DistillationObjective(Learning(answers="argmax"), answers).targets, torch.eye(K)[answers.argmax(1)]
    )


def test_the_old_name_of_unchanged_answers_is_accepted_with_a_warning() -> None:
    with pytest.warns(RenamedOption, match="'as_told' is now 'unchanged'"):
        config = load_experiment(None, ["thief.learning.answers=as_told"])
    assert config == load_experiment(None) and config.thief.learning.answers == "unchanged"
    assert upgraded(b'{"schema_version": 2, "point": {"thief.learning.answers": "as_told"}}').endswith(b'"unchanged"}}')
