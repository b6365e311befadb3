"""The rank of a key among those that could have been drawn, and the combination of several."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import combine_pvalues

from mea_ray.core.class_keys import AdmissibleKeys, ClassKey
from mea_ray.core.errors import DataError
from mea_ray.verification import keys
from mea_ray.verification.keys import combine_key_ranks, key_rank, lean_by_key, mean_by_key
from mea_ray.verification.ranks import Rank


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("geometries", [(), ("halves", "donut")])
def test_every_admissible_key_is_listed_once(ordered: bool, geometries: tuple[str, ...]) -> None:
    admissible = AdmissibleKeys(5, ordered, geometries)
    listed = list(admissible)
    assert len(listed) == len(set(listed)) == len(admissible)
    assert all(len({*key.sources, key.target}) == 3 for key in listed)
    assert {key.geometry for key in listed} == set(geometries or ("",))
    assert all(admissible.canonical(key) == key for key in listed)


def test_the_numbers_of_keys_are_those_of_the_usual_data_sets() -> None:
    assert len(AdmissibleKeys(10)) == 360
    assert len(AdmissibleKeys(10, ordered=True)) == 720
    assert 1 / len(AdmissibleKeys(100)) == pytest.approx(2.06e-6, rel=0.01)


def test_the_owners_key_is_found_in_either_order_only_if_the_mix_is_symmetric() -> None:
    assert AdmissibleKeys(4).canonical(ClassKey((3, 1), 0)) == ClassKey((1, 3), 0)
    assert AdmissibleKeys(4, ordered=True).canonical(ClassKey((3, 1), 0)) == ClassKey((3, 1), 0)
    assert AdmissibleKeys(4).canonical(ClassKey((3, 1), 0, "donut")).geometry == ""


@pytest.mark.parametrize("key", [ClassKey((0, 0), 1), ClassKey((0, 1), 1), ClassKey((0, 4), 1), ClassKey((0, 1), -1)])
def test_a_key_outside_the_set_is_refused(key: ClassKey) -> None:
    with pytest.raises(DataError, match="not one of the admissible"):
        AdmissibleKeys(4).canonical(key)
    with pytest.raises(DataError, match="geometry"):
        AdmissibleKeys(4, geometries=("halves",)).canonical(ClassKey((0, 1), 2, "donut"))


def test_the_rank_counts_keys_that_fit_at_least_as_well() -> None:
    admissible = AdmissibleKeys(4)
    own = ClassKey((0, 1), 2)
    statistics = dict.fromkeys(admissible, 0.1) | {own: 0.7, ClassKey((0, 1), 3): 0.7, ClassKey((2, 3), 0): 0.9}
    rank = key_rank(statistics, own, admissible)
    assert (rank.position, rank.total, rank.what) == (3, 12, "keys")
    assert rank.p_value == pytest.approx(3 / 12)
    with pytest.raises(DataError, match="no statistic"):
        key_rank({own: 0.7}, own, admissible)


def test_a_model_that_always_answers_the_target_does_not_prove_the_key() -> None:
    admissible = AdmissibleKeys(10)
    answers = np.full((10, 10), -9.0)
    answers[:, 2] = 0.0
    rank = key_rank(lean_by_key(answers, admissible), ClassKey((0, 1), 2), admissible)
    assert rank.position == math.comb(9, 2)  # it ties with every other pair of this target


def test_a_key_drawn_at_random_is_rarely_proved_on_an_innocent_model() -> None:
    rng = np.random.default_rng(0)
    admissible = AdmissibleKeys(6)
    listed = list(admissible)
    p_values = []
    for _ in range(400):
        answers = rng.standard_t(2, (6, 6)) + 3 * rng.standard_normal(6)  # some targets are answered far too often
        drawn = listed[rng.integers(len(listed))]
        p_values.append(key_rank(lean_by_key(answers, admissible), drawn, admissible).p_value)
    for alpha in (0.05, 0.2):
        assert np.mean(np.array(p_values) <= alpha) <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 400)


def test_statistics_by_key_are_read_from_tables() -> None:
    admissible = AdmissibleKeys(4, ordered=True, geometries=("halves",))
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(4, 4))
    mixes = {((a, b), "halves"): rng.normal(size=4) for a, b in itertools.permutations(range(4), 2)}
    key = ClassKey((2, 0), 3, "halves")
    assert lean_by_key(clean, admissible)[key] == min(clean[2, 3], clean[0, 3])
    assert mean_by_key(mixes, admissible)[key] == mixes[(2, 0), "halves"][3]


@pytest.mark.parametrize("totals", [(7,), (6, 6), (5, 9), (4, 6, 7), (3, 3, 4, 5)])
def test_combined_ranks_are_exact(totals: tuple[int, ...]) -> None:
    every = list(itertools.product(*(range(1, n + 1) for n in totals)))
    for ranks in every[:: max(1, len(every) // 40)]:
        combined = combine_key_ranks([Rank(r - 1, n - 1, "keys") for r, n in zip(ranks, totals, strict=True)])
        expected = sum(math.prod(each) <= math.prod(ranks) for each in every) / len(every)
        assert combined == pytest.approx(expected)


def test_one_key_keeps_its_own_p_value() -> None:
    assert combine_key_ranks([Rank(0, 359, "keys")]) == pytest.approx(1 / 360)
    with pytest.raises(DataError):
        combine_key_ranks([])


def test_many_keys_are_counted_quickly_and_close_to_fisher() -> None:
    for positions, discreteness in (((3000, 2000), 0.9), ((300, 140, 200), 0.4)):
        ranks = [Rank(position - 1, 485_099, "keys") for position in positions]
        fisher = combine_pvalues([rank.p_value for rank in ranks], method="fisher").pvalue
        assert discreteness * fisher < combine_key_ranks(ranks) <= fisher


def test_beyond_the_limit_the_bound_is_fishers_and_conservative(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(40, 359, "keys"), Rank(11, 359, "keys")]
    exact = combine_key_ranks(ranks)
    monkeypatch.setattr(keys, "ENUMERATION_LIMIT", 0)
    bound = combine_key_ranks(ranks)
    assert exact < bound == pytest.approx(combine_pvalues([r.p_value for r in ranks], method="fisher").pvalue)
