"""Synthetic results of a large sweep, drawn at random, for measuring and testing code that reads thousands of them.

Nothing was trained. The numbers follow the settings smoothly, with noise, so that marginals, fronts and importances
have something to show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mea_ray.config import ExperimentConfig, build, yaml_text
from mea_ray.results.records import (
    RESULTS,
    ModelReport,
    QueryLogRecord,
    RankRecord,
    RemovalResult,
    RungResult,
    SuccessRate,
    TrialResult,
)
from mea_ray.storage.files import write_whole

BUDGETS = (1_000, 5_000, 20_000)
MODELS = ("cnn9", "resnet18", "vgg_like")
ANSWERS = ("argmax", "unchanged", "unlean")
REMOVALS: tuple[tuple[dict[str, Any], float], ...] = (
    ({"name": "fine_tuning", "epochs": 5}, 5.0),
    ({"name": "pruning", "rate": 0.5}, 0.5),
    ({"name": "pruning", "rate": 0.9}, 0.9),
    ({"name": "quantisation", "bits": 4}, 4.0),
)
_NULLS = 4
_SAMPLES = 500


def write_drawn(folder: Path, trials: int, *, seeds: int = 1, seed: int = 0) -> None:
    """Write a sweep's folder: ``sweep.yaml`` and ``results/*.json``, in the schema of every result.

    Args:
        folder: The sweep's folder; made if it is not there.
        trials: Number of results.
        seeds: Results for each point; ``trials / seeds`` points are distinct.
        seed: Seed of the draw.
    """
    rate = {"loguniform": [1e-3, 1e-1]}
    space = {
        "thief.training.learning_rate": rate,
        "victim.training.weight_decay": {"loguniform": [1e-5, 1e-2]},
        "thief.model.name": {"choice": list(MODELS)},
        "thief.learning.answers": {"choice": list(ANSWERS)},
    }
    tree = {
        "name": folder.name,
        "description": f"{trials:,} drawn results: nothing was trained.",
        "space": space,
        "search": {"name": "optuna", "samples": trials, "metric": ["wsr", "victim_gap"], "mode": ["max", "min"]},
    }
    write_whole(folder / "sweep.yaml", yaml_text.dump(tree))
    for result in drawn(trials, seeds=seeds, seed=seed):
        result.save(folder / RESULTS / f"{result.trial}.json")


def drawn(trials: int, *, seeds: int = 1, seed: int = 0) -> Iterator[TrialResult]:
    """Yield drawn results; see ``write_drawn``."""
    rng = np.random.default_rng(seed)
    base = build(ExperimentConfig, {"thief": {"budgets": list(BUDGETS)}}).resolved()
    point: dict[str, Any] = {}
    for place in range(trials):
        if place % seeds == 0:
            point = {
                "thief.training.learning_rate": float(10 ** rng.uniform(-3, -1)),
                "victim.training.weight_decay": float(10 ** rng.uniform(-5, -2)),
                "thief.model.name": str(rng.choice(MODELS)),
                "thief.learning.answers": str(rng.choice(ANSWERS)),
            }
        own = point | ({"seed": place % seeds} if seeds > 1 else {})
        yield _trial(f"{place:016x}", own, base, rng)


def _trial(name: str, point: dict[str, Any], base: dict[str, Any], rng: np.random.Generator) -> TrialResult:
    rate = math.log10(point["thief.training.learning_rate"])
    decay = math.log10(point["victim.training.weight_decay"])
    skill = math.exp(-((rate + 2) ** 2)) * (1.0 if point["thief.model.name"] != "cnn9" else 0.9)
    mark = {"unchanged": 0.9, "argmax": 0.6, "unlean": 0.1}[point["thief.learning.answers"]] * (0.6 + 0.08 * -decay)
    gap = 0.004 * -decay + float(rng.uniform(0, 0.01))
    nulls = [_report(0.96, float(rng.uniform(0, 0.04)), rng, nulls=False) for _ in range(_NULLS)]
    rungs, stolen = [], []
    for step, budget in enumerate(BUDGETS, start=1):
        grown = 1 - math.exp(-step)
        report = _report(0.5 + 0.45 * skill * grown, min(1.0, mark * grown), rng)
        rungs.append(RungResult(budget=budget, queries=budget, report=report, epochs=20, seconds=40.0 * step))
        innocent = _report(0.5 + 0.45 * skill * grown, float(rng.uniform(0, 0.05)), rng, nulls=False)
        stolen.append(RungResult(budget=budget, queries=budget, report=innocent, epochs=20, seconds=40.0 * step))
    last = rungs[-1].report
    removals = [
        RemovalResult(
            removal=removal,
            strength=strength,
            tried_on="substitute",
            before=last,
            after=_report(last.accuracy - 0.05 * part, (last.wsr.rate if last.wsr else 0.0) * (1 - part), rng),
            seconds=9.0,
        )
        for (removal, strength), part in zip(REMOVALS, (0.1, 0.2, 0.9, 0.3), strict=True)
    ]
    log = QueryLogRecord(
        requests=200,
        images=BUDGETS[-1],
        classes=[BUDGETS[-1] // 10] * 10,
        sampled=5000,
        distances=4990,
        distance_counts=[int(count) for count in rng.integers(0, 300, 20)],
        distance_range=(0.5, 9.0),
        shapiro_w=0.97,
        alarm=False,
    )
    return TrialResult(
        trial=name,
        point=point,
        config=_with(base, point),
        victim=f"{abs(hash(point['victim.training.weight_decay'])) % 16**16:016x}",
        nulls=[f"{place:016x}" for place in range(_NULLS)],
        victim_report=_report(0.96 - gap, 0.99, rng),
        null_reports=nulls,
        rungs=rungs,
        stolen_nulls=stolen,
        removals=removals,
        chance=0.1,
        date="2026-01-31T12:00:00+00:00",
        queries_charged=BUDGETS[-1],
        answers_stored=BUDGETS[-1],
        query_log={f"{name}-1": log},
        seconds=300.0,
        device="cpu",
        versions={"python": "3.11.9", "mea_ray": "0", "commit": "drawn"},
    )  # fmt: skip


def _with(base: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """Return the config with a point's values at their paths."""
    tree = dict(base)
    for path, value in point.items():
        *parents, last = path.split(".")
        inner = tree
        for name in parents:
            inner[name] = dict(inner[name])
            inner = inner[name]
        inner[last] = value
    return tree


