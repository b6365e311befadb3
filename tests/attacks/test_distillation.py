from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_fakes import CLASSES, FAST, FAST_TRAINING, POOL, SHAPE, FakeBlackBox, Substitute, same
from attack_fakes import steal as steal_with

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.base import Attack, Rung
from mea_ray.attacks.distillation import Distillation
from mea_ray.attacks.learning import Learning
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import LearningConfig, TrainingConfig, build
from mea_ray.core.errors import ArtifactError, ConfigError, OverBudget
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.data.statistics import channel_statistics


def steal(blackbox: FakeBlackBox, budgets: Sequence[int], attack: Attack | None = None, **rest: Any) -> list[Rung]:
    return steal_with(blackbox, budgets, attack or Distillation(query_chunk=64), **rest)


def test_the_table_builds_it_from_its_defaults_and_refuses_unknown_parameters() -> None:
    attack = ATTACKS.build("distillation")
    assert isinstance(attack, Distillation) and not attack.requery
    assert attack.learning(LearningConfig()).temperature == 7.0
    assert attack.learning(LearningConfig(temperature=2.0)).temperature == 2.0
    assert all(parameter.doc for parameter in ATTACKS.parameters("distillation"))
    with pytest.raises(ConfigError, match="query_chunk"):
        ATTACKS.build("distillation", query_chnk=3)


def test_each_image_is_queried_once_and_none_beyond_the_budget() -> None:
    blackbox = FakeBlackBox(budget=250)
    rungs = steal(blackbox, [100, 250])
    assert [len(images) for images in blackbox.queries] == [64, 36, 28, 64, 58]
    assert blackbox.distinct() == blackbox.asked == 250
    assert [(rung.budget, rung.queries, rung.epochs) for rung in rungs] == [(100, 100, 2), (250, 250, 2)]


def test_a_rung_is_paid_for_only_when_it_is_wanted() -> None:
    blackbox = FakeBlackBox(budget=250)
    rungs = Distillation().run(
        blackbox, POOL, budgets=[100, 250], make_model=Substitute, training=FAST_TRAINING, seed=0
    )
    assert blackbox.asked == 0
    next(rungs)
    assert blackbox.asked == 100


def test_transfer_sets_are_nested_and_their_answers_belong_to_their_images() -> None:
    small, large = TransferSet(), TransferSet()
    steal(FakeBlackBox(), [90], transfer=small)
    steal(FakeBlackBox(), [30, 200], transfer=large)
    np.testing.assert_array_equal(small.indices, large.prefix(90)[0])
    np.testing.assert_array_equal(large.answers, FakeBlackBox().query(POOL[large.indices]))


def test_a_substitute_does_not_depend_on_the_rungs_before_it() -> None:
    alone = steal(FakeBlackBox(), [250])[0]
    after_others = steal(FakeBlackBox(), [100, 200, 250])[-1]
    skipping = steal(FakeBlackBox(), [100, 250], skip={100})
    assert same(alone.model, after_others.model)
    assert len(skipping) == 1 and same(alone.model, skipping[0].model)
    assert not alone.model.training


def test_it_is_a_function_of_its_seed_and_leaves_the_callers_random_stream_alone() -> None:
    models = []
    for caller, seed in enumerate((3, 3, 4)):
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        models.append(steal(FakeBlackBox(), [100], seed=seed)[0].model)
        assert torch.equal(before, torch.get_rng_state())
    first, again, other = models
    assert same(first, again) and not same(first, other)


def test_a_killed_thief_goes_on_without_asking_anything_twice(tmp_path: Path) -> None:
    dying = FakeBlackBox(fail_at=3)
    with pytest.raises(ConnectionError):
        steal(dying, [100, 250], transfer=TransferSet(tmp_path))
    assert len(TransferSet(tmp_path)) == dying.asked == 64 + 36 + 28
    rest = FakeBlackBox(budget=250 - dying.asked)
    rungs = steal(rest, [100, 250], transfer=TransferSet(tmp_path), skip={100})
    dying.queries += rest.queries
    assert dying.distinct() == dying.asked == 250
    assert same(rungs[0].model, steal(FakeBlackBox(), [250])[0].model)


def test_a_finished_transfer_set_asks_nothing(tmp_path: Path) -> None:
    steal(FakeBlackBox(), [100], transfer=TransferSet(tmp_path))
    silent = FakeBlackBox(budget=0)
    steal(silent, [50, 100], transfer=TransferSet(tmp_path))
    assert silent.asked == 0


def test_the_transfer_set_of_another_seed_is_refused(tmp_path: Path) -> None:
    steal(FakeBlackBox(), [100], transfer=TransferSet(tmp_path))
    with pytest.raises(ArtifactError, match="another"):
        steal(FakeBlackBox(), [100], transfer=TransferSet(tmp_path), seed=1)


