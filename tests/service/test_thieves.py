"""Many thieves of one service: they do not notice each other, the owner sees them all, and none reaches the model."""

from __future__ import annotations

import functools
import gc
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import nn

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.base import Attack
from mea_ray.attacks.query_attack import QueryAttack, Thief
from mea_ray.blackbox.colluding import Colluding, account_names, account_share
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.prada import query_log_record
from mea_ray.config import ClientConfig, ServingConfig, TrainingConfig
from mea_ray.core.types import BlackBox
from mea_ray.models.build import build_model
from mea_ray.results.records import QueryLogRecord
from mea_ray.service.accounts import Account
from mea_ray.service.client import ServiceClient
from mea_ray.service.pool import VictimService
from mea_ray.training.checkpoint import load_model, save_model

SHAPE = (1, 8, 8)
SMALL = {"width": 0.0625}
TRAINING = TrainingConfig(epochs=1, batch_size=16, precision="float32")
THIEVES = {"ann": (0, 160, 1), "ben": (1, 96, 1), "cleo": (2, 128, 1), "dan": (3, 145, 2)}
"""Name: seed, budget, accounts."""


def _pool(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (200, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("victim")
    save_model(path, build_model("vgg_like", SHAPE, 10, SMALL), {})
    return path


@pytest.fixture(scope="module")
def service(ray_session: None, folder: Path) -> Iterator[VictimService]:
    running = VictimService.start(
        folder, "robbed", ServingConfig(cpus_per_replica=0.5, pass_images=16, max_wait_ms=10.0)
    )
    yield running
    running.stop()


@pytest.fixture(scope="module")
def burglars(service: VictimService) -> list[Any]:
    """A process for each thief, started once: starting them takes longer than the thefts."""

    # Ray's workers cannot import a test file; what is defined in this one travels as code.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    class Burglar:
        """Steals in a process of its own, as a trial does."""

        def __init__(self) -> None:
            torch.set_num_threads(1)

        def ready(self) -> bool:
            return True

        def steal(
            self, accounts: list[Account], seed: int, budget: int, start: float, keep: str = "", die_at: int = 0
        ) -> dict[str, Any]:
            import os

            from mea_ray.attacks.transfer import TransferSet

            transfer = TransferSet(Path(keep) if keep else None)
            messages = len(transfer)
            opened = [
                ServiceClient(
                    "robbed",
                    account,
                    ClientConfig(request_images=8, max_in_flight=1),
                    start_at=account_share(index, len(accounts), messages),
                )
                for index, account in enumerate(accounts)
            ]
            box: Any = opened[0]
            if len(accounts) > 1:
                box = Colluding(opened, budget=budget, start_at=messages, at_once=True)
            calls = [0]
            answer = opened[-1].query

            def query(images: Any) -> Any:
                calls[0] += 1
                answers = answer(images)
                if calls[0] == die_at:  # charged, and not kept
                    os._exit(1)
                return answers

            opened[-1].query = query  # type: ignore[method-assign]
            while time.time() < start:
                time.sleep(0.001)
            attack: Attack = ATTACKS.build("distillation", query_chunk=16)
            (rung,) = attack.run(
                box,
                _pool(seed),
                budgets=[budget],
                make_model=functools.partial(build_model, "vgg_like", SHAPE, 10, SMALL),
                training=TRAINING,
                seed=seed,
                transfer=transfer,
            )
            weights = {name: value.numpy() for name, value in rung.model.state_dict().items()}
            return {"answers": transfer.answers, "weights": weights, "queries": rung.queries}

    # One that is killed comes back, for the tests run in any order.
    made: list[Any] = [ray.remote(Burglar).options(num_cpus=0, max_restarts=-1).remote() for _ in THIEVES]
    ray.get([burglar.ready.remote() for burglar in made])
    return made


def _register(service: VictimService, client: str, budget: int, accounts: int) -> list[Account]:
    names = account_names(client, accounts)
    for index, name in enumerate(names):
        service.register(name, account_share(index, accounts, budget))
    return [service.account(name) for name in names]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        np.array_equal(one["answers"], other["answers"])
        and one["weights"].keys() == other["weights"].keys()
        and all(np.array_equal(value, other["weights"][name]) for name, value in one["weights"].items())
    )


def test_four_thieves_at_once_get_what_they_get_one_after_another(service: VictimService, burglars: list[Any]) -> None:
    alone = {}
    before = service.stats()
    for (name, (seed, budget, accounts)), burglar in zip(THIEVES.items(), burglars, strict=True):
        opened = _register(service, f"alone-{name}", budget, accounts)
        alone[name] = ray.get(burglar.steal.remote(opened, seed, budget, 0.0))
    between = service.stats()
    under_way = []
    start = time.time() + 0.5
    for (name, (seed, budget, accounts)), burglar in zip(THIEVES.items(), burglars, strict=True):
        opened = _register(service, name, budget, accounts)
        under_way.append(burglar.steal.remote(opened, seed, budget, start))
    together = dict(zip(THIEVES, ray.get(under_way), strict=True))
    after = service.stats()

    queries = between["images"] - before["images"]
    assert queries == after["images"] - between["images"] == sum(budget for _, budget, _ in THIEVES.values())
    assert after["passes"] - between["passes"] < between["passes"] - before["passes"], "they did not meet in a pass"
    for name, (_, budget, accounts) in THIEVES.items():
        assert _same(together[name], alone[name]), name
        assert together[name]["queries"] == len(together[name]["answers"]) == budget
        names = account_names(name, accounts)
        assert [service.charged(n) for n in names] == [account_share(i, accounts, budget) for i in range(accounts)]
        for account in names:
            assert service.query_log(account) == service.query_log(f"alone-{account}")
    assert not _same(together["ann"], together["ben"])
    # Two keys, one substitute: each key alone showed the owner half of it.
    halves = [service.query_log(account) for account in account_names("dan", 2)]
    assert [half.images for half in halves] == [73, 72]
    outputs = together["dan"]["answers"].argmax(1)
    assert np.sum([half.classes for half in halves], 0).tolist() == np.bincount(outputs, minlength=10).tolist()


def test_a_thief_with_two_keys_who_is_killed_goes_on_and_pays_once(
    service: VictimService, burglars: list[Any], tmp_path: Path
) -> None:
    accounts = _register(service, "killed", 145, 2)
    names = [each.client for each in accounts]
    *_, last = burglars
    with pytest.raises(ray.exceptions.RayError):
        ray.get(last.steal.remote(accounts, 3, 145, 0.0, str(tmp_path), 4))
    spent = sum(map(service.charged, names))
    assert 3 * 16 < spent <= 4 * 16, "it died over its fourth query"
    first = burglars[0]
    resumed = ray.get(first.steal.remote(accounts, 3, 145, 0.0, str(tmp_path)))
    lived = _register(service, "lived", 145, 2)
    assert _same(resumed, ray.get(first.steal.remote(lived, 3, 145, 0.0)))
    assert [service.charged(name) for name in names] == [73, 72]
    assert service.query_log("killed-1") == service.query_log("lived-1")


def test_the_log_survives_deaths_and_equals_that_of_one_process(service: VictimService, folder: Path) -> None:
    images = _pool(9)
    service.register("watched")
    service.register("quiet")
    client = service.client("watched", ClientConfig(request_images=5, max_in_flight=4))
    for count, _ in enumerate(client.query_iter(images)):
        if count == 10:
            ray.kill(service.ledger, no_restart=False)
        if count == 25:
            # Not while the ledger is still away, as on a slow machine it may be: what a replica could not tell it yet
            # dies with the replica.
            service.query_log("watched")
            ray.kill(service.replicas[0], no_restart=False)
    ledger = Ledger()
    ledger.register("watched")
    box = LocalBlackBox(load_model(folder)[0], None, ledger, "watched", pass_images=16)
    for start in range(0, 200, 5):
        box.query(images[start : start + 5])
    result = service.query_log("watched")
    assert result == query_log_record(box.log.of("watched"), 10)
    assert (result.requests, result.images, result.sampled) == (40, 200, 200)
    assert service.query_log("quiet") == QueryLogRecord(requests=0, images=0, classes=[0] * 10)


def _reachable(start: Any) -> Iterator[Any]:
    """Everything that code which holds ``start`` can get at through it.

    Not through classes and modules, and not through a function's globals: these are the program, the same for all.
    """
    seen = {id(start)}
    result = [start]
    while result:
        current = result.pop()
        yield current
        if isinstance(current, (types.FunctionType, types.MethodType)):
            function = current.__func__ if isinstance(current, types.MethodType) else current
            nexts = [function.__closure__, function.__defaults__, function.__kwdefaults__, function.__dict__]
            nexts.append(getattr(current, "__self__", None))
        else:
            nexts = gc.get_referents(current)
        for each in nexts:
            if id(each) not in seen and not isinstance(each, (type, types.ModuleType)):
                seen.add(id(each))
                result.append(each)


def _models(start: Any) -> list[nn.Module]:
    return [each for each in _reachable(start) if isinstance(each, nn.Module)]


def test_the_walker_finds_a_planted_leak(service: VictimService, folder: Path) -> None:
    service.register("leaky")
    victim, _ = load_model(folder)

    class Slots:
        __slots__ = ("victim",)

    def hide(model: nn.Module) -> Any:
        return lambda: model

    slots = Slots()
    slots.victim = victim  # type: ignore[attr-defined]
    leaks = [hide(victim), [{"a": (victim,)}], functools.partial(print, victim), victim.forward, slots, iter([victim])]
    for leak in leaks:
        client = service.client("leaky")
        client.request_prefix = leak
        assert any(result is victim for result in _models(client)), leak
    assert _models(LocalBlackBox(victim)), "in one process the model is behind a private attribute, and is found"


def test_nothing_that_an_attack_gets_leads_to_a_model(service: VictimService, folder: Path) -> None:
    for name in account_names("blind", 2):
        service.register(name, 100)
    victim, _ = load_model(folder)
    weights = {value.numpy().tobytes() for value in victim.state_dict().values() if value.numel() > 1}
    opened = [service.client(name, ClientConfig(request_images=8)) for name in account_names("blind", 2)]
    values: list[Any] = []

    class Spy(QueryAttack):
        def queries(self, thief: Thief) -> Any:
            values.append(thief)
            yield np.arange(8)

    def steal(box: BlackBox) -> Any:
        (rung,) = Spy().run(
            box,
            _pool(0),
            budgets=[8],
            make_model=functools.partial(build_model, "vgg_like", SHAPE, 10, SMALL),
            training=TRAINING,
            seed=0,
        )
        return rung

    for box in (opened[0], Colluding(opened, start_at=0)):
        opened[0].asked = 0
        answers = box.query(_pool(1)[:20])
        assert len(answers) == 20
        opened[0].asked = opened[1].asked = 0
        assert not _models(box), "after it was used, too"
        everything = list(_reachable(box))
        assert len(everything) > 10
        assert not [a for a in everything if isinstance(a, (torch.Tensor, np.ndarray)) and _bytes(a) in weights]
    # An attack's own code is given less than that: no black box at all, also where the victim is in this process.
    rung = steal(LocalBlackBox(victim))
    assert not [result for result in _reachable(values[0]) if isinstance(result, (BlackBox, nn.Module))]
    assert not any(result is rung.model for result in _reachable(values[0]))


def _bytes(array: Any) -> bytes:
    return bytes(np.ascontiguousarray(array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array).data)


@pytest.mark.parametrize("name", ATTACKS.names())
def test_by_its_types_an_attack_gets_a_black_box_and_no_model(name: str) -> None:
    attack: Any = ATTACKS.resolve(name)
    given = typing.get_type_hints(attack.run)
    assert given["blackbox"] is BlackBox
    others = {"pool", "budgets", "make_model", "training", "seed", "transfer", "skip", "learning", "labels"}
    assert given.keys() - {"blackbox", "return"} == others
    kinds = [k for key, k in given.items() if key != "return" and typing.get_origin(k) is None and isinstance(k, type)]
    assert not [kind for kind in kinds if issubclass(kind, nn.Module)]
    assert issubclass(attack, QueryAttack)
    visible = typing.get_type_hints(Thief).values()
    assert BlackBox not in visible, "the driver alone holds the black box"
    classes = [kind for kind in visible if isinstance(kind, type) and typing.get_origin(kind) is None]
    assert not [kind for kind in classes if issubclass(kind, nn.Module)]
