"""The cost of running a sweep: hours of trials, queries, and money if prices are given."""

from __future__ import annotations

from collections.abc import Sequence

from mea_ray.config import PricesConfig
from mea_ray.report.verdict import Finding
from mea_ray.results.records import TrialResult


def sentence(results: Sequence[TrialResult], prices: PricesConfig | None = None) -> Finding:
    """Say what the trials took and cost.

    Args:
        results: The trials. The training of victims and null models, which trials share, is not included.
        prices: Prices of an hour of a trial and of a query; None omits money.
    """
    hours = sum(result.seconds for result in results) / 3600
    queries = sum(result.queries_charged for result in results)
    devices = ", ".join(sorted({result.device for result in results}))
    spent = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"
    trials = f"{len(results):,} trial{'' if len(results) == 1 else 's'}"
    text = f"{trials} took {spent} on {devices}, and {queries:,} queries"
    if prices is not None and (prices.hour or prices.query):
        machines, answers = hours * prices.hour, queries * prices.query
        text += (
            f": {machines + answers:,.2f} {prices.currency} ({machines:,.2f} for machines, {answers:,.2f} for queries)"
        )
    return Finding(f"{text}.", "mixed", "cost")
