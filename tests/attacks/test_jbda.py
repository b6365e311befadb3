"""Jacobian augmentation on a linear victim and a linear substitute, where every point is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from attack_fakes import CLASSES, FAST, POOL, SHAPE, FakeBlackBox, Substitute, flat, same, steal, thief_of

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.jbda import Jbda, first_times, stepped
from mea_ray.attacks.transfer import TransferSet
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import numpy_generator
from mea_ray.core.types import Images
from mea_ray.removal.base import last_layer

VARIANTS: list[dict[str, Any]] = [
    {},
    {"output": "logit", "step": 0.03},
    {"periodic": 1},
    {"reservoir": 25, "reservoir_from": 1, "rounds_epochs": 4},
]


def linear(seed: int = 0, scale: float = 3.0) -> Substitute:
    model = Substitute()
    rng = np.random.default_rng(seed)
    head = last_layer(model)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(rng.normal(0, scale / 8, (CLASSES, 64))))
        head.bias.copy_(torch.from_numpy(rng.normal(0, 0.1, CLASSES)))
    model.set_normalisation([0.4], [0.3])
    return model


def plain_step(model: Substitute, image: npt.NDArray[np.uint8], label: int, step: float, output: str) -> Images:
    """One image, one pixel after another, with the Jacobian of a linear network written out."""
    head = last_layer(model)
    weight, bias = (tensor.detach().double().numpy() for tensor in (head.weight, head.bias))
    mean, std = float(model.mean), float(model.std)
    logits = weight @ ((image.reshape(-1) / 255 - mean) / std) + bias
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    jacobian = weight / std
    if output == "probability":
        jacobian = probabilities[:, None] * (jacobian - probabilities @ jacobian)
    step = np.sign(step) * np.floor(255 * abs(step) + 0.5) / 255
    made = np.empty(64, np.uint8)
    for pixel in range(64):
        value = image.reshape(-1)[pixel] / 255 + step * np.sign(jacobian[label, pixel])
        made[pixel] = round(min(max(value, 0.0), 1.0) * 255)
    return made.reshape(image.shape)


@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("step", [0.1, -0.1, 0.03, 1 / 255])
def test_a_step_is_the_papers(output: str, step: float) -> None:
    model, labels = linear(), np.random.default_rng(1).integers(0, CLASSES, 40)
    made = stepped(model, POOL[:40], labels, step, output)  # type: ignore[arg-type]
    assert made.dtype == np.uint8
    expected = [plain_step(model, image, label, step, output) for image, label in zip(POOL[:40], labels, strict=True)]
    np.testing.assert_array_equal(made, expected)


def test_a_step_is_clipped_and_has_whole_levels() -> None:
    model = Substitute()
    head = last_layer(model)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[0, 0::2], head.weight[0, 1::2] = 1.0, -1.0
    image = np.zeros((1, *SHAPE), np.uint8)
    image.reshape(-1)[:8] = [250, 250, 3, 3, 100, 100, 230, 25]
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    assert stepped(model, image, zero, 0.1, "logit").reshape(-1)[:10].tolist() == [
        255,
        224,
        29,
        0,
        126,
        74,
        255,
        0,
        26,
        0,
    ]
    # 0.1 is 25.5 of 255 levels, and a half counts as a whole one. A class without a gradient stays.
    np.testing.assert_array_equal(stepped(model, image, one, 0.1, "logit"), image)
    # Its probability has one: it falls as the other's rises.
    np.testing.assert_array_equal(
        stepped(model, image, one, 0.1, "probability"), stepped(model, image, zero, -0.1, "logit")
    )


def test_a_sure_substitute_still_has_a_gradient() -> None:
    model = linear(scale=400.0)
    labels = np.zeros(30, np.int64)
    pixels = (torch.from_numpy(POOL[:30]).float() / 255).requires_grad_()
    probability = model(pixels).softmax(1)[:, 0]
    vanished = torch.autograd.grad(probability.sum(), pixels)[0].flatten(1).abs().amax(1) == 0
    assert vanished.any(), "the probability itself should be lost in float32 here"
    moved = (stepped(model, POOL[:30], labels, 0.1) != POOL[:30]).reshape(30, -1).any(1)
    assert moved[probability.detach().numpy() < 0.5].all()


def test_a_step_does_not_depend_on_its_batch_and_leaves_weights_without_gradients() -> None:
    model, labels = linear(), np.arange(40) % CLASSES
    together = stepped(model, POOL[:40], labels, 0.1)
    apart = [stepped(model, POOL[i : i + 1], labels[i : i + 1], 0.1)[0] for i in range(40)]
    np.testing.assert_array_equal(together, apart)
    assert model.head.weight.grad is None and not model.training


def test_first_times_are_noted() -> None:
    queried: set[int] = set()
    assert first_times(POOL[[3, 4, 3, 5]], queried).tolist() == [0, 1, 3]
    assert first_times(POOL[[5, 6, 4, 6]], queried).tolist() == [1]
    assert len(queried) == 4


def plain_attack(attack: Jbda, box: FakeBlackBox, budget: int, seed: int = 0) -> list[bytes]:
    """Algorithm 1, image by image. Substitutes are trained as the attack does it, all else is written out."""
    order = numpy_generator(seed, "queries").permutation(len(POOL))
    points: list[Images] = list(POOL[order[: attack.seed_size]])
    number = 0
    while len(points) < budget:
        images = np.array(points)
        answers = box.query(images)
        thief = thief_of(TransferSet(), seed=seed)
        model = thief.new_model("round", number)
        assert isinstance(model, Substitute)
        epochs: dict[str, Any] = {"epochs": attack.rounds_epochs} if attack.rounds_epochs else {}
        thief.fit(model, images, answers, "round", number, **epochs)
        chosen = range(len(points))
        if attack.reservoir is not None and number >= attack.reservoir_from and len(points) > attack.reservoir:
            drawn = numpy_generator(seed, "reservoir", number).choice(len(points), attack.reservoir, replace=False)
            assert len(set(drawn.tolist())) == attack.reservoir
            chosen = drawn.tolist()
        step = attack.step
        if attack.periodic is not None and (number // attack.periodic) % 2 == 1:
            step = -step
        for index in chosen:
            made = plain_step(model, images[index], int(answers[index].argmax()), step, attack.output)
            if not any(np.array_equal(made, point) for point in points):
                points.append(made)
        number += 1
    return flat([np.array(points[:budget])])


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: ",".join(options) or "default")
@pytest.mark.parametrize("answer", ["all", "label"])
def test_it_asks_the_papers_points_with_the_oracles_labels(options: dict[str, Any], answer: str) -> None:
    attack = Jbda(seed_size=20, query_chunk=16, **options)
    box = FakeBlackBox(budget=130, answer=answer)
    steal(box, [130], attack, learning={"temperature": 1.0})
    assert flat(box.queries) == plain_attack(attack, FakeBlackBox(answer=answer), 130)
    assert box.charged == box.distinct() == 130
    assert all(query.dtype == np.uint8 and len(query) <= 16 for query in box.queries)


def test_the_label_is_the_victims_and_not_the_substitutes() -> None:
    class Liar(FakeBlackBox):
        def query(self, images: Any) -> Any:
            answers = super().query(images)
            return np.roll(answers, 1, axis=1) if len(self.queries) == 1 else answers

    # One seed: the first round trains on a single answer, and steps along the gradient of what the victim said.
    honest, liar = FakeBlackBox(), Liar()
    for box in (honest, liar):
        steal(box, [2], Jbda(seed_size=1, output="logit"), training=FAST | {"learning_rate": 1e-9})
    seed, outputs = honest.queries[0], int(honest.query(honest.queries[0]).argmax())
    model = thief_of(TransferSet()).new_model("round", 0)
    assert isinstance(model, Substitute)
    np.testing.assert_array_equal(honest.queries[1][0], plain_step(model, seed[0], outputs, 0.1, "logit"))
    np.testing.assert_array_equal(liar.queries[1][0], plain_step(model, seed[0], (outputs + 1) % CLASSES, 0.1, "logit"))


def test_the_sign_of_the_step_alternates() -> None:
    signs = [np.sign(Jbda(periodic=2).step_of(number)) for number in range(7)]
    assert signs == [1, 1, -1, -1, 1, 1, -1]
    assert {Jbda(step=0.2).step_of(number) for number in range(7)} == {0.2}


def test_a_reservoir_limits_later_rounds_only() -> None:
    curves = steal(FakeBlackBox(), [400], Jbda(seed_size=20, reservoir=30, reservoir_from=3))[0].curves["new points"]
    assert [value for _, value in curves[:4]] == [20, 40, 80, 30]
    assert [count for count, _ in curves[:4]] == [40, 80, 160, 190]
    assert all(value <= 30 for _, value in curves[3:])


def test_seeds_do_not_depend_on_the_budget_and_duplicates_are_never_paid_for() -> None:
    pool = np.concatenate([POOL[:12]] * 5)
    box = FakeBlackBox()
    (rung,) = steal(box, [100], Jbda(seed_size=20), pool=pool)
    assert box.distinct() == box.asked == rung.queries == 100
    small, large = FakeBlackBox(), FakeBlackBox()
    steal(small, [15], Jbda(seed_size=20))
    steal(large, [15, 200], Jbda(seed_size=20))
    assert flat(small.queries) == flat(large.queries)[:15]


def test_a_point_that_was_queried_before_is_dropped() -> None:
    # One label and one gradient for all, without clipping: x becomes x + s, then x - s (and x again), then x + 2 s (and
    # x twice). Every round finds as many new points as there are seeds, however many it steps from.
    box = FakeBlackBox()
    box.weights[:] = 0
    attack = Jbda(seed_size=10, periodic=1, step=0.05, output="logit")
    training = FAST | {"learning_rate": 1e-9}
    (rung,) = steal(box, [50], attack, pool=POOL // 4 + 96, training=training, make_model=linear)
    assert [value for _, value in rung.curves["new points"]] == [10, 10, 10]
    assert box.charged == box.distinct() == 50


class Blind(Substitute):
    """Sees nothing, so that its gradient is zero everywhere."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x.flatten(1)


