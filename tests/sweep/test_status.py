"""What other processes know of a sweep: its log of events, ``mea-ray status`` and ``mea-ray report --watch``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from report_results import trial

from mea_ray.cli import main as cli
from mea_ray.cli.options import OK, USAGE
from mea_ray.cli.status import duration, watch
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.report import html
from mea_ray.storage import remote as storage_module
from mea_ray.sweep import events as e
from mea_ray.sweep.event_log import EventLog
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.status import SILENT_S, Status, open_folder, read_status


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return begun(tmp_path / "s")


def begun(path: Path, storage: str | None = None, trials: int = 4) -> SweepFolder:
    path.mkdir(parents=True, exist_ok=True)
    plan = {"trial_count": trials, "victims": {"v": {"trials": trials, "queries": 100 * trials}}, "nulls": ["n"]}
    (path / "plan.json").write_text(json.dumps(plan))
    return SweepFolder(storage or str(path.parent), path.name)


def started(name: str, done: int = 0) -> e.TrialStarted:
    return e.TrialStarted(name, {"seed": int(name[1:])}, 7, "node", (50, 100), done)


def rung(name: str, queries: int) -> e.RungFinished:
    return e.RungFinished(name, queries, queries, 0.9, 0.8, 0.7, 0.1, 0.0)


def finish(folder: SweepFolder, log: EventLog, name: str, stopped: bool = False) -> None:
    trial(name).save(folder.result_path(name))
    log(e.TrialFinished(name, "x", stopped))


def test_a_sweep_is_followed_through_two_starts(folder: SweepFolder) -> None:
    clock = Clock()
    log = EventLog(folder, clock)
    log(e.SweepStarted("f", 4, 0, 1, 1, 400))
    log(e.ModelReady("victim", "v", "f"))
    for name in ("t0", "t1", "t2"):
        log(started(name))
    log(e.Queried("t0", 40, 100))
    log(rung("t0", 50))
    clock.now += 10
    log(rung("t0", 100))
    finish(folder, log, "t0")
    clock.now += 30
    finish(folder, log, "t1", stopped=True)
    log(e.TrialFailed("t2", "RuntimeError: no"))

    status = read_status(folder)
    assert (status.planned, status.done, status.stopped, status.waiting) == (4, 2, 1, 1)
    assert status.failed == {"t2": "RuntimeError: no"} and not status.running
    assert (status.models, status.models_planned, status.queries) == (1, 2, 100)
    assert status.rate() == pytest.approx(1 / 30) and status.seconds_left() == pytest.approx(30)
    assert status.state(clock.now + SILENT_S - 1) == "running"
    assert status.state(clock.now + SILENT_S + 1) == "silent"  # killed: it never said that it ended

    log = EventLog(folder, clock)
    log(e.SweepStarted("f", 4, 2, 1, 1, 200))
    log(started("t2", done=1))
    log(e.TrialRestarted("t2", "died"))
    log(started("t2", done=1))
    log(e.Queried("t2", 60, 100))
    status = read_status(folder)
    assert status.failed == {} and status.rate() is None and status.waiting == 4 - 2 - len(status.running)
    clock.now += 1
    log.close("interrupted")
    status = read_status(folder)
    assert status.state() == "interrupted" and not status.running and status.queries == 160


def test_running_trials_are_listed_while_the_driver_lives(folder: SweepFolder) -> None:
    log = EventLog(folder)
    log(e.SweepStarted("f", 4, 0, 1, 1, 400))
    log(started("t3", done=1))
    log(e.TrialRestarted("t3", "died"))
    log(started("t3", done=1))
    log(e.Queried("t3", 60, 100))
    log(rung("t3", 100))
    (running,) = read_status(folder).running.values()
    assert (running.answers, running.budget, running.rungs, running.of_rungs, running.restarts) == (
        60 + 40,
        100,
        2,
        2,
        1,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_a_full_disk_does_not_end_a_sweep_through_its_log_and_is_reported_once(
    folder: SweepFolder, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(folder)
    log._file.close()
    log._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    log(started("t3"))
    log(rung("t3", 100))
    log.close("failed")
    (logged,) = caplog.records
    assert "No space left" in logged.getMessage()


def test_the_log_is_appended_to_and_epochs_are_thinned(folder: SweepFolder) -> None:
    clock = Clock()
    log = EventLog(folder, clock)
    path = folder.path / "events.jsonl"
    for epoch in range(1, 101):
        log(e.ModelEpoch("victim", "v", epoch, 100, {"loss": object()}))
        clock.now += 1
    first = path.read_bytes()
    epochs = [json.loads(line)["epoch"] for line in first.splitlines()]
    assert epochs == [*range(1, 101, 10), 100]
    path.write_bytes(first + b'{"t": 1, "event": "Trial')  # killed while it wrote
    EventLog(folder, clock).close("done")
    assert path.read_bytes().startswith(first)
    assert read_status(folder).state() == "done"
    log.beat()
    assert json.loads(path.read_bytes().splitlines()[-1])["event"] == "Ended"
    clock.now += 60
    log.beat()
    assert json.loads(path.read_bytes().splitlines()[-1]) == {"t": clock.now, "event": "Beat"}


def test_a_full_disk_costs_the_log_and_not_the_sweep(folder: SweepFolder, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(folder)
    log._file.close()  # whatever is written now fails
    log(e.Warned("x"))
    assert "the sweep continues" in caplog.text


def test_a_remote_storage_is_read_from_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import fs

    bucket = tmp_path / "bucket"
    monkeypatch.setattr(storage_module, "_remote", lambda location: (fs.LocalFileSystem(), str(bucket)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    mine = SweepFolder("s3://bucket", "s")
    begun(mine.path, "s3://bucket")
    mine.push("plan.json")
    log = EventLog(mine)
    log(e.SweepStarted("f", 4, 0, 1, 1, 400))
    finish(mine, log, "t0")
    mine.push("results")
    log.close("interrupted")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    there = open_folder("s3://bucket/s/")
    assert there.path != mine.path
    status = read_status(there)
    assert (status.done, status.state()) == (1, "interrupted")
    resumed = EventLog(there)  # goes on with the same log
    resumed(e.SweepStarted("f", 4, 1, 1, 1, 300))
    resumed.close("done")
    (whole,) = (bucket / "s" / "events.jsonl.d").iterdir()  # the segments, merged at the end
    assert whole.read_text().count("SweepStarted") == 2


def test_no_sweep_is_distinguished_from_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no plan\.json"):
        open_folder(str(tmp_path / "none"))


def test_a_damaged_plan_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"trial_count":')
    with pytest.raises(ArtifactError, match="is damaged: .*; restore it from a copy, or start the sweep under another"):
        read_status(open_folder(str(tmp_path)))


def test_a_sweep_of_an_older_version_has_no_log_and_still_a_status(folder: SweepFolder) -> None:
    for name in ("t0", "t1"):
        trial(name).save(folder.result_path(name))
    status = read_status(folder)
    assert (status.done, status.waiting, status.state()) == (2, 2, "unknown")


def test_status_prints_what_happens(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(folder)
    log(e.SweepStarted("f", 4, 0, 1, 1, 400))
    log(started("t0"))
    finish(folder, log, "t0")
    log(started("t1"))
    log(e.Queried("t1", 33, 100))
    log(e.TrialFailed("t2", "RuntimeError: [no]"))
    assert cli.main(["status", str(folder.path)]) == OK
    output = capsys.readouterr().out
    for text in ("1 of 4", "33/100", "running, last seen", "RuntimeError: [no]", "seed=0: finished"):
        assert text in output
    assert cli.main(["status", str(folder.path.parent)]) == USAGE


def finish_and_close(folder: SweepFolder, log: EventLog, trial: str) -> None:
    finish(folder, log, trial)
    log.close("done")


def test_watching_renders_new_results_until_the_sweep_ends(folder: SweepFolder) -> None:
    log = EventLog(folder)
    log(e.SweepStarted("f", 4, 0, 1, 1, 400))
    pages: list[str] = []
    steps: list[Any] = [
        lambda: None,
        lambda: finish(folder, log, "t0"),
        lambda: None,
        partial(finish_and_close, folder, log, "t1"),
    ]

    def render() -> Path:
        page = html.write(folder.path)
        pages.append(page.read_text())
        return page

    messages: list[str] = []
    page = watch(folder, render, messages.append, every_s=1, sleep=lambda seconds: steps.pop(0)())
    assert page == folder.path / "report.html" and not steps
    assert len(pages) == 2 and pages[0] != pages[1]  # rendered for t0 and for t1, and not between
    assert messages[-1] == "the sweep is done"


def test_report_watch_of_an_ended_sweep_prints_its_table(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    log = EventLog(folder)
    finish(folder, log, "t0")
    log.close("done")
    assert cli.main(["report", str(folder.path), "--watch", "--every", "1"]) == OK
    assert "suggestive" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (3.4, "3 s"), (90, "2 min"), (3900, "1 h 05 min"), (200_000, "2 d 7 h")]
)
def test_durations_are_written_as_people_do(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_waiting_is_never_negative() -> None:
    assert Status("s", planned=1, done=2).waiting == 0
