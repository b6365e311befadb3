from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import FakeWandb

from mea_ray.config import TrackingConfig
from mea_ray.results.numbers import rung_metrics
from mea_ray.results.records import ModelReport, QueryLogRecord, RungResult, SuccessRate, TrialResult
from mea_ray.tracking import TrackerSet, trackers
from mea_ray.tracking.rows import flatten, nested
from mea_ray.tracking.wandb_tracker import IGNORED_VARIABLES, WandbTracker, run_id


def rate(value: float) -> SuccessRate:
    return SuccessRate(
        successes=int(value * 100), trials=100, rate=value, low=max(0.0, value - 0.05), high=min(1.0, value + 0.05)
    )


def report(wsr: float, **more: Any) -> ModelReport:
    return ModelReport(accuracy=0.8, wsr=rate(wsr), wfpr_mean=0.1, **more)


def result(trial: str = "t0") -> TrialResult:
    rungs = [
        RungResult(budget=b, queries=b, report=report(w, fidelity=0.7, p_value=0.01), epochs=2, seconds=1.5)
        for b, w in ((100, 0.5), (200, 0.75))
    ]
    return TrialResult(
        trial=trial,
        point={"seed": 1, "thief.model": {"name": "cnn9", "width": 0.5}},
        config={"seed": 1, "thief": {"budgets": [100, 200], "model": {"name": "cnn9"}}},
        victim="v0",
        nulls=["n0"],
        victim_report=report(0.99),
        null_reports=[report(0.02), report(0.04)],
        rungs=rungs,
        queries_charged=200,
        seconds=12.0,
        device="cpu",
        versions={"commit": "abc1234"},
    )


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    folders = {name: tmp_path / name for name in ("victim", "substitute-100", "substitute-200")}
    for folder in folders.values():
        folder.mkdir()
        for file in ("model.safetensors", "model.json", "key.json", "key.safetensors"):
            (folder / file).write_text("x")
    return folders


def test_a_trial_is_one_run_with_its_curve_over_queries(
    wandb: FakeWandb, tmp_path: Path, models: dict[str, Path]
) -> None:
    WandbTracker(tmp_path, "sweep", command="mea-ray sweep s").log(result(), models)
    victim, trial = wandb.runs
    assert victim.arguments["group"] == trial.arguments["group"] == "victim-v0"
    assert (trial.arguments["name"], trial.arguments["mode"]) == ("seed=1, model=cnn9(width=0.5)", "offline")
    assert trial.arguments["config"] == {
        "seed": 1,
        "thief": {"budgets": "100,200", "model": {"name": "cnn9"}},
        "set": {"seed": 1, "thief": {"model": {"name": "cnn9", "width": 0.5}}},
        "group": {"victim": "victim-v0", "seed": "seed-1", "setting": "thief.model.name=cnn9, thief.model.width=0.5"},
        "git": {"commit": "abc1234"},
        "command": "mea-ray sweep s",
    }
    for name in ("wsr", "wfpr", "accuracy", "fidelity", "p_value", "null_wsr", "threshold", "null_high"):
        assert trial.metrics[name] == "queries"
    assert [(line["queries"], line["wsr"]) for line in trial.logged] == [(100, 0.5), (200, 0.75)]
    assert trial.logged[0]["null_wsr"] == pytest.approx(0.03)
    assert [(line["threshold"], line["null_low"], line["null_high"]) for line in trial.logged] == [
        (0.3, 0.02, 0.04)
    ] * 2
    chart = trial.logged[-1]["robustness"]
    assert (chart["xs"], chart["keys"]) == ([100, 200], ["wsr", "threshold", "null_low", "null_high"])
    assert chart["ys"] == [[0.5, 0.75], [0.3, 0.3], [0.02, 0.02], [0.04, 0.04]]
    assert trial.summary["set"]["thief"]["model"]["name"] == "cnn9", "by the names of the config"
    assert trial.summary["queries_charged"] == 200 and victim.finished and trial.finished


