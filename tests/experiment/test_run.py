from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config

from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.experiment import run as pipeline
from mea_ray.results.records import TrialResult


@pytest.fixture(scope="module")
def prepared() -> pipeline.Prepared:
    return pipeline.prepare(config())


def test_the_whole_experiment(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    everyone = ["substitute", "victim", "null_model"]
    methods = [{"name": "pruning", "rate": 0.3}, {"name": "fine_tuning", "epochs": 1}]
    whole = config(
        verification__stolen_null_models=1,
        removal__methods=methods,
        removal__tried_on=everyone,
        detection__methods=[{"name": "neural_cleanse", "steps": 20}, "lof"],
        detection__images=200,
    )
    result = pipeline.run(whole, tmp_path, records.append)
    victim, (null,), rungs = result.victim_report, result.null_reports, result.rungs
    assert victim.wsr is not None and victim.wsr.trials >= 1000 and victim.wsr.rate > 0.9
    assert victim.accuracy > 0.85 and victim.fidelity is None
    assert victim.infringes_threshold and victim.infringes_significance
    assert null.wsr is not None and null.wsr.rate < 0.3 and null.accuracy > 0.9 and not null.infringes_threshold
    assert null.p_value is None and null.fidelity is not None
    assert victim.wfpr_mean is not None and victim.wfpr_mean < 0.3 and len(victim.wfpr) > 1
    assert [(rung.budget, rung.queries) for rung in rungs] == [(200, 200), (900, 900)]
    assert rungs[1].report.fidelity is not None and rungs[1].report.fidelity > 0.7
    assert all(rung.report.wsr is not None and rung.report.p_value is not None for rung in rungs)
    assert result.queries_charged == 900, "the control is no query of the thief's"
    (control,) = result.stolen_nulls
    assert control.queries == control.budget == 900 and control.report.p_value is not None
    assert control.report.fidelity is not None and control.report.fidelity > 0.7, "it is close to the null model"
    assert control.report.wsr is not None and control.report.wsr.rate < 0.3
    assert [(r.removal["name"], r.tried_on) for r in result.removals] == [
        (method["name"], on) for method in methods for on in everyone
    ]
    for removal, before in zip(result.removals, 2 * [rungs[1].report, victim, null], strict=True):
        assert removal.before == before and removal.after.accuracy > 0.5
        assert removal.after.wsr is not None and removal.after.p_value is not None
    kept = {(r.removal["name"], r.tried_on): r.after.wsr.rate for r in result.removals if r.after.wsr}
    assert kept["pruning", "victim"] > 0.5 and kept["fine_tuning", "null_model"] < 0.3
    assert [(d.detection["name"], d.tried_on) for d in result.detections] == [
        (name, on) for name in ("neural_cleanse", "lof") for on in ("substitute", "null_model")
    ]
    assert all(len(d.triggers) == (10 if d.detection["name"] == "neural_cleanse" else 0) for d in result.detections)
    assert result.detections[0].target == "2" and result.detections[0].triggers[3].on_substitute.trials > 50
    assert {"false_positive", "detected"} <= set(result.detections[2].numbers)
    assert {"python", "torch", "numpy"} <= set(result.versions) and result.device and result.seconds > 0
    assert len(result.nulls) == 1 and result.victim not in result.nulls
    assert len(records) == 12 * 2
    assert TrialResult.load(tmp_path / "result.json") == result
    assert build(ExperimentConfig, result.config) == whole


def test_a_killed_run_goes_on_in_its_folder_and_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = config(
        victim__training__epochs=1, thief__training__epochs=1, verification__samples=50, victim__watermark__name="none"
    )
    answer = pipeline.LocalBlackBox.query
    sizes: list[int] = []

    def dying(self: Any, images: Any) -> Any:
        answers = answer(self, images)
        sizes.append(len(images))
        # Dies after the charge and before the answer is kept: the worst moment.
        if len(sizes) == 4:
            raise ConnectionError("the thief's process dies here")
        return answers

    monkeypatch.setattr(pipeline.LocalBlackBox, "query", dying)
    with pytest.raises(ConnectionError):
        pipeline.run(quick, tmp_path / "a")
    assert len(TransferSet(tmp_path / "a" / "transfer")) == 128 + 72 + 56
    resumed = pipeline.run(quick, tmp_path / "a")
    assert resumed.queries_charged == 900 and sum(sizes) == 900 + sizes[3]
    whole = pipeline.run(quick, tmp_path / "b")
    assert [rung.report for rung in whole.rungs] == [rung.report for rung in resumed.rungs]
    assert whole.victim_report.wsr is None and whole.rungs[0].report.p_value is None


def test_the_thief_gets_the_pools_images_and_nothing_else(
    prepared: pipeline.Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class Spy:
        def run(self, blackbox: Any, pool: Any, **rest: Any) -> Any:
            seen.update(rest, pool=pool, blackbox=blackbox)
            return iter(())

    choice = config().thief.attack
    monkeypatch.setattr(type(choice), "build", lambda self: Spy())
    list(pipeline.run_attack(config(), prepared, "box"))  # type: ignore[arg-type]
    assert seen.pop("pool") is prepared.splits.thief_pool.images and seen.pop("blackbox") == "box"
    assert set(seen) == {"budgets", "make_model", "training", "seed", "transfer", "skip", "learning", "labels"}
    model = pickle.loads(pickle.dumps(seen["make_model"]))()
    assert model.shape == prepared.shape and model.classes == prepared.classes


def test_victim_and_null_models_start_from_seeds_of_their_own(prepared: pipeline.Prepared) -> None:
    one_epoch = config(victim__training__epochs=1, victim__watermark__name="none")
    records: list[dict[str, Any]] = []
    victim = pipeline.train_victim(one_epoch, prepared, records.append)
    again = pipeline.train_victim(one_epoch, prepared)
    nulls = [pipeline.train_null(one_epoch, prepared, index) for index in (0, 0, 1)]
    assert victim.key is None and [record["stage"] for record in records] == ["train"]
    assert victim.info["history"][0]["loss"] == records[0]["loss"]
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (victim.model, again.model, *nulls)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[4])
    means = prepared.splits.victim_train.images.astype(np.float64).mean((0, 2, 3)) / 255
    np.testing.assert_allclose(victim.model.mean.flatten().numpy(), means, rtol=1e-5)


def test_early_stop_of_the_victim_watches_its_validation_images(prepared: pipeline.Prepared) -> None:
    stopping = config(
        victim__training__epochs=6,
        victim__training__early_stop_patience=2,
        victim__training__learning_rate=1e-12,
        victim__watermark__name="none",
    )
    history = pipeline.train_victim(stopping, prepared).info["history"]
    assert len(history) == 3 and all(record["validation"] is not None for record in history)


def test_another_dataset_can_be_the_thiefs_pool() -> None:
    other = pipeline.prepare(config(splits__thief_pool={"name": "digits", "image_size": 9}))
    assert other.splits.thief_pool.shape == other.shape
    disjoint = pipeline.prepare(config(splits__thief_pool="disjoint"))
    assert len(disjoint.splits.thief_pool) + len(disjoint.splits.victim_train) < len(other.splits.thief_pool)


def test_the_data_belong_to_the_victim_and_not_to_the_thief(prepared: pipeline.Prepared) -> None:
    other = pipeline.prepare(config(seed=5, thief__budgets=[10]))
    np.testing.assert_array_equal(other.splits.victim_train.images, prepared.splits.victim_train.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thief__budgets": [100_000]}, "100000"),
        ({"thief__training__early_stop_patience": 3}, "validation_fraction"),
        ({"victim__watermark__target_class": 17}, "class 17"),
        ({"thief__attack__query_chunk": 0}, "query_chunk=0"),
        ({"service__policy": {"name": "top_k", "k": 0}}, "k=0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_training(
    prepared: pipeline.Prepared, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(ConfigError, match=message):
        pipeline.check(config(**changes), prepared)
    with pytest.raises(ConfigError, match=message):
        pipeline.run(config(**changes))


def test_too_few_held_out_images_are_refused() -> None:
    few = config(splits__verification_fraction=0.01)
    prepared = pipeline.prepare(few)
    kept = np.concatenate([np.flatnonzero(prepared.splits.verification.labels == label)[:5] for label in range(10)])
    splits = replace(prepared.splits, verification=prepared.splits.verification.take(kept))
    with pytest.raises(ConfigError, match="verification_fraction"):
        pipeline.check(few, pipeline.Prepared(splits, prepared.shape, prepared.classes))


def test_removals_that_could_not_be_tried_are_refused(prepared: pipeline.Prepared) -> None:
    def free(**more: Any) -> ExperimentConfig:
        whole = config(removal__methods=["pruning"], **more)
        attack = type(whole.thief.attack).model_validate({"name": "dfme", "batch_size": 2})
        return whole.model_copy(update={"thief": whole.thief.model_copy(update={"attack": attack})})

    with pytest.raises(ConfigError, match="keeps no answered images"):
        pipeline.check(free(), prepared)
    pipeline.check(free(removal__tried_on=["null_model"]), prepared)


def test_requery_is_registered_with_what_it_may_be_charged() -> None:
    assert pipeline.budget_to_register(config()) == 900
    asking = config(thief__attack__requery=True)
    assert pipeline.budget_to_register(asking) == 1100
    assert pipeline.already_asked(asking, TransferSet()) == 0


def test_what_the_actors_call_can_be_pickled(prepared: pipeline.Prepared) -> None:
    for function in (pipeline.train_victim, pipeline.train_null, pipeline.assess, pipeline.run_attack, pipeline.check):
        assert pickle.loads(pickle.dumps(function)) is function
    assert pickle.loads(pickle.dumps(prepared)).shape == prepared.shape
