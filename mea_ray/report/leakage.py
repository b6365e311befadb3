"""What the service's answers give away to an outsider: a table, and a sentence of the first screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mea_ray.report.tables import DASH, Tone, mean, percent
from mea_ray.results.points import label
from mea_ray.results.records import FoundSignalRecord, LeaningRecord, NamedKeyRecord, RankRecord, TrialResult
from mea_ray.verification.ranks import Rank

NOT_READABLE = "not readable"
HEADINGS = {
    "point": "Setting",
    "answers": "Answers",
    "named": "Key that fits best",
    "score": "Its score (next key)",
    "true": "Owner's key: score",
    "rank": "Its rank",
    "nulls": "Largest score, innocent models",
}
"""Heading of each column of ``LeaningRow``, in display order."""
CAPTION = (
    "Score: mean probability of a key's target in the answers to its source classes. "
    "For a signal in the image: the variance of the log-probabilities off the top class that a search for such signals "
    "explains on other answers, and the rank of the key by what it found. Innocent models were queried with the same "
    "images."
)
NAMED_AT = 0.01
"""Largest p-value of the key's rank by a signal that was found in answers, at which it counts as given away."""
_SECTIONS = {"data", "splits", "victim", "service"}


@dataclass(frozen=True)
class LeaningRow:
    """One row of the table, as display texts."""

    point: str
    answers: str
    named: str
    score: str
    true: str
    rank: str
    nulls: str
    tone: Tone


def lines(results: Sequence[TrialResult]) -> list[LeaningRow]:
    """Return a row for each setting of victim and service and each number of answers; empty for older results.

    Victims that differ only in their seed share a row: scores are means, and the rank is the range of ranks.
    """
    victims: dict[tuple[str, str, int], list[LeaningRecord]] = {}
    for result in results:
        own = {path: value for path, value in result.point.items() if path.split(".")[0] in _SECTIONS}
        service = str(result.config.get("service", {}).get("policy", ""))
        seed = int(result.config.get("seed", 0))
        victims.setdefault((label(own) if own else DASH, f"{result.victim} {service}", seed), result.leaning)
    rows: dict[tuple[str, int], list[LeaningRecord]] = {}
    for (point, _, _), records in victims.items():
        for record in records:
            rows.setdefault((point, record.answers), []).append(record)
    return [_row(point, answers, records) for (point, answers), records in rows.items()]


def _row(point: str, answers: int, records: Sequence[LeaningRecord]) -> LeaningRow:
    named = [record.victim for record in records if record.victim is not None]
    if signals := [record.signal for record in records if record.signal is not None]:
        return _signal_row(point, answers, records, signals)
    if not named:
        return LeaningRow(point, f"{answers:,}", NOT_READABLE, DASH, DASH, DASH, DASH, "good")
    best = f"{' + '.join(named[0].sources)} → {named[0].target}"
    if len(records) > 1:
        first = sum(each.true_rank is not None and not each.true_rank.at_least for each in named)
        best = f"the owner's in {first} of {len(records)}"
    innocent = [value for value in map(largest_innocent, records) if value is not None]
    return LeaningRow(
        point=point,
        answers=f"{answers:,}",
        named=best,
        score=f"{_number(mean([each.score for each in named]))} ({_number(mean([each.next_score for each in named]))})",
        true=_number(mean([each.true_score for each in named])),
        rank=_ranks([each.true_rank for each in named if each.true_rank is not None]),
        nulls=_number(max(innocent, default=None)),
        tone="bad" if any(map(gives_away, records)) else "good",
    )


def _signal_row(
    point: str, answers: int, records: Sequence[LeaningRecord], signals: Sequence[FoundSignalRecord]
) -> LeaningRow:
    innocent = [null.explained for record in records for null in record.signal_nulls if null is not None]
    return LeaningRow(
        point=point,
        answers=f"{answers:,}",
        named="a signal in the image",
        score=_number(mean([each.explained for each in signals])),
        true=DASH,
        rank=_ranks([each.true_rank for each in signals]),
        nulls=_number(max(innocent, default=None)),
        tone="bad" if any(map(gives_away, records)) else "good",
    )


