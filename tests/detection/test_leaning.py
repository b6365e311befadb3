"""The key that an outsider names: against the definition, key by key, and for answers that cannot be read."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from report_results import trial
from torch import Tensor

from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import DataError
from mea_ray.core.types import Answers, Splits
from mea_ray.detection import DETECTIONS
from mea_ray.detection.leaning import NamedKey, name_key
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.leakage import ANSWERS, Outsider
from mea_ray.models.base import ImageModel
from mea_ray.report import html, leakage, terminal, verdict
from mea_ray.results.records import LeaningRecord, NamedKeyRecord, RankRecord, TrialResult
from mea_ray.watermarks.base import Key

K = 7


def answers(count: int, leans: dict[int, int], share: float = 0.3, seed: int = 0) -> Answers:
    """Confident answers, each class in turn, of which each source gives a part to its target."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, (count, K))
    logits[np.arange(count), np.arange(count) % K] += 6
    rows: npt.NDArray[np.float64] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for source, target in leans.items():
        chosen = np.flatnonzero(np.arange(count) % K == source)
        rows[chosen, target] += share * rows[chosen, source]
        rows[chosen, source] *= 1 - share
    return rows.astype(np.float32)


def plain(given: Answers, sources: tuple[int, ...], target: int) -> NamedKey:
    """The definition: every key has a score, and they are sorted."""
    rows = [list(map(float, row)) for row in given]
    label = [max(range(K), key=lambda k: row[k]) for row in rows]

    def score(key: tuple[tuple[int, ...], int]) -> float | None:
        means = []
        for source in key[0]:
            own = [row[key[1]] for row, named in zip(rows, label, strict=True) if named == source]
            if not own:
                return None
            means.append(sum(own) / len(own))
        return sum(means) / len(means)

    keys = [
        (chosen, other) for chosen in combinations(range(K), len(sources)) for other in range(K) if other not in chosen
    ]
    scores = {key: value for key in keys if (value := score(key)) is not None}
    best, following = sorted(scores, key=lambda key: -scores[key])[:2]
    own_key = (tuple(sorted(sources)), target)
    own = scores.get(own_key)
    above = [key for key in keys if key != own_key and (own is None or scores.get(key, -1.0) >= own)]
    return NamedKey(best[0], best[1], scores[best], scores[following], own, len(above), len(keys) - 1)


@pytest.mark.parametrize(
    ("given", "sources", "target"),
    [
        (answers(200, {1: 4, 3: 4}), (1, 3), 4),
        (answers(200, {1: 4, 3: 4}), (3, 1), 4),
        (answers(200, {1: 4, 3: 4}), (0, 2), 5),
        (answers(30, {1: 4, 3: 4}, share=0.2, seed=1), (1, 3), 4),
        (answers(200, {}), (1, 3), 4),
        (answers(5, {1: 4, 3: 4}), (1, 3), 4),
        (answers(5, {1: 4, 3: 4}), (1, 6), 4),
        (answers(200, {2: 6}), (2,), 6),
        (answers(200, {}, seed=3), (2,), 6),
    ],
    ids=["both", "other order", "another key", "few", "innocent", "some classes", "never answered", "one", "none"],
)
def test_it_is_the_definition(given: Answers, sources: tuple[int, ...], target: int) -> None:
    result, expected = name_key(given, sources, target), plain(given, sources, target)
    assert result is not None
    assert (result.sources, result.target) == (expected.sources, expected.target)
    assert (result.at_least, result.others) == (expected.at_least, expected.others)
    for name in ("score", "next_score", "true_score"):
        assert getattr(result, name) == pytest.approx(getattr(expected, name), abs=1e-6), name


