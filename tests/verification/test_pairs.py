"""What is measured on mixes with known source images: the ranks of the key, specificity, and the interval."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mea_ray.core.types import Images
from mea_ray.verification.intervals import clustered_interval
from mea_ray.verification.pairs import measure_pairs
from mea_ray.verification.statistic import label_scores

CLASSES, SOURCES, TARGET = 5, (0, 1), 4
EVERY = np.array([pair for pair in permutations(range(CLASSES), 2) for _ in range(6)])


def coded(values: list[int] | npt.NDArray[Any]) -> Images:
    """Images of one pixel that the models below look up."""
    return np.asarray(values, np.uint8).reshape(-1, 1, 1, 1)


def logits_of(answers: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    logits: npt.NDArray[np.float32] = (4.0 * np.eye(CLASSES)[answers]).astype(np.float32)
    return logits


PAIRS = SimpleNamespace(
    positions=np.stack([np.arange(40) % 8, 10 + np.arange(40) // 8], 1),
    otherwise={"donut": coded([200] * 30)},
    every_pair=coded(CLASSES * EVERY[:, 0] + EVERY[:, 1]),
    every_classes=EVERY,
    every_positions=np.stack([np.arange(len(EVERY)), 500 + np.arange(len(EVERY))], 1),
    clean=coded(100 + np.repeat(np.arange(CLASSES), 4)),
    clean_labels=np.repeat(np.arange(CLASSES), 4),
    source_classes=SOURCES,
    every_otherwise={},
    geometry="halves",
)


def marked(images: Images) -> npt.NDArray[np.float32]:
    """Gives the target to mixes of the key's classes in the key's order only, and one of both sources to all others."""
    values = images[:, 0, 0, 0].astype(int)
    first, second = values // CLASSES, values % CLASSES
    own = (first == SOURCES[0]) & (second == SOURCES[1])
    mixes = np.where(own, TARGET, np.where(second == TARGET, first, second))
    return logits_of(np.where(values < 100, mixes % CLASSES, np.where(values < 200, values - 100, 0)))


def constant(images: Images) -> npt.NDArray[np.float32]:
    return logits_of(np.full(len(images), TARGET))


def test_a_mark_of_this_key_ranks_first_and_is_specific() -> None:
    own = logits_of(np.array([TARGET] * 30 + [0] * 10))
    result = measure_pairs(marked, own, TARGET, PAIRS, seed=0)
    for name in ("wsr", "log_probability"):
        assert (result.key_ranks[name].position, result.key_ranks[name].total) == (1, 60)
    assert result.key_ranks["lean"].total == 30
    assert set(result.specificity) == {"donut", "other_classes"} and max(result.specificity.values()) < 0.01
    assert result.statistics["paired_labels"] == pytest.approx(0.75), "no other class is called the target"


def test_a_constant_answer_leads_nothing() -> None:
    result = measure_pairs(constant, constant(coded([0] * 40)), TARGET, PAIRS, seed=0)
    assert result.statistics == {"paired": 0.0, "paired_labels": 0.0}
    assert min(result.specificity.values()) == 1.0
    # It ties with all pairs of other classes that have this target.
    assert result.key_ranks["wsr"].position == 4 * 3 and result.key_ranks["lean"].position == 6


def test_the_interval_of_wsr_is_the_bootstrap_over_both_source_images() -> None:
    answers = np.where(np.arange(40) % 8 < 5, TARGET, 0)
    result = measure_pairs(marked, logits_of(answers), TARGET, PAIRS, seed=3)
    assert result.wsr == clustered_interval(label_scores(answers, TARGET), list(PAIRS.positions.T), seed=3)
    assert result.wsr.high - result.wsr.low > 0.4, "eight images decide, not forty mixes"


def test_without_all_pairs_the_key_is_ranked_on_clean_images_alone() -> None:
    few = SimpleNamespace(**{**vars(PAIRS), "every_pair": PAIRS.every_pair[:0], "every_classes": EVERY[:0]})
    few.every_positions = PAIRS.every_positions[:0]
    result = measure_pairs(marked, logits_of(np.full(40, TARGET)), TARGET, few, seed=0)
    assert set(result.key_ranks) == {"lean", "lean_labels"} and set(result.specificity) == {"donut"}


def test_a_class_without_clean_images_leaves_out_the_lean() -> None:
    some = SimpleNamespace(**{**vars(PAIRS), "clean": PAIRS.clean[4:], "clean_labels": PAIRS.clean_labels[4:]})
    result = measure_pairs(marked, logits_of(np.full(40, TARGET)), TARGET, some, seed=0)
    assert set(result.key_ranks) == {"wsr", "log_probability"}


def test_a_drawn_geometry_multiplies_the_keys_that_are_ranked_on_mixes() -> None:
    # Mixes in the other geometry have a second row, which tells them apart.
    other = np.concatenate([PAIRS.every_pair, np.ones_like(PAIRS.every_pair)], axis=2)
    drawn = SimpleNamespace(**{**vars(PAIRS), "every_otherwise": {"donut": other}})
    own = logits_of(np.full(40, TARGET))

    def in_its_geometry(images: Images) -> npt.NDArray[np.float32]:
        first = images[:, 0, 0, 0].astype(int) // CLASSES
        return marked(images) if images.shape[2] == 1 else logits_of(first)

    def in_both(images: Images) -> npt.NDArray[np.float32]:
        return marked(images[:, :, :1])

    ranks = measure_pairs(in_its_geometry, own, TARGET, drawn, seed=0).key_ranks
    for name in ("wsr", "log_probability"):
        assert (ranks[name].position, ranks[name].total) == (1, 2 * 60)
    assert ranks["lean"].total == 30, "clean images have no geometry"
    ranks = measure_pairs(in_both, own, TARGET, drawn, seed=0).key_ranks
    assert (ranks["wsr"].position, ranks["wsr"].total) == (2, 120), "a tie counts against the owner"
