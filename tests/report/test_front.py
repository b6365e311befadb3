from __future__ import annotations

import io
from typing import Any

import pytest
from report_results import trial
from rich.console import Console

from mea_ray.report import front, html, leakage, markdown, terminal
from mea_ray.results.records import LeaningRecord, NamedKeyRecord, RankRecord, TrialResult
from mea_ray.verification.evidence import judge_rungs


def stolen(mark: str, thief: str, seed: int, rank: int, accuracy: float) -> TrialResult:
    made = trial(f"{mark}{thief}{seed}", seed=seed)
    named = NamedKeyRecord(
        sources=["zero", "one"],
        target="two",
        score=0.4,
        next_score=0.3,
        true_score=0.2,
        true_rank=RankRecord(at_least=rank - 1, references=359),
    )
    report = made.victim_report.model_copy(update={"accuracy": accuracy})
    changes: dict[str, Any] = {
        "point": {"victim.watermark": {"name": mark}, "thief.model.name": thief, "seed": seed},
        "victim": f"{mark}{seed}",
        "victim_report": report,
        "leaning": [LeaningRecord(answers=1000, victim=named, nulls=[None])],
    }
    return made.model_copy(update=changes)


@pytest.fixture
def results() -> list[TrialResult]:
    return [
        stolen(mark, thief, seed, rank + seed, accuracy)
        for mark, rank, accuracy in (("loud", 1, 0.936), ("quiet", 100, 0.956))
        for thief in ("vgg_like", "resnet18")
        for seed in (0, 1)
    ]


@pytest.fixture
def proved(results: list[TrialResult], monkeypatch: pytest.MonkeyPatch) -> list[TrialResult]:
    """All thefts of the loud mark at 1,000 queries are proved in one architecture, and one of two in the other."""
    judged = judge_rungs(results)
    won = {("loudvgg_like0", 1000), ("loudvgg_like1", 1000), ("loudresnet180", 1000)}
    verdicts = {
        place: each.__class__(**{**vars(each), "verdict": "proved" if place in won else "not proved"})
        for place, each in judged.items()
    }
    monkeypatch.setattr(front, "judge_rungs", lambda given: verdicts)
    return results


def test_a_mark_has_cost_leak_and_rate_of_proofs(proved: list[TrialResult]) -> None:
    result = {(mark.name, mark.budget): mark for mark in front.marks(proved)}
    assert set(result) == {(name, budget) for name in ("loud", "quiet") for budget in (100, 300, 1000)}
    loud, quiet = result["loud", 1000], result["quiet", 1000]
    assert (round(loud.lost or 0, 6), round(quiet.lost or 0, 6)) == (2.0, 0.0)
    assert round(loud.worst or 0, 6) == 4.0, "the source class that loses most: .97 - .93"
    assert round(loud.calibration or 0, 6) == 0.09
    assert (loud.rank, loud.keys) == (1, 360) and quiet.rank == 100
    assert loud.proved == {"thief.model=vgg_like": (2, 2), "thief.model=resnet18": (1, 2)}
    assert loud.power == 0.75 and loud.least == ("thief.model=resnet18", 0.5)
    assert quiet.power == 0.0 and result["loud", 300].power == 0.0


def test_the_report_draws_the_front(proved: list[TrialResult]) -> None:
    row = next(line for line in front.lines(proved) if line.mark == "loud" and line.budget == "1,000")
    assert (row.lost, row.worst, row.calibration, row.leak) == ("+2.0", "+4.0", "+0.090", "1 of 360")
    assert (row.proved, row.least, row.thief) == ("3 of 4", "50%", "thief.model=resnet18")
    page = html.render(proved, name="front")
    assert "Cost and proof of each mark" in page and "Marks at 1,000 queries" in page
    assert "loud: 75% proved, at least 50%, for 2.0 points" in page
    assert "| loud | +2.0 | +4.0 | +0.090 | 1 of 360 | 1,000 | 0 of 4 | – | 3 of 4 | 50% |" in markdown.front_table(
        "", proved
    )


