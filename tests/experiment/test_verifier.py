"""The verifier draws what all models share once, and judges each by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import config

from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.build import build_model
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
    assert len(judged) == 8 and all(report.wsr is not None and report.wsr.trials == 40 for report in judged)
    assert len(mixings) == 1


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
