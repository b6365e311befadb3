"""The verifier draws what all models share once, and judges each by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import config

from mea_ray.core.seeding import derive
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.build import build_model
from mea_ray.results.records import RankRecord
from mea_ray.verification.statistic import STATISTICS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.mixed_classes import MixedClasses


@pytest.fixture
def mixings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that held-out samples were mixed with, one for each time."""
    seeds: list[int] = []
    mix = MixedClasses.samples

    def counted(self: MixedClasses, key: Key, held_out: Any, count: int, seed: int) -> Any:
        seeds.append(seed)
        return mix(self, key, held_out, count, seed)

    monkeypatch.setattr(MixedClasses, "samples", counted)
    return seeds


def test_samples_are_mixed_once_in_an_experiment(mixings: list[int]) -> None:
    quick = {"victim__training__epochs": 1, "thief__training__epochs": 1, "thief__budgets": [50, 100]}
    result = run_in_memory(
        config(
            **quick,
            verification__samples=40,
            verification__null_models=2,
            verification__stolen_null_models=1,
            removal__methods=["quantisation"],
        )
    )
    judged = [result.victim_report, *result.null_reports, *(rung.report for rung in result.rungs)]
    judged += [*(rung.report for rung in result.stolen_nulls), *(removal.after for removal in result.removals)]
    assert len(judged) == 9 and all(report.wsr is not None and report.wsr.trials == 40 for report in judged)
    assert len(mixings) == 1


def test_the_samples_are_traced_to_their_source_images() -> None:
    chosen = config(verification__samples=40)
    data = load_splits(chosen)
    key = chosen.victim.watermark.build().make_key(data.victim_train, 0)
    verifier = Verifier(chosen, data, key)
    samples, pairs = verifier.samples(), verifier.pairs
    assert samples is not None and pairs is not None and verifier.pairs is pairs
    combiner, _ = MixedClasses.combiners(key)
    first, second = (torch.from_numpy(data.verification.images[side]).float() / 255 for side in pairs.positions.T)
    seed = derive(derive(derive(chosen.seed, "verification"), "watermark"), "mixes")
    mixed = (combiner(first, second, torch.Generator().manual_seed(seed)) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(mixed, samples.images)


def test_a_marked_model_leads_the_null_models_and_the_other_keys() -> None:
    result = run_in_memory(config(verification__null_models=2, verification__samples=200))
    victim = result.victim_report
    on_mixes = set(STATISTICS) - {"correlation"}  # that is for marks which are a signal
    assert set(victim.statistics) == on_mixes == set(victim.null_ranks)
    assert victim.wsr is not None and victim.statistics["wsr"] == victim.wsr.rate
    for name in ("wsr", "log_probability", "paired"):
        assert victim.null_ranks[name] == RankRecord(at_least=0, references=2)
    assert victim.p_value == pytest.approx(1 / 3)
    assert victim.key_ranks["log_probability"].p_value <= 2 / 720, "this key, or the same classes in the other order"
    assert victim.key_ranks["lean"].references == 359
    assert all(p < 0.01 for p in victim.specificity.values()) and "other_classes" in victim.specificity
    assert all(null.p_value is None and not null.null_ranks for null in result.null_reports)
    assert result.chance is not None and 0.08 < result.chance < 0.15 and not result.key_drawn


def test_detections_have_samples_of_their_own(mixings: list[int]) -> None:
    chosen = config(verification__samples=40)
    data = load_splits(chosen)
    key = chosen.victim.watermark.build().make_key(data.victim_train, 0)
    verifier = Verifier(chosen, data, key)
    first, again, others = verifier.samples(), verifier.samples(), verifier.samples("detection")
    assert first is again and first is not None and others is not None and len(mixings) == 2
    assert not np.array_equal(first.images, others.images)
    assert Verifier(chosen, data, None).samples() is None


def test_without_a_key_accuracy_and_fidelity_are_left() -> None:
    chosen = config()
    data = load_splits(chosen)
    torch.manual_seed(0)
    model = build_model("vgg_like", data.shape, data.classes, {"width": 0.1})
    verifier = Verifier(chosen, data, None)
    assert verifier.classifier(model) is model, "a classifier is judged as it is"
    predicted = verifier.predictions(model)
    report = verifier.report(model, victim=predicted)
    assert report.accuracy == (predicted == data.test.labels).mean()
    assert report.fidelity == 1.0 and report.wsr is None and report.p_value is None