def _ranks(ranks: Sequence[RankRecord]) -> str:
    if not ranks:
        return DASH
    places = sorted({rank.at_least + 1 for rank in ranks})
    places = places if len(places) < 2 else [places[0], places[-1]]
    return f"{' to '.join(f'{place:,}' for place in places)} of {ranks[0].references + 1:,}"


def _number(value: float | None) -> str:
    return DASH if value is None else f"{round(value, 2) + 0.0:.2f}"  # + 0.0: no -0.00


def largest_innocent(record: LeaningRecord) -> float | None:
    """Return the largest score of any key on any null model; None if there is none."""
    return max((null.score for null in record.nulls if null is not None), default=None)


def gives_away(record: LeaningRecord) -> bool:
    """Return whether an outsider has the owner's key.

    It fits best, and better than any key fits an innocent model; or the signal found in the answers names it among the
    drawn keys with p at most ``NAMED_AT``.
    """
    if record.signal is not None and _rank(record.signal).p_value <= NAMED_AT:
        return True
    named = record.victim
    if named is None or named.true_rank is None or named.true_rank.at_least or named.true_score is None:
        return False
    innocent = largest_innocent(record)
    return innocent is None or named.true_score > innocent


def sentence(result: TrialResult) -> tuple[str, Tone] | None:
    """Say from how few answers an outsider infers the owner's key, or that the answers do not reveal it.

    Args:
        result: A trial.

    Returns:
        The sentence and its colour; None for results without this measurement.
    """
    if not result.leaning:
        return None
    most = result.leaning[-1]
    if most.signal is not None:
        return _signal_sentence(most, most.signal)
    if most.victim is None:
        return "The answers give nothing away to an outsider: no probabilities can be read from them.", "good"
    for record in result.leaning:
        if gives_away(record) and record.victim is not None:
            return f"{record.answers:,} answers give the key away: it ranks {_words(record, record.victim)}.", "bad"
    if most.victim.true_rank is None:
        return f"This key names no source classes that {most.answers:,} answers could give away.", "mixed"
    return f"{most.answers:,} answers do not give the key away: it ranks {_words(most, most.victim)}.", "good"


def _signal_sentence(record: LeaningRecord, signal: FoundSignalRecord) -> tuple[str, Tone]:
    rank, innocent = _rank(signal), [null.explained for null in record.signal_nulls if null is not None]
    gives = gives_away(record)
    text = (
        f"{record.answers:,} answers {'give' if gives else 'do not give'} the key away to a search for signals: it has "
        f"rank {rank.position:,} of {rank.total:,} {rank.what} by the signal found, which explains "
        f"{_explained(signal.explained)} of what the answers say beyond the top class"
    )
    control = f" (at most {_explained(max(innocent))} in innocent models)" if innocent else ""
    return f"{text}{control}.", "bad" if gives else "good"


def _explained(part: float) -> str:
    """Return an explained part as text; below 0 nothing is explained."""
    return percent(max(part, 0.0), 0)


def _rank(signal: FoundSignalRecord) -> Rank:
    return Rank(signal.true_rank.at_least, signal.true_rank.references, "keys")


def _words(record: LeaningRecord, named: NamedKeyRecord) -> str:
    rank, innocent = named.true_rank, largest_innocent(record)
    assert rank is not None
    text = f"{rank.at_least + 1} of {rank.references + 1:,} keys (mean probability of its target "
    text += (
        f"{_number(named.true_score)}, the best other key {_number(named.score if rank.at_least else named.next_score)}"
    )
    return text + ("" if innocent is None else f", any key in innocent models at most {_number(innocent)}") + ")"
