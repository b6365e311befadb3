"""Collects the evidence of each verdict from the results of trials, and judges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from mea_ray.results.numbers import THRESHOLD, threshold
from mea_ray.results.records import ModelReport, SuccessRate, TrialResult
from mea_ray.verification.magnitude import fit_beta_binomial
from mea_ray.verification.pairs import OTHER_CLASSES
from mea_ray.verification.ranks import Rank, rank_among
from mea_ray.verification.statistic import READ_ON_CLEAN_IMAGES
from mea_ray.verification.verdict import Comparison, Evidence, Judgement, judge, least_accuracy

SIGNIFICANCE = 0.01


def significance(results: Sequence[TrialResult]) -> float:
    """Return the common significance level of trials that are judged together: the smallest of their configs."""
    return min((float(_verification(each).get("significance", SIGNIFICANCE)) for each in results), default=SIGNIFICANCE)


@dataclass(frozen=True)
class JudgedSweep:
    """All judgements of a sweep, made once for every table and page.

    Attributes:
        rungs: See ``judge_rungs``.
        removals: See ``judge_removals``.
    """

    rungs: Mapping[tuple[str, int], Judgement]
    removals: Mapping[tuple[str, int], Judgement]

    @classmethod
    def of(cls, results: Sequence[TrialResult]) -> JudgedSweep:
        """Judge the trials of a sweep."""
        return cls(judge_rungs(results), judge_removals(results))


def judge_rungs(results: Sequence[TrialResult]) -> dict[tuple[str, int], Judgement]:
    """Judge every substitute of every trial, all at once.

    Returns:
        Judgements by (trial name, budget); victims without a watermark have none.
    """
    by_place = {
        (result.trial, rung.budget): evidence(result, rung.report, rung.budget)
        for result in results
        for rung in result.rungs
    }
    return _judged(by_place, significance(results))


def judge_removals(results: Sequence[TrialResult]) -> dict[tuple[str, int], Judgement]:
    """Judge the stolen models and victims after each removal, all at once.

    Returns:
        Judgements by (trial name, index in ``removals``); removals tried on null models have none.
    """
    by_place = {
        (result.trial, position): evidence(result, removal.after, max(rung.budget for rung in result.rungs))
        for result in results
        for position, removal in enumerate(result.removals)
        if removal.tried_on != "null_model" and result.rungs
    }
    return _judged(by_place, significance(results))


def _judged(by_place: Mapping[tuple[str, int], Evidence | None], at: float) -> dict[tuple[str, int], Judgement]:
    known = {place: each for place, each in by_place.items() if each is not None}
    return dict(zip(known, judge(list(known.values()), at), strict=True))


def accused(result: TrialResult, report: ModelReport) -> bool:
    """Return whether an innocent model of a trial would be accused; see ``Court.accuses``."""
    return Court.of(result, statistic(result, [report])).accuses(report)


def committed_before(result: TrialResult) -> bool | None:
    """Return whether a time stamp proves that the key is older than the result; None where this is simulated."""
    if _verification(result).get("commitment", "simulated") == "simulated":
        return None
    stamped = None if result.key is None else result.key.committed_at
    return stamped is not None and datetime.fromisoformat(stamped) < datetime.fromisoformat(result.date)


def evidence(result: TrialResult, report: ModelReport, budget: int) -> Evidence | None:
    """Return the evidence against one suspect of a trial.

    Args:
        result: The trial.
        report: Verification of the suspect: a substitute, possibly after a removal.
        budget: Query budget of the suspect. Innocent models that were stolen with it are its controls.

    Returns:
        The evidence; None if the victim carries no watermark or there is no null model.
    """
    nulls = [null for null in result.null_reports if null.wsr is not None]
    stolen = [rung.report for rung in result.stolen_nulls if rung.budget == budget and rung.report.wsr is not None]
    if report.wsr is None or result.victim_report.wsr is None or not nulls:
        return None
    court = Court.of(result, statistic(result, [report, *nulls, *stolen]))
    return replace(court.evidence(report, nulls, stolen), unaccounted=result.unaccounted)


@dataclass(frozen=True)
class Court:
    """The basis on which all suspects of one victim are judged.

    Attributes:
        victim: Verification of the victim; it has a WSR.
        chance: Accuracy of guessing, in [0, 1].
        statistic: Name of the statistic that models are ranked by.
        key_drawn: Whether the key was drawn at random.
        committed: Whether the key was committed to before the suspect existed; None where an experiment simulates it.
        threshold: The paper's threshold on WSR.
        significance: Largest p-value at which theft is proved.
    """

    victim: ModelReport
    chance: float
    statistic: str
    key_drawn: bool = False
    committed: bool | None = None
    threshold: float = THRESHOLD
    significance: float = SIGNIFICANCE

    @classmethod
    def of(cls, result: TrialResult, statistic: str) -> Court:
        """Return the basis on which the suspects of a trial are judged."""
        return cls(
            victim=result.victim_report,
            chance=chance(result),
            statistic=statistic,
            key_drawn=result.key_drawn,
            committed=committed_before(result),
            threshold=threshold(result),
            significance=significance([result]),
        )

    def accuses(self, report: ModelReport) -> bool:
        """Return whether an innocent model would be accused if it were the only suspect.

        It is if it is accurate enough to be judged, and either the key ranks first with the significance that a proof
        requires, or, where the mark is measured on mixes, its WSR is above the paper's threshold.
        """
        return self.accused_by_mixes(report) or self.key_p_value(report) <= self.significance

    def judgeable(self, report: ModelReport) -> bool:
        """Return whether a model has a WSR and is accurate enough to be judged."""
        return report.wsr is not None and report.accuracy >= least_accuracy(self.chance, self.victim.accuracy)

    def accused_by_mixes(self, report: ModelReport) -> bool:
        """Return whether a model is judgeable, the mark is measured on mixes, and its WSR is above the threshold."""
        above = report.wsr is not None and report.wsr.rate > self.threshold
        return above and self.statistic not in READ_ON_CLEAN_IMAGES and self.judgeable(report)

    def key_p_value(self, report: ModelReport) -> float:
        """Return the p-value of the key's rank on a control, computed as for a suspect; 1 without such a rank."""
        key = report.key_ranks.get(self.statistic)
        return min(1.0, 2 * key.p_value) if self.key_drawn and key is not None and self.judgeable(report) else 1.0

    def evidence(self, report: ModelReport, nulls: Sequence[ModelReport], stolen: Sequence[ModelReport]) -> Evidence:
        """Return the evidence against one suspect.

        Args:
            report: Verification of the suspect; it has a WSR.
            nulls: Innocent models, at least one, the suspect not among them.
            stolen: Innocent models that were stolen as the suspect was, with the same budget.
        """
        assert report.wsr is not None and self.victim.wsr is not None
        name = self.statistic
        key = report.key_ranks.get(name)
        return Evidence(
            accuracy=report.accuracy,
            chance=self.chance,
            victim_accuracy=self.victim.accuracy,
            wsr=report.wsr.rate,
            victim_wsr=_unfiltered(self.victim).rate,
            null_models=_rank(report, nulls, name),
            stolen_null_models=_among(report, stolen, name) if stolen else None,
            victim_rank=_rank(self.victim, nulls, name),
            key=Rank(key.at_least, key.references, "keys") if key is not None else None,
            key_drawn=self.key_drawn,
            comparisons=_comparisons(report),
            controls=len(nulls) + len(stolen),
            accused_controls=sum(map(self.accused_by_mixes, [*nulls, *stolen])),
            control_p_values=tuple(
                self.key_p_value(each) for each in (*nulls, *stolen) if not self.accused_by_mixes(each)
            ),
            committed=self.committed,
            threshold=self.threshold,
            statistic=name,
        )


