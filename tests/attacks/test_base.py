"""An attack's methods are checked when its class is defined, and its settings before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_fakes import FAST_TRAINING, POOL, FakeBlackBox, Substitute

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.base import Attack, Rung
from mea_ray.attacks.query_attack import Queries, QueryAttack, Thief
from mea_ray.config import ExperimentConfig, LearningConfig, build
from mea_ray.core.errors import ConfigError


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a module of another package and return its name."""
    monkeypatch.chdir(tmp_path)
    names: list[str] = []

    def write(source: str) -> str:
        names.append(f"written_attack_{len(names)}_{tmp_path.name}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_run_that_lacks_a_keyword_is_refused_by_name_when_the_config_is_read(outside: Any) -> None:
    """The recipe that the README once had: it ended in a TypeError after the victim was trained."""
    module = outside(
        "from mea_ray.attacks.base import Attack\n\n\n"
        "class Mine(Attack):\n"
        "    def __init__(self, *, rounds: int = 3) -> None:\n"
        "        self.rounds = rounds\n\n"
        "    def run(self, blackbox, pool, *, budgets, make_model, training, seed, transfer=None, skip=()):\n"
        "        yield None\n"
    )
    with pytest.raises(
        ConfigError, match=r"Mine.run does not take learning=, labels=; it must be run\(self, blackbox, "
    ):
        build(ExperimentConfig, {"thief": {"attack": f"{module}:Mine"}})
    with pytest.raises(ConfigError, match="QueryAttack"):
        ATTACKS.resolve(f"{module}:Mine")


def test_a_method_that_cannot_be_called_is_refused_when_its_class_is_defined() -> None:
    with pytest.raises(ConfigError, match=r"Few.queries cannot be called.*queries\(self, thief\)"):

        class Few(QueryAttack):
            def queries(self) -> Queries:  # type: ignore[override]
                yield POOL[:1]

    with pytest.raises(ConfigError, match="missing a required argument: 'more'"):

        class Many(QueryAttack):
            def queries(self, thief: Thief, more: int) -> Queries:  # type: ignore[override]
                yield POOL[:1]

    with pytest.raises(ConfigError, match="missing a required argument: 'more'"):

        class Needy(Attack):
            def run(self, blackbox: Any, pool: Any, *, more: int, **rest: Any) -> Iterator[Rung]:  # type: ignore[override]
                yield from ()


def test_a_run_of_its_own_is_possible_and_called_as_every_other() -> None:
    class Whole(Attack):
        def run(self, blackbox: Any, pool: Any, **rest: Any) -> Iterator[Rung]:
            answers = blackbox.query(pool[: rest["budgets"][0]])
            yield Rung(rest["budgets"][0], len(answers), rest["make_model"](), 0, 0.0)

    assert isinstance(Whole(), Attack)
    settings: dict[str, Any] = {"training": FAST_TRAINING, "seed": 0, "transfer": None, "skip": ()}
    rungs = Whole().run(FakeBlackBox(), POOL, budgets=[5], make_model=Substitute, labels=None, **settings)
    assert [rung.queries for rung in rungs] == [5]


def test_an_attack_without_queries_is_refused(outside: Any) -> None:
    module = outside("from mea_ray.attacks.query_attack import QueryAttack\n\n\nclass Idle(QueryAttack):\n    pass\n")
    with pytest.raises(ConfigError, match="must define queries"):
        ATTACKS.build(f"{module}:Idle")


def test_a_pool_without_labels_is_refused_before_any_query_by_attacks_that_read_them() -> None:
    adaptive, plain = ATTACKS.build("knockoff", policy="adaptive"), ATTACKS.build("knockoff")
    with pytest.raises(ConfigError, match="labels of the thief's pool"):
        adaptive.check(600, [10], FAST_TRAINING, labelled=False)
    plain.check(600, [10], FAST_TRAINING, labelled=False)
    adaptive.check(600, [10], FAST_TRAINING)


@pytest.mark.parametrize(
    ("name", "params", "budgets", "smallest"),
    [
        ("distillation", {}, [1], 1),
        ("distillation", {}, [50, 300], 32),
        ("distillation", {"requery": True}, [2, 9], 1),
        ("active", {"initial": 1}, [20], 1),
        ("active", {"initial": 1, "selection": "random"}, [20], 20),
        ("active", {"initial": 25}, [20], 20),
        ("jbda", {"seed_size": 1}, [20], 1),
        ("jbda", {"seed_size": 40}, [20], 20),
        ("knockoff", {"policy": "adaptive"}, [20], 20),
        ("dfme", {"batch_size": 4}, [40], 4),
        ("stolen_encoder", {}, [1, 5], 1),
    ],
)
def test_the_smallest_batch_is_known_before(
    name: str, params: dict[str, Any], budgets: list[int], smallest: int
) -> None:
    training = FAST_TRAINING.changed(batch_size=32)
    assert ATTACKS.build(name, **params).smallest_batch(600, budgets, training) == smallest
    if name != "dfme":
        assert ATTACKS.build(name, **params).smallest_batch(600, budgets, FAST_TRAINING.changed(batch_size=1)) == 1


def test_held_out_images_make_the_smallest_batch_smaller() -> None:
    training = FAST_TRAINING.changed(batch_size=32, early_stop_patience=3)
    attack = ATTACKS.build("distillation")
    assert attack.smallest_batch(600, [3], training, LearningConfig(validation_fraction=0.7)) == 1
