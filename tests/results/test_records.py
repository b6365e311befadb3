from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_results import model_report, trial, with_innocents, with_removals, with_thief

from mea_ray.core.errors import ArtifactError
from mea_ray.results.records import TrialResult, read_results


def saved(folder: Path, **changes: Any) -> Path:
    """A result file whose JSON was changed by hand."""
    path = folder / "t1.json"
    tree = trial("t1").model_dump(mode="json") | changes
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = with_removals(with_thief(trial("t1")))
    result.save(tmp_path / "t1.json")
    assert TrialResult.load(tmp_path / "t1.json") == result


def test_a_number_that_is_not_finite_survives_the_file(tmp_path: Path) -> None:
    rung = trial("t1").rungs[0].model_copy(update={"curves": {"loss": [(1, math.inf), (2, math.nan)]}})
    trial("t1").model_copy(update={"rungs": [rung]}).save(tmp_path / "t1.json")
    ((_, first), (_, second)) = TrialResult.load(tmp_path / "t1.json").rungs[0].curves["loss"]
    assert first == math.inf and math.isnan(second)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schema_version": 3}, "schema version 3, this version of mea_ray reads 2"),
        ({"queries_charged": -1}, "queries_charged: Input should be greater than or equal to 0"),
        ({"seconds": "soon"}, "seconds: "),
        ({"trial": "t2"}, "holds the result of another trial, 't2'"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"rungs": [{"budget": 1}]}, "rungs.0.queries: Field required"),
    ],
)
def test_what_is_not_a_result_of_this_trial_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ArtifactError) as error:
        TrialResult.load(saved(tmp_path, **changes))
    assert reason in str(error.value) and "t1.json" in str(error.value) and "--resume" in str(error.value)


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, math.nan, math.inf])
def test_a_rate_lies_between_0_and_1(tmp_path: Path, accuracy: float) -> None:
    report = model_report(0.9, 0.5).model_dump(mode="json") | {"accuracy": accuracy}
    with pytest.raises(ArtifactError, match="victim_report.accuracy"):
        TrialResult.load(saved(tmp_path, victim_report=report))


def test_more_successes_than_trials_are_refused(tmp_path: Path) -> None:
    report = model_report(0.9, 0.5).model_dump(mode="json")
    report["wsr"] |= {"successes": 1001, "trials": 1000}
    with pytest.raises(ArtifactError, match="1001 successes in 1000 trials"):
        TrialResult.load(saved(tmp_path, victim_report=report))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[]", b"\x00" * 10])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t1.json").write_bytes(content)
    with pytest.raises(ArtifactError) as error:
        TrialResult.load(tmp_path / "t1.json")
    assert "\n" not in str(error.value)


def test_results_come_in_the_order_of_the_sweeps_settings(tmp_path: Path) -> None:
    for name, seed in (("a", 10), ("b", 9), ("c", 2)):
        trial(name, seed=seed).save(tmp_path / "results" / f"{name}.json")
    assert [result.trial for result in read_results(tmp_path)] == ["c", "b", "a"]
    assert read_results(tmp_path / "results") == read_results(tmp_path)


def test_a_folder_without_results_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty" / "results").mkdir(parents=True)
    for path, reason in (("nothing", "does not exist"), ("file", "is a file"), ("empty", "there are no trial results")):
        with pytest.raises(ArtifactError, match=f"{reason}.*mea-ray sweep"):
            read_results(tmp_path / path)


def test_a_result_of_version_1_is_read_with_ranks_in_place_of_its_binomial(tmp_path: Path) -> None:
    result = with_innocents(trial("t1", end=0.8), 3, wsr=0.35)
    old = json.loads(result.model_dump_json())
    old["schema_version"] = 1
    reports = [
        old["victim_report"],
        *old["null_reports"],
        *(rung["report"] for rung in old["rungs"] + old["stolen_nulls"]),
    ]
    for report in reports:
        report.update(p_value=1e-16, infringes_significance=True)
        for name in ("statistics", "null_ranks", "key_ranks", "specificity"):
            del report[name]
    del old["chance"], old["key_drawn"]
    (tmp_path / "t1.json").write_text(json.dumps(old), encoding="utf-8")
    actual = TrialResult.load(tmp_path / "t1.json")
    assert actual.schema_version == 2
    assert [rung.report.p_value for rung in actual.rungs] == [1.0, 0.25, 0.25]
    assert [null.p_value for null in actual.null_reports] == [None] * 3


def test_a_file_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t1.json"
    trial("t1").save(path)
    path.write_text(path.read_text().replace('"queries_charged": ', '"queries_charged": 1'))
    with pytest.raises(ArtifactError, match="was changed after it was written: its checksum differs; delete it"):
        TrialResult.load(path)


def test_a_copy_under_another_trials_name_is_refused(tmp_path: Path) -> None:
    trial("t1").model_copy(update={"date": "2026-11-30T10:00:00+00:00"}).save(tmp_path / "t1.json")
    copy = tmp_path / "t2.json"
    copy.write_text((tmp_path / "t1.json").read_text())
    with pytest.raises(ArtifactError, match="holds the result of another trial, 't1'"):
        read_results(tmp_path)
    copy.write_text((tmp_path / "t1.json").read_text().replace('"trial": "t1"', '"trial": "t2"'))
    with pytest.raises(ArtifactError, match="t2.json was changed after it was written"):
        read_results(tmp_path)
    # Results that older versions wrote have no checksum.
    for path in (tmp_path / "t1.json", copy):
        path.write_text(
            json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"})
        )
    with pytest.raises(ArtifactError, match="t2.json is a copy of t1.json under another name"):
        read_results(tmp_path)
    copy.unlink()
    assert [result.trial for result in read_results(tmp_path)] == ["t1"], "without a checksum it is read"