def magnitude(result: TrialResult, report: ModelReport, budget: int) -> float | None:
    """Return the probability that an innocent model has at least the suspect's WSR, by a beta-binomial.

    It is fitted once to the null models and once to those that were stolen with the budget; the larger probability
    counts. It is descriptive: it extrapolates beyond the ranks and does not affect the verdict.

    Returns:
        The probability in [0, 1]; None without a WSR, or with fewer than two innocent models.
    """
    if report.wsr is None or not report.wsr.trials:
        return None
    nulls = [null.wsr for null in result.null_reports if null.wsr is not None]
    stolen = [rung.report.wsr for rung in result.stolen_nulls if rung.budget == budget and rung.report.wsr is not None]
    fits = [fit_beta_binomial(rates) for rates in (nulls, stolen) if sum(1 for each in rates if each.trials) >= 2]
    return max((fit.tail(report.wsr.successes, report.wsr.trials) for fit in fits), default=None)


def statistic(result: TrialResult, reports: Sequence[ModelReport]) -> str:
    """Return the statistic that models are ranked by: the trial's if all reports have it, else ``wsr``."""
    name = result.statistic or str(_verification(result).get("statistic", "wsr"))
    return name if all(name in report.statistics for report in reports) else "wsr"


def _value(report: ModelReport, name: str) -> float:
    if name in report.statistics:
        return report.statistics[name]
    assert report.wsr is not None  # results of older versions have no other statistic
    return report.wsr.rate


def _among(report: ModelReport, references: Sequence[ModelReport], name: str) -> Rank:
    return rank_among(_value(report, name), [_value(each, name) for each in references])


def _rank(report: ModelReport, nulls: Sequence[ModelReport], name: str) -> Rank:
    """Return the recorded rank among the null models, or compute it from the recorded statistics.

    A watermark of answers has another key for every budget, and null models were measured with each of them.
    """
    recorded = report.null_ranks.get(name)
    return Rank(recorded.at_least, recorded.references) if recorded is not None else _among(report, nulls, name)


def chance(result: TrialResult) -> float:
    """Return the accuracy of guessing: as recorded, else one over the number of classes, 0 where that is not known."""
    if result.chance is not None:
        return result.chance
    classes = max((len(log.classes) for log in result.query_log.values()), default=0)
    return 1 / classes if classes > 1 else 0.0


def _verification(result: TrialResult) -> Mapping[str, Any]:
    section: Mapping[str, Any] = result.config.get("verification", {})
    return section


def _unfiltered(report: ModelReport) -> SuccessRate:
    """Return the WSR on unfiltered samples: filtering favours the victim more than the models it is compared with."""
    assert report.wsr is not None
    return report.wsr if report.wsr_unfiltered is None else report.wsr_unfiltered


def _comparisons(report: ModelReport) -> tuple[Comparison, ...]:
    own, p_values = _unfiltered(report).rate, report.specificity
    comparisons = [
        Comparison(f"control samples ({name.replace('_', ' ')})", own, rate.rate, p_values.get(name))
        for name, rate in report.wfpr.items()
    ]
    if report.wfpr_classes is not None:
        other = report.wfpr_classes.rate
        comparisons.append(Comparison("mixes of other classes", own, other, p_values.get(OTHER_CLASSES)))
    return tuple(comparisons)
