from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config, without_durations

from mea_ray.attacks.base import Attack
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Splits
from mea_ray.experiment import owner
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_in_memory, run_local
from mea_ray.experiment.owner import train_null, train_victim
from mea_ray.experiment.theft import account_budgets, answers_received, run_attack, total_budget
from mea_ray.results.records import TrialResult


@pytest.fixture(scope="module")
def data() -> Splits:
    return load_splits(config())


def test_the_whole_experiment(tmp_path: Path) -> None:
    records: list[tuple[str, str, dict[str, Any]]] = []
    everyone = ["substitute", "victim", "null_model"]
    methods = [{"name": "pruning", "rate": 0.3}, {"name": "fine_tuning", "epochs": 1}]
    whole = config(
        storage=str(tmp_path),
        verification__stolen_null_models=1,
        removal__methods=methods,
        removal__tried_on=everyone,
        detection__methods=[{"name": "neural_cleanse", "steps": 20}, "lof"],
        detection__images=200,
    )
    done = run_local(whole, on_epoch=lambda role, name, record: records.append((role, name, record)))
    result = done.result
    victim, (null,), rungs = result.victim_report, result.null_reports, result.rungs
    assert victim.wsr is not None and victim.wsr.trials >= 1000 and victim.wsr.rate > 0.9
    assert victim.accuracy > 0.85 and victim.fidelity is None
    assert victim.infringes_threshold and victim.p_value == 0.5
    assert null.wsr is not None and null.wsr.rate < 0.3 and null.accuracy > 0.9 and not null.infringes_threshold
    assert null.p_value is None and null.fidelity is not None
    assert victim.wfpr_mean is not None and victim.wfpr_mean < 0.3 and len(victim.wfpr) > 1
    assert [(rung.budget, rung.queries) for rung in rungs] == [(200, 200), (900, 900)]
    assert rungs[1].report.fidelity is not None and rungs[1].report.fidelity > 0.7
    assert all(rung.report.wsr is not None and rung.report.p_value is not None for rung in rungs)
    assert result.queries_charged == 900, "the control is no query of the thief's"
    assert [control.budget for control in result.stolen_nulls] == [200, 900]
    control = result.stolen_nulls[-1]
    assert control.queries == control.budget == 900 and control.report.p_value is not None
    assert control.report.fidelity is not None and control.report.fidelity > 0.7, "it is close to the null model"
    assert control.report.wsr is not None and control.report.wsr.rate < 0.3
    assert [(r.removal["name"], r.tried_on) for r in result.removals] == [
        (method["name"], on) for method in methods for on in everyone
    ]
    for removal, before in zip(result.removals, 2 * [rungs[1].report, victim, null], strict=True):
        assert removal.before == before and removal.after.accuracy > 0.5
        assert removal.after.wsr is not None and removal.after.p_value is not None
    remaining = {(r.removal["name"], r.tried_on): r.after.wsr.rate for r in result.removals if r.after.wsr}
    assert remaining["pruning", "victim"] > 0.5 and remaining["fine_tuning", "null_model"] < 0.3
    assert [(d.detection["name"], d.tried_on) for d in result.detections] == [
        (name, on) for name in ("neural_cleanse", "lof") for on in ("substitute", "null_model")
    ]
    assert all(len(d.triggers) == (10 if d.detection["name"] == "neural_cleanse" else 0) for d in result.detections)
    assert result.detections[0].target == "2" and result.detections[0].triggers[3].on_substitute.trials > 50
    assert {"false_positive", "detected"} <= set(result.detections[2].numbers)
    assert {"python", "torch", "numpy"} <= set(result.versions) and result.device and result.seconds > 0
    assert [record.answers for record in result.leaning] == [30, 100, 1000]
    for record in result.leaning:
        assert record.victim is not None and record.victim.true_rank is not None and len(record.nulls) == 1
        assert record.victim.true_rank.references == 359 and 0 < record.victim.score < 1
    assert len(result.nulls) == 1 and result.victim not in result.nulls
    assert [record[:2] for record in records] == 12 * [("victim", result.victim)] + 12 * [("null", result.nulls[0])]
    assert TrialResult.load(done.folder / "results" / f"{result.trial}.json") == result and not done.reused
    # Victim, key and null model are kept as a sweep keeps them, and the substitutes beside the answers.
    assert (tmp_path / "artifacts" / "victims" / result.victim / "key.json").exists()
    assert (tmp_path / "artifacts" / "nulls" / result.nulls[0] / "model.safetensors").exists()
    kept_models = done.folder / "trials" / result.trial / "substitutes"
    assert {path.name for path in kept_models.iterdir()} == {"200", "900"}
    again = run_local(whole, on_epoch=lambda *_: pytest.fail("something was trained"))
    assert again.reused and again.result == result
    assert "storage" not in result.config and build(ExperimentConfig, whole.over(result.config)) == whole