def test_curves_of_the_attack_and_what_the_owner_saw_are_logged(wandb: FakeWandb, tmp_path: Path) -> None:
    plain = result()
    first, last = plain.rungs
    curves = {"reward": [(50, 0.1), (150, 0.4)]}
    log = QueryLogRecord(requests=2, images=200, classes=[150, 50], shapiro_w=0.8, alarm=True)
    messages = plain.model_copy(
        update={"rungs": [first, last.model_copy(update={"curves": curves})], "query_log": {"t0": log}}
    )
    WandbTracker(tmp_path, "sweep", log_models=False).log(messages, {})
    (run,) = wandb.runs
    assert run.metrics["attack/reward"] == "queries"
    assert [(line["queries"], line["attack/reward"]) for line in run.logged if "attack/reward" in line] == curves[
        "reward"
    ]
    assert run.summary["query_log"]["1"]["images"] == 200 and run.summary["query_log"]["1"]["alarm"] is True


def test_models_are_linked_and_the_key_stays_at_home(wandb: FakeWandb, tmp_path: Path, models: dict[str, Path]) -> None:
    tracker = WandbTracker(tmp_path, "sweep")
    tracker.log(result("t0"), models)
    tracker.log(result("t1"), models)
    victims = [a for run in wandb.runs for a in run.artifacts if a.type == "victim"]
    assert [(a.name, a.files) for a in victims] == [("victim-v0", ["model.json", "model.safetensors"])]
    substitutes = [a for run in wandb.runs for a in run.artifacts if a.type == "substitute"]
    assert [a.name for a in substitutes] == [f"substitute-{t}-{b}" for t in ("t0", "t1") for b in (100, 200)]
    assert all(a.metadata["made_from"] == "victim-v0:latest" for a in substitutes)


def test_online_the_victim_is_declared_as_used(wandb: FakeWandb, tmp_path: Path, models: dict[str, Path]) -> None:
    WandbTracker(tmp_path, "sweep", mode="online").log(result(), models)
    assert [a.name for a in wandb.runs[-1].used] == ["victim-v0"]


def test_no_models_no_artifacts(wandb: FakeWandb, tmp_path: Path, models: dict[str, Path]) -> None:
    WandbTracker(tmp_path, "sweep", log_models=False).log(result(), models)
    assert len(wandb.runs) == 1 and not wandb.runs[0].artifacts


