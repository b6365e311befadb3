"""The verdict: each way in which a proof fails has its name, and the worst comes first."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mea_ray.core.errors import DataError
from mea_ray.verification.ranks import Rank, rank_among
from mea_ray.verification.verdict import SEVERITY, Comparison, Evidence, Judgement, judge

GOOD = Evidence(
    accuracy=0.9,
    chance=0.1,
    victim_accuracy=0.95,
    wsr=0.8,
    victim_wsr=0.99,
    null_models=Rank(0, 120),
    stolen_null_models=Rank(0, 120),
    victim_rank=Rank(0, 120),
    comparisons=(Comparison("mixes in donut", 0.8, 0.05, 1e-4), Comparison("mixes of other classes", 0.8, 0.02)),
    controls=240,
)


def verdict(suspect: Evidence, significance: float = 0.01) -> Judgement:
    (judgement,) = judge([suspect], significance)
    return judgement


def test_all_conditions_together_are_a_proof() -> None:
    judgement = verdict(GOOD)
    assert judgement.verdict == judgement.text == "proved" and judgement.above_threshold
    assert judgement.p_value == judgement.adjusted_p_value == pytest.approx(1 / 121)
    assert "0.0083" in judgement.reasons[0].text


def test_a_model_that_always_answers_the_target_is_not_proved() -> None:
    constant = replace(
        GOOD,
        accuracy=0.097,
        wsr=1.0,
        victim_wsr=0.049,
        comparisons=(Comparison("mixes in donut", 1.0, 1.0), Comparison("mixes of other classes", 1.0, 0.998)),
    )
    judgement = verdict(constant)
    assert judgement.verdict == "too poor to judge"
    assert [reason.verdict for reason in judgement.reasons] == [
        "too poor to judge",
        "not specific",
        "not specific",
        "not proved",
    ]
    assert "9.7%" in judgement.reasons[0].text and "4.9%" in judgement.reasons[-1].text


def test_a_poor_model_is_too_poor_to_judge() -> None:
    least = 0.1 + (0.95 - 0.1) / 2
    assert verdict(replace(GOOD, accuracy=least)).verdict == "proved"
    assert verdict(replace(GOOD, accuracy=least - 1e-6)).verdict == "too poor to judge"


def test_a_victim_that_only_guesses_judges_nobody() -> None:
    judgement = verdict(replace(GOOD, victim_accuracy=0.1, accuracy=0.9))
    assert judgement.verdict == "too poor to judge" and "no better than chance" in judgement.reasons[0].text


@pytest.mark.parametrize(
    "comparison",
    [
        Comparison("mixes in donut", 0.8, 0.79),
        Comparison("mixes in donut", 0.8, 0.3),  # at the paper's threshold
        Comparison("mixes in donut", 0.02, 0.02),
        Comparison("mixes in donut", 0.8, 0.2, p_value=0.02),
    ],
)
def test_an_unspecific_mark_is_called_so(comparison: Comparison) -> None:
    judgement = verdict(replace(GOOD, comparisons=(*GOOD.comparisons, comparison)))
    assert judgement.verdict == "not specific" and "donut" in judgement.reasons[0].text


def test_a_significant_difference_does_not_excuse_a_high_rate() -> None:
    close = Comparison("mixes in donut", 0.8, 0.5, p_value=0.001)
    assert verdict(replace(GOOD, comparisons=(close,))).verdict == "not specific"
    assert verdict(replace(GOOD, comparisons=(replace(close, other=0.25),))).verdict == "proved"


def test_what_is_read_on_clean_images_is_specific_by_the_keys_rank() -> None:
    lean = replace(GOOD, statistic="lean", comparisons=(Comparison("mixes in donut", 0.0, 0.0),))
    assert verdict(replace(lean, key=Rank(0, 359, "keys"))).verdict == "proved"
    other = verdict(replace(lean, key=Rank(36, 359, "keys")))
    assert other.verdict == "not specific" and "37 of 360 keys" in other.reasons[0].text
    assert verdict(lean).verdict == "suggestive"


def test_a_mark_that_was_compared_with_nothing_is_suggestive_at_best() -> None:
    assert verdict(replace(GOOD, comparisons=())).verdict == "suggestive"


@pytest.mark.parametrize(("nulls", "floor"), [(1, "0.5"), (2, "0.33"), (20, "0.048")])
def test_few_null_models_are_suggestive_at_best_and_the_text_says_why(nulls: int, floor: str) -> None:
    few = replace(GOOD, null_models=Rank(0, nulls), stolen_null_models=Rank(0, nulls), controls=2 * nulls)
    judgement = verdict(few)
    assert judgement.verdict == "suggestive"
    assert f"rank 1 of {nulls + 1} models (p cannot be below {floor})" in judgement.reasons[0].text
    assert "99 null models" in judgement.reasons[0].text


def test_a_suspect_behind_an_innocent_model_is_not_proved() -> None:
    assert verdict(replace(GOOD, null_models=Rank(1, 20))).verdict == "not proved"
    assert verdict(replace(GOOD, stolen_null_models=Rank(3, 8))).verdict == "not proved"


def test_a_weak_lead_over_few_models_is_not_proved() -> None:
    assert verdict(replace(GOOD, wsr=0.02, null_models=Rank(0, 1), stolen_null_models=Rank(0, 1))).verdict == (
        "not proved"
    )


def test_without_stolen_controls_it_is_suggestive_at_best() -> None:
    assert verdict(replace(GOOD, stolen_null_models=None)).verdict == "suggestive"


def test_accused_controls_void_the_proof() -> None:
    judgement = verdict(replace(GOOD, controls=2, accused_controls=1))
    assert judgement.verdict == "void" and judgement.text == "void: innocent models would be accused"
    assert "1 of 2 innocent models" in judgement.reasons[0].text
    # Of many controls the significance allows a few.
    assert verdict(replace(GOOD, accused_controls=2)).verdict == "proved"
    assert verdict(replace(GOOD, accused_controls=3)).verdict == "void"


def test_a_victim_without_a_mark_proves_nothing() -> None:
    assert "carries no mark" in verdict(replace(GOOD, victim_wsr=0.2)).reasons[0].text
    behind = verdict(replace(GOOD, victim_rank=Rank(1, 120)))
    assert behind.verdict == "not proved" and "2 of 121 models" in behind.reasons[0].text


def test_an_uncommitted_key_is_no_proof() -> None:
    assert verdict(replace(GOOD, committed=False)).verdict == "not committed"
    assert verdict(replace(GOOD, committed=True)).verdict == "proved"


def test_a_drawn_key_proves_with_few_null_models() -> None:
    few = replace(GOOD, null_models=Rank(0, 1), stolen_null_models=Rank(0, 1), controls=2)
    drawn = replace(few, key=Rank(0, 359, "keys"), key_drawn=True)
    assert drawn.p_value == pytest.approx(2 / 360)
    assert verdict(drawn).verdict == "proved"


def test_a_key_that_fits_by_chance_does_not_accuse_a_suspect_that_innocent_models_equal() -> None:
    few = replace(GOOD, null_models=Rank(0, 24), stolen_null_models=Rank(0, 8), controls=32)
    drawn = replace(few, key=Rank(0, 359, "keys"), key_drawn=True)
    assert verdict(drawn).verdict == "proved"
    for behind in (replace(drawn, null_models=Rank(1, 24)), replace(drawn, stolen_null_models=Rank(1, 8))):
        judgement = verdict(behind)
        assert judgement.verdict == "not proved" and judgement.adjusted_p_value <= 0.01
        assert judgement.reasons[0].text.startswith("Innocent models show as much")
    # Of many models as many may lead it as the significance allows.
    assert verdict(replace(drawn, null_models=Rank(4, 999))).verdict == "proved"


def test_the_key_on_controls_is_corrected_as_it_is_on_suspects() -> None:
    drawn = replace(GOOD, key=Rank(0, 129_599, "keys"), key_drawn=True, controls=8, control_p_values=(0.004, 1.0))
    assert verdict(drawn).verdict == "void" and "1 of 8 innocent models" in verdict(drawn).reasons[0].text
    assert {judgement.verdict for judgement in judge([drawn] * 3, 0.01)} == {"proved"}
    fits = replace(drawn, control_p_values=(0.003,))
    assert {judgement.verdict for judgement in judge([fits] * 3, 0.01)} == {"void"}


def test_a_mark_that_is_read_on_clean_images_needs_no_mix_that_the_victim_answers() -> None:
    lean = replace(GOOD, statistic="lean", key=Rank(0, 359, "keys"), victim_wsr=0.0, wsr=0.0)
    assert verdict(lean).verdict == "proved"
    assert verdict(replace(lean, victim_rank=None)).verdict == "not proved"
    assert verdict(replace(lean, victim_rank=Rank(1, 120))).verdict == "not proved"


def test_a_key_chosen_by_hand_or_searched_for_has_no_p_value() -> None:
    few = replace(GOOD, null_models=Rank(0, 1), stolen_null_models=Rank(0, 1), controls=2, key=Rank(0, 359, "keys"))
    judgement = verdict(few)
    assert few.key_p_value is None and judgement.verdict == "suggestive"
    assert "chosen by hand" in judgement.reasons[0].text


def test_a_key_that_was_drawn_but_does_not_fit_costs_a_factor_of_two_at_most() -> None:
    drawn = replace(GOOD, key=Rank(300, 359, "keys"), key_drawn=True)
    assert drawn.p_value == pytest.approx(2 / 121)


def test_the_paper_s_threshold_does_not_decide() -> None:
    judgement = verdict(replace(GOOD, wsr=0.25))
    assert judgement.verdict == "proved" and not judgement.above_threshold


def test_many_suspects_are_corrected_together() -> None:
    assert [judgement.verdict for judgement in judge([GOOD] * 2, 0.01)] == ["suggestive", "suggestive"]
    strong = replace(GOOD, null_models=Rank(0, 999), stolen_null_models=Rank(0, 999))
    alone = judge([strong, replace(GOOD, null_models=Rank(60, 120))], 0.01)
    assert [judgement.verdict for judgement in alone] == ["proved", "not proved"]
    assert alone[0].adjusted_p_value == pytest.approx(2 / 1000)
    assert judge([], 0.01) == []


def test_reasons_come_worst_first_and_decide() -> None:
    bad = replace(GOOD, committed=False, accused_controls=99, accuracy=0.2, stolen_null_models=None)
    judgement = verdict(bad)
    order = [SEVERITY.index(reason.verdict) for reason in judgement.reasons]
    assert order == sorted(order) and len(order) >= 4
    assert judgement.verdict == judgement.reasons[0].verdict == "void"


def test_a_mark_that_is_not_there_is_not_called_unspecific() -> None:
    gone = replace(GOOD, wsr=0.01, null_models=Rank(40, 120), comparisons=(Comparison("mixes in donut", 0.01, 0.01),))
    assert [reason.verdict for reason in verdict(gone).reasons] == ["not proved"]


@pytest.mark.parametrize("significance", [0.0, 1.0])
def test_an_impossible_significance_is_refused(significance: float) -> None:
    with pytest.raises(DataError, match="significance"):
        judge([GOOD], significance)


def test_innocent_suspects_are_rarely_proved() -> None:
    # Statistics with heavy tails; suspect and references are exchangeable. Everything else speaks against the suspect.
    rng = np.random.default_rng(0)
    suspects = []
    for values in rng.standard_t(1, (3000, 3, 30)):
        nulls, stolen = (rank_among(float(row[0]), row[1:]) for row in values[:2])
        drawn = Rank(int(rng.integers(360)), 359, "keys")
        suspects.append(replace(GOOD, null_models=nulls, stolen_null_models=stolen, key=drawn, key_drawn=True))
    wrong = np.mean([verdict(suspect, 0.1).verdict == "proved" for suspect in suspects])
    assert wrong <= 0.1 + 3 * math.sqrt(0.09 / 3000)
    assert sum(judgement.verdict == "proved" for judgement in judge(suspects, 0.01)) <= 1