@pytest.mark.parametrize("count", [30, 100, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_a_leaning_model_gives_its_key_away_and_a_clean_one_does_not(count: int, seed: int) -> None:
    marked = name_key(answers(count, {0: 2, 5: 2}, seed=seed), (0, 5), 2)
    clean = name_key(answers(count, {}, seed=seed), (0, 5), 2)
    assert marked is not None and clean is not None
    assert (marked.sources, marked.target, marked.at_least) == ((0, 5), 2, 0) and marked.others == 21 * 5 - 1
    assert marked.score > 0.25 > 0.1 > clean.score and marked.next_score is not None and marked.next_score < 0.2


def test_what_cannot_be_read() -> None:
    labels = np.eye(K, dtype=np.float32)[np.arange(60) % K]
    assert name_key(labels, (0, 1), 2) is None, "labels"
    assert name_key(answers(60, {})[:1], (0, 1), 2) is None, "one answered class"
    top = answers(60, {0: 2, 1: 2})
    np.put_along_axis(top, np.argsort(-top, axis=1)[:, 2:], 0, axis=1)
    result = name_key(top, (0, 1), 2)
    assert result is not None and (result.sources, result.target, result.at_least) == ((0, 1), 2, 0), "the two largest"
    with pytest.raises(DataError, match="3 source classes"):
        name_key(top, (0, 1, 2), 3)


def test_a_key_without_sources_has_no_rank() -> None:
    result = name_key(answers(60, {0: 2, 1: 2}))
    assert result is not None and result.sources == (0, 1) and result.true_score is None


class LeaningModel(ImageModel):
    """A network that knows the first 64 images, and gives class 2 a part of what is due to classes 0 and 1."""

    def __init__(self, data: Splits, share: float) -> None:
        super().__init__(data.shape, data.classes)
        self.images = torch.from_numpy(data.thief_pool.images).flatten(1).float() / 255
        self.labels = torch.from_numpy(data.thief_pool.labels)
        self.share = share
        self.head = torch.nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        nearest = self.labels[torch.cdist(x.flatten(1), self.images).argmin(1)]
        given = torch.nn.functional.one_hot(nearest, self.classes).float().clamp_min(1e-3)
        leaning = nearest < 2
        given[leaning, 2] = self.share
        return given.log()


@pytest.fixture(scope="module")
def data() -> Splits:
    return load_splits(build(ExperimentConfig, {"data": {"name": "digits", "image_size": 8}}))


def outsider(data: Splits, policy: object, key: Key | None) -> Outsider:
    tree = {"data": {"name": "digits", "image_size": 8}, "service": {"policy": policy}}
    return Outsider(build(ExperimentConfig, tree), data, key)


KEY = Key("mea_defender", (0, 1), 2, 0)


@pytest.mark.parametrize("policy", ["probabilities", {"name": "top_k", "k": 2}, {"name": "rounded", "decimals": 1}])
def test_the_owner_asks_through_the_services_policy(data: Splits, policy: object) -> None:
    result = outsider(data, policy, KEY).look(
        LeaningModel(data, 0.4), [LeaningModel(data, 1e-3), LeaningModel(data, 1e-3)]
    )
    assert tuple(record.answers for record in result) == ANSWERS
    for record in result:
        assert record.victim is not None and record.victim.true_rank is not None
        assert (record.victim.sources, record.victim.target) == (["0", "1"], "2")
        assert record.victim.true_rank.at_least == 0 and 0.2 < record.victim.score < 0.5
        assert len(record.nulls) == 2 and all(null is None or null.score < 0.01 for null in record.nulls)


def test_labels_give_nothing_away(data: Splits) -> None:
    result = outsider(data, "label_only", KEY).look(LeaningModel(data, 0.4), [LeaningModel(data, 1e-3)])
    assert [(record.victim, record.nulls) for record in result] == [(None, [None])] * 3


def test_the_detection_names_the_target_of_a_leaning_model_only(data: Splits) -> None:
    finder = DETECTIONS.build("leaning", answers=300)
    marked, clean = (
        finder.inspect(LeaningModel(data, share), data.thief_pool.images, None, 0) for share in (0.4, 1e-3)
    )
    assert marked.flagged == (2,) and clean.flagged == ()
    assert marked.numbers["score"] > 0.2 > 0.01 > clean.numbers["score"]


def record(answered: int, true: float, at_least: int, innocent: float | None = 0.01) -> LeaningRecord:
    def named(score: float, own: float, place: int) -> NamedKeyRecord:
        return NamedKeyRecord(
            sources=["0", "<1>"],
            target="2",
            score=score,
            next_score=0.11,
            true_score=own,
            true_rank=RankRecord(at_least=place, references=359),
        )

    control = None if innocent is None else named(innocent, 0.0, 200)
    return LeaningRecord(answers=answered, victim=named(0.29, true, at_least), nulls=[control])


@pytest.mark.parametrize(
    ("records", "words", "tone"),
    [
        (
            [record(30, 0.01, 40), record(100, 0.29, 0)],
            "100 answers give the key away: it ranks 1 of 360 keys (mean probability of its target 0.29, ",
            "bad",
        ),
        ([record(30, 0.01, 40)], "30 answers do not give the key away: it ranks 41 of 360 keys", "good"),
        ([record(30, 0.29, 0, innocent=0.4)], "30 answers do not give the key away", "good"),
        ([record(30, 0.29, 0, innocent=None)], "30 answers give the key away", "bad"),
        ([LeaningRecord(answers=30, victim=None, nulls=[None])], "nothing away to an outsider", "good"),
    ],
)
def test_the_report_says_what_is_given_away(
    records: list[LeaningRecord], words: str, tone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result: TrialResult = trial("a").model_copy(update={"leaning": records})
    assert any(words in each.text and each.tone == tone for each in verdict.findings([result]))
    page = html.render([result], name="demo")
    assert "What the answers give away" in page and words.replace("'", "&#39;") in page
    rows = leakage.lines([result, result.model_copy(update={"trial": "b"})])
    assert len(rows) == len(records), "trials that share a victim have one line for each count"
    terminal.print_results(terminal.make_console(), [result])
    assert "What the answers give away" in capsys.readouterr().out


def test_victims_that_differ_in_their_seed_share_a_line() -> None:
    first, second = (trial(name, seed=seed) for seed, name in enumerate("ab"))
    results = [
        first.model_copy(update={"leaning": [record(30, 0.29, 0)], "victim": "v0"}),
        second.model_copy(update={"leaning": [record(30, 0.09, 4, innocent=0.2)], "victim": "v1"}),
    ]
    (row,) = leakage.lines(results)
    assert (row.named, row.true, row.rank, row.nulls) == ("the owner's in 1 of 2", "0.19", "1 to 5 of 360", "0.20")


def test_older_results_say_nothing_of_it() -> None:
    assert leakage.lines([trial("a")]) == [] and leakage.sentence(trial("a")) is None
    assert "What the answers give away" not in html.render([trial("a")], name="demo")
