"""What the verdict is given of a recorded trial."""

from __future__ import annotations

import pytest
from report_results import model_report, trial

from mea_ray.results.records import QueryLogRecord, RankRecord, TrialResult
from mea_ray.verification.evidence import Court, chance, evidence, statistic
from mea_ray.verification.ranks import Rank
from mea_ray.verification.verdict import judge


def with_nulls(result: TrialResult, rates: list[float], stolen: list[float]) -> TrialResult:
    last = result.rungs[-1]
    return result.model_copy(
        update={
            "null_reports": [model_report(0.95, rate) for rate in rates],
            "stolen_nulls": [last.model_copy(update={"report": model_report(0.9, rate)}) for rate in stolen],
        }
    )


def test_ranks_are_those_of_the_recorded_rates() -> None:
    result = with_nulls(trial("a", end=0.8), [0.0, 0.1, 0.9], [0.1, 0.2])
    last = result.rungs[-1]
    extracted = evidence(result, last.report, last.budget)
    assert extracted is not None
    assert (extracted.null_models, extracted.stolen_null_models) == (Rank(1, 3), Rank(0, 2))
    assert (extracted.controls, extracted.accused_controls) == (5, 1)
    controls = {"control samples (stripes)", "control samples (pixel merge)"}
    assert {each.name for each in extracted.comparisons} == controls


def test_the_statistic_is_the_trials_and_in_older_results_the_configs() -> None:
    result = trial("a")
    known = model_report(0.9, 0.5, statistics={"wsr": 0.5, "lean": -1.0, "log_probability": -2.0})
    older = result.model_copy(update={"config": {"verification": {"statistic": "log_probability"}}})
    assert statistic(older, [known]) == "log_probability"
    assert statistic(older.model_copy(update={"statistic": "lean"}), [known]) == "lean"
    assert statistic(older.model_copy(update={"statistic": "lean"}), [known, model_report(0.9, 0.5)]) == "wsr"


def test_controls_that_the_key_fits_are_handed_on_with_their_p_values() -> None:
    fits = {"lean": RankRecord(at_least=0, references=359)}
    good, poor = (model_report(accuracy, 0.9, key_ranks=fits) for accuracy in (0.9, 0.1))
    court = Court(model_report(0.95, 1.0), 0.1, "lean", key_drawn=True)
    result = court.evidence(good, [good, poor], [])
    assert result.accused_controls == 0  # no mix need answer the target
    assert result.control_p_values == pytest.approx((2 / 360, 1.0))
    assert court.accuses(good) and not court.accuses(poor)


def test_controls_are_those_of_the_same_budget() -> None:
    result = with_nulls(trial("a"), [0.0], [0.1])
    first = result.rungs[0]
    extracted = evidence(result, first.report, first.budget)
    assert extracted is not None and extracted.stolen_null_models is None and extracted.controls == 1


def test_without_a_watermark_or_a_null_model_there_is_no_evidence() -> None:
    result = trial("a")
    assert evidence(result, model_report(0.9, None), 1000) is None
    assert evidence(result.model_copy(update={"null_reports": []}), result.rungs[-1].report, 1000) is None


def test_chance_is_read_from_the_classes_that_were_answered() -> None:
    result = trial("a")
    assert chance(result) == 0.0
    log = QueryLogRecord(requests=1, images=4, classes=[1, 1, 1, 1])
    assert chance(result.model_copy(update={"query_log": {"thief": log}})) == 0.25


def test_a_recorded_constant_answer_is_not_proved() -> None:
    constant = model_report(0.097, 1.0, wfpr={"donut": model_report(0.1, 1.0).wsr}, wfpr_mean=1.0)
    base = with_nulls(trial("a"), [0.0], [0.0])
    result = base.model_copy(update={"victim_report": model_report(0.95, 0.049)})
    extracted = evidence(result, constant, 1000)
    assert extracted is not None
    (judgement,) = judge([extracted], 0.01)
    assert judgement.verdict == "too poor to judge"
    assert any("4.9%" in reason.text for reason in judgement.reasons)


def test_one_null_model_is_suggestive_at_best() -> None:
    result = with_nulls(trial("a", end=0.9), [0.01], [0.02])
    extracted = evidence(result, result.rungs[-1].report, 1000)
    assert extracted is not None and extracted.p_value == pytest.approx(0.5)
    assert judge([extracted], 0.01)[0].verdict == "suggestive"
