"""Knockoff Nets: a bandit with one good arm, every reward and update against plain ones, and what resuming leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mea_ray.attacks import ATTACKS, knockoff
from mea_ray.attacks.bandit import Bandit, ClassPolicy, group_classes, members_of
from mea_ray.attacks.base import Rung
from mea_ray.attacks.distillation import Distillation
from mea_ray.attacks.knockoff import Knockoff
from mea_ray.attacks.query_attack import Thief
from mea_ray.attacks.rewards import RewardKind, Rewards
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig, LearningConfig, TrainingConfig, build
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.theft import run_attack
from mea_ray.models.base import ImageModel

CLASSES, SHAPE, ARMS, GOOD = 3, (1, 8, 8), 5, 2
LABELS = np.random.default_rng(4).permutation(np.arange(600) % ARMS).astype(np.int64)
POOL = np.random.default_rng(0).integers(0, 256, (600, *SHAPE), dtype=np.uint8)
POOL[:, 0, 0, 0] = LABELS
FAST = {"epochs": 2, "batch_size": 50, "augment": (), "schedule": "constant"}


class Victim:
    """Is sure of images of the good arm, and of no others; remembers what it was asked, and can die."""

    classes, image_shape = CLASSES, SHAPE

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.queries: list[Images | FloatImages] = []
        self.fail_at = fail_at

    @property
    def asked(self) -> int:
        return sum(map(len, self.queries))

    @property
    def remaining(self) -> int | None:
        return None

    def distinct(self) -> int:
        return len(np.unique(np.concatenate(self.queries).reshape(self.asked, -1), axis=0))

    def query(self, images: Images | FloatImages) -> Answers:
        if self.fail_at is not None and len(self.queries) == self.fail_at:
            raise ConnectionError("the thief's process dies here")
        assert images.dtype == np.uint8
        self.queries.append(images.copy())
        sure = np.where(images[:, 0, 0, 0] == GOOD, 4.0, 0.3)[:, None]
        logits = sure * np.eye(CLASSES)[images[:, 0, 1, 1] % CLASSES] + images[:, 0, 2, :3] / 800
        powers = np.exp(logits)
        answers: Answers = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
        return answers


class Substitute(ImageModel):
    def __init__(self) -> None:
        super().__init__(SHAPE, CLASSES)
        self.feature_size, self.head = 64, nn.Linear(64, CLASSES)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def steal(
    victim: Victim,
    budgets: Sequence[int],
    *,
    pool: Images = POOL,
    labels: Any = LABELS,
    seed: int = 0,
    transfer: TransferSet | None = None,
    skip: Sequence[int] = (),
    attack: Any = None,
    training: Any = FAST,
    **params: Any,
) -> list[Rung]:
    attack = attack or Knockoff(**{"policy": "adaptive", **params})
    return list(
        attack.run(
            victim,
            pool,
            budgets=budgets,
            make_model=Substitute,
            training=TrainingConfig(**training),
            seed=seed,
            transfer=transfer,
            skip=skip,
            labels=labels,
        )
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    others = b.state_dict()
    return all(torch.equal(value, others[name]) for name, value in a.state_dict().items())


def probability(rung: Rung, label: int) -> list[tuple[int, float]]:
    return list(rung.curves[f"policy/{label}"])


def plain_softmax(values: list[float]) -> list[float]:
    powers = [2.718281828459045**value for value in values]
    return [power / sum(powers) for power in powers]


def plain_rewards(answers: Answers, kinds: Sequence[str], students: Answers | None = None) -> np.ndarray:
    """Rescaled and averaged rewards, from the formulas, with all sums written out and redone for every answer."""
    columns = []
    for kind in kinds:
        values: list[float] = []
        for t, p in enumerate(answers.astype(np.float64)):
            if kind == "certainty":
                ranked = sorted(p, reverse=True)
                values.append(ranked[0] - ranked[1])
            elif kind == "diversity":
                before = answers[:t].astype(np.float64)
                values.append(sum(max(0, p[k] - before[:, k].mean()) for k in range(len(p))) if t else 0.0)
            else:
                assert students is not None
                values.append(-sum(p[k] * np.log(float(students[t, k])) for k in range(len(p))))
        scaled = []
        for t, value in enumerate(values):
            low, high = min(values[: t + 1]), max(values[: t + 1])
            scaled.append((value - low) / (high - low) if high > low else 0.5)
        columns.append(scaled)
    means: np.ndarray = np.mean(columns, axis=0)
    return means


def plain_policies(arms: list[int], rewards: np.ndarray, count: int) -> list[list[float]]:
    """The policy before each draw and after the last one, while no arm is exhausted (section 5 of the paper)."""
    preferences, drawn = [0.0] * count, [0] * count
    policies = [plain_softmax(preferences)]
    for t, z in enumerate(arms):
        drawn[z] += 1
        advantage = rewards[t] - (rewards[:t].mean() if t else rewards[0])
        pi = policies[-1]
        for other in range(count):
            if other == z:
                preferences[z] += advantage / drawn[z] * (1 - pi[z])
            else:
                preferences[other] -= advantage / drawn[z] * pi[other]
        policies.append(plain_softmax(preferences))
    return policies


def test_the_table_builds_it_and_refuses_what_it_does_not_know() -> None:
    attack = ATTACKS.build("knockoff")
    assert (
        isinstance(attack, Knockoff) and not attack.uses_labels and attack.learning(LearningConfig()).temperature == 1.0
    )
    for bad in (
        {"policy": "adaptiv"},
        {"reward": "entropy"},
        {"hierarchy": "three_level"},
        {"batch": 0},
        {"coarse_classes": 1},
        {"student_every": 1},
        {"student_epochs": 0},
        {"student_images": 1},
    ):
        (name,) = bad
        with pytest.raises(ConfigError, match=name):
            ATTACKS.build("knockoff", **bad)


@pytest.mark.parametrize("hierarchy", ["none", "two_level"])
@pytest.mark.parametrize("batch", [1, 16])
def test_the_probability_of_the_good_arm_rises(hierarchy: str, batch: int) -> None:
    transfer = TransferSet()
    (rung,) = steal(
        Victim(), [300], reward="certainty", batch=batch, hierarchy=hierarchy, coarse_classes=2, transfer=transfer
    )
    shares = [LABELS[transfer.indices] == GOOD]
    # 120 images of 600 are of the good arm; once they are used up it leaves the policy.
    before_empty = [value for _, value in probability(rung, GOOD) if value > 0]
    assert before_empty[0] == pytest.approx(1 / ARMS, abs=0.35 if hierarchy == "two_level" else 1e-12)
    assert max(before_empty) > before_empty[0] + 0.1
    assert np.mean(shares) > 1.5 / ARMS


@pytest.mark.parametrize("reward", ["certainty", "diversity", "all"])
def test_each_step_is_the_plain_update(reward: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knockoff, "LOG_GROWTH", 1.0)  # a point at each step
    outputs: list[Answers] = []
    predict = knockoff._Student.predict

    def remember(self: Any, indices: Any) -> Answers:
        outputs.append(predict(self, indices))
        return outputs[-1]

    monkeypatch.setattr(knockoff._Student, "predict", remember)
    transfer = TransferSet()
    (rung,) = steal(Victim(), [90], reward=reward, batch=1, student_every=20, transfer=transfer)
    kinds = ("certainty", "diversity", "loss") if reward == "all" else (reward,)
    # What follows the last answer is not seen: the attack was not asked to go on.
    rewards = plain_rewards(transfer.answers[:89], kinds, np.concatenate(outputs) if outputs else None)
    arms = LABELS[transfer.indices[:89]].tolist()
    policies = plain_policies(arms, rewards, ARMS)
    for label in range(ARMS):
        points = probability(rung, label)
        assert [queries for queries, _ in points] == list(range(90))
        assert [value for _, value in points] == pytest.approx([pi[label] for pi in policies], abs=1e-9)
    assert [value for _, value in rung.curves["reward"]] == pytest.approx(rewards.tolist(), abs=1e-9)
    assert bool(outputs) == (reward == "all")


@pytest.mark.parametrize("kinds", [("certainty",), ("diversity",), ("loss",), ("certainty", "diversity", "loss")])
def test_rewards_are_the_formulas_rescaled_and_averaged(kinds: tuple[RewardKind, ...]) -> None:
    rng = np.random.default_rng(3)
    answers, students = rng.dirichlet(np.full(6, 0.4), (2, 50)).astype(np.float32)
    rewards = Rewards(kinds, 6)
    scored = [rewards.score(p, q) for p, q in zip(answers, np.maximum(students, 1e-6), strict=True)]
    expected = plain_rewards(answers, kinds, np.maximum(students, 1e-6))
    assert [reward for reward, _, _ in scored] == pytest.approx(expected.tolist(), abs=1e-6)
    advantages = [expected[t] - expected[:t].mean() if t else 0 for t in range(50)]
    assert [advantage for _, advantage, _ in scored] == pytest.approx(advantages, abs=1e-6)
    assert all(0 <= reward <= 1 for reward, _, _ in scored)


def test_probabilities_are_used_as_such() -> None:
    # A second softmax or an argmax would give other numbers.
    rewards = Rewards(("certainty", "diversity", "loss"), 3)
    rewards.score(np.array([0.2, 0.3, 0.5], np.float32), np.full(3, 1 / 3, np.float32))
    _, _, plain = rewards.score(np.array([0.7, 0.3, 0.0], np.float32), np.array([0.5, 0.25, 0.25], np.float32))
    assert plain["certainty"] == pytest.approx(0.4)
    assert plain["diversity"] == pytest.approx(0.5)
    assert plain["loss"] == pytest.approx(0.7 * np.log(2) + 0.3 * np.log(4), abs=1e-6)


def test_a_constant_reward_is_a_half_and_moves_nothing() -> None:
    rewards = Rewards(("certainty",), 3)
    for _ in range(5):
        assert rewards.score(np.array([0, 1, 0], np.float32), None)[:2] == (0.5, 0.0)
    # The first other value is an end of the scale.
    assert rewards.score(np.array([0.5, 0.5, 0], np.float32), None)[0] == 0.0


def test_a_student_that_rules_a_class_out_makes_a_finite_loss() -> None:
    _, _, plain = Rewards(("loss",), 2).score(np.array([1, 0], np.float32), np.array([0, 1], np.float32))
    assert plain["loss"] == pytest.approx(-np.log(1e-7))


def test_a_bandit_does_not_overflow_and_leaves_dead_arms_alone() -> None:
    bandit = Bandit(3)
    bandit.preferences[:] = (2000.0, 1999.0, -5000.0)
    pi = bandit.probabilities()
    assert pi == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0.0])
    bandit.alive[0] = False
    pi = bandit.probabilities()
    assert pi.tolist() == [0.0, 1.0, 0.0]
    bandit.update(1, 0.5, pi)
    assert bandit.preferences[0] == 2000.0
    bandit.alive[:] = False
    assert not bandit.probabilities().any()


def test_classes_are_drawn_with_the_probabilities_of_both_levels() -> None:
    policy = ClassPolicy(np.full(4, 10**6), [np.array([0, 3]), np.array([1, 2])])
    policy.coarse.preferences[:] = (1.0, 0.0)
    policy.fine[0].preferences[:] = (0.0, 2.0)
    policy.fine[1].preferences[:] = (0.5, 0.0)
    group, first, second = plain_softmax([1, 0]), plain_softmax([0, 2]), plain_softmax([0.5, 0])
    expected = [group[0] * first[0], group[1] * second[0], group[1] * second[1], group[0] * first[1]]
    assert policy.probabilities() == pytest.approx(expected)
    uniform = np.random.default_rng(0).random((20000, 2))
    drawn = np.bincount([policy.draw(numbers).action for numbers in uniform], minlength=4) / 20000
    assert drawn == pytest.approx(expected, abs=0.02)


def test_both_levels_learn_from_a_draw() -> None:
    policy = ClassPolicy(np.full(4, 9), [np.array([0, 3]), np.array([1, 2])])
    for advantage in (0.6, -0.2):
        draw = policy.draw(np.zeros(2), action=2)
        before = [policy.coarse.preferences.copy(), policy.fine[1].preferences.copy()]
        policy.update(draw, advantage)
        step = advantage / policy.coarse.drawn[1]
        assert policy.coarse.preferences - before[0] == pytest.approx(step * (np.array([0, 1]) - draw.coarse))
        assert policy.fine[1].preferences - before[1] == pytest.approx(step * (np.array([0, 1]) - draw.fine))
    assert not policy.fine[0].preferences.any() and policy.fine[1].drawn.tolist() == [0, 2]


def test_an_exhausted_class_leaves_the_policy_and_takes_its_group_with_it() -> None:
    policy = ClassPolicy(np.array([1, 1, 5]), [np.array([0, 1]), np.array([2])])
    policy.draw(np.zeros(2), action=0)
    assert policy.probabilities().tolist() == [0.0, 0.5, 0.5]
    # The largest number below 1 must not run past the last arm that is left.
    assert policy.draw(np.array([0.0, np.nextafter(1, 0)])).action == 1
    assert policy.probabilities().tolist() == [0.0, 0.0, 1.0]
    assert policy.draw(np.zeros(2)).action == 2


@pytest.mark.parametrize(
    "params",
    [
        {"policy": "random"},
        {"reward": "certainty"},
        {"reward": "diversity", "batch": 7},
        {"reward": "loss", "student_images": 40},
        {"hierarchy": "two_level"},
    ],
)
def test_the_whole_pool_is_queried_without_repetition_and_charged_once(params: dict[str, Any]) -> None:
    victim, transfer = Victim(), TransferSet()
    labels = np.sort(LABELS)
    labels[:3], labels[3:10] = 7, 9  # a class of three images, and numbers that are not consecutive
    (small, whole) = steal(victim, [37, 600], labels=labels, transfer=transfer, **params)
    assert (small.queries, whole.queries) == (37, 600)
    assert victim.asked == victim.distinct() == 600
    assert sorted(transfer.indices) == list(range(600))
    if params.get("policy") != "random":
        assert {name for name in whole.curves if name.count("/") == 1 and name.startswith("policy/")} == {
            f"policy/{label}" for label in (0, 1, 2, 3, 4, 7, 9)
        }
        assert probability(whole, 7)[-1][1] == 0.0


def test_the_random_policy_is_the_control() -> None:
    transfers = [TransferSet(), TransferSet(), TransferSet()]
    steal(Victim(), [200], policy="random", labels=None, transfer=transfers[0])
    steal(Victim(), [200], attack=Distillation(), labels=None, transfer=transfers[1])
    steal(Victim(), [200], policy="random", labels=None, transfer=transfers[2], seed=1)
    np.testing.assert_array_equal(transfers[0].indices, transfers[1].indices)
    assert not np.array_equal(transfers[0].indices, transfers[2].indices)
    with pytest.raises(ConfigError, match="labels"):
        steal(Victim(), [200], policy="adaptive", labels=None)


@pytest.mark.parametrize("batch", [1, 16])
def test_budgets_are_nested_and_substitutes_do_not_depend_on_the_rungs_before(batch: int) -> None:
    run = partial(steal, batch=batch, student_every=30)
    small, large = TransferSet(), TransferSet()
    (alone,) = run(Victim(), [90], transfer=small)
    nested = run(Victim(), [30, 90, 150], transfer=large)
    skipping = run(Victim(), [30, 90, 150], skip=[30, 150])
    np.testing.assert_array_equal(small.indices, large.prefix(90)[0])
    assert same(alone.model, nested[1].model) and same(alone.model, skipping[0].model)
    assert alone.curves == nested[1].curves == skipping[0].curves
    assert not np.array_equal(small.indices, run_other_seed(batch))


def run_other_seed(batch: int) -> np.ndarray:
    other = TransferSet()
    steal(Victim(), [90], batch=batch, student_every=30, transfer=other, seed=1)
    return other.indices


@pytest.mark.parametrize("hierarchy", ["none", "two_level"])
def test_a_killed_thief_goes_on_as_if_nothing_had_happened(hierarchy: str, tmp_path: Path) -> None:
    run = partial(steal, hierarchy=hierarchy, batch=8, student_every=30)
    undisturbed = TransferSet()
    expected = run(Victim(), [60, 150], transfer=undisturbed)
    dying = Victim(fail_at=13)
    with pytest.raises(ConnectionError):
        run(dying, [60, 150], transfer=TransferSet(tmp_path))
    stored = len(TransferSet(tmp_path))
    assert 0 < stored <= dying.asked
    rest, continued = Victim(), TransferSet(tmp_path)
    resumed = run(rest, [60, 150], transfer=continued)
    assert rest.asked == 150 - stored
    np.testing.assert_array_equal(continued.indices, undisturbed.indices)
    assert [rung.curves for rung in resumed] == [rung.curves for rung in expected]
    assert same(resumed[1].model, expected[1].model)


def test_what_was_paid_for_counts_where_the_student_is_not_reproducible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = partial(steal, reward="loss", batch=4, student_every=20)
    run(Victim(), [100], transfer=TransferSet(tmp_path))
    stored = TransferSet(tmp_path).indices.copy()
    predict = knockoff._Student.predict
    monkeypatch.setattr(knockoff._Student, "predict", lambda self, indices: predict(self, indices)[:, ::-1])
    elsewhere, continued = TransferSet(), TransferSet(tmp_path)
    run(Victim(), [150], transfer=elsewhere)
    assert not np.array_equal(elsewhere.indices[:100], stored)
    victim = Victim()
    run(victim, [150], transfer=continued)
    np.testing.assert_array_equal(continued.indices[:100], stored)
    assert victim.asked == 50 and len(np.unique(continued.indices)) == 150


def test_the_transfer_set_of_another_attack_is_refused(tmp_path: Path) -> None:
    steal(Victim(), [100], transfer=TransferSet(tmp_path))
    for others in ({"seed": 1}, {"policy": "random"}):
        with pytest.raises(ArtifactError, match="another"):
            steal(Victim(), [100], transfer=TransferSet(tmp_path), **others)  # type: ignore[arg-type]


def test_the_student_is_trained_only_for_the_reward_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[int] = []
    fit = Thief.fit

    def count(self: Any, model: Any, images: Any, answers: Any, *names: Any, **rest: Any) -> Any:
        if names[0] == "student":
            fits.append(len(images))
            assert rest["epochs"] == 1
        return fit(self, model, images, answers, *names, **rest)

    monkeypatch.setattr(Thief, "fit", count)
    steal(Victim(), [160], reward="certainty")
    assert not fits
    # At 32, 64, 96 and 128 images (whole batches of 16), at most 100 of them; at 160 nobody asks any more.
    steal(Victim(), [160], reward="loss", student_every=30, student_images=100, student_epochs=1)
    assert fits == [32, 64, 96, 100]


def test_the_loss_reward_finds_what_the_student_does_not_know() -> None:
    # All classes get one and the same answer but for the good one, whose answers no linear student foresees.
    class Odd(Victim):
        def query(self, images: Images | FloatImages) -> Answers:
            super().query(images)
            odd = images[:, 0, 0, 0] == GOOD
            outputs = np.where(odd, images[:, 0, 1, 1] % CLASSES, 0)
            return np.eye(CLASSES, dtype=np.float32)[outputs]

    learning = FAST | {"learning_rate": 0.01}
    for seed in (0, 2):
        settings: dict[str, Any] = {
            "reward": "loss",
            "student_every": 20,
            "student_epochs": 10,
            "batch": 4,
        }
        (rung,) = steal(Odd(), [300], seed=seed, training=learning, **settings)
        # The first steps are large and taken by chance (1 / N); it counts what follows them.
        shares = [share for queries, share in probability(rung, GOOD) if queries >= 60 and share > 0]
        assert shares[-1] > shares[0] + 0.05


def test_curves_are_short_and_end_within_their_rung() -> None:
    (rung,) = steal(Victim(), [600], reward="certainty", batch=1)
    names = {"reward", "reward/certainty", *(f"policy/{label}" for label in range(ARMS))}
    assert set(rung.curves) == names
    for name in names:
        queries = [each for each, _ in rung.curves[name]]
        assert queries == sorted(set(queries)) and queries[-1] <= 600 and 40 < len(queries) < 100
    for point in range(len(rung.curves["policy/0"])):
        assert sum(rung.curves[f"policy/{label}"][point][1] for label in range(ARMS)) == pytest.approx(1)
    points, query_images = 0, 0
    while query_images < 1_000_000:
        points, query_images = points + 1, max(query_images + 1, int(np.ceil(query_images * knockoff.LOG_GROWTH)))
    assert points <= 210


def test_only_the_first_classes_are_logged() -> None:
    labels = np.arange(600, dtype=np.int64) % 30
    (rung,) = steal(Victim(), [40], reward="certainty", labels=labels, hierarchy="two_level", coarse_classes=4)
    assert sum(name.startswith("policy/group_of/") for name in rung.curves) == 20
    assert sum(name.startswith("policy/group/") for name in rung.curves) == 4
    assert sum(name.count("/") == 1 and name.startswith("policy/") for name in rung.curves) == 20


def test_groups_are_of_classes_that_look_alike() -> None:
    rng = np.random.default_rng(2)
    dark, light = rng.integers(0, 60, (80, 3, 20, 12)), rng.integers(190, 256, (80, 3, 20, 12))
    flat = np.full((40, 3, 20, 12), 128)
    busy = rng.integers(0, 2, (40, 3, 20, 12)) * 255
    pool = np.concatenate([dark[:40], light[:40], busy, dark[40:], flat, light[40:]]).astype(np.uint8)
    present, members = members_of(np.repeat(np.arange(6), 40))
    assert present.tolist() == list(range(6)) and members[2].tolist() == list(range(80, 120))
    # Noise and plain grey have the same mean; their deviations tell them apart.
    groups = group_classes(pool, members, 4)
    assert [group.tolist() for group in groups] == [[0, 3], [1, 5], [2], [4]]
    assert [group.tolist() for group in group_classes(pool, members, 99)] == [[each] for each in range(6)]
    assert [group.tolist() for group in group_classes(pool, members, 1)] == [list(range(6))]


MIXED = {"name": "mixture", "parts": [{"name": "digits", "limit": 60}, {"name": "noise", "train_images": 60}]}


@pytest.mark.parametrize(("pool", "classes"), [("train", 10), ("disjoint", 10), (MIXED, 13)])
def test_the_labels_of_every_pool_reach_the_policy(pool: Any, classes: int) -> None:
    training = {"epochs": 1, "early_stop_patience": None}
    thief = {"attack": {"name": "knockoff", "policy": "adaptive"}, "budgets": [24, 64], "training": training}
    small = {"model": {"name": "cnn9", "width": 0.05}}
    config = build(
        ExperimentConfig, {"data": "digits", "splits": {"thief_pool": pool}, "victim": small, "thief": thief | small}
    )
    data = load_splits(config)
    victim = build_network(config.victim.model, data.shape, data.classes).eval()
    ledger, transfer = Ledger(None), TransferSet()
    ledger.register("thief", 64, None)
    blackbox = LocalBlackBox(victim, config.service.policy.build(), ledger, "thief", pass_images=32)
    rungs = list(run_attack(config, data, blackbox, transfer))
    assert ledger.charged("thief") == len(np.unique(transfer.indices)) == rungs[-1].queries == 64
    logged = {name for name in rungs[-1].curves if name.startswith("policy/")}
    assert logged == {f"policy/{label}" for label in range(classes)}
