"""The answer policy lof: flags what is no digit, lets digits through, and says nothing else otherwise than before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor

from mea_ray.blackbox import POLICIES
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.outliers import OutlierFilter
from mea_ray.blackbox.policies import Response, pixel_vectors, respond
from mea_ray.blackbox.prada import query_log_record
from mea_ray.blackbox.query_log import QueryLog
from mea_ray.config import ClientConfig, ExperimentConfig, ServingConfig, build, write_yaml
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import Splits
from mea_ray.evaluation import metrics
from mea_ray.experiment.answers import answer_policy, stored_owners_images
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.owner import train_victim
from mea_ray.models.base import ImageModel
from mea_ray.training.checkpoint import save_model, weights_digest, weights_secret

CONTAMINATION = 0.05


def config(**policy: Any) -> ExperimentConfig:
    tree = {
        "data": {"name": "digits", "image_size": 8},
        "victim": {
            "model": {"name": "vgg_like", "width": 0.25},
            "watermark": "none",
            "training": {"epochs": 4, "batch_size": 64, "augment": [], "learning_rate": 2e-3},
        },
        "thief": {"model": {"name": "vgg_like", "width": 0.125}, "training": {"epochs": 1}, "budgets": [60]},
        "service": {"policy": {"name": "lof", "contamination": CONTAMINATION, **policy}},
    }
    return build(ExperimentConfig, tree)


@pytest.fixture(scope="module")
def data() -> Splits:
    return load_splits(config())


@pytest.fixture(scope="module")
def victim(data: Splits) -> ImageModel:
    return train_victim(config(), data).model


def served(victim: ImageModel, data: Splits, log: QueryLog, **params: Any) -> LocalBlackBox:
    policy = POLICIES.build("lof", contamination=CONTAMINATION, **params)
    policy = answer_policy(policy, victim, None, lambda: data.victim_train.images, pass_images=16)
    return LocalBlackBox(victim, policy, log=log, pass_images=16)


@pytest.mark.parametrize("on", ["features", "pixels"])
def test_noise_is_flagged_and_clean_images_pass_at_about_the_contamination(
    victim: ImageModel, data: Splits, on: str
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, *data.shape), dtype=np.uint8)
    rates = []
    for images in (data.victim_train.images[:500], data.test.images[:200], noise):
        log = QueryLog()
        served(victim, data, log, on=on).query(images)
        result = query_log_record(log.of("thief"), 10)
        assert result.images == len(images) and result.marked == 0
        rates.append(result.flagged / len(images))
    owned, held_out, abnormal = rates
    assert owned < 2 * CONTAMINATION and held_out < 3 * CONTAMINATION
    # A network that knows digits only sees digits in noise, too: among its features little of it is an outlier.
    assert abnormal > (0.95 if on == "pixels" else 2 * owned)


def test_what_is_flagged_is_what_scikit_learn_flags(victim: ImageModel, data: Splits) -> None:
    policy = OutlierFilter(neighbours=7, contamination=CONTAMINATION, on="pixels", fitted=300)
    chosen = policy.choose(data.victim_train.images)
    assert len(chosen) == 300
    policy.fit(pixel_vectors(chosen))
    images = data.test.images[:150]
    plain = LocalOutlierFactor(n_neighbors=7, novelty=True, contamination=CONTAMINATION, algorithm="brute")
    plain.fit(chosen.reshape(300, -1) / 255)
    response = policy.respond(metrics.probabilities(victim, images), images)
    assert response.flagged.tolist() == (plain.predict(images.reshape(150, -1) / 255) < 0).tolist()
    assert 0 < response.flagged.sum() < 150


def test_only_flagged_answers_change_and_repeated_queries_get_the_same_answers(
    victim: ImageModel, data: Splits
) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (300, *data.shape), dtype=np.uint8)
    images = np.concatenate([data.test.images[:60], noise])
    plain = LocalBlackBox(victim, pass_images=16).query(images)
    box = served(victim, data, QueryLog(), on="pixels")
    answers = box.query(images)
    policy = box._passes.policy
    flagged = respond(policy, plain, images).flagged
    assert np.array_equal(answers[~flagged], plain[~flagged]) and (~flagged).sum() > 40
    assert np.array_equal(np.sort(answers, axis=1), np.sort(plain, axis=1)), "a confidence like any other's"
    # At random: a flagged image keeps its label as often as chance has it.
    remaining = (answers[flagged].argmax(1) == plain[flagged].argmax(1)).mean()
    assert abs(remaining - 0.1) < 4 * np.sqrt(0.09 / flagged.sum())
    order = np.random.default_rng(2).permutation(len(images))
    assert np.array_equal(box.query(images[order]), answers[order])
    other = served(victim, data, QueryLog(), on="pixels", seed=1).query(images)
    assert not np.array_equal(other[flagged], answers[flagged]), "the order is the owner's secret"


def test_the_wording_is_any_policy_of_a_classifier(victim: ImageModel, data: Splits) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, *data.shape), dtype=np.uint8)
    full = served(victim, data, QueryLog(), on="pixels").query(images)
    for wording in ("label_only", {"name": "top_k", "k": 2}):
        name, params = (wording, {}) if isinstance(wording, str) else (wording["name"], {"k": 2})
        outputs = served(victim, data, QueryLog(), on="pixels", wording=wording).query(images)
        assert np.array_equal(outputs, POLICIES.build(name, **params).apply(full, images))  # type: ignore[arg-type]
    for bad in ("lof", "model_guard_s", "embedding", {"k": 2}):
        with pytest.raises(ConfigError, match="wording"):
            OutlierFilter(wording=bad)


@pytest.mark.parametrize("params", [{"neighbours": 0}, {"fitted": 1}, {"contamination": 0.0}, {"contamination": 0.6}])
def test_bad_parameters(params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(params))):
        POLICIES.build("lof", **params)


def test_it_does_not_answer_before_it_knows_what_is_normal() -> None:
    p, images = np.full((2, 4), 0.25, np.float32), np.zeros((2, 1, 4, 4), np.uint8)
    with pytest.raises(DataError, match="not fitted"):
        OutlierFilter().apply(p, images)
    fitted = OutlierFilter()
    fitted.fit(np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32))
    with pytest.raises(DataError, match="on=pixels"):
        fitted.apply(p, images)
    assert isinstance(fitted.respond(p, images, np.zeros((2, 3), np.float32)), Response)


def test_a_replica_finds_the_owners_images_by_the_config_beside_the_model(tmp_path: Path, data: Splits) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        stored_owners_images(tmp_path)
    tree = {**config().resolved(), "splits": {"thief_pool": "noise"}}  # whose pool is not loaded for it
    write_yaml(build(ExperimentConfig, tree), tmp_path / "config.yaml")
    assert np.array_equal(stored_owners_images(tmp_path), data.victim_train.images)


def test_the_service_flags_what_one_process_flags(
    ray_session: None, tmp_path: Path, victim: ImageModel, data: Splits
) -> None:
    from mea_ray.service.pool import VictimService

    save_model(tmp_path, victim, {})
    write_yaml(config(), tmp_path / "config.yaml")
    noise = np.random.default_rng(3).integers(0, 256, (40, *data.shape), dtype=np.uint8)
    images = np.concatenate([data.test.images[:60], noise])
    log = QueryLog()
    expected = served(victim, data, log).query(images)
    policy = {"name": "lof", "contamination": CONTAMINATION}
    service = VictimService.start(tmp_path, "wary", ServingConfig(cpus_per_replica=0.5, pass_images=16, policy=policy))
    try:
        service.register("thief")
        torch.set_num_threads(1)
        answers = service.client("thief", ClientConfig(request_images=16)).query(images)
        assert np.array_equal(answers, expected)
        assert service.query_log("thief").flagged == log.of("thief").flagged > 5
    finally:
        service.stop()


def test_an_experiment_runs_behind_it() -> None:
    result = run_in_memory(config(wording="label_only"))
    (log,) = result.query_log.values()
    assert log.images == 60 and log.flagged < 20


@pytest.mark.parametrize("policy", ["noise", "lof"])
def test_the_secret_of_answers_follows_from_the_weights_and_not_from_what_is_published(
    victim: ImageModel, data: Splits, policy: str
) -> None:
    images = np.random.default_rng(4).integers(0, 256, (30, *data.shape), dtype=np.uint8)

    def asked(model: ImageModel, secret: bytes | None = None) -> np.ndarray:
        worded = POLICIES.build(policy, **({"on": "pixels"} if policy == "lof" else {}))
        worded = answer_policy(worded, model, None, lambda: data.victim_train.images, pass_images=16)
        if secret is not None:
            worded.use_secret(secret)  # type: ignore[attr-defined]
        return LocalBlackBox(victim, worded, pass_images=16).query(images)

    plain = asked(victim)
    assert np.array_equal(plain, asked(victim)), "a replica that is started again answers the same"
    other = copy.deepcopy(victim)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert not np.array_equal(plain, asked(other))
    published = weights_digest(victim)
    for guess in (published.encode(), bytes.fromhex(published), b"", b"0"):
        assert not np.array_equal(plain, asked(victim, guess))
    assert np.array_equal(plain, asked(victim, weights_secret(victim)))
