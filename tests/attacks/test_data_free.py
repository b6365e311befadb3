"""DFME and MAZE: the estimated gradient, the accounts, and the student that is trained while it asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attack_fakes import (
    CLASSES,
    FAST,
    FAST_TRAINING,
    POOL,
    SHAPE,
    FakeBlackBox,
    Substitute,
    flat,
    same,
    steal,
    thief_of,
)
from torch import nn

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.data_free import DFME, MAZE, DataFree
from mea_ray.attacks.generator_game import LOG_EVERY, GeneratorGame, OnlineDiverged, forward_differences
from mea_ray.attacks.image_generator import ImageGenerator, pixels
from mea_ray.attacks.learning import Learning
from mea_ray.attacks.query_attack import Query
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import LearningConfig, merge
from mea_ray.core.errors import ConfigError
from mea_ray.core.seeding import derive
from mea_ray.core.types import Answers
from mea_ray.evaluation import metrics

SMALL: dict[str, Any] = {
    "batch_size": 6,
    "generator__noise_size": 5,
    "generator__width": 4,
    "generator__learning_rate": 1e-3,
}


def asked(query: Query) -> Any:
    return np.asarray(query.images)


def built(name: str, settings: dict[str, Any]) -> Any:
    """Build an attack; in the names of its settings ``__`` stands for a dot."""
    return ATTACKS.build(name, **merge({}, {key.replace("__", "."): value for key, value in settings.items()}))


def dfme(**changed: Any) -> DFME:
    attack: DFME = built("dfme", {**SMALL, "student__steps": 2, **changed})
    return attack


def maze(**changed: Any) -> MAZE:
    replay = {"replay__steps": 2, "replay__images": 20}
    attack: MAZE = built("maze", {**SMALL, **replay, "generator__directions": 2, "student__steps": 3, **changed})
    return attack


ATTACKED: list[Callable[..., DataFree]] = [dfme, maze]


@pytest.fixture(params=ATTACKED, ids=["dfme", "maze"])
def build(request: pytest.FixtureRequest) -> Callable[..., DataFree]:
    made: Callable[..., DataFree] = request.param
    return made


class Dropped(Substitute):
    """A linear network whose inputs are dropped at random in training, and that normalises batches."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(64)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.norm(self.dropout(x.flatten(1)))
        return features


# The estimate of the gradient


def along_a_basis(function: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor, epsilon: float) -> Any:
    """Estimate with all unit vectors as directions: what the expectation over the sphere is for a linear function."""
    size = points.shape[1]
    directions = torch.eye(size, dtype=points.dtype)[:, None].expand(size, *points.shape)
    moved = torch.stack([function(points + epsilon * each) for each in directions])
    return forward_differences(function(points), moved, directions, epsilon)


def test_the_estimate_of_a_linear_function_is_its_gradient() -> None:
    rng = torch.Generator().manual_seed(0)
    slope = torch.randn(7, generator=rng, dtype=torch.float64)
    points = torch.randn((3, 7), generator=rng, dtype=torch.float64)
    torch.testing.assert_close(along_a_basis(lambda x: x @ slope, points, 0.1), slope.expand(3, 7))


def test_the_estimate_of_a_quadratic_function_is_off_by_half_a_step_of_its_curvature() -> None:
    rng = torch.Generator().manual_seed(0)
    root = torch.randn((7, 7), generator=rng, dtype=torch.float64)
    curvature = root @ root.T
    points = torch.randn((3, 7), generator=rng, dtype=torch.float64)
    estimate = along_a_basis(lambda x: ((x @ curvature) * x).sum(1) / 2, points, 0.1)
    torch.testing.assert_close(estimate, points @ curvature + 0.05 * curvature.diagonal())


def test_random_directions_are_right_in_the_mean_and_off_by_the_dimension() -> None:
    rng = torch.Generator().manual_seed(0)
    size, count = 8, 40_000
    slope = torch.randn(size, generator=rng, dtype=torch.float64)
    directions = torch.randn((1, count, size), generator=rng, dtype=torch.float64)
    directions /= directions.norm(dim=2, keepdim=True)
    single = forward_differences(torch.zeros(count).double(), 1e-3 * directions @ slope, directions, 1e-3)
    # |d (a u) u|^2 = d^2 (a u)^2 is d |a|^2 in the mean.
    assert float(single.square().sum(1).mean() / slope.square().sum()) == pytest.approx(size, rel=0.03)
    torch.testing.assert_close(single.mean(0), slope, atol=0.05, rtol=0)