def test_a_resumed_sweep_logs_no_trial_twice_but_those_that_failed_again(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.fails = "log"
    with pytest.raises(RuntimeError):
        WandbTracker(tmp_path, "sweep").log(result(), {})
    assert wandb.runs[-1].finished  # a failed run is not left open
    wandb.fails = ""
    for _ in range(2):
        WandbTracker(tmp_path, "sweep").log(result(), {})
    assert len(wandb.runs) == 2


def test_online_a_killed_start_is_continued_in_the_same_run(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.fails = "log"
    with pytest.raises(RuntimeError):
        WandbTracker(tmp_path / "a", "sweep", mode="online", runs_per_minute=1e6).log(result(), {})
    wandb.fails = ""
    for folder in ("a", "b", "c"):  # what was noted on a disk is not there
        WandbTracker(tmp_path / folder, "sweep", mode="online", runs_per_minute=1e6).log(result(), {})
    (run,) = wandb.runs
    assert [line["queries"] for line in run.logged] == [100, 200] and run.summary["queries_charged"] == 200


def test_ids_follow_from_the_names_of_sweep_and_trial() -> None:
    assert run_id("s", "t0") == run_id("s", "t0")
    assert len({run_id("s", "t0"), run_id("s", "t1"), run_id("other", "t0")}) == 3


def test_the_environment_does_not_reach_our_runs(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in IGNORED_VARIABLES:
        monkeypatch.setenv(name, "leak")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    warnings: list[str] = []
    tracker = WandbTracker(tmp_path, "sweep", warn=warnings.append)
    tracker.log(result("t0"), {})
    tracker.log(result("t1"), {})
    assert "leak" not in wandb.environment.values() and wandb.environment["WANDB_ENTITY"] == "team"
    assert os.environ["WANDB_RUN_ID"] == "leak"  # it is not ours to change
    assert len(warnings) == 1 and all(name in warnings[0] for name in IGNORED_VARIABLES)
    assert len({run.arguments["id"] for run in wandb.runs}) == 2


def test_an_interrupted_offline_run_is_replaced_and_a_sent_one_is_not(wandb: FakeWandb, tmp_path: Path) -> None:
    home, identity = tmp_path / "wandb", run_id("sweep", "t0")
    for name in ("1", "2"):
        (home / f"offline-run-{name}-{identity}").mkdir(parents=True)
    (home / f"offline-run-2-{identity}" / "run.wandb.synced").write_text("")
    (home / "offline-run-1-other").mkdir()
    WandbTracker(tmp_path, "sweep").log(result("t0"), {})
    assert {path.name for path in home.glob("offline*")} == {f"offline-run-2-{identity}", "offline-run-1-other"}


def test_the_summary_has_one_line_per_rung(wandb: FakeWandb, tmp_path: Path) -> None:
    tracker = WandbTracker(tmp_path, "sweep")
    tracker.log_config({"name": "sweep", "base": {"seed": 0}})
    tracker.summarize([result("t0"), result("t1")])
    (run,) = wandb.runs
    assert run.arguments["config"] == {"name": "sweep", "base": {"seed": 0}}
    table = run.logged[0]["trials"]
    assert [(line["trial"], line["queries"], line["wsr"]) for line in table] == [
        ("t0", 100, 0.5), ("t0", 200, 0.75), ("t1", 100, 0.5), ("t1", 200, 0.75),
    ]  # fmt: skip
    assert table[0]["set.thief.model.name"] == "cnn9"


def test_a_rendered_report_is_attached_to_one_run(wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<h1>demo</h1>", encoding="utf-8")
    tracker = WandbTracker(tmp_path, "sweep", mode="online", runs_per_minute=1e6)
    for _ in range(2):
        tracker.attach([tmp_path / "report.html", tmp_path / "report.csv"])
    (run,) = wandb.runs
    assert run.logged == [{"report": "<h1>demo</h1>"}], "a step that is there is not added again"
    assert (run.artifacts[0].type, run.artifacts[0].files) == ("report", ["report.html"])
    WandbTracker(tmp_path, "other").attach([tmp_path / "nothing.html"])
    assert len(wandb.runs) == 1


def test_keys_are_nested_and_nothing_is_lost() -> None:
    assert nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert nested({"a": 1, "a.b": 2}) == nested({"a.b": 2, "a": 1}) == {"a": {"": 1, "b": 2}}


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_broken_wandb_is_a_warning_and_the_files_are_still_written(
    wandb: FakeWandb, tmp_path: Path, fails: str
) -> None:
    wandb.fails = fails
    warnings: list[str] = []
    visible = trackers(TrackingConfig(), tmp_path, "sweep", warn=warnings.append)
    visible.log_config({})
    visible.log(result(), {})
    visible.summarize([result()])
    visible.close()
    assert len(warnings) == 2 and all("WandbTracker failed" in text for text in warnings)
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 3


def test_online_without_a_network_becomes_offline_with_one_warning(wandb: FakeWandb, tmp_path: Path) -> None:
    wandb.fails = "online"
    warnings: list[str] = []
    tracker = WandbTracker(tmp_path, "sweep", mode="online", warn=warnings.append)
    tracker.log(result("t0"), {})
    tracker.log(result("t1"), {})
    assert [run.arguments["mode"] for run in wandb.runs] == ["offline", "offline"]
    assert len(warnings) == 1 and "mea-ray sync" in warnings[0]
    assert wandb.runs[0].arguments["settings"]["init_timeout"] <= 30


def test_online_without_an_account_asks_nobody(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    warnings: list[str] = []
    WandbTracker(tmp_path, "sweep", mode="online", warn=warnings.append).log(result(), {})
    assert wandb.runs[0].arguments["mode"] == "offline" and "wandb login" in warnings[0]


def test_disabled_never_imports_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    warnings: list[str] = []
    visible = trackers(TrackingConfig(wandb="disabled"), tmp_path, "sweep", warn=warnings.append)
    visible.log(result(), {})
    visible.summarize([result()])
    assert not warnings


def test_any_tracker_may_fail_without_harm_to_the_others(tmp_path: Path) -> None:
    class Bad:
        def __getattr__(self, name: str) -> Any:
            raise KeyError(name)

    seen: list[str] = []

    class Good:
        def log(self, result: TrialResult, models: Any) -> None:
            seen.append(result.trial)

    warnings: list[str] = []
    TrackerSet([Bad(), Good()], warnings.append).log(result(), {})  # type: ignore[list-item]
    assert seen == ["t0"] and len(warnings) == 1


def test_the_csv_holds_every_rung_of_every_trial(tmp_path: Path) -> None:
    visible = trackers(TrackingConfig(wandb="disabled"), tmp_path, "sweep")
    visible.log(result("t0"), {})
    visible.log(result("t1"), {})
    with (tmp_path / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["trial"], float(line["queries"]), float(line["wsr"])) for line in lines] == [
        ("t0", 100, 0.5), ("t0", 200, 0.75), ("t1", 100, 0.5), ("t1", 200, 0.75),
    ]  # fmt: skip
    assert lines[0]["set.seed"] == "1"


def test_the_csv_is_appended_to_also_by_a_resumed_sweep(tmp_path: Path) -> None:
    trackers(TrackingConfig(wandb="disabled"), tmp_path, "sweep").log(result("t0"), {})
    before = (tmp_path / "summary.csv").read_bytes()
    resumed = trackers(TrackingConfig(wandb="disabled"), tmp_path, "sweep")
    resumed.log(result("t0"), {})
    assert (tmp_path / "summary.csv").read_bytes() == before
    resumed.log(result("t1"), {})
    resumed.summarize([result("t0"), result("t1"), result("t2")])
    after = (tmp_path / "summary.csv").read_bytes()
    assert after.startswith(before)
    lines = list(csv.DictReader(after.decode().splitlines()))
    assert [line["trial"] for line in lines] == ["t0", "t0", "t1", "t1", "t2", "t2"]


def test_a_new_number_is_a_new_column_and_a_torn_line_is_written_again(tmp_path: Path) -> None:
    def read() -> list[dict[str, str]]:
        with (tmp_path / "summary.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def new_trackers() -> TrackerSet:
        return trackers(TrackingConfig(wandb="disabled"), tmp_path, "sweep")

    new_trackers().log(result("t0"), {})
    new_trackers().log(result("t1").model_copy(update={"point": {"extra": 7}}), {})
    assert [line["set.extra"] for line in read()] == ["", "", "7", "7"]
    assert read()[0]["set.seed"] == "1" and read()[2]["set.seed"] == ""
    whole = (tmp_path / "summary.csv").read_bytes()
    (tmp_path / "summary.csv").write_bytes(whole[:-5])  # killed while it wrote
    new_trackers().log(result("t1").model_copy(update={"point": {"extra": 7}}), {})
    assert (tmp_path / "summary.csv").read_bytes() == whole


def test_numbers_that_do_not_exist_are_left_out() -> None:
    bare = result().model_copy(update={"null_reports": []})
    rung = bare.rungs[0].model_copy(update={"report": ModelReport(accuracy=0.5)})
    assert set(rung_metrics(bare, rung)) == {"queries", "budget", "accuracy", "train_seconds", "train_epochs"}
    assert flatten({"a": {"b": [1, 2]}, "c": None}) == {"a.b": "1,2", "c": None}


def test_the_real_wandb_writes_offline_quietly_and_only_into_the_folder(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_SILENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "leak")
    monkeypatch.setenv("WANDB_SWEEP_ID", "leak")
    monkeypatch.setenv("WANDB_RESUME_FROM", "leak?_step=1")
    monkeypatch.setenv("WANDB_RUN_NOTES", "leak")
    monkeypatch.setenv("WANDB_CONFIG_PATHS", "leak")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweep"
    folder.mkdir()
    started = time.monotonic()
    warnings: list[str] = []
    visible = trackers(TrackingConfig(), folder, "sweep", warn=warnings.append)
    visible.log(result(), models)
    visible.summarize([result()])
    visible.close()
    assert time.monotonic() - started < 60
    runs = list((folder / "wandb").glob("offline-run-*"))
    names = ("victim-v0", "t0", "summary-sweep")
    assert {run.name.rpartition("-")[2] for run in runs} == {run_id("sweep", name) for name in names}
    assert len(warnings) == 1 and all(
        name in warnings[0] for name in ("WANDB_RUN_ID, ", "WANDB_RESUME_FROM", "WANDB_SWEEP_ID")
    )
    assert not any(b"leak" in path.read_bytes() for path in folder.rglob("*.wandb"))
    assert all(list(run.glob("run-*.wandb")) for run in runs)
    (stored,) = (folder / "wandb").glob(f"offline-run-*-{run_id('sweep', 't0')}/run-*.wandb")
    written = stored.read_bytes()
    for text in (b"seed=1, model=cnn9(width=0.5)", b"victim-v0", b"abc1234", b"null_high", b"robustness"):
        assert text in written
    assert {path.name for path in tmp_path.iterdir()} == {"sweep", *models}
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""
    assert json.loads(result().model_dump_json())["trial"] == "t0"