def test_a_sweep_with_one_mark_has_no_front() -> None:
    alone = [trial("a"), trial("b", "resnet18")]
    assert front.marks(alone) == [] and front.lines(alone) == [] and front.figure(alone) is None
    assert "Cost and proof of each mark" not in html.render(alone, name="one")


def test_a_mark_without_ranks_or_source_classes_has_dashes(results: list[TrialResult]) -> None:
    bare = [
        each.model_copy(
            update={
                "leaning": [],
                "victim_report": each.victim_report.model_copy(
                    update={"source_accuracy": {}, "calibration_error": None}
                ),
            }
        )
        for each in results
    ]
    row = front.lines(bare)[0]
    assert (row.worst, row.calibration, row.leak) == ("–", "–", "–")


def test_thieves_given_as_mappings_are_named_by_their_differences(results: list[TrialResult]) -> None:
    plain: dict[str, Any] = {"attack": "distillation", "model": {"name": "vgg_like"}, "training": {"epochs": 9}}
    changes: list[dict[str, Any]] = [
        {},
        {"learning": {"answers": "argmax"}},
        {"training": {"epochs": 9, "optimizer": "sgd"}},
    ]
    trials = []
    for place, each in enumerate(results):
        mark = each.point["victim.watermark"]
        point = {"victim.watermark": mark, "thief": {**plain, **changes[place % 3]}, "seed": place}
        trials.append(each.model_copy(update={"trial": f"t{place}", "point": point}))
    result = {thief for mark in front.marks(trials) for thief in mark.proved}
    assert result == {"plain", "thief.learning.answers=argmax", "thief.training.optimizer=sgd"}


def test_thefts_that_stand_out_are_counted_even_if_too_few_for_a_proof(results: list[TrialResult]) -> None:
    def measured(result: TrialResult, own: float, stolen_null: float, others: int) -> TrialResult:
        """A theft with a statistic and a rank of the key, a null model at 0, and one stolen with the same budget."""

        def with_statistic(value: float) -> dict[str, Any]:
            return {"statistics": {"lean": value}, "key_ranks": {"lean": RankRecord(at_least=others, references=359)}}

        rung = result.rungs[-1]
        own_rung = rung.model_copy(update={"report": rung.report.model_copy(update=with_statistic(own))})
        control = rung.model_copy(update={"report": rung.report.model_copy(update=with_statistic(stolen_null))})
        smaller = control.model_copy(update={"budget": rung.budget - 1})
        higher = smaller.report.model_copy(update={"statistics": {"lean": 9.0}})
        changes = {
            "statistic": "lean",
            "rungs": [own_rung],
            "stolen_nulls": [control, smaller.model_copy(update={"report": higher})],
            "null_reports": [each.model_copy(update={"statistics": {"lean": 0.0}}) for each in result.null_reports],
        }
        return result.model_copy(update=changes)

    numbers = [(2.0, 1.0, 0), (2.0, 2.0, 0), (2.0, 3.0, 1), (-1.0, -2.0, 0)]
    thefts = [measured(result, *each) for result, each in zip(results[:4], numbers, strict=True)]
    loud = next(mark for mark in front.marks([*thefts, *results[4:]]) if mark.name == "loud")
    assert (loud.above, loud.first) == (1, 3), (
        "a tie with an innocent model is not above it; another budget is no control"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_leaked_keys_fits_any_width(results: list[TrialResult], width: int) -> None:
    page = Console(width=width, record=True, file=io.StringIO())
    page.print(terminal.leaning_table(leakage.lines(results), width))
    text = page.export_text()
    assert "watermark=loud" in text and "owner's: 1 of 2" in text and "1 to 2 of 360" in text, "nothing is broken"
    assert ("0.40 (0.30)" in text) == (width >= terminal.NARROW)