def test_rounds_that_run_dry_ask_the_pool_until_it_is_empty() -> None:
    box = FakeBlackBox()
    rungs = steal(box, [50, 100], Jbda(seed_size=20), pool=POOL[:70], make_model=Blind)
    assert [rung.queries for rung in rungs] == [50, 70]
    order = numpy_generator(0, "queries").permutation(70)
    assert flat(box.queries) == flat([POOL[order]])
    assert [value for _, value in rungs[1].curves["new points"]] == [0, 0, 0, 0]


def thieves(attack: Callable[[], Jbda]) -> None:
    """Nested budgets: a substitute depends on its own prefix only."""
    (alone,) = steal(FakeBlackBox(), [70], attack())
    after = steal(FakeBlackBox(), [10, 45, 70, 120], attack())
    (skipping,) = steal(FakeBlackBox(), [30, 70], attack(), skip={30})
    for other in (after[2], skipping):
        assert same(alone.model, other.model) and alone.curves == other.curves and other.queries == 70


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: ",".join(options) or "default")
def test_budgets_are_nested(options: dict[str, Any]) -> None:
    thieves(lambda: Jbda(seed_size=20, query_chunk=16, **options))


def test_a_killed_thief_goes_on_where_it_was(tmp_path: Path) -> None:
    def attack() -> Jbda:
        return Jbda(seed_size=20, query_chunk=16, reservoir=25, reservoir_from=1)

    whole = FakeBlackBox()
    model = steal(whole, [90], attack())[0].model
    for number in range(len(whole.queries)):
        path = tmp_path / str(number)
        dying = FakeBlackBox(budget=90, fail_at=number)
        with pytest.raises(ConnectionError):
            steal(dying, [90], attack(), transfer=TransferSet(path))
        rest = FakeBlackBox(budget=90, paid=dying.paid, start_at=dying.asked)
        (rung,) = steal(rest, [90], attack(), transfer=TransferSet(path))
        assert flat(dying.queries + rest.queries) == flat(whole.queries)
        assert rest.charged == 90 and same(rung.model, model)