def _report(accuracy: float, wsr: float, rng: np.random.Generator, *, nulls: bool = True) -> ModelReport:
    measured = int(rng.binomial(_SAMPLES, wsr))
    rate = _rate(measured)
    others = {name: _rate(int(rng.binomial(_SAMPLES, 0.02 + 0.05 * wsr))) for name in ("donut", "stripes")}
    statistics = {"wsr": rate.rate, "lean": float(rng.normal(4 * rate.rate, 0.1))}
    return ModelReport(
        accuracy=accuracy,
        fidelity=min(1.0, accuracy + 0.01),
        wsr=rate,
        wfpr=others,
        wfpr_mean=sum(each.rate for each in others.values()) / len(others),
        wfpr_classes=_rate(int(rng.binomial(_SAMPLES, 0.01))),
        statistics=statistics,
        null_ranks={each: RankRecord(at_least=0 if wsr > 0.05 else 2, references=_NULLS) for each in statistics}
        if nulls
        else {},
        specificity={"donut": 0.001, "stripes": 0.001, "other_classes": 0.001} if nulls else {},
        p_value=1 / (1 + _NULLS) if nulls else None,
        infringes_threshold=rate.rate > 0.3,
        source_accuracy={"zero": accuracy, "one": accuracy},
        source_target_probability=0.02,
        calibration_error=0.03,
    )


def _rate(successes: int) -> SuccessRate:
    rate = successes / _SAMPLES
    half = 1.96 * math.sqrt(rate * (1 - rate) / _SAMPLES)
    low, high = max(0.0, rate - half), min(1.0, rate + half)
    return SuccessRate(successes=successes, trials=_SAMPLES, rate=rate, low=low, high=high)
