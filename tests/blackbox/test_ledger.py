"""The ledger against a plain dictionary, and against kill -9."""

from __future__ import annotations

import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mea_ray.blackbox.ledger import Charge, Ledger, RateLimit
from mea_ray.core.errors import (
    ArtifactError,
    BadQuery,
    ConfigError,
    OverBudget,
    RateLimited,
    RequestConflict,
    UnknownClient,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_charges_once_per_id_and_stops_at_the_budget() -> None:
    ledger = Ledger(None)
    ledger.register("a", 10)
    ledger.charge("a", "1", 6, "x")
    ledger.charge("a", "1", 6, "x")
    assert (ledger.charged("a"), ledger.remaining("a")) == (6, 4)
    with pytest.raises(OverBudget) as caught:
        ledger.charge("a", "2", 5, "y")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.client, error.asked, error.remaining, error.budget) == ("a", 5, 4, 10)
    assert ledger.charged("a") == 6
    ledger.charge("a", "2", 4, "z")
    assert ledger.remaining("a") == 0
    ledger.charge("a", "1", 6, "x")  # paid before: still answered
    with pytest.raises(RequestConflict):
        ledger.charge("a", "1", 6, "other")
    with pytest.raises(RequestConflict):
        ledger.charge("a", "1", 1, "x")
    with pytest.raises(UnknownClient):
        ledger.charge("b", "1", 1, "x")
    with pytest.raises(UnknownClient):
        ledger.remaining("b")


def test_clients_are_separate() -> None:
    ledger = Ledger(None)
    ledger.register("a", 5)
    ledger.register("b", None)
    ledger.charge("a", "same", 5, "x")
    ledger.charge("b", "same", 500, "y")
    assert (ledger.charged("a"), ledger.charged("b")) == (5, 500)
    assert (ledger.remaining("a"), ledger.remaining("b")) == (0, None)
    assert ledger.clients() == ["a", "b"]


def test_a_budget_may_grow_but_never_below_what_is_charged() -> None:
    ledger = Ledger(None)
    ledger.register("a", 5)
    ledger.charge("a", "1", 5, "x")
    with pytest.raises(ConfigError, match="below the 5"):
        ledger.register("a", 4)
    assert ledger.remaining("a") == 0
    ledger.register("a", 8)
    assert ledger.remaining("a") == 3
    ledger.register("a", 5)
    assert ledger.remaining("a") == 0


def test_token_bucket() -> None:
    clock = Clock()
    ledger = Ledger(None, clock=clock)
    ledger.register("a", None, RateLimit(10.0, 20))
    ledger.charge("a", "1", 20, "x")
    with pytest.raises(RateLimited) as caught:
        ledger.charge("a", "2", 5, "x")
    assert caught.value.retry_after_s == pytest.approx(0.5)
    assert ledger.charged("a") == 20
    ledger.charge("a", "1", 20, "x")  # a retry is not slowed down
    ledger.register("a", None, RateLimit(10.0, 20))  # nor does registering again refill the bucket
    with pytest.raises(RateLimited):
        ledger.charge("a", "2", 5, "x")
    clock.now += 0.5 + 1e-9
    ledger.charge("a", "2", 5, "x")
    clock.now -= 50  # a clock set back neither gives nor blocks for ever
    with pytest.raises(RateLimited) as caught:
        ledger.charge("a", "3", 5, "x")
    assert caught.value.retry_after_s <= 0.5 + 1e-6


