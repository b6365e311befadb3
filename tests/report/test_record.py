from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_results import rate, trial, with_thief, write_sweep

from mea_ray.cli.main import main
from mea_ray.cli.options import OK
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.report import detections
from mea_ray.report.record import SweepRecord, command_of, make_record, slim
from mea_ray.results.portable import without_paths
from mea_ray.results.records import DetectionResult, ReversedTrigger, TrialResult, read_results

COMMAND = "mea-ray sweep sweeps/budgets.yaml data.path=/home/ann/cifar10 storage=s3://bucket/results/x seeds=3"


def finished(folder: Path, *, planned: int = 6, command: str = COMMAND) -> list[TrialResult]:
    """A finished sweep with its log, as a sweep leaves it."""
    results = write_sweep(folder)
    events = [
        {"t": 1796027848.5, "event": "SweepStarted", "trials": planned, "command": command},
        {"t": 1796127848.5, "event": "SweepStarted", "trials": planned, "command": "mea-ray sweep x --resume"},
    ]
    lines = [json.dumps(event) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return results


def test_a_record_says_how_the_sweep_was_made(tmp_path: Path) -> None:
    finished(tmp_path / "sweep")
    made = make_record(tmp_path / "sweep", tmp_path / "record", note="two CPU cores")
    assert made == SweepRecord.load(tmp_path / "record")
    assert made.command == "mea-ray sweep sweeps/budgets.yaml data.path=cifar10 seeds=3"
    assert (made.date, made.commit, made.device, made.trials) == ("2026-11-30", "abc1234", "cpu", 6)
    assert made.versions == {"python": "3.11.9", "torch": "2.9.0", "mea_ray": "0.1.0"}
    assert made.seconds == 75.0 and made.note == "two CPU cores"


def test_a_record_is_read_like_a_sweep(tmp_path: Path) -> None:
    results = finished(tmp_path / "sweep")
    make_record(tmp_path / "sweep", tmp_path / "record")
    assert {result.trial for result in read_results(tmp_path / "record")} == {result.trial for result in results}
    assert read_results(tmp_path / "record") == read_results(tmp_path / "sweep")


def private(name: str) -> TrialResult:
    config: dict[str, Any] = {
        "storage": "/scratch/ann/results",
        "data": {"name": "parquet", "path": "/home/ann/cifar10"},
        "tracking": {"wandb": "online", "entity": "anns-team", "group": "anns-runs"},
        "verification": {"threshold": 0.3},
    }
    result = with_thief(trial(name, config=config))
    trigger = ReversedTrigger(label="2", norm=3.0, success=1.0, on_substitute=rate(0.2), picture="aGVsbG8=" * 999)
    detection = DetectionResult(
        detection={"name": "abs", "file": "~/x/y.pt"}, tried_on="victim", triggers=[trigger], seconds=1.0
    )
    return result.model_copy(update={"detections": [detection]})


def test_names_of_machines_and_accounts_are_removed(tmp_path: Path) -> None:
    private("t1").save(tmp_path / "sweep" / "results" / "t1.json")
    (tmp_path / "sweep" / "sweep.yaml").write_text(
        "name: s\ndescription: See https://arxiv.org/abs/2401.15239 and/or 1/2.\n"
        "base: {storage: /scratch/ann, data: {path: 'C:/x', pool: gs://anns/pool}, tracking: {entity: anns-team}}\n",
        encoding="utf-8",
    )
    make_record(tmp_path / "sweep", tmp_path / "record", command="mea-ray sweep /home/ann/s.yaml")
    text = "".join(path.read_text() for path in (tmp_path / "record").rglob("*") if path.is_file())
    for word in ("ann/", "/ann", "anns", "/home", "/scratch", str(Path.home()), "aGVsbG8"):
        assert word not in text, word
    assert getpass.getuser() not in (tmp_path / "record" / "record.json").read_text()
    assert "https://arxiv.org/abs/2401.15239 and/or 1/2" in " ".join(text.split())
    assert yaml.safe_load((tmp_path / "record" / "sweep.yaml").read_text())["base"]["data"]["pool"] == "pool"


def test_curves_and_pictures_are_thinned_and_numbers_stay() -> None:
    result = private("t1")
    small = slim(result)
    points = small.rungs[-1].curves["policy/3"]
    assert len(points) == 50 and points[0] == (1, 0.003) and points[-1] == (1000, 0.003)
    assert small.detections[0].triggers[0].picture == "" and small.detections[0].triggers[0].norm == 3.0
    assert [rung.report for rung in small.rungs] == [rung.report for rung in result.rungs]
    assert small.query_log == result.query_log
    assert detections.pictures([small]) == [] and len(detections.pictures([result])) == 1


def test_a_command_with_quotes_can_be_run_again(tmp_path: Path) -> None:
    finished(tmp_path / "sweep")
    command = "mea-ray run x.yaml 'thief.budgets=[1, 2]' 'data={name: parquet, path: /a/b}' storage='/a b'"
    made = make_record(tmp_path / "sweep", tmp_path / "record", command=command)
    assert made.command == "mea-ray run x.yaml 'thief.budgets=[1, 2]' 'data={name: parquet, path: b}'"
    made = make_record(tmp_path / "sweep", tmp_path / "record", command="an open 'quote in /a/b")
    assert made.command == "an open 'quote in b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data.path=/a/b/c", "data.path=c"),
        ("a/b c/d.yaml", "a/b c/d.yaml"),
        ("'data.path=~/x/y/'", "'data.path=y'"),
        ("~ann/x", "x"),
        ("s3://bucket/a/b", "b"),
        ("mixing=1/2 / 3", "mixing=1/2 / 3"),
        ("https://x.org/a", "https://x.org/a"),
    ],
)
def test_paths_shrink_to_their_last_part(text: str, expected: str) -> None:
    assert without_paths(text) == expected


