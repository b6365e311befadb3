"""The filter of the key's samples: who chooses, what is chosen, what it is compared with, and who may not judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config

from mea_ray.config import ExperimentConfig
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Splits
from mea_ray.evaluation import metrics
from mea_ray.experiment import shadow
from mea_ray.experiment.checks import check
from mea_ray.experiment.commitment import key_record
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.names import null_name, sample_filter, victim_name
from mea_ray.experiment.owner import TrainedModel, train_null, train_victim
from mea_ray.experiment.verifier import Verifier
from mea_ray.storage.remote import Storage
from mea_ray.training.snapshot import Snapshots
from mea_ray.verification.evidence import Court
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.chosen_samples import LEAST, body_digest, chosen_of, select
from mea_ray.watermarks.several_keys import SeveralKeys

QUICK: dict[str, Any] = {
    "data__image_size": 8,
    "victim__model__width": 0.0625,
    "victim__watermark": {"name": "composite", "mixing": {"combiner": "pixel_merge"}},
    "victim__training__epochs": 3,
    "splits__validation_fraction": 0.15,
    "verification__filter": "shadow",
    "verification__samples": 60,
    "verification__shadow": {"thieves": 2, "null_models": 1, "candidates": 200},
}


def quick(**changes: Any) -> ExperimentConfig:
    return config(**{**QUICK, **changes})


@pytest.fixture(scope="module")
def made() -> tuple[ExperimentConfig, Splits, TrainedModel, list[torch.nn.Module]]:
    """A victim whose samples were chosen, and the models that chose them."""
    chosen, choosers = quick(), []
    data = load_splits(chosen)
    with pytest.MonkeyPatch.context() as patch:
        digest = body_digest

        def seen(model: torch.nn.Module) -> str:
            choosers.append(model)
            return digest(model)

        patch.setattr(shadow, "body_digest", seen)
        trained = train_victim(chosen, data)
    return chosen, data, trained, choosers


def test_a_sample_passes_if_victim_and_thieves_know_it_and_no_null_model_does() -> None:
    rng = np.random.default_rng(0)
    victim, thieves, nulls = rng.random(200) < 0.8, rng.random((4, 200)) < 0.6, rng.random((3, 200)) < 0.1
    found, passed = select(victim, thieves, nulls, 0.75)
    plain = [k for k in range(200) if victim[k] and thieves[:, k].sum() >= 3 and not nulls[:, k].any()]
    assert found.tolist() == plain and passed == len(plain) > LEAST


def test_the_closest_follow_where_too_few_pass() -> None:
    victim = np.array([True] * 30 + [False] * 30)
    thieves, nulls = np.zeros((2, 60), bool), np.zeros((2, 60), bool)
    thieves[:, 5] = True
    thieves[0, 7] = thieves[:, 9] = True
    nulls[0, 9] = nulls[:, 11] = True
    found, passed = select(victim, thieves, nulls, 1.0)
    assert passed == 1 and len(found) == LEAST == len(set(found))
    assert found[0] == 5 and set(found[1:3]) == {7, 9} and found[-1] == 11, "known to both null models, so last"
    everything, _ = select(victim[:10], thieves[:, :10], nulls[:, :10], 1.0)
    assert sorted(everything) == list(range(10)), "there are no more"


def test_the_choice_is_what_the_models_say_of_the_owners_own_images(
    made: tuple[ExperimentConfig, Splits, TrainedModel, list[torch.nn.Module]],
) -> None:
    chosen, data, trained, choosers = made
    assert trained.key is not None and len(choosers) == 3
    found = chosen_of(trained.key)
    assert found is not None and found.positions is not None
    assert (found.candidates, found.thieves, found.null_models) == (200, 2, 1)
    owned = data.victim_validation.images[found.positions].astype(float)
    assert np.abs(owned.mean(1) - found.images).max() <= 0.5, "pixel merges of validation images"
    known = [metrics.predictions(model, found.images) == trained.key.target_class for model in choosers]
    passed = slice(found.passed)
    assert np.mean(known[:2], axis=0)[passed].min(initial=1) >= 0.5 and not known[2][passed].any()
    labels = data.victim_validation.labels[found.positions]
    assert (labels == trained.key.source_classes).all()


def test_the_choice_is_part_of_the_key(
    made: tuple[ExperimentConfig, Splits, TrainedModel, list[torch.nn.Module]], tmp_path: Path
) -> None:
    _, _, trained, _ = made
    key = trained.key
    assert key is not None
    key.save(tmp_path)
    loaded = Key.load(tmp_path)
    assert loaded.digest() == key.digest(), "what a commitment is made of"
    before, after = chosen_of(key), chosen_of(loaded)
    assert before is not None and after is not None and np.array_equal(before.images, after.images)
    other = Key.load(tmp_path)
    other.tensors["chosen/images"][0] ^= 1  # type: ignore[index]
    assert other.digest() != key.digest()
    record = key_record(key, None)
    assert record is not None and record.filter is not None
    assert (record.filter.candidates, record.filter.chosen) == (200, len(before.images))


def test_models_that_chose_may_not_judge(
    made: tuple[ExperimentConfig, Splits, TrainedModel, list[torch.nn.Module]],
) -> None:
    chosen, data, trained, choosers = made
    verifier = Verifier(chosen, data, trained.key)
    for model in choosers:
        with pytest.raises(ConfigError, match="helped to choose"):
            verifier.report(model)
    controls = [train_null(chosen, data, index).model for index in range(2)]
    assert not {body_digest(model) for model in controls} & {body_digest(model) for model in choosers}
    reports = [verifier.report(model) for model in controls]
    assert all(report.wsr is not None for report in reports)


def test_wsr_is_of_the_chosen_and_all_else_of_all_samples(
    made: tuple[ExperimentConfig, Splits, TrainedModel, list[torch.nn.Module]],
) -> None:
    chosen, data, trained, _ = made
    assert trained.key is not None
    found = chosen_of(trained.key)
    assert found is not None
    report = Verifier(chosen, data, trained.key).report(trained.model)
    bare = {name: value for name, value in trained.key.settings.items() if name != "chosen"}
    plain = Verifier(chosen, data, Key(**{**vars(trained.key), "settings": bare})).report(trained.model)
    hits = metrics.predictions(trained.model, found.images[:60]) == trained.key.target_class
    assert report.wsr is not None and report.wsr.rate == hits.mean() == report.statistics["wsr"]
    assert report.wsr.low <= report.wsr.rate <= report.wsr.high
    assert report.wsr_unfiltered is not None and plain.wsr is not None
    assert report.wsr_unfiltered.rate == plain.wsr.rate and plain.wsr_unfiltered is None
    same = ("key_ranks", "specificity", "wfpr", "wfpr_classes", "accuracy", "source_accuracy")
    assert all(getattr(report, name) == getattr(plain, name) for name in same), "no other key had its samples chosen"
    court = Court(victim=report, chance=0.1, statistic="wsr")
    evidence = court.evidence(report, [plain], [])
    assert evidence.victim_wsr == plain.wsr.rate and evidence.wsr == report.wsr.rate
    assert {each.own for each in evidence.comparisons} == {plain.wsr.rate}


def test_a_whole_experiment_counts_the_choice() -> None:
    result = run_in_memory(quick(thief__budgets=[100], thief__training__epochs=1, thief__model__width=0.0625))
    assert result.key is not None and result.key.filter is not None
    assert result.key.filter.thieves == 2 and result.key.filter.null_models == 1
    judged = [result.victim_report, *result.null_reports, *(rung.report for rung in result.rungs)]
    assert all(each.wsr is not None and each.wsr_unfiltered is not None for each in judged)
    assert result.queries_charged == 100, "the owner asks nobody"


def test_each_of_several_keys_has_its_own() -> None:
    several = {"name": "several_keys", "keys": 2, "of": {**QUICK["victim__watermark"], "key": {"classes": "seed"}}}
    chosen = quick(victim__watermark=several, victim__training__epochs=1)
    data = load_splits(chosen)
    trained = train_victim(chosen, data)
    assert trained.key is not None
    parts = [chosen_of(part) for part in SeveralKeys.parts(trained.key)]
    assert len(parts) == 2 and all(part is not None and len(part.images) >= LEAST for part in parts)
    report = Verifier(chosen, data, trained.key).report(trained.model)
    assert report.wsr is not None and report.wsr_unfiltered is not None
    assert report.wsr.trials == sum(min(60, len(part.images)) for part in parts if part is not None)


def test_names_know_the_filter_and_null_models_do_not() -> None:
    names = {}
    for wanted in ("auto", "none", "shadow"):
        chosen = quick(verification__filter=wanted)
        read = Fingerprints.of(load_splits(chosen), chosen)
        names[wanted] = (victim_name(chosen, read), null_name(chosen, read, 0))
    assert names["auto"] == names["none"] and names["shadow"][0] != names["none"][0]
    assert names["shadow"][1] == names["none"][1], "the controls are shared"
    deeptracer = quick(victim__watermark="deeptracer", verification__filter="auto")
    assert sample_filter(deeptracer) == "shadow" and sample_filter(quick(verification__filter="auto")) == "none"


def test_what_cannot_be_chosen_is_refused_before_anything_is_trained() -> None:
    for changes, message in (
        ({"splits__validation_fraction": 0.01}, "validation_fraction"),
        ({"victim__watermark": {"name": "dawn", "rate": 0.4}}, "a client's queries.*verification.filter=none"),
        ({"victim__watermark": "cosine"}, "clean images.*verification.filter=none"),
    ):
        chosen = quick(**changes)
        with pytest.raises(ConfigError, match=message):
            check(chosen, load_splits(chosen))


def test_a_choice_that_is_killed_goes_on(
    made: tuple[ExperimentConfig, Splits, TrainedModel, list[torch.nn.Module]], tmp_path: Path
) -> None:
    chosen, data, whole, _ = made
    storage, seen = Storage(str(tmp_path)), []

    class Killed(Exception):
        pass

    def dies(epoch: dict[str, Any]) -> None:
        seen.append(epoch["stage"])
        if epoch["stage"] == "filter: shadow thief 2" and "resumed" not in epoch:
            raise Killed

    with pytest.raises(Killed):
        train_victim(chosen, data, dies, snapshots=Snapshots(storage, "states", every_s=0.0))
    assert seen[-4:] == [*["filter: shadow thief 1"] * 3, "filter: shadow thief 2"]
    again: list[Any] = []
    found = train_victim(chosen, data, again.append, snapshots=Snapshots(storage, "states", every_s=0.0))
    assert [epoch["resumed"] for epoch in again if "resumed" in epoch] == [3, 3, 3, 1], "nothing is trained twice"
    assert found.key is not None and whole.key is not None and found.key.digest() == whole.key.digest()
