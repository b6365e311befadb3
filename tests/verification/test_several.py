"""Several keys in one report: the ranks combine exactly, and all else is what it is called."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from report_results import model_report
from scipy.stats import combine_pvalues

from mea_ray.core.errors import DataError
from mea_ray.results.records import ModelReport, RankRecord
from mea_ray.verification.keys import combine_key_ranks, combined_rank
from mea_ray.verification.ranks import Rank
from mea_ray.verification.several import merged


@pytest.mark.parametrize("totals", [(6,), (6, 6), (12, 5), (4, 6, 8), (3, 3, 3, 3)])
def test_the_combined_rank_is_that_of_an_enumeration_and_uniform_under_the_null(totals: tuple[int, ...]) -> None:
    every = list(itertools.product(*(range(1, total + 1) for total in totals)))
    p_values = []
    for positions in every:
        rank = combined_rank([Rank(at - 1, total - 1, "keys") for at, total in zip(positions, totals, strict=True)])
        at_least = sum(math.prod(each) <= math.prod(positions) for each in every)
        assert (rank.position, rank.total) == (at_least, len(every))
        p_values.append(rank.p_value)
    for level in {*p_values, 0.01, 0.05, 0.3}:  # every tuple is equally likely for an innocent suspect
        share = float(np.mean([p <= level for p in p_values]))
        assert share <= level + 1e-12 and (level not in p_values or share == pytest.approx(level))


def test_simulated_innocent_suspects_have_uniform_p_values() -> None:
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 360, (4000, 2))
    p_values = np.array([combined_rank([Rank(int(at), 359, "keys") for at in each]).p_value for each in ranks])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p_values <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 4000))


def test_it_is_close_to_fisher_where_ranks_are_many() -> None:
    ranks = [Rank(9, 719, "keys"), Rank(40, 719, "keys")]
    fisher = combine_pvalues([rank.p_value for rank in ranks], method="fisher").pvalue
    assert 0.7 * fisher < combine_key_ranks(ranks) <= fisher, "whole ranks make the exact p-value smaller"
    assert combined_rank([Rank(0, 359, "keys")] * 2).p_value == pytest.approx(1 / 129_600)


def test_one_report_of_two_keys() -> None:
    def report(wsr: float, lean: float, at_least: int) -> ModelReport:
        return model_report(
            0.9,
            wsr,
            statistics={"wsr": wsr, "lean": lean},
            key_ranks={"lean": RankRecord(at_least=at_least, references=359)},
            specificity={"stripes": 0.01 * lean},
            source_accuracy={f"class {lean}": 0.9},
        )

    nulls = [{"wsr": 0.5, "lean": 1.0}, {"wsr": 0.9, "lean": 5.0}]
    result = merged([report(0.6, 2.0, 0), report(0.8, 4.0, 1)], nulls=nulls, statistic="lean", threshold=0.65)
    assert result.wsr is not None and (result.wsr.successes, result.wsr.trials) == (1400, 2000)
    assert result.statistics == pytest.approx({"wsr": 0.7, "lean": 3.0}) and result.infringes_threshold
    assert result.null_ranks["lean"] == RankRecord(at_least=1, references=2) and result.p_value == pytest.approx(2 / 3)
    # Products of at most 2 are those of the ranks (1, 1), (1, 2) and (2, 1).
    assert result.key_ranks["lean"] == RankRecord(at_least=2, references=360**2 - 1)
    assert result.specificity == {"stripes": pytest.approx(0.04)}
    assert result.wfpr["stripes"].trials == 2000 and set(result.source_accuracy) == {"class 2.0", "class 4.0"}
    with pytest.raises(DataError):
        merged([model_report(0.9, None)], nulls=[], statistic="wsr", threshold=0.3)