def test_an_unfinished_sweep_is_refused(tmp_path: Path) -> None:
    finished(tmp_path / "sweep", planned=7)
    with pytest.raises(ArtifactError, match="6 results of 7 trials"):
        make_record(tmp_path / "sweep", tmp_path / "record")
    assert not (tmp_path / "record").exists()


def test_without_a_command_there_is_no_record(tmp_path: Path) -> None:
    finished(tmp_path / "sweep", command="")
    with pytest.raises(ConfigError, match="--command"):
        make_record(tmp_path / "sweep", tmp_path / "record")
    assert make_record(tmp_path / "sweep", tmp_path / "record", command="mea-ray sweep x").date == "2026-11-30"


def test_only_a_record_is_overwritten(tmp_path: Path) -> None:
    finished(tmp_path / "sweep")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="not a record"):
        make_record(tmp_path / "sweep", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    make_record(tmp_path / "sweep", tmp_path / "record")
    for path in (tmp_path / "sweep" / "results").glob("tresnet18*.json"):
        path.unlink()
    (tmp_path / "sweep" / "events.jsonl").unlink()
    make_record(tmp_path / "sweep", tmp_path / "record", command="x")
    assert len(read_results(tmp_path / "record")) == 3


def test_the_command_line_makes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "sweep")
    target = tmp_path / "records" / "demo"
    assert main(["report", str(tmp_path / "sweep"), "--record", str(target), "--note", "a laptop"]) == OK
    assert "6 trials of 2026-11-30, commit abc1234" in capsys.readouterr().out
    assert SweepRecord.load(target).note == "a laptop"


def test_a_missing_or_damaged_record_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="--record"):
        SweepRecord.load(tmp_path)
    (tmp_path / "record.json").write_text("{}")
    with pytest.raises(ArtifactError, match="damaged"):
        SweepRecord.load(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["null", "[]", '"x"', "{", "\0", '{"t": "x", "event": "SweepStarted"}', '{"t": NaN, "event": "SweepStarted"}']
    + ['{"t": 1e300, "event": "SweepStarted", "trials": 1}', '{"t": 1, "event": "SweepStarted", "trials": null}'],
)
def test_a_damaged_log_gives_no_command(line: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(f"{line}\n", encoding="utf-8")
    assert command_of(tmp_path) == ""