@pytest.mark.parametrize("budgets", [[601], [100, 601], [], [0], [100, 100], [200, 100]])
def test_budgets_that_cannot_be_filled_are_refused_before_any_query(budgets: list[int]) -> None:
    blackbox = FakeBlackBox()
    with pytest.raises(ConfigError, match="budgets"):
        Distillation().run(blackbox, POOL, budgets=budgets, make_model=Substitute, training=FAST_TRAINING, seed=0)
    assert blackbox.asked == 0


def test_a_black_box_that_answers_too_few_is_refused_before_any_query() -> None:
    blackbox = FakeBlackBox(budget=199)
    with pytest.raises(ConfigError, match="199"):
        steal(blackbox, [100, 200])
    assert blackbox.asked == 0


def test_over_budget_keeps_what_was_answered(tmp_path: Path) -> None:
    # A durable set may hold one answer less than was charged, so that only the victim can tell.
    with pytest.raises(OverBudget):
        steal(FakeBlackBox(budget=199), [200], transfer=TransferSet(tmp_path))
    assert len(TransferSet(tmp_path)) == 192


def plain_softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(1, keepdims=True))
    softmax: np.ndarray = powers / powers.sum(1, keepdims=True)
    return softmax


@pytest.mark.parametrize("loss", ["kl", "soft_ce", "l1"])
@pytest.mark.parametrize("temperature", [1.0, 7.0, 0.5])
@pytest.mark.parametrize("squared", [False, True])
def test_the_loss_is_hintons(loss: str, temperature: float, squared: bool) -> None:
    rng = np.random.default_rng(5)
    victim, substitute = rng.normal(0, 3, (2, 9, CLASSES))
    attack = Learning(loss=loss, temperature=temperature, scale_by_temperature_squared=squared)
    value = attack.distance(torch.tensor(substitute), attack.soften(torch.tensor(plain_softmax(victim))))
    # The plain loss has the victim's logits; the attack has only its answers.
    target, outputs = plain_softmax(victim / temperature), plain_softmax(substitute / temperature)
    expected = {
        "kl": np.mean(np.sum(target * (np.log(target) - np.log(outputs)), 1)),
        "soft_ce": np.mean(np.sum(-target * np.log(outputs), 1)),
        "l1": np.mean(np.sum(np.abs(target - outputs), 1)),
    }[loss]
    assert float(value) == pytest.approx(expected * (temperature**2 if squared else 1), rel=1e-4)


def test_answers_with_zeros_make_finite_targets() -> None:
    hidden = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.6, 0.3, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    hot = Learning(temperature=7.0).soften(hidden)
    assert torch.allclose(hot.sum(1), torch.ones(3)) and torch.equal(hot.argmax(1)[:2], torch.tensor([1, 0]))
    zero = 1e-12 ** (1 / 7)
    assert hot[0, 0].item() == pytest.approx(zero / (1 + 3 * zero), rel=1e-4)
    cold = Learning(temperature=1.0).soften(hidden)
    assert torch.allclose(cold[1], torch.tensor([2 / 3, 1 / 3, 0.0, 0.0]))
    for loss in ("kl", "soft_ce", "l1"):
        for temperature in (1.0, 7.0):
            attack = Learning(loss=loss, temperature=temperature)
            logits = torch.randn(3, CLASSES, requires_grad=True)
            attack.distance(logits, attack.soften(hidden)).backward()
            assert logits.grad is not None and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("answer", ["all", "top_2", "label"])
@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_a_substitute_learns_the_victim(answer: str, temperature: float) -> None:
    victim = FakeBlackBox(answer=answer)
    training = FAST | {"epochs": 30, "learning_rate": 0.01}
    learning = {"temperature": temperature, "scale_by_temperature_squared": True}
    stolen = steal(victim, [600], training=training, learning=learning)[0].model
    unseen = np.random.default_rng(9).integers(0, 256, (1000, *SHAPE), dtype=np.uint8)
    with torch.no_grad():
        predicted = stolen(torch.from_numpy(unseen).float() / 255).argmax(1).numpy()
    assert (predicted == victim.query(unseen).argmax(1)).mean() > 0.8