def quick(storage: Path | None = None) -> ExperimentConfig:
    changes = {} if storage is None else {"storage": str(storage)}
    return config(
        victim__training__epochs=1,
        thief__training__epochs=1,
        verification__samples=50,
        victim__watermark__name="none",
        **changes,
    )


def test_a_killed_run_goes_on_in_its_folder_and_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = LocalBlackBox.query
    sizes: list[int] = []

    def dying(self: Any, images: Any) -> Any:
        answers = answer(self, images)
        if self.client == "thief":  # the owner's own look at what the answers give away; a thief has his trial's name
            return answers
        sizes.append(len(images))
        # Dies after the charge and before the answer is kept: the worst moment.
        if len(sizes) == 4:
            raise ConnectionError("the thief's process dies here")
        return answers

    monkeypatch.setattr(LocalBlackBox, "query", dying)
    with pytest.raises(ConnectionError):
        run_local(quick(tmp_path / "a"))
    (transfer,) = tmp_path.glob("a/local/experiment-*/trials/*/transfer")
    assert len(TransferSet(transfer)) == 128 + 72 + 56
    resumed = run_local(quick(tmp_path / "a")).result
    assert resumed.queries_charged == 900 and sum(sizes) == 900 + sizes[3]
    whole = run_local(quick(tmp_path / "b")).result
    assert [rung.report for rung in whole.rungs] == [rung.report for rung in resumed.rungs]
    assert whole.victim_report.wsr is None and whole.rungs[0].report.p_value is None
    assert resumed.trial == whole.trial, "where it runs does not count"


def test_memory_and_disk_give_the_same_result(tmp_path: Path) -> None:
    def plain(result: TrialResult) -> Any:
        return without_durations(result.model_dump(mode="json", exclude={"config": {"storage"}}))

    assert plain(run_in_memory(quick())) == plain(run_local(quick(tmp_path)).result)


def test_the_thief_gets_the_pools_images_and_nothing_else(data: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Spy(Attack):
        def run(self, blackbox: Any, pool: Any, **rest: Any) -> Any:
            seen.update(rest, pool=pool, blackbox=blackbox)
            return iter(())

    choice = config().thief.attack
    monkeypatch.setattr(type(choice), "build", lambda self: Spy())
    list(run_attack(config(), data, "box"))  # type: ignore[arg-type]
    assert seen.pop("pool") is data.thief_pool.images and seen.pop("blackbox") == "box"
    assert set(seen) == {"budgets", "make_model", "training", "seed", "transfer", "skip", "learning", "labels"}
    model = pickle.loads(pickle.dumps(seen["make_model"]))()
    assert model.shape == data.shape and model.classes == data.classes


def test_victim_and_null_models_start_from_seeds_of_their_own(data: Splits) -> None:
    one_epoch = config(victim__training__epochs=1, victim__watermark__name="none")
    records: list[dict[str, Any]] = []
    victim = train_victim(one_epoch, data, records.append)
    again = train_victim(one_epoch, data)
    nulls = [train_null(one_epoch, data, index).model for index in (0, 0, 1)]
    assert victim.key is None and [record["stage"] for record in records] == ["train"]
    assert victim.info["history"][0]["loss"] == records[0]["loss"]
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (victim.model, again.model, *nulls)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2]) and not torch.equal(weights[2], weights[4])
    means = data.victim_train.images.astype(np.float64).mean((0, 2, 3)) / 255
    np.testing.assert_allclose(victim.model.mean.flatten().numpy(), means, rtol=1e-5)