def test_a_request_larger_than_the_burst_goes_through_at_the_sustained_rate() -> None:
    clock = Clock()
    ledger = Ledger(None, clock=clock)
    ledger.register("a", None, RateLimit(10.0, 20))
    start = clock.now
    for index in range(10):
        while True:
            try:
                ledger.charge("a", str(index), 50, "x")
                break
            except RateLimited as limited:
                clock.now += limited.retry_after_s + 1e-9
    # 500 images at 10 a second; the burst and the last debt (50) come for nothing.
    assert clock.now - start == pytest.approx((500 - 20 - 30) / 10, abs=0.01)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_model(tmp_path: Path, durable: bool, seed: int) -> None:
    """Random registrations, charges, replays, conflicts and reopenings; a dictionary says what must come out."""
    g = np.random.default_rng(seed)
    path = tmp_path / "ledger.sqlite" if durable else None
    ledger = Ledger(path)
    budgets: dict[str, int | None] = {}
    paid: dict[tuple[str, str], tuple[int, str]] = {}

    def spent(client: str) -> int:
        return sum(images for (name, _), (images, _) in paid.items() if name == client)

    for _ in range(250):
        action = g.integers(10)
        client = f"c{g.integers(4)}"
        if action == 0:
            budget = None if g.random() < 0.2 else int(g.integers(0, 150))
            if budget is not None and client in budgets and budget < spent(client):
                with pytest.raises(ConfigError):
                    ledger.register(client, budget)
            else:
                ledger.register(client, budget)
                budgets[client] = budget
        elif action == 1 and durable:
            ledger.close()
            ledger = Ledger(path)
        else:
            charges = [
                Charge(f"c{g.integers(4)}", str(g.integers(60)), int(g.integers(1, 4)), "xy"[g.integers(2)])
                for _ in range(g.integers(1, 6))
            ]
            for charge, outcome in zip(charges, ledger.charge_many(charges), strict=True):
                key, value = (charge.client, charge.request_id), (charge.images, charge.digest)
                if charge.client not in budgets:
                    expected: type = UnknownClient
                elif key in paid:
                    expected = type(None) if paid[key] == value else RequestConflict
                elif (limit := budgets[charge.client]) is not None and spent(charge.client) + charge.images > limit:
                    expected = OverBudget
                else:
                    expected = type(None)
                    paid[key] = value
                assert type(outcome) is expected
        assert ledger.clients() == sorted(budgets)
        for name, limit in budgets.items():
            assert ledger.charged(name) == spent(name)
            assert ledger.remaining(name) == (None if limit is None else limit - spent(name))
    assert any(paid)


def test_rate_survives_reopening(tmp_path: Path) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path / "l", clock=clock)
    ledger.register("a", None, RateLimit(1.0, 10))
    ledger.charge("a", "1", 10, "x")
    ledger.close()
    again = Ledger(tmp_path / "l", clock=clock)
    with pytest.raises(RateLimited):
        again.charge("a", "2", 1, "x")


def test_unpaid_counts_only_what_is_new() -> None:
    ledger = Ledger(None)
    ledger.register("a", 10)
    ledger.charge("a", "1", 6, "x")
    assert ledger.unpaid("a", [("1", 6), ("2", 3), ("3", 4)]) == 7


CHILD = """
import sys
from mea_ray.blackbox.ledger import Ledger
ledger = Ledger(sys.argv[1])
ledger.register("a", None)
for index in range(10**6):
    ledger.charge("a", str(index), 3, "x")
    sys.stdout.write(f"{index}\\n")
    sys.stdout.flush()
"""


