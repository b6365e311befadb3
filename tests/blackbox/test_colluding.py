"""Several accounts as one black box: who is asked what, what each is charged, and what a resume costs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config

from mea_ray.blackbox.colluding import Colluding, account_names, account_share
from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.core.errors import BadQuery, ConfigError, OverBudget
from mea_ray.core.types import BlackBox
from mea_ray.experiment.local import run_in_memory, run_local
from mea_ray.experiment.theft import account_budgets
from mea_ray.models.build import build_model

SHAPE = (1, 8, 8)


def _images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build_model("vgg_like", SHAPE, 4, {"width": 0.0625})


def _accounts(model: Any, ledger: Ledger, count: int, start_at: int = 0) -> list[LocalBlackBox]:
    names = account_names("t", count)
    return [
        LocalBlackBox(model, None, ledger, name, start_at=account_share(index, count, start_at))
        for index, name in enumerate(names)
    ]


def test_shares_are_those_of_dealing_cards() -> None:
    for accounts in (1, 2, 3, 7):
        for images in range(30):
            dealt = np.bincount(np.arange(images) % accounts, minlength=accounts).tolist()
            assert [account_share(index, accounts, images) for index in range(accounts)] == dealt
    assert account_names("t", 1) == ["t"] and account_names("t", 3) == ["t-1", "t-2", "t-3"]


@pytest.mark.parametrize("at_once", [False, True])
def test_answers_in_order_and_an_even_charge(model: Any, at_once: bool) -> None:
    ledger = Ledger()
    for index, name in enumerate(account_names("t", 3)):
        ledger.register(name, account_share(index, 3, 50))
    box = Colluding(_accounts(model, ledger, 3), budget=50, at_once=at_once)
    assert isinstance(box, BlackBox) and (box.classes, box.image_shape, box.remaining) == (4, SHAPE, 50)
    images = _images(50)
    got = np.concatenate([box.query(images[a:b]) for a, b in ((0, 1), (1, 2), (2, 22), (22, 45))])
    assert np.array_equal(got, LocalBlackBox(model).query(images)[:45])
    assert [ledger.charged(name) for name in account_names("t", 3)] == [15, 15, 15] and box.remaining == 5
    with pytest.raises(OverBudget) as caught:
        box.query(_images(6))
    assert (caught.value.asked, caught.value.remaining, caught.value.budget) == (6, 5, 50)
    assert sum(map(ledger.charged, ledger.clients())) == 45, "nothing of the refused query was charged"
    box.query(images[45:])
    assert box.remaining == 0 and box.asked == 50
    ledger.register("t-2", None)
    assert box.remaining is None


def test_after_an_error_the_same_query_costs_what_it_cost(model: Any) -> None:
    ledger = Ledger()
    for name in account_names("t", 2):
        ledger.register(name)
    box = Colluding(_accounts(model, ledger, 2))
    box.query(_images(7))
    second, works = box.accounts[1], box.accounts[1].query

    def dies(images: Any) -> Any:
        raise ConnectionError("gone")

    second.query = dies  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        box.query(_images(9, seed=1))
    assert sum(map(ledger.charged, ledger.clients())) == 7 + 4, "the first account answered its part"
    second.query = works  # type: ignore[method-assign]
    answers = box.query(_images(9, seed=1))
    assert np.array_equal(answers, LocalBlackBox(model).query(_images(9, seed=1)))
    assert sum(map(ledger.charged, ledger.clients())) == 16 == box.asked


@pytest.mark.parametrize(
    "images",
    [_images(0), _images(9)[:, :, :4], _images(9).astype(np.float64), np.full((9, *SHAPE), np.nan, np.float32), "none"],
    ids=["none", "shape", "type", "nan", "no array"],
)
def test_images_are_checked_before_they_are_dealt_out(model: Any, images: Any) -> None:
    """Of nine images one is bad; the account that gets the others must not be charged for them."""
    ledger = Ledger()
    for name in account_names("t", 3):
        ledger.register(name)
    box = Colluding(_accounts(model, ledger, 3))
    if isinstance(images, np.ndarray) and images.dtype == np.float32:
        images[:-1] = 0.5
    with pytest.raises(BadQuery):
        box.query(images)
    assert [ledger.charged(name) for name in account_names("t", 3)] == [0, 0, 0] and box.asked == 0
    assert box.query(_images(9)).shape == (9, 4)


def test_colluding_accounts_travel_to_another_process() -> None:
    box = pickle.loads(pickle.dumps(Colluding([_Remote(), _Remote()])))
    assert box.query(_images(3)).shape == (3, 4) and box.asked == 3


class _Remote:
    """An account that can be pickled, as the client of a service can."""

    classes, image_shape, remaining = 4, SHAPE, None

    def __init__(self) -> None:
        self.asked = 0

    def query(self, images: Any) -> Any:
        self.asked += len(images)
        return np.zeros((len(images), 4), np.float32)


def test_accounts_must_stand_where_the_thief_stands(model: Any) -> None:
    ledger = Ledger()
    for name in account_names("t", 2):
        ledger.register(name)
    with pytest.raises(ConfigError, match=r"start_at=5: \[3, 2\]"):
        Colluding(_accounts(model, ledger, 2), start_at=5)
    with pytest.raises(ConfigError, match="at least one"):
        Colluding([])
    Colluding(_accounts(model, ledger, 2, start_at=5), start_at=5)


def test_a_killed_thief_with_two_accounts_is_charged_once_and_steals_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick: dict[str, Any] = {
        "victim__training__epochs": 1,
        "thief__training__epochs": 1,
        "verification__null_models": 1,
        "victim__watermark__name": "none",
        "thief__budgets": [201, 401],
    }
    colluding = config(**quick, thief__accounts=2, storage=str(tmp_path / "killed"))
    assert account_budgets(colluding, "thief") == {"thief-1": 201, "thief-2": 200}
    answer = LocalBlackBox.query
    messages: list[str] = []

    def dying(self: Any, images: Any) -> Any:
        answers = answer(self, images)
        if self.client == "thief":  # the owner's own look at what the answers give away; thieves have the trial's name
            return answers
        messages.append(self.client)
        # Dies when one account was charged for its part of the query, and nothing of it is kept.
        if len(messages) == 5:
            raise ConnectionError("the thief's process dies here")
        return answers

    monkeypatch.setattr(LocalBlackBox, "query", dying)
    with pytest.raises(ConnectionError):
        run_local(colluding)
    resumed = run_local(colluding).result
    name = resumed.trial
    assert messages[:5] == [f"{name}-1", f"{name}-2", f"{name}-1", f"{name}-2", f"{name}-1"]
    assert resumed.queries_charged == 401
    assert {client: log.images for client, log in resumed.query_log.items()} == {f"{name}-1": 201, f"{name}-2": 200}
    whole = run_in_memory(colluding)
    alone = run_in_memory(config(**quick))
    assert resumed.query_log == whole.query_log
    (single,) = alone.query_log.values()
    assert single.images == 401 and single.classes == [
        sum(counts) for counts in zip(*(log.classes for log in whole.query_log.values()), strict=True)
    ]
    for rung, other in zip(resumed.rungs, alone.rungs, strict=True):
        assert rung.report == other.report, "one substitute, whoever asked for its images"