def test_early_stop_of_the_victim_watches_its_validation_images(data: Splits) -> None:
    stopping = config(
        victim__training__epochs=6,
        victim__training__early_stop_patience=2,
        victim__training__learning_rate=1e-12,
        victim__watermark__name="none",
    )
    history = train_victim(stopping, data).info["history"]
    assert len(history) == 3 and all(record["validation"] is not None for record in history)


def test_another_dataset_can_be_the_thiefs_pool() -> None:
    other = load_splits(config(splits__thief_pool={"name": "digits", "image_size": 9}))
    assert other.thief_pool.shape == other.shape
    disjoint = load_splits(config(splits__thief_pool="disjoint"))
    assert len(disjoint.thief_pool) + len(disjoint.victim_train) < len(other.thief_pool)


def test_the_data_belong_to_the_victim_and_not_to_the_thief(data: Splits) -> None:
    other = load_splits(config(seed=5, thief__budgets=[10]))
    np.testing.assert_array_equal(other.victim_train.images, data.victim_train.images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thief__budgets": [100_000]}, "100000"),
        ({"thief__training__early_stop_patience": 3}, "validation_fraction"),
        ({"victim__watermark__target_class": 17}, "class 17"),
        ({"thief__attack__query_chunk": 0}, "query_chunk=0"),
        ({"service__policy": {"name": "top_k", "k": 0}}, "k=0"),
        (
            {"victim__training__batch_size": 1, "victim__model": {"name": "resnet18", "width": 0.0625}},
            "at least 2 images in a batch",
        ),
        (
            {
                "victim__training__batch_size": 1,
                "victim__pretext": "simclr",
                "victim__watermark": "none",
                "service__policy": "embedding",
                "thief__attack": "feature_distillation",
            },
            "victim.pretext=simclr needs at least 2 images",
        ),
        ({"detection__methods": ["strip"], "detection__images": 3}, "'strip' needs at least 4 clean images"),
    ],
)
def test_what_cannot_be_run_is_refused_before_training(
    data: Splits, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "train", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(ConfigError, match=message):
        check(config(**changes), data)
    with pytest.raises(ConfigError, match=message):
        run_in_memory(config(**changes))


def test_too_few_held_out_images_are_refused() -> None:
    few = config(splits__verification_fraction=0.01)
    loaded = load_splits(few)
    remaining = np.concatenate([np.flatnonzero(loaded.verification.labels == label)[:5] for label in range(10)])
    splits = replace(loaded, verification=loaded.verification.take(remaining))
    with pytest.raises(ConfigError, match="verification_fraction"):
        check(few, splits)


def test_removals_that_could_not_be_tried_are_refused(data: Splits) -> None:
    def free(**more: Any) -> ExperimentConfig:
        whole = config(removal__methods=["pruning"], **more)
        attack = type(whole.thief.attack).model_validate({"name": "dfme", "batch_size": 2})
        return whole.model_copy(update={"thief": whole.thief.model_copy(update={"attack": attack})})

    with pytest.raises(ConfigError, match="stores no answered images"):
        check(free(), data)
    check(free(removal__tried_on=["null_model"]), data)


def test_requery_is_registered_with_what_it_may_be_charged() -> None:
    assert total_budget(config()) == 900
    asking = config(thief__attack__requery=True)
    assert total_budget(asking) == 1100
    assert answers_received(asking, TransferSet()) == 0
    assert account_budgets(asking, "t") == {"t": 1100}