def test_kill_9_loses_no_acknowledged_charge(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(50):
        child.stdout.readline()
    with pytest.raises(ArtifactError, match="uses it"):
        _open_soon(path)
    child.send_signal(signal.SIGKILL)
    acknowledged = 50 + len([line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")])
    child.wait()
    ledger = Ledger(path)
    # What was answered is on disk; one more may have been committed and not yet answered.
    assert acknowledged <= ledger.charged("a") // 3 <= acknowledged + 1
    before = ledger.charged("a")
    for index in range(acknowledged):
        ledger.charge("a", str(index), 3, "x")
    assert ledger.charged("a") == before


def _open_soon(path: Path) -> None:
    from mea_ray.blackbox.journal import LedgerJournal

    LedgerJournal(path, timeout_s=0.05)


def test_a_successor_waits_for_a_dying_predecessor(tmp_path: Path) -> None:
    import threading

    first = Ledger(tmp_path / "l")
    first.register("a", 5)
    timer = threading.Timer(0.3, first.close)
    timer.start()
    start = time.monotonic()
    assert Ledger(tmp_path / "l").remaining("a") == 5
    assert time.monotonic() - start > 0.2
    timer.join()


def test_a_damaged_or_foreign_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"not a database" * 100)
    with pytest.raises(ArtifactError, match="move the file away"):
        Ledger(tmp_path / "damaged")
    database = sqlite3.connect(tmp_path / "future")
    database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(ArtifactError, match="schema 99"):
        Ledger(tmp_path / "future")


def test_what_the_disk_refused_was_not_charged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.register("a", 10, RateLimit(1.0, 10))

    monkeypatch.setattr(ledger._journal, "write", _full)
    with pytest.raises(sqlite3.OperationalError):
        ledger.charge_many([Charge("a", "1", 4, "x"), Charge("a", "2", 4, "y")])
    assert ledger.charged("a") == 0
    monkeypatch.undo()
    ledger.charge("a", "1", 8, "other-images")
    assert ledger.charged("a") == 8


@pytest.mark.parametrize("known", [False, True])
def test_what_the_disk_refused_was_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    clock = Clock()
    ledger = Ledger(tmp_path / "l", clock=clock)
    if known:
        ledger.register("a", 10, RateLimit(1.0, 10))
        ledger.charge("a", "1", 10, "x")
    monkeypatch.setattr(ledger._journal, "write", _full)
    clock.now += 5
    with pytest.raises(sqlite3.OperationalError):
        ledger.register("a", 99, None)
    monkeypatch.undo()
    if not known:
        assert ledger.clients() == []
        return
    assert (ledger.budget("a"), ledger.charged("a")) == (10, 10)
    ledger.register("a", 30, RateLimit(1.0, 10))
    with pytest.raises(RateLimited) as caught:
        ledger.charge("a", "2", 6, "y")
    assert caught.value.retry_after_s == pytest.approx(1.0), "the failed call removed the rate limit or its tokens"


def _full(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


MALFORMED: dict[str, tuple[Any, Any, Any, Any]] = {
    "no image": ("a", "9", 0, "x"),
    "fewer than none": ("a", "9", -5, "x"),
    "half an image": ("a", "9", 1.5, "x"),
    "a boolean": ("a", "9", True, "x"),
    "more than fit in a row": ("a", "9", 2**63, "x"),
    "empty id": ("a", "", 1, "x"),
    "long id": ("a", "1" * 129, 1, "x"),
    "a surrogate": ("a", "\ud800", 1, "x"),
    "a zero byte": ("a", "1\x002", 1, "x"),
    "a line break": ("a", "1\n", 1, "x"),
    "bytes": ("a", b"9", 1, "x"),
    "no string": ("a", ["9"], 1, "x"),
    "an id in other digits": ("a", "\u0661-" + "0" * 32, 1, "x"),
    "a name with a blank": ("a b", "9", 1, "x"),
    "no name": (None, "9", 1, "x"),
    "a hash that is none": ("a", "9", 1, None),
}


@pytest.mark.parametrize("charge", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_charge_is_refused_and_stops_no_other(tmp_path: Path, charge: tuple[Any, Any, Any, Any]) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.register("a", 10)
    outcomes = ledger.charge_many([Charge("a", "1", 3, "x"), Charge(*charge), Charge("a", "2", 4, "y")])
    assert [type(outcome) for outcome in outcomes] == [type(None), BadQuery, type(None)]
    assert pickle.loads(pickle.dumps(outcomes[1])).args == outcomes[1].args  # type: ignore[union-attr]
    with pytest.raises(BadQuery):
        ledger.charge(*charge)
    assert ledger.charged("a") == 7
    ledger.close()
    assert Ledger(tmp_path / "l").charged("a") == 7


@pytest.mark.parametrize(
    ("name", "budget", "rate"),
    [
        ("", None, None),
        ("a\x00", None, None),
        ("b" * 129, None, None),
        (7, None, None),
        ("a", -1, None),
        ("a", 1.5, None),
        ("a", True, None),
        ("a", None, RateLimit(0.0, 1)),
        ("a", None, RateLimit(float("nan"), 1)),
        ("a", None, RateLimit(float("inf"), 1)),
        ("a", None, RateLimit(1.0, 0)),
    ],
)
def test_an_account_that_could_not_be_stored_is_refused(name: Any, budget: Any, rate: RateLimit | None) -> None:
    ledger = Ledger(None)
    with pytest.raises(ConfigError):
        ledger.register(name, budget, rate)
    assert ledger.clients() == []


def test_a_copy_is_whole_while_the_ledger_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.register("c", 100)
    ledger.charge("c", "r1", 3, "x")
    ledger.copy_to(tmp_path / "copy.sqlite")
    assert sorted(path.name for path in tmp_path.glob("*copy*")) == ["copy.sqlite"]
    ledger.charge("c", "r2", 4, "y")
    copy = Ledger(tmp_path / "copy.sqlite")
    assert (copy.charged("c"), copy.budget("c"), ledger.charged("c")) == (3, 100, 7)
    copy.charge("c", "r1", 3, "x")
    assert copy.charged("c") == 3, "it knows which requests were charged"
