"""One process at a time, whatever is killed, stopped, or happens to the clock; on a disk and in an object store."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pyarrow import fs

from mea_ray.core.errors import LeaseLost
from mea_ray.storage import process
from mea_ray.storage.lease import FileLease, Lease
from mea_ray.storage.remote_lease import RemoteLease

SPAWN = multiprocessing.get_context("spawn")
ELSEWHERE = {"machine": "elsewhere/boot", "pid": 1, "started": 0}
Make = Callable[..., Lease]


def file_lease(folder: Path, **timing: Any) -> Lease:
    return FileLease(folder, "x", **timing)


def remote_lease(folder: Path, **timing: Any) -> Lease:
    return RemoteLease(fs.LocalFileSystem(), str(folder), "x", **timing)


@pytest.fixture(params=[file_lease, remote_lease], ids=["disk", "object store"])
def make(request: pytest.FixtureRequest) -> Make:
    result: Make = request.param
    return result


def _hold_forever(make: Make, folder: str) -> None:
    assert make(Path(folder), beat_s=0.05, expiry_s=30).acquire()
    (Path(folder) / "held").touch()
    time.sleep(60)


def wait_for(path: Path, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def claim_of_another(lease: Lease, folder: Path) -> Path:
    """Make the present claim that of a process on another machine."""
    (path,) = (folder / "x").iterdir() if isinstance(lease, RemoteLease) else folder.glob("x.*")
    path.write_text(json.dumps({**json.loads(path.read_text()), **ELSEWHERE}))
    return path


def beat(lease: Lease, path: Path, count: int) -> None:
    """A heartbeat of the process on the other machine."""
    if isinstance(lease, RemoteLease):
        path.write_text(json.dumps({**json.loads(path.read_text()), "beat": count}))
    else:
        # Its clock is wrong, and is set back now and then.
        os.utime(path, ns=(0, random.randrange(2**60)))


def test_it_is_held_by_one_at_a_time(make: Make, tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    assert first.holder() is None
    assert first.try_acquire() and first.is_held() and not second.try_acquire()
    assert (second.holder() or {})["pid"] == os.getpid()
    second.release()
    assert first.is_held()
    first.release()
    assert not first.is_held() and second.try_acquire()
    with pytest.raises(LeaseLost):
        first.ensure()
    second.release()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_holder_loses_it_at_once(make: Make, tmp_path: Path) -> None:
    holder = SPAWN.Process(target=_hold_forever, args=(make, str(tmp_path)))
    holder.start()
    wait_for(tmp_path / "held")
    waiter = make(tmp_path, expiry_s=30)
    assert not waiter.try_acquire()
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert waiter.acquire(poll_s=0.01)
    waiter.release()


def test_a_holder_on_another_machine_is_judged_by_its_heartbeat(make: Make, tmp_path: Path) -> None:
    holder = make(tmp_path, beat_s=60)
    assert holder.try_acquire()
    path = claim_of_another(holder, tmp_path)
    waiter = make(tmp_path, beat_s=0.05, expiry_s=0.4)
    for count in range(12):  # 0.6 s of heartbeats, longer than the expiry
        beat(holder, path, 1000 + count)
        assert not waiter.try_acquire()
        time.sleep(0.05)
    started = time.monotonic()
    assert waiter.acquire(poll_s=0.02)
    assert 0.3 < time.monotonic() - started < 30
    assert not holder.is_held()
    holder.release()
    assert waiter.is_held(), "who lost it takes nothing away"
    waiter.release()


def test_a_stopped_holder_loses_it_and_finds_out(make: Make, tmp_path: Path) -> None:
    lost = threading.Event()
    holder = make(tmp_path, beat_s=0.05, expiry_s=0.5, on_lost=lost.set)
    assert holder.try_acquire()
    holder._stop.set()  # its heart stands still, as if it were stopped
    assert holder._heart is not None
    holder._heart.join()
    waiter = make(tmp_path, beat_s=0.05, expiry_s=0.5)
    assert waiter.acquire(poll_s=0.02)
    assert not holder.is_held()
    with pytest.raises(LeaseLost, match="silent for more than 0.5 s"):
        holder.ensure()
    holder._stop.clear()  # it goes on
    holder._beat_until_stopped()
    assert lost.is_set() and waiter.is_held()
    holder.release()
    assert waiter.is_held()
    waiter.release()


def test_a_folder_that_is_away_for_a_while_takes_the_lease_from_nobody(tmp_path: Path) -> None:
    lost = threading.Event()
    folder, away = tmp_path / "leases", tmp_path / "away"
    with file_lease(folder, beat_s=0.02, on_lost=lost.set) as lease:
        folder.rename(away)
        assert not lost.wait(0.5) and not lease.is_held()
        away.rename(folder)
        (claim,) = folder.iterdir()
        before = claim.stat().st_mtime_ns
        assert not lost.wait(0.5) and lease.is_held()
        assert claim.stat().st_mtime_ns > before, "its heart goes on beating"


def test_the_clock_of_the_machine_does_not_matter(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = make(tmp_path, beat_s=0.05, expiry_s=0.5)
    assert holder.try_acquire()
    waiter = make(tmp_path, beat_s=0.05, expiry_s=0.5)
    now, created = time.time, psutil.Process.create_time
    for step in (3600.0, -3600.0, 86400.0):
        monkeypatch.setattr(time, "time", lambda step=step: now() + step)
        monkeypatch.setattr(psutil.Process, "create_time", lambda self, step=step: created(self) + step)
        for _ in range(6):
            assert not waiter.try_acquire()
            time.sleep(0.03)
    assert holder.is_held()
    holder.release()


def test_a_waiter_that_was_stopped_itself_does_not_take_that_for_silence(make: Make, tmp_path: Path) -> None:
    holder = make(tmp_path, beat_s=60)
    assert holder.try_acquire()
    claim_of_another(holder, tmp_path)
    waiter = make(tmp_path, beat_s=0.05, expiry_s=5.0)
    assert not waiter.try_acquire()
    waiter._looked -= 3600  # an hour passed in which it could not look
    assert not waiter.try_acquire()
    holder.release()


def test_only_one_of_many_waiters_takes_over(make: Make, tmp_path: Path) -> None:
    holder = make(tmp_path, beat_s=60)
    assert holder.try_acquire()
    claim_of_another(holder, tmp_path)
    waiters = [make(tmp_path, beat_s=0.05, expiry_s=0.3) for _ in range(4)]
    won: list[Lease] = []

    def wait(waiter: Lease) -> None:
        if waiter.acquire(give_up=lambda: bool(won), poll_s=0.01):
            won.append(waiter)

    threads = [threading.Thread(target=wait, args=(waiter,)) for waiter in waiters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and sum(waiter.is_held() for waiter in waiters) == 1
    won[0].release()


def test_of_many_that_want_it_all_the_time_never_do_two_have_it(make: Make, tmp_path: Path) -> None:
    inside, most, had = [0], [0], [0] * 4
    count = threading.Lock()
    end = time.monotonic() + 30.0

    def work(index: int) -> None:
        lease = make(tmp_path, expiry_s=60)
        while sum(had) < 12 and time.monotonic() < end:
            if not lease.try_acquire():
                time.sleep(0.02 * random.random())
                continue
            with count:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                had[index] += 1
            time.sleep(0.002)
            assert lease.is_held()
            with count:
                inside[0] -= 1
            lease.release()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and sum(had) >= 12, had


def test_a_process_makes_no_claim_while_another_is_about_to_hold_it(tmp_path: Path) -> None:
    system = fs.LocalFileSystem()
    first, second = RemoteLease(system, str(tmp_path), "x"), RemoteLease(system, str(tmp_path), "x", expiry_s=0.2)
    first._epoch = 1
    first._write("first", active=False)
    assert not second.try_acquire() and [path.name for path in (tmp_path / "x").iterdir()] == ["first"]
    claim_of_another(first, tmp_path)  # whose process cannot be looked for: it counts as dead after a silence
    assert second.acquire(poll_s=0.02) and second.is_held()
    second.release()


def test_a_holder_that_writes_again_after_it_was_succeeded_changes_nothing(tmp_path: Path) -> None:
    old = RemoteLease(fs.LocalFileSystem(), str(tmp_path), "x", beat_s=60)
    assert old.try_acquire()
    claim_of_another(old, tmp_path)
    new = RemoteLease(fs.LocalFileSystem(), str(tmp_path), "x", beat_s=0.05, expiry_s=0.2)
    assert new.acquire(poll_s=0.02)
    old._beat(old.token)  # it was stopped between its look and its write
    assert new.is_held() and not old.is_held()
    old.release()
    assert new.is_held()
    new.release()


def test_a_claim_whose_process_died_while_it_made_it_holds_up_nobody_for_long(tmp_path: Path) -> None:
    dead = RemoteLease(fs.LocalFileSystem(), str(tmp_path), "x")
    dead._epoch = 1
    (tmp_path / "x").mkdir()
    dead._write("0", active=False)
    claim_of_another(dead, tmp_path)
    waiter = RemoteLease(fs.LocalFileSystem(), str(tmp_path), "x", beat_s=0.05, expiry_s=0.3)
    assert waiter.acquire(poll_s=0.02)
    waiter.release()


def test_a_process_is_known_by_its_start_in_ticks() -> None:
    here = process.identity()
    assert here["started"] == process.started(os.getpid()) is not None
    assert not process.is_gone(here)
    assert process.is_gone({**here, "started": here["started"] + 1}), "its number is used again"
    assert process.is_gone({**here, "pid": 2**22 + 1})
    assert not process.is_gone({**here, "machine": "elsewhere", "pid": 2**22 + 1})
    assert not process.is_gone({}) and not process.is_gone({"machine": process.machine(), "pid": "x"})
    assert process.describe(here).startswith(f"process {os.getpid()} on ")


def test_a_killed_process_is_gone_before_its_parent_has_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        here = {"machine": process.machine(), "pid": child.pid, "started": process.started(child.pid)}
        assert here["started"] is not None and process.runs_here(here)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is a zombie until it is waited for
        assert process.started(child.pid) is None
        assert process.is_gone(here) and not process.runs_here(here)
    finally:
        child.kill()
        child.communicate()
