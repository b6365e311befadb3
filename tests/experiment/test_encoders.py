"""Self-supervised victims through a whole experiment, and behind the service's actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.blackbox import POLICIES
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.passes import FixedShapePasses
from mea_ray.config import ClientConfig, ExperimentConfig, ServingConfig, build, merge
from mea_ray.core.errors import ConfigError
from mea_ray.evaluation import metrics, probes
from mea_ray.experiment import owner
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.encoders import probe_set, with_probe
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.model_sources import StoredModels
from mea_ray.experiment.names import Names
from mea_ray.experiment.verifier import Verifier
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.report.settings import machines
from mea_ray.results.numbers import rung_metrics
from mea_ray.training.checkpoint import load_model, save_model

TRAINING = {"epochs": 6, "batch_size": 64, "learning_rate": 2e-3}
TREE: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 12},
    "splits": {"verification_fraction": 0.5},
    "victim": {
        "insecure_key_from_seed": True,
        "pretext": {"name": "simclr", "flip": 0.0, "crop_scale": [0.5, 1.0]},
        "model": {"name": "cnn9", "width": 0.25},
        "watermark": "mea_defender_encoder",
        "training": TRAINING,
    },
    "service": {"policy": "embedding"},
    "thief": {
        "attack": "feature_distillation",
        "model": {"name": "vgg_like", "width": 0.35},
        "training": {**TRAINING, "augment": []},
        "budgets": [100, 300],
    },
    "verification": {"samples": 100, "probe_images": 400},
}


def config(**changes: Any) -> ExperimentConfig:
    return build(ExperimentConfig, merge(TREE, {key.replace("__", "."): value for key, value in changes.items()}))


def test_the_whole_experiment_with_an_encoder() -> None:
    result = run_in_memory(config())
    reports = [result.victim_report, *result.null_reports, *(rung.report for rung in result.rungs)]
    assert all(report.knn_accuracy is not None and 0 < report.knn_accuracy <= 1 for report in reports)
    assert all((report.knn_accuracy or 0) > 0.3 for report in reports[:2])
    # Read by a probe, an encoder of a few epochs knows half of the digits (chance is 0.1), and so does the stolen one.
    assert result.victim_report.accuracy > 0.5 and result.rungs[-1].report.accuracy > 0.4
    assert all(report.wsr is not None and report.wsr.trials == 100 for report in reports)
    assert result.null_reports[0].p_value is None and result.rungs[0].report.p_value is not None
    assert result.queries_charged == 300 and [rung.queries for rung in result.rungs] == [100, 300]
    # An embedding names no class: the owner's log puts all images in one.
    assert result.query_log[result.trial].classes == [300]
    # How an encoder was read is told beside its numbers.
    assert ("encoders read by", "linear_probe, 400 labelled images") in machines([result])
    assert rung_metrics(result, result.rungs[0])["knn_accuracy"] == result.rungs[0].report.knn_accuracy


def names(chosen: ExperimentConfig) -> Names:
    return Names.of(chosen, Fingerprints("a" * 32))


def test_an_encoder_is_recognised_by_its_name() -> None:
    """Artifacts are shared by trials that want the same victim, and by no others."""
    other = config(victim__pretext={"name": "simclr", "flip": 0.0, "crop_scale": [0.6, 1.0]})
    one, another = names(config()), names(other)
    assert one.victim != another.victim and one.nulls != another.nulls
    assert one.victim == names(config(thief__budgets=[50], verification__reading="prototype")).victim


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"service__policy": "probabilities"}, "service.policy=probabilities.*embedding, embedding_normalised"),
        ({"thief__attack": "distillation"}, "thief.attack=distillation.*feature_distillation, stolen_encoder"),
        ({"victim__pretext": "none"}, "service.policy=embedding.*label_only"),
        ({"victim__watermark": "mea_defender"}, "marks classifiers only"),
        ({"victim__training__early_stop_patience": 2}, "early_stop_patience"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_trained(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(owner, "train", trained)
    with pytest.raises(ConfigError, match=message):
        run_in_memory(config(**changes))


def test_a_reading_is_of_the_owners_labelled_images_and_leaves_the_encoder_as_it_was() -> None:
    chosen = config()
    data = load_splits(chosen)
    check(chosen, data)
    few = probe_set(chosen, data)
    owned = {image.tobytes() for image in data.victim_train.images}
    assert len(few) == 400 and all(image.tobytes() in owned for image in few.images)
    torch.manual_seed(0)
    model = build_model("vgg_like", data.shape, data.classes, {"width": 0.1})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = with_probe(chosen, few, model), Verifier(chosen, data, None).classifier(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    images = data.test.images
    assert np.array_equal(metrics.logits(first, images), metrics.logits(second, images))


def test_a_stored_encoder_is_read_anew_by_an_experiment_that_reads_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(victim__training__epochs=1, storage=str(tmp_path))
    data = load_splits(chosen)
    other = config(victim__training__epochs=1, verification__reading="prototype")
    fits = count_fits(monkeypatch)

    def victim_of(experiment: ExperimentConfig) -> ImageModel:
        result = Names.of(experiment, Fingerprints.of(data, experiment))
        return StoredModels(Store(str(tmp_path)), experiment, data, result).victim()[0]

    trained = victim_of(chosen)
    assert len(fits) == 1
    again, otherwise = victim_of(chosen), victim_of(other)
    assert len(fits) == 2 and len(list((tmp_path / "artifacts" / "victims").iterdir())) == 1
    expected = with_probe(other, probe_set(other, data), trained)
    for one, two in ((again, trained), (otherwise, expected)):
        assert np.array_equal(metrics.logits(one, data.test.images), metrics.logits(two, data.test.images))


def count_fits(monkeypatch: pytest.MonkeyPatch) -> list[ImageModel]:
    """Record every model whose head is fitted."""
    fits: list[ImageModel] = []
    fit = probes.read

    def counted(model: ImageModel, *arguments: Any) -> None:
        fits.append(model)
        fit(model, *arguments)

    monkeypatch.setattr(probes, "read", counted)
    return fits


def test_the_head_of_each_model_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = count_fits(monkeypatch)
    quick = {"epochs": 1, "batch_size": 64}
    result = run_in_memory(
        config(
            victim__training=quick,
            thief__training=quick,
            verification__stolen_null_models=1,
            thief__budgets=[50, 100],
        )
    )
    models = 1 + len(result.null_reports) + len(result.rungs) + len(result.stolen_nulls)
    assert len(fits) == models == 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    save_model(path, build_model("vgg_like", (1, 12, 12), 10, {"width": 0.1}), {})
    return path


def test_policies_word_the_features_of_each_image_by_itself(folder: Path) -> None:
    model, _ = load_model(folder)
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 12, 12), dtype=np.uint8)
    raw, unit, rounded = (
        LocalBlackBox(model, POLICIES.build(name), pass_images=16).query(images)
        for name in ("embedding", "embedding_normalised", "embedding_rounded")
    )
    np.testing.assert_allclose(raw, metrics.features(model, images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rounded, np.round(unit.astype(np.float64), 2).astype(np.float32))
    # Bit for bit the same, whatever an image is merged with.
    passes = FixedShapePasses(model, model.shape, POLICIES.build("embedding"), pass_images=16)
    merged = np.concatenate(passes.answer([images[:3], images[3:30], images[30:]]))
    assert np.array_equal(raw, merged)


def test_the_service_answers_with_the_same_embeddings_and_charges_them(ray_session: None, folder: Path) -> None:
    from mea_ray.service.pool import VictimService

    images = np.random.default_rng(1).integers(0, 256, (70, 1, 12, 12), dtype=np.uint8)
    model, _ = load_model(folder)
    expected = LocalBlackBox(model, POLICIES.build("embedding_normalised"), pass_images=16).query(images)
    service = VictimService.start(
        folder, "encoder", ServingConfig(cpus_per_replica=0.5, pass_images=16, policy={"name": "embedding_normalised"})
    )
    try:
        service.register("thief", 100)
        client = service.client("thief", ClientConfig(request_images=16))
        assert client.classes == model.feature_size
        assert np.array_equal(client.query(images), expected)
        assert service.charged("thief") == 70 and client.remaining == 30
        assert service.query_log("thief").classes == [70]
    finally:
        service.stop()
