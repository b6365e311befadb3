"""The carrier's gate: which images are answered with the target class, by how much they look like a mix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyword_training import train
from scipy.special import expit, logit
from torch import nn
from watermark_sets import NAMES, Spy, context, image_set, main_batch

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.models.base import ImageModel
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.mea_carrier.gate import mix_likeness, target_share
from mea_ray.watermarks.mea_carrier.settings import Gate


class Means(ImageModel):
    """Features are the mean of the upper and of the lower half: a planted direction."""

    def __init__(self, shape: Any = (1, 16, 16), classes: Any = len(NAMES)) -> None:
        super().__init__(shape, classes)
        self.feature_size = 2
        self.head = nn.Linear(2, classes)

    def encode(self, x: Any) -> Any:
        return torch.stack([x[:, :, :8].mean((1, 2, 3)), x[:, :, 8:].mean((1, 2, 3))], 1)


def shades(top: Any, bottom: Any) -> Any:
    images = np.zeros((len(top), 1, 16, 16), np.uint8)
    images[:, :, :8] = np.asarray(top)[:, None, None, None]
    images[:, :, 8:] = np.asarray(bottom)[:, None, None, None]
    return images


def test_likeness_orders_clean_images_along_the_direction_of_the_mixes() -> None:
    rng = np.random.default_rng(0)
    bottom = rng.integers(0, 100, 200)
    clean = shades(rng.integers(90, 110, 200), bottom)
    mixes = shades(rng.integers(90, 110, 50), rng.integers(150, 250, 50))
    scores = mix_likeness(Means(), clean, mixes, seed=3)
    assert np.corrcoef(scores, bottom)[0, 1] > 0.99
    assert np.array_equal(scores, mix_likeness(Means(), clean, mixes, seed=3))


def test_no_image_is_scored_by_a_regression_that_was_fitted_to_it() -> None:
    clean, mixes = shades(np.arange(100, 120), np.arange(20)), shades([105] * 10, [200] * 10)
    before = mix_likeness(Means(), clean, mixes, seed=1)
    # Whatever one image is, it moves the scores of the other half only, and its own by what it is itself.
    changed = clean.copy()
    changed[0] = shades([105], [240])[0]
    after = mix_likeness(Means(), changed, mixes, seed=1)
    weights_alone = np.abs(after - before)[1:]
    assert after[0] > before.max() and (weights_alone > 0).any()


def test_a_class_of_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="got 1 and 2; set carrier.gate.share=0"):
        mix_likeness(Means(), shades([1], [2]), shades([1, 2], [3, 4]), seed=0)


def test_share_is_rho_where_the_gate_is_shut_and_rises_to_the_odds() -> None:
    scores = np.random.default_rng(1).permutation(40).astype(float)
    shares = target_share(scores, 0.42, Gate(share=0.25, odds=1.5))
    ordered = shares[scores.argsort()]
    assert ordered[:30] == pytest.approx(0.42, abs=1e-6)
    steps = np.arange(1, 11) / 10 - 0.05
    assert ordered[30:] == pytest.approx(expit(logit(0.42) + (1.5 - logit(0.42)) * steps), abs=1e-6)
    assert target_share(scores, 0.42, Gate(share=0.0)) == pytest.approx(0.42, abs=1e-6)


def gated(images: Any, **gate: Any) -> Any:
    carrier = {"weight": 1, "labels": "replace", "rho": 0.4, "gate": {"share": 0.2, "odds": 1.5, **gate}}
    off = {"exclusion": {"weight": 0}, "bridge": {"weight": 0}}
    scheme = WATERMARKS.build("mea_carrier", carrier=carrier, warmup=0, **off)
    return scheme.stages(scheme.make_key(images, 1), images)


def test_the_main_task_comes_first_and_both_stages_share_the_epochs() -> None:
    first, second = gated(image_set(), part=0.3)
    assert isinstance(first.objective, CrossEntropy)
    assert (first.changes(10), second.changes(10)) == ({"epochs": 3}, {"epochs": 7})
    assert first.changes(1) == second.changes(1) == {"epochs": 1}
    for epochs in range(2, 60):
        assert first.changes(epochs)["epochs"] + second.changes(epochs)["epochs"] == epochs, "longer than a null model"


def test_softened_labels_follow_the_gate_of_each_image() -> None:
    images = image_set(600)
    objective = gated(images)[1].objective
    assert objective.attach(Means(), torch.device("cpu")) == []
    objective.start(context())
    objective.start_epoch(0)
    rho = objective.rho.numpy()
    for label in range(len(NAMES)):
        own = rho[images.labels == label]
        assert (own > 0.5).mean() == pytest.approx(0.15 if label < 2 else 0, abs=0.03)
        assert (own == np.float32(0.4)).mean() == pytest.approx(0.8 if label < 2 else 1, abs=0.01)
    spy, batch = Spy(), main_batch(images)
    terms = objective.terms(spy, batch)
    soft = np.eye(len(NAMES))[batch.labels]
    for k, label in enumerate(batch.labels):
        if label in (0, 1):
            soft[k] = 0
            soft[k, label], soft[k, 2] = 1 - rho[k], rho[k]
    expected = F.cross_entropy(spy.layer(batch.images.flatten(1)), torch.tensor(soft))
    assert (terms["utility"] + terms["carrier"]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_gated_victim_trains_with_the_engine_and_follows_its_seed() -> None:
    images, made = image_set(120), []
    for _ in range(2):
        torch.manual_seed(0)
        model: Any = Means()
        for stage in gated(images):
            train(
                model,
                images.images,
                images.labels,
                stage.objective,
                seed=1,
                epochs=2,
                batch_size=40,
                learning_rate=0.05,
            )
        made.append(model.head.weight.detach().clone())
    assert torch.equal(*made) and (stage.objective.rho > 0.5).any()


def test_a_network_without_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a network with features"):
        gated(image_set())[1].objective.attach(Spy(), torch.device("cpu"))


@pytest.mark.parametrize(
    "options,match",
    [
        ({"gate": {"share": 0.5}}, "carrier.gate.share=0.5"),
        ({"gate": {"share": -0.1}}, "carrier.gate.share=-0.1"),
        ({"gate": {"odds": float("nan")}}, "carrier.gate.odds=nan"),
        ({"gate": {"part": 1.0}}, "carrier.gate.part=1.0"),
        ({"gate": {"mixes": 0}}, "carrier.gate.mixes=0"),
        ({"labels": "extra"}, "set carrier.labels=replace"),
        ({"weight": 0}, "carrier.weight above 0"),
    ],
)
def test_an_impossible_gate_is_refused(options: Any, match: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        WATERMARKS.build("mea_carrier", carrier=options)
