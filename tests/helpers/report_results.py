"""Trial results as a sweep would leave them, made up, for the tests of the report and of the command line."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

from mea_ray.results.records import ModelReport, QueryLogRecord, RemovalResult, RungResult, SuccessRate, TrialResult


def rate(value: float, trials: int = 1000) -> SuccessRate:
    half = 1.96 * sqrt(value * (1 - value) / trials)
    return SuccessRate(
        successes=round(value * trials),
        trials=trials,
        rate=value,
        low=max(0.0, value - half),
        high=min(1.0, value + half),
    )


def model_report(accuracy: float, wsr: float | None, **more: Any) -> ModelReport:
    infringes = wsr is not None and wsr > 0.3
    known: dict[str, Any] = {
        "accuracy": accuracy,
        "wsr": None if wsr is None else rate(wsr),
        "wfpr": {"stripes": rate(0.1), "pixel_merge": rate(0.2)},
        "wfpr_mean": 0.15,
        "infringes_threshold": infringes,
        "p_value": 0.5 if infringes else 1.0,
    }
    return ModelReport(**{**known, **more})


def trial(
    name: str, model: str = "vgg_like", seed: int = 0, end: float = 0.8, config: dict[str, Any] | None = None
) -> TrialResult:
    """A trial whose WSR rises to ``end`` over three budgets."""
    costs = {
        "calibration_error": 0.11,
        "source_target_probability": 0.31,
        "source_accuracy": {"zero": 0.95, "one": 0.93},
    }
    innocent = {
        "calibration_error": 0.02,
        "source_target_probability": 0.01,
        "source_accuracy": {"zero": 0.98, "one": 0.97},
    }
    rungs = [
        RungResult(
            budget=budget,
            queries=budget,
            report=model_report(
                0.8 + 0.05 * i + 0.01 * seed, end * (0.25 + 0.375 * i) + 0.02 * seed, fidelity=0.82 + 0.05 * i
            ),
            epochs=5,
            seconds=2.0,
        )
        for i, budget in enumerate((100, 300, 1000))
    ]
    return TrialResult(
        trial=name,
        point={"thief.model.name": model, "seed": seed},
        config=config
        or {"seed": seed, "verification": {"threshold": 0.3, "significance": 0.01}, "victim": {"seed": 3}},
        victim="0123456789abcdef",
        nulls=["fedcba9876543210"],
        victim_report=model_report(0.952, 0.996, p_value=0.5, **costs),
        null_reports=[model_report(0.956, 0.013, p_value=None, fidelity=0.94, **innocent)],
        rungs=rungs,
        queries_charged=1000,
        seconds=12.5,
        device="cpu",
        versions={"python": "3.11.9", "torch": "2.9.0", "mea_ray": "0.1.0", "commit": "abc1234"},
    )


def with_innocents(result: TrialResult, count: int, wsr: float = 0.01) -> TrialResult:
    """The trial with so many null models, and as many of them stolen with each budget."""
    innocent = model_report(0.95, wsr, p_value=None)
    stolen = [rung.model_copy(update={"report": innocent}) for rung in result.rungs for _ in range(count)]
    return result.model_copy(update={"null_reports": [innocent] * count, "stolen_nulls": stolen})


def with_thief(result: TrialResult, accounts: int = 2) -> TrialResult:
    """The trial with curves of its attack's own and what the owner saw of its accounts."""
    curves: dict[str, list[tuple[int, float]]] = {
        "reward": [(100 * i, 0.1 * i) for i in range(1, 11)],
        "reward/<certainty>": [(100 * i, 0.05 * i) for i in range(1, 11)],
        "loss": [(1000, 0.5)],
        "silent": [],
        **{f"policy/{label}": [(i, 0.001 * label) for i in range(1, 1001)] for label in range(12)},
    }
    record = QueryLogRecord(
        requests=4,
        images=500,
        classes=[250, 150, 100],
        sampled=500,
        distances=497,
        distance_counts=[1, 5, 9, 3],
        distance_range=(0.5, 2.5),
        shapiro_w=0.71,
        alarm=True,
    )
    shy = record.model_copy(update={"shapiro_w": None, "alarm": None, "distance_counts": [], "distance_range": None})
    *others, last = result.rungs
    log = {f"{result.trial}-{number}": record if number == 1 else shy for number in range(1, accounts + 1)}
    return result.model_copy(update={"rungs": [*others, last.model_copy(update={"curves": curves})], "query_log": log})


def with_removals(result: TrialResult) -> TrialResult:
    """The trial with a removal at two strengths that takes the mark, one that does not, and their control."""
    before = result.rungs[-1].report
    null = result.null_reports[0]
    tried = [
        ({"name": "pruning", "rate": 0.9}, 0.9, "substitute", before, model_report(0.80, 0.10)),
        ({"name": "pruning", "rate": 0.1}, 0.1, "substitute", before, model_report(0.90, 0.75)),
        ({"name": "<tune>"}, 5.0, "substitute", before, model_report(0.91, 0.70)),
        ({"name": "pruning", "rate": 0.9}, 0.9, "null_model", null, model_report(0.85, 0.02)),
    ]
    removals = [
        RemovalResult(removal=removal, strength=strength, tried_on=on, before=old, after=new, seconds=1.0)
        for removal, strength, on, old, new in tried
    ]
    return result.model_copy(update={"removals": removals})


def write_sweep(folder: Path, seeds: int = 3) -> list[TrialResult]:
    """Write two architectures times ``seeds`` trials and a sweep file into ``folder``."""
    results = [
        trial(f"t{model}{seed}", model, seed, end)
        for model, end in (("vgg_like", 0.85), ("resnet18", 0.35))
        for seed in range(seeds)
    ]
    for result in results:
        result.save(folder / "results" / f"{result.trial}.json")
    (folder / "sweep.yaml").write_text("name: demo\ndescription: A <made up> sweep & nothing else.\n", encoding="utf-8")
    return results