def test_the_substitute_normalises_by_the_thiefs_own_images() -> None:
    dark = (POOL // 4).astype(np.uint8)
    model = steal(FakeBlackBox(), [60], pool=dark)[0].model
    scaled = dark.astype(np.float64) / 255
    buffers = dict(model.named_buffers())
    assert float(buffers["mean"]) == pytest.approx(scaled.mean(), abs=1e-6)
    assert float(buffers["std"]) == pytest.approx(scaled.std(), abs=1e-6)


def test_channel_statistics_are_numpys() -> None:
    images = np.random.default_rng(2).integers(0, 256, (5000, 3, 2, 3), dtype=np.uint8)
    images[:, 2] = 51
    means, deviations = channel_statistics(images)
    scaled = images / 255
    assert means == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    assert deviations[:2] == pytest.approx(scaled.std((0, 2, 3)).tolist()[:2])
    assert means[2] == pytest.approx(0.2) and deviations[2] == 1.0


def test_early_stop_watches_the_fidelity_on_held_out_answers() -> None:
    blackbox = FakeBlackBox(budget=100)
    training = FAST | {"epochs": 40, "early_stop_patience": 2, "learning_rate": 1e-9}
    rung = steal(blackbox, [100], learning={"validation_fraction": 0.2}, training=training)[0]
    assert blackbox.asked == 100 and rung.queries == 100
    # With a learning rate of nothing the fidelity never rises after the first epoch.
    assert rung.epochs == 3
    with pytest.raises(ConfigError, match="validation_fraction"):
        steal(FakeBlackBox(), [100], training=training)
    with pytest.raises(ConfigError, match="0 to validate"):
        steal(FakeBlackBox(), [3], learning={"validation_fraction": 0.1}, training=training)


def test_held_out_answers_are_not_wasted_without_early_stop() -> None:
    plain = steal(FakeBlackBox(), [100])[0].model
    assert same(plain, steal(FakeBlackBox(), [100], learning={"validation_fraction": 0.3})[0].model)


@pytest.mark.parametrize("budget", [100, 101, 337])
def test_requery_asks_every_batch_of_every_epoch_and_stops_at_the_budget(budget: int) -> None:
    blackbox = FakeBlackBox(budget=budget)
    training = FAST | {"epochs": 4, "batch_size": 10, "augment": ("flip",)}
    (rung,) = steal(blackbox, [budget], Distillation(requery=True, query_chunk=64), training=training)
    images = budget // 4
    assert blackbox.asked == rung.queries == 4 * images <= budget
    assert all(query.dtype == np.float32 for query in blackbox.queries)
    # Flipped views are other images than those of the pool: more distinct ones than there are originals.
    assert images < blackbox.distinct() <= 2 * images


def test_requery_charges_each_rung_for_itself() -> None:
    attack = Distillation(requery=True)
    assert attack.query_cost([100, 200]) == 300 and Distillation().query_cost([100, 200]) == 200
    blackbox = FakeBlackBox(budget=300)
    rungs = steal(blackbox, [100, 200], attack)
    assert [rung.queries for rung in rungs] == [100, 200] and blackbox.asked == 300
    # A small pool can be asked again and again; two epochs of 600 images are all that this training asks.
    assert steal(FakeBlackBox(), [1500], attack)[0].queries == 1200
    with pytest.raises(ConfigError, match="leaves 0 images"):
        steal(FakeBlackBox(), [1], attack)


def test_requery_holds_validation_images_out_of_the_budget() -> None:
    blackbox = FakeBlackBox(budget=100)
    training = FAST | {"early_stop_patience": 5}
    (rung,) = steal(
        blackbox, [100], Distillation(requery=True), training=training, learning={"validation_fraction": 0.5}
    )
    # 33 + 33 images: the first ones are asked once, the others in both epochs.
    assert rung.queries == blackbox.asked <= 100
    assert blackbox.queries[0].dtype == np.uint8 and len(blackbox.queries[0]) in {32, 33}


def test_an_interrupted_requery_replays_its_answers(tmp_path: Path) -> None:
    training = FAST | {"epochs": 4, "batch_size": 25, "augment": ("flip", "crop"), "crop_padding": 2}
    attack = Distillation(requery=True, query_chunk=50)
    dying = FakeBlackBox(fail_at=11)
    with pytest.raises(ConnectionError):
        steal(dying, [100, 400], attack, training=training, transfer=TransferSet(tmp_path))
    assert dying.asked == 275
    assert attack.answered_images(TransferSet(tmp_path), [100, 400]) == 275
    rest = FakeBlackBox(budget=500 - 275)
    resumed = steal(rest, [100, 400], attack, training=training, transfer=TransferSet(tmp_path), skip={100})
    assert rest.asked == 225
    whole = steal(FakeBlackBox(), [100, 400], attack, training=training)
    assert same(resumed[0].model, whole[1].model)


def test_black_boxes_that_answer_nonsense_are_noticed() -> None:
    class Broken(FakeBlackBox):
        def query(self, images: Images | FloatImages) -> Answers:
            return super().query(images)[:, :2]

    with pytest.raises(Exception, match="answers of shape"):
        steal(Broken(), [10])


@pytest.mark.parametrize(
    "learning",
    [
        {"temperature": 0.0},
        {"validation_fraction": 1.0},
        {"floor": 0.0},
        {"loss": "l3"},
        {"mixing": "blur"},
        {"mixing_alpha": 0.0},
        {"label_smoothing": 1.0},
        {"statistics": "victim"},
    ],
)
def test_impossible_parameters_are_refused(learning: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(learning))):
        build(LearningConfig, learning)
    with pytest.raises(ConfigError, match="query_chunk"):
        ATTACKS.build("distillation", query_chunk=0)


def test_it_takes_every_training_setting_of_a_config() -> None:
    defaults = {name: getattr(TrainingConfig(), name) for name in TrainingConfig.model_fields}
    training = defaults | {"epochs": 1, "crop_padding": 2}
    assert steal(FakeBlackBox(), [50], training=training)[0].epochs == 1
