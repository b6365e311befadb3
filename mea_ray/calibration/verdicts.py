"""The product's own verdicts on innocent and on stolen models, and the statistics behind them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from mea_ray.calibration.measured import KeyMeasurements
from mea_ray.calibration.separation import Separation, separations
from mea_ray.config import VerificationConfig
from mea_ray.results.records import ModelReport
from mea_ray.verification.evidence import Court
from mea_ray.verification.statistic import STATISTICS
from mea_ray.verification.verdict import judge

BY_KEY = "rank of the key by "
"""Prefix of a statistic's name where the key's rank by it is the statistic."""


class BudgetTable(BaseModel):
    """How well each statistic tells stolen models from innocent ones at one budget, the best first."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    budget: int
    rows: list[Separation]


class VerdictCounts(BaseModel):
    """Verdicts at one budget by one statistic, each suspect judged alone.

    Attributes:
        statistic: The statistic that models and keys are ranked by.
        budget: Query budget of the stolen models.
        innocent: Verdicts on innocent models: each innocent one, and each stolen innocent one, with each key. The other
            innocent models are the references.
        stolen: Verdicts on stolen marked models, each with its own key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    statistic: str
    budget: int
    innocent: dict[str, int]
    stolen: dict[str, int]

    @property
    def comparisons(self) -> int:
        """Comparisons of an innocent model with a key."""
        return sum(self.innocent.values())

    @property
    def false_proofs(self) -> int:
        """How many of them the verdict calls proved."""
        return self.innocent.get("proved", 0)

    @property
    def proofs(self) -> int:
        """How many of the stolen marked models the verdict calls proved."""
        return self.stolen.get("proved", 0)


def statistics_at(keys: Sequence[KeyMeasurements], budget: int) -> BudgetTable:
    """Measure how well each statistic, and each rank of the key, tells stolen models from innocent ones."""
    innocent = [
        values(report) for key in keys for report in (*key.reports("innocent"), *key.reports("stolen innocent", budget))
    ]
    stolen = [values(report) for key in keys for report in key.reports("stolen marked", budget)]
    return BudgetTable(budget=budget, rows=separations(innocent, stolen))


def values(report: ModelReport) -> Mapping[str, float]:
    """Return the statistics of a model, and as further ones the ranks of the key (the better, the larger)."""
    ranks = {f"{BY_KEY}{name}": -rank.p_value for name, rank in report.key_ranks.items()}
    return {**report.statistics, **ranks}


def verdicts_at(
    keys: Sequence[KeyMeasurements], budget: int, statistic: str, settings: VerificationConfig
) -> VerdictCounts:
    """Judge every model with every key, each suspect alone at the significance of the config.

    Args:
        keys: What was measured with each key.
        budget: Query budget of the stolen models.
        statistic: The statistic that models and keys are ranked by.
        settings: Threshold and significance.
    """
    innocent: Counter[str] = Counter()
    stolen: Counter[str] = Counter()
    for key in keys:
        (victim,) = key.reports("marked")
        court = Court(
            victim,
            key.chance,
            statistic,
            key_drawn=key.key_drawn,
            threshold=settings.threshold,
            significance=settings.significance,
        )
        nulls, controls = key.reports("innocent"), key.reports("stolen innocent", budget)
        for place, suspect in enumerate(nulls):
            others = nulls[:place] + nulls[place + 1 :]
            innocent[_verdict(court, suspect, others, controls)] += 1
        for place, suspect in enumerate(controls):
            innocent[_verdict(court, suspect, nulls, controls[:place] + controls[place + 1 :])] += 1
        for suspect in key.reports("stolen marked", budget):
            stolen[_verdict(court, suspect, nulls, controls)] += 1
    return VerdictCounts(statistic=statistic, budget=budget, innocent=dict(innocent), stolen=dict(stolen))


def _verdict(court: Court, suspect: ModelReport, nulls: Sequence[ModelReport], controls: Sequence[ModelReport]) -> str:
    (judgement,) = judge([court.evidence(suspect, nulls, controls)], court.significance)
    return judgement.verdict


def all_verdicts(
    keys: Sequence[KeyMeasurements], budgets: Sequence[int], settings: VerificationConfig
) -> list[VerdictCounts]:
    """Judge by every statistic that all models have, at every budget."""
    known = [name for name in STATISTICS if all(name in each.report.statistics for key in keys for each in key.models)]
    return [verdicts_at(keys, budget, name, settings) for budget in budgets for name in known]
