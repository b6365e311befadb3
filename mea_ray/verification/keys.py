"""The test by keys: does the owner's key fit the suspect better than the other admissible keys?

It needs no null model. If the key was drawn uniformly from the admissible keys before the suspect existed, every rank
of its statistic on an innocent suspect is equally likely. A key whose classes the owner chose has no such p-value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc

from mea_ray.core.class_keys import AdmissibleKeys, ClassKey
from mea_ray.core.errors import DataError
from mea_ray.verification.ranks import Rank, rank_among

ENUMERATION_LIMIT = 10**7
"""Largest product of ranks whose tail is counted exactly, in about a second."""


def lean_by_key(means: npt.NDArray[np.floating[Any]], admissible: AdmissibleKeys) -> dict[ClassKey, float]:
    """Return the statistic ``lean`` of one suspect for every admissible key.

    Args:
        means: (classes, classes); entry [a, t] is the mean score of target t on clean images of class a.
        admissible: The keys; their geometry makes no difference.
    """
    return {key: float(min(means[label, key.target] for label in key.sources)) for key in admissible}


def mean_by_key(
    means: Mapping[tuple[tuple[int, int], str], npt.NDArray[np.floating[Any]]], admissible: AdmissibleKeys
) -> dict[ClassKey, float]:
    """Return the mean score of mixes of one suspect for every admissible key.

    Args:
        means: For each pair of source classes and geometry of ``admissible``, (classes,); entry [t] is the mean score
            of target t on such mixes.
        admissible: The keys.
    """
    return {key: float(means[key.sources, key.geometry][key.target]) for key in admissible}


def key_rank(statistics: Mapping[ClassKey, float], key: ClassKey, admissible: AdmissibleKeys) -> Rank:
    """Rank the owner's key among all admissible keys on one suspect.

    Args:
        statistics: The same statistic of the suspect for every admissible key. Larger values speak for theft.
        key: The owner's key.
        admissible: The keys from which it was drawn.

    Returns:
        The rank, with p = number of admissible keys whose statistic is at least that of ``key`` / number of keys.

    Raises:
        DataError: The key is not admissible, or a key has no statistic.
    """
    own = admissible.canonical(key)
    missing = [each for each in admissible if each not in statistics]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(admissible)} admissible keys have no statistic, the first is {missing[0]}"
        )
    others = [statistics[each] for each in admissible if each != own]
    return rank_among(statistics[own], others, "keys")


def combined_rank(ranks: Sequence[Rank]) -> Rank:
    """Return the joint rank of several independently drawn keys among all combinations of admissible keys.

    Its p-value is that of ``combine_key_ranks``; arguments and errors are the same.
    """
    total = math.prod(rank.total for rank in ranks)
    # A whole number if counted exactly; beyond the limit of counting it is rounded against the owner.
    position = max(1, math.ceil(combine_key_ranks(ranks) * total - 1e-6))
    return Rank(min(position, total) - 1, total - 1, "keys")


def combine_key_ranks(ranks: Sequence[Rank]) -> float:
    """Combine the ranks of independently drawn keys on one suspect into one p-value.

    The statistic is the product of the p-values (Fisher's method). Its distribution under independent discrete uniform
    ranks is counted exactly. Beyond ``ENUMERATION_LIMIT`` the chi-squared distribution of continuous p-values is used,
    which is conservative for discrete ones.

    Args:
        ranks: One rank for each key, at least one.

    Returns:
        P(product of ranks <= the observed product), in (0, 1].

    Raises:
        DataError: There is no rank.

    References:
        R. A. Fisher, Statistical Methods for Research Workers, 4th edition (1932), section 21.1.
    """
    if not ranks:
        raise DataError("there is no rank to combine; rank at least one key")
    product = math.prod(rank.position for rank in ranks)
    if product <= ENUMERATION_LIMIT:
        totals = tuple(sorted((rank.total for rank in ranks), reverse=True))
        return _products_up_to(product, totals, {}) / math.prod(totals)
    statistic = -2 * sum(math.log(rank.p_value) for rank in ranks)
    return float(chdtrc(2 * len(ranks), statistic))  # the survival function of chi-squared


def _products_up_to(bound: int, totals: tuple[int, ...], known: dict[tuple[int, int], int]) -> int:
    """Count the tuples of whole numbers with 1 <= i_k <= totals[k] whose product is at most ``bound``."""
    if len(totals) == 1:
        return min(bound, totals[0])
    if bound >= math.prod(totals):
        return math.prod(totals)
    place = (bound, len(totals))
    if place not in known:
        count, first = 0, 1
        last_allowed = min(bound, totals[0])
        while first <= last_allowed:  # all i from first to last leave the same bound to the others
            rest = bound // first
            last = min(bound // rest, last_allowed)
            count += (last - first + 1) * _products_up_to(rest, totals[1:], known)
            first = last + 1
        known[place] = count
    return known[place]