def test_it_is_a_function_of_its_seed() -> None:
    boxes = [FakeBlackBox() for _ in range(3)]
    for box, seed, state in zip(boxes, (1, 1, 2), (5, 6, 7), strict=True):
        torch.manual_seed(state)
        steal(box, [60], Jbda(seed_size=20), seed=seed)
    first, again, other = (flat(box.queries) for box in boxes)
    assert first == again and first != other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed_size": 0}, "seed_size=0"),
        ({"rounds_epochs": 0}, "rounds_epochs=0"),
        ({"periodic": 0}, "periodic=0"),
        ({"reservoir": 0}, "reservoir=0"),
        ({"reservoir_from": -1}, "reservoir_from=-1"),
        ({"query_chunk": 0}, "query_chunk=0"),
        ({"step": 0.001}, "step=0.001"),
        ({"step": 1.5}, "step=1.5"),
        ({"output": "loss"}, "output"),
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ATTACKS.build("jbda", **options)


def test_a_pool_that_cannot_seed_it_is_refused_before_any_query() -> None:
    box = FakeBlackBox()
    with pytest.raises(ConfigError, match="holds 100 images, this attack needs 150"):
        steal(box, [500], Jbda(), pool=POOL[:100])
    assert not box.queries
    steal(box, [100], Jbda(), pool=POOL[:100])
    assert box.asked == 100


def test_more_queries_steal_more() -> None:
    training = FAST | {"epochs": 30, "learning_rate": 0.01}
    rungs = steal(FakeBlackBox(), [20, 320], Jbda(seed_size=20, rounds_epochs=10), training=training)
    unseen = np.random.default_rng(9).integers(0, 256, (1000, *SHAPE), dtype=np.uint8)
    outputs = FakeBlackBox().query(unseen).argmax(1)
    with torch.no_grad():
        agree = [float((r.model(torch.from_numpy(unseen) / 255).argmax(1).numpy() == outputs).mean()) for r in rungs]
    assert agree[1] > agree[0] + 0.1
