"""p-values by rank: what n references allow, ties against the owner, and the rate of false positives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest

from mea_ray.core.errors import DataError
from mea_ray.verification.ranks import Rank, rank_among


def test_the_p_value_is_the_position_among_all() -> None:
    rank = rank_among(0.8, [0.1, 0.9, 0.3, 0.85])
    assert (rank.at_least, rank.references, rank.position, rank.total) == (2, 4, 3, 5)
    assert rank.p_value == pytest.approx(3 / 5)


def test_a_tie_counts_against_the_owner() -> None:
    assert rank_among(0.5, [0.5] * 9).p_value == 1.0
    assert rank_among(1.0, [1.0, 0.0, 0.0]).position == 2


def test_no_p_value_is_below_what_the_number_of_references_allows() -> None:
    for n in (0, 1, 2, 20, 199):
        rank = rank_among(math.inf, [0.0] * n)
        assert rank.p_value == rank.floor == pytest.approx(1 / (n + 1))


def test_the_sentence_says_what_the_references_allow() -> None:
    assert Rank(0, 20).sentence() == "rank 1 of 21 models (p cannot be below 0.048)"
    assert Rank(0, 1).sentence() == "rank 1 of 2 models (p cannot be below 0.5)"
    assert Rank(2, 359, "keys").sentence() == "rank 3 of 360 keys (p = 0.0083)"


def test_innocent_suspects_have_uniform_p_values_whatever_the_distribution() -> None:
    # Heavy tails, and more spread between models than any binomial: 20 null models and a suspect, 4,000 times.
    values = np.random.default_rng(0).standard_cauchy((4000, 21))
    p_values = np.array([rank_among(float(row[0]), row[1:]).p_value for row in values])
    for alpha in (1 / 21, 0.1, 0.5):
        assert (p_values <= alpha).mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 4000)
    spread = np.random.default_rng(1).uniform(0, 1 / 21, 4000)
    assert kstest(p_values - spread, "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("value", "references"), [(math.nan, [0.1]), (0.1, [0.2, math.nan])])
def test_what_is_not_a_number_has_no_rank(value: float, references: list[float]) -> None:
    with pytest.raises(DataError, match="not a number"):
        rank_among(value, references)


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(DataError):
        Rank(3, 2)