def test_the_generator_moves_along_the_true_gradient_of_the_disagreement(
    build: Callable[..., DataFree], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through the victim, which no thief has, with many more directions than pixels."""
    attack = build(generator__directions=4000, batch_size=4, generator__epsilon=1e-2)
    box = FakeBlackBox()
    game = GeneratorGame(attack.game, attack.disagreement, thief_of(TransferSet()))
    outputs, query = game.probe()
    seen: list[torch.Tensor] = []
    outputs.register_hook(seen.append)
    game.move_generator(outputs, query, box.query(asked(query)))
    point = outputs.detach().double().requires_grad_()
    student = game.student.double()
    predicted = (pixels(point).flatten(1) @ torch.from_numpy(box.weights).T).softmax(1)
    (-attack.disagreement(student(pixels(point)), predicted, 1e-12).mean()).backward()
    assert point.grad is not None
    result, true = seen[0].flatten(1).double(), point.grad.flatten(1)
    assert torch.nn.functional.cosine_similarity(result, true).min() > 0.97
    assert (result.norm(dim=1) / true.norm(dim=1)).sub(1).abs().max() < 0.1


# The losses


def answers_and_logits() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.dirichlet(np.ones(5), 6), rng.normal(size=(6, 5))


def test_the_loss_of_dfme_is_l1_of_logits_recovered_up_to_their_mean() -> None:
    answers, logits = answers_and_logits()
    expected = [np.abs(z - (np.log(p) - np.log(p).mean())).mean() for p, z in zip(answers, logits, strict=True)]
    result = dfme().disagreement(torch.from_numpy(logits), torch.from_numpy(answers), 1e-12)
    np.testing.assert_allclose(result, expected)
    of_victim = 3 * logits - (3 * logits).mean(1, keepdims=True)
    outputs = torch.from_numpy(3 * logits).softmax(1)
    assert float(dfme().disagreement(torch.from_numpy(of_victim), outputs, 1e-12).max()) < 1e-9


def test_the_loss_of_maze_is_kl_from_the_victim() -> None:
    answers, logits = answers_and_logits()
    powers = np.exp(logits)
    outputs = powers / powers.sum(1, keepdims=True)
    expected = [(p * np.log(p / q)).sum() for p, q in zip(answers, outputs, strict=True)]
    result = maze().disagreement(torch.from_numpy(logits), torch.from_numpy(answers), 1e-12)
    np.testing.assert_allclose(result, expected)


@pytest.mark.parametrize("answer", ["label", "top_2"])
def test_hidden_probabilities_are_floored(build: Callable[..., DataFree], answer: str) -> None:
    (rung,) = steal(FakeBlackBox(answer=answer), [200], build(), learning={"floor": 1e-3})
    assert all(torch.isfinite(value).all() for value in rung.model.state_dict().values())
    hard = torch.eye(CLASSES)[:2]
    logits = torch.zeros(2, CLASSES)
    assert float(dfme().disagreement(logits, hard, 1e-12).max()) == pytest.approx(27.63 * 2 * 3 / 16, rel=1e-3)


def plain_dfme(box: FakeBlackBox, iterations: int, seed: int, settings: dict[str, Any]) -> nn.Module:
    """DFME once more, straight from the paper, on the same random streams."""
    count, size = settings["batch_size"], settings["generator__noise_size"]
    torch.manual_seed(derive(seed, "student"))
    student = Substitute()
    student.set_normalisation([0.0], [1.0])
    torch.manual_seed(derive(seed, "generator"))
    generator = ImageGenerator(size, SHAPE, settings["generator__width"])
    noise, sphere = (torch.Generator().manual_seed(derive(seed, name)) for name in ("noise", "sphere"))
    descend = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    ascend = torch.optim.Adam(generator.parameters(), settings["generator__learning_rate"])

    def loss(images: torch.Tensor) -> torch.Tensor:
        logs = torch.from_numpy(box.query(images.detach().numpy())).log()
        distances: torch.Tensor = (student(images) - (logs - logs.mean(1, keepdim=True))).abs().mean(1)
        return distances

    for _ in range(iterations):
        x = generator(torch.randn((count, size), generator=noise))
        u = torch.randn((1, *x.shape), generator=sphere)[0]
        u = u / u.flatten(1).norm(dim=1)[:, None, None, None]
        with torch.no_grad():
            slopes = 64 * (loss((torch.tanh(x + 1e-2 * u) + 1) / 2) - loss((torch.tanh(x) + 1) / 2)) / 1e-2
        ascend.zero_grad()
        (x * (-slopes[:, None, None, None] * u / count)).sum().backward()
        ascend.step()
        for _ in range(settings["student__steps"]):
            with torch.no_grad():
                images = (torch.tanh(generator(torch.randn((count, size), generator=noise))) + 1) / 2
            descend.zero_grad()
            loss(images).mean().backward()
            descend.step()
    return student


def test_dfme_is_what_the_paper_says() -> None:
    settings = {**SMALL, "student__steps": 2, "generator__learning_rate": 1e-2}
    first, rung = steal(FakeBlackBox(), [24, 24 * 3], dfme(**settings, generator__epsilon=1e-2), seed=5)
    with torch.random.fork_rng([]):
        expected = plain_dfme(FakeBlackBox(), 3, 5, settings).state_dict()
    for name, value in rung.model.state_dict().items():
        # Where a difference of logits is near zero its sign hangs on the last bits.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-4)
    assert float((first.model.state_dict()["head.weight"] - expected["head.weight"]).abs().max()) > 0.02


# The accounts


def test_every_image_that_is_sent_is_charged_and_no_more_than_the_budget() -> None:
    box = FakeBlackBox(budget=100)
    rungs = steal(box, [40, 100], dfme())
    assert [len(query) for query in box.queries] == [12, 6, 6] * 4  # 96; the next 12 would be too many
    assert [rung.queries for rung in rungs] == [36, 96]
    assert box.charged == box.distinct() == rungs[-1].queries
    assert {query.dtype.name for query in box.queries} == {"float32"}
    assert dfme().game.iteration_queries == 24
    assert DFME().game.iteration_queries == 1792


def test_maze_reuses_the_batch_of_its_estimate_and_pays_nothing_for_replay() -> None:
    box = FakeBlackBox(budget=100)
    rungs = steal(box, [30, 100], maze())
    assert [len(query) for query in box.queries] == [18, 6, 6] * 3  # 90; the next 18 would be too many
    assert [rung.queries for rung in rungs] == [30, 90]
    assert box.charged == box.distinct() == 90
    assert maze().game.iteration_queries == 30
    assert MAZE().game.iteration_queries == 1920
    assert maze(replay__reuse_batch=False).game.iteration_queries == 36


def test_without_the_generator_only_batches_are_queried(build: Callable[..., DataFree]) -> None:
    box = FakeBlackBox()
    steal(box, [30], build(generator__steps=0))
    assert [len(query) for query in box.queries] == [6] * 5


def test_probes_are_a_step_away_from_the_images_they_belong_to() -> None:
    box = FakeBlackBox()
    steal(box, [30], dfme(generator__epsilon=0.5, generator__directions=3))
    base, moved = box.queries[0][:6].astype(np.float64), box.queries[0][6:].astype(np.float64)
    steps = np.arctanh(moved * 2 - 1).reshape(3, 6, 64) - np.arctanh(base * 2 - 1).reshape(6, 64)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=2), 0.5, rtol=1e-3)


def test_replay_draws_from_the_newest_images_with_their_own_answers() -> None:
    attack = maze(replay__images=15)
    game = GeneratorGame(attack.game, attack.disagreement, thief_of(TransferSet()))
    box = FakeBlackBox()
    for _ in range(4):
        images, query = game.batch()
        game.teach(images, box.query(asked(query)))
    newest_images: Any = np.concatenate(box.queries)[-15:]
    newest = set(flat([newest_images]))
    drawn: set[bytes] = set()
    for _ in range(30):
        images, answers = game.recall()
        np.testing.assert_array_equal(FakeBlackBox().query(images.numpy()), answers)
        drawn |= set(flat([images.numpy()]))
    assert drawn == newest


# The curve


@pytest.mark.parametrize("model", [Substitute, Dropped])
def test_a_rung_is_what_a_run_with_its_budget_alone_gives(
    build: Callable[..., DataFree], model: Callable[[], nn.Module]
) -> None:
    budgets = [30, 61, 150]
    rungs = steal(FakeBlackBox(), budgets, build(decay_at=(50, 90)), make_model=model)
    for rung in rungs:
        (alone,) = steal(FakeBlackBox(), [rung.budget], build(decay_at=(50, 90)), make_model=model)
        assert same(rung.model, alone.model) and rung.queries == alone.queries
        assert not rung.model.training
    assert not same(rungs[0].model, rungs[1].model) and not same(rungs[1].model, rungs[2].model)


def test_it_follows_from_its_seed_and_leaves_the_callers_random_stream_alone(build: Callable[..., DataFree]) -> None:
    before = torch.get_rng_state()
    (first,) = steal(FakeBlackBox(), [90], build(), make_model=Dropped)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    (again,) = steal(FakeBlackBox(), [90], build(), make_model=Dropped)
    (other,) = steal(FakeBlackBox(), [90], build(), make_model=Dropped, seed=1)
    assert same(first.model, again.model) and not same(first.model, other.model)


def test_one_attack_may_run_twice_at_once(build: Callable[..., DataFree]) -> None:
    attack = build()
    (alone,) = steal(FakeBlackBox(), [90], build())
    settings: dict[str, Any] = {"budgets": [30, 90], "make_model": Substitute, "training": FAST_TRAINING}
    runs = [attack.run(FakeBlackBox(), POOL, seed=seed, **settings) for seed in (0, 1)]
    turns = [next(run) for _, run in zip(range(4), cycle(runs), strict=False)]
    assert same(turns[2].model, alone.model) and not same(turns[3].model, alone.model)


@pytest.mark.parametrize("fail_at", [0, 1, 4, 7])
def test_a_killed_run_goes_on_with_the_same_bits(build: Callable[..., DataFree], fail_at: int, tmp_path: Path) -> None:
    expected = steal(FakeBlackBox(), [60, 150], build(), make_model=Dropped)
    dying = FakeBlackBox(fail_at=fail_at)
    with pytest.raises(ConnectionError):
        steal(dying, [60, 150], build(), make_model=Dropped, transfer=TransferSet(tmp_path))
    stored = TransferSet(tmp_path)
    box = FakeBlackBox(budget=150, paid=dying.paid, start_at=len(stored))
    rungs = steal(box, [60, 150], build(), make_model=Dropped, transfer=stored)
    assert all(same(a.model, b.model) for a, b in zip(rungs, expected, strict=True))
    assert box.charged == expected[-1].queries
    (skipping,) = steal(FakeBlackBox(0), [60, 150], build(), make_model=Dropped, transfer=stored, skip={60})
    assert same(skipping.model, expected[-1].model)


def test_it_needs_no_pool_and_normalises_nothing(build: Callable[..., DataFree]) -> None:
    (bare,) = steal(FakeBlackBox(), [60], build(), pool=POOL[:0], learning={"statistics": "pool"})
    (rich,) = steal(FakeBlackBox(), [60], build(), learning={"statistics": "none"})
    assert same(bare.model, rich.model)
    assert bare.model.mean.tolist() == [[[0.0]]] and bare.model.std.tolist() == [[[1.0]]]  # type: ignore[operator]


def fidelity(rung: Any) -> float:
    outputs: Answers = FakeBlackBox().query(POOL)
    return metrics.fidelity(metrics.predictions(rung.model, POOL), outputs.argmax(1))


def test_the_student_learns_what_the_victim_says_and_more_with_more_queries(build: Callable[..., DataFree]) -> None:
    wide: dict[str, Any] = {
        "batch_size": 32,
        "generator__noise_size": 64,
        "generator__width": 16,
        "student__learning_rate": 0.3,
    }
    rungs = steal(FakeBlackBox(), [200, 4000], build(**wide, **({"replay__images": 2000} if build is maze else {})))
    assert fidelity(rungs[1]) > 0.5 > fidelity(rungs[0]) + 0.1


def test_losses_are_logged_and_cut_at_the_rung() -> None:
    queries = 24 * LOG_EVERY
    rungs = steal(FakeBlackBox(), [queries - 1, 2 * queries], dfme())
    assert not rungs[0].curves
    assert set(rungs[1].curves) == {"student_loss", "disagreement"}
    for points in rungs[1].curves.values():
        assert [query_images for query_images, _ in points] == [queries, 2 * queries]
        assert points[1][1] < points[0][1]


def test_learning_rates_follow_the_queries() -> None:
    game = dfme(decay_at=(100, 200), decay_factor=0.1).game
    assert [game.rate(queries) for queries in (0, 99, 100, 199, 200)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    slow, fast = (steal(FakeBlackBox(), [300], dfme(decay_at=at, decay_factor=1e-9)) for at in ((40,), ()))
    (stopped,) = steal(FakeBlackBox(), [36], dfme())
    start, *ends = (run[0].model.state_dict()["head.weight"] for run in ([stopped], slow, fast))
    assert float((ends[0] - start).abs().max()) < 1e-6 < float((ends[1] - start).abs().max())


def test_the_thiefs_own_defences_change_the_student(build: Callable[..., DataFree]) -> None:
    changes: Sequence[dict[str, Any]] = (
        {},
        {"mixing": "mixup"},
        {"mixing": "cutmix"},
        {"label_smoothing": 0.2},
        {"temperature": 3.0},
        {"temperature": 3.0, "scale_by_temperature_squared": True},
    )
    models = [steal(FakeBlackBox(), [60], build(), learning=change)[0].model for change in changes]
    assert not any(same(a, b) for i, a in enumerate(models) for b in models[:i])
    clipped = steal(FakeBlackBox(), [60], build(), training={**FAST, "gradient_clip": 1e-3})
    assert not same(clipped[0].model, models[0])


# The generator


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 17, 9), (2, 2, 3)])
def test_a_generator_makes_images_of_any_shape(shape: tuple[int, int, int]) -> None:
    generator = ImageGenerator(5, shape, 6)
    painted = generator(torch.randn(8, 5))
    assert painted.shape == (8, *shape)
    assert painted.mean((0, 2, 3)).abs().max() < 1e-4
    images = pixels(100 * painted)
    assert images.min() >= 0 and images.max() <= 1


def test_the_generator_has_the_papers_layers() -> None:
    shapes = [tuple(each.shape) for each in ImageGenerator(256, (3, 32, 32)).parameters() if each.ndim > 1]
    assert shapes == [(128 * 8 * 8, 256), (128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]


# Errors


@pytest.mark.parametrize("name", ["dfme", "maze"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 1},
        {"generator__steps": -1},
        {"student__steps": 0},
        {"generator__directions": 0},
        {"generator__epsilon": 0.0},
        {"generator__noise_size": 0},
        {"generator__width": 1},
        {"student__learning_rate": 0.0},
        {"generator__learning_rate": -1.0},
        {"weight_decay": -0.1},
        {"decay_at": (5, 5)},
        {"decay_at": (0, 5)},
        {"decay_factor": 0.0},
        {"student__optimizer": "adamw"},
    ],
    ids=str,
)
def test_a_wrong_parameter_is_refused_by_name(name: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("__", ".")):
        built(name, wrong)


def test_settings_of_before_the_groups_go_on_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="student.learning_rate"):
        old = ATTACKS.build("maze", student_learning_rate=0.03, generator_width=32, directions=3, replay_steps=4)
    new = built("maze", {"student__learning_rate": 0.03, "generator__width": 32, "generator__directions": 3})
    assert (old.game.student, old.game.generator) == (new.game.student, new.game.generator)
    assert old.game.generator.noise_size == 100 and old.game.replay.steps == 4


def test_a_replay_that_holds_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="replay.images=5"):
        maze(replay__images=5)
    maze(replay__images=5, replay__steps=0)


def test_what_does_not_apply_is_refused_before_any_query(build: Callable[..., DataFree]) -> None:
    box = FakeBlackBox()
    with pytest.raises(ConfigError, match="early_stop_patience=3"):
        steal(box, [90], build(), training={**FAST, "early_stop_patience": 3}, learning={"validation_fraction": 0.1})
    with pytest.raises(ConfigError, match=r"learning.loss=l1"):
        steal(box, [90], build(), learning={"loss": "l1"})
    with pytest.raises(ConfigError, match="a budget of 17 images does not cover"):
        steal(box, [17, 90], build())
    with pytest.raises(ConfigError, match="strictly ascending"):
        steal(box, [90, 60], build())
    assert not box.asked


def test_a_budget_that_just_reaches_trains_the_student_once(build: Callable[..., DataFree]) -> None:
    (rung,) = steal(FakeBlackBox(), [18], build())
    torch.manual_seed(derive(0, "student"))
    assert rung.queries == 18 and not same(rung.model, Substitute())


def test_a_student_that_diverges_says_so(build: Callable[..., DataFree]) -> None:
    with pytest.raises(OnlineDiverged, match="student.learning_rate"):
        steal(FakeBlackBox(), [3000], build(student__learning_rate=1e30))


def test_a_learning_that_is_checked_is_the_shared_one() -> None:
    assert dfme().learning(LearningConfig(mixing="mixup")) == Learning(temperature=1.0, mixing="mixup")
    assert dfme().pool_needed([5]) == maze().pool_needed([7]) == 0
