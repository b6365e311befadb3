from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import Viewing
from torch import nn

from mea_ray.blackbox.passes import FixedShapePasses
from mea_ray.blackbox.policies import Probabilities
from mea_ray.core.errors import ConfigError
from mea_ray.evaluation import metrics
from mea_ray.models import MODELS
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.models.foreign import ForeignModel, Preprocessing, check_trainable
from mea_ray.training.checkpoint import load_model, save_model

SHAPE = (1, 12, 12)


def build(name: str, shape: tuple[int, int, int] = SHAPE, classes: int = 10, **params: Any) -> ImageModel:
    return build_model(f"foreign_networks:{name}", shape, classes, params)


def test_a_module_from_outside_is_listed_checked_and_built_by_its_name() -> None:
    model = build("Viewing", width=4)
    assert isinstance(model, ForeignModel) and isinstance(model.net, Viewing)
    assert model.net.m1[0].out_channels == 4 and model.feature_size == 32
    listed = {p.name: p.default for p in MODELS.parameters("foreign_networks:Viewing")}
    assert listed["width"] == 8 and listed["preprocessing.channel_order"] == "RGB"
    assert not {"num_classes", "in_channels"} & set(listed), "what the data decides is no option"
    with pytest.raises(ConfigError, match=r"no parameter 'widht'; did you mean 'width'\?"):
        build("Viewing", widht=4)
    with pytest.raises(ConfigError, match=r"width='wide'"):
        build("Viewing", width="wide")


def test_the_logits_are_the_modules_and_the_features_are_what_its_last_layer_receives() -> None:
    model = build("Viewing")
    model.set_normalisation([0.25], [0.5])
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():
        expected = model.net((x - 0.25) / 0.5)  # type: ignore[operator]
        assert torch.equal(model(x), expected)
        assert torch.allclose(model.head(model.features(x)), expected, atol=1e-6)
    model.head = nn.Linear(32, 4)
    assert model(x).shape == (3, 4) and model.net.m2[2].out_features == 4  # type: ignore[index, union-attr]


@pytest.mark.parametrize("name", ["Viewing", "ViewingImageModel"])
def test_a_network_that_flattens_with_view_gets_contiguous_images_everywhere(name: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)
    model = build(name)
    assert not model.channels_last
    inner = model.net if isinstance(model, ForeignModel) else model
    inner.to(memory_format=torch.channels_last)
    with torch.no_grad(), pytest.raises(RuntimeError, match="view size is not compatible"):
        inner(torch.rand(2, *SHAPE).contiguous(memory_format=torch.channels_last))
    model.to(memory_format=torch.contiguous_format)
    logits = metrics.logits(model, images)
    passes = FixedShapePasses(model, SHAPE, Probabilities(), pass_images=4)
    assert np.allclose(passes.answer([images])[0], torch.from_numpy(logits).softmax(1), atol=1e-6)
    assert build("small").channels_last and build_model("vgg_like", SHAPE, 10).channels_last


def test_a_network_of_a_fixed_size_gets_images_of_that_size() -> None:
    with pytest.raises(ConfigError, match=r"cannot take images of shape \(1, 12, 12\).*preprocessing.size"):
        build("FixedSize")
    model = build("FixedSize", preprocessing={"size": [20, 20]})
    assert model(torch.rand(2, *SHAPE)).shape == (2, 10)


def test_the_preprocessing_is_applied_as_declared() -> None:
    x = torch.rand(2, 3, 8, 8)
    given = {"channel_order": "BGR", "value_range": [0, 255], "mean": [104, 117, 123], "deviation": [1, 2, 4]}
    model = build("ExactInput", (3, 8, 8), 3, preprocessing=given)
    expected = (255 * x.flip(1) - torch.tensor([104, 117, 123]).view(3, 1, 1)) / torch.tensor([1, 2, 4]).view(3, 1, 1)
    assert torch.allclose(model(x), expected.mean((2, 3)), atol=1e-3)
    model.set_normalisation([0, 0, 0], [1, 1, 1])
    assert torch.allclose(model(x), expected.mean((2, 3)), atol=1e-3), "what is declared stays"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Pair", "returns a tuple of 2; it must return logits .* alone"),
        ("Probabilities", "returns probabilities.*leave out its softmax"),
        ("TooFew", r"returns \(2, 7\) for 2 images of 10 classes"),
        ("NeedsArgument", "needs depth, which has no default"),
    ],
)
def test_what_returns_no_logits_is_refused_with_a_remedy(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name)


def test_auxiliary_outputs_in_training_are_detected_before_it() -> None:
    model = build("WithAuxiliary")
    with pytest.raises(ConfigError, match="returns a tuple of 2"):
        check_trainable(model)
    check_trainable(build("Viewing"))


def test_a_network_without_features_says_what_needs_them() -> None:
    model = build("NoFeatures")
    assert not model.has_features and model(torch.rand(2, *SHAPE)).shape == (2, 10)
    with pytest.raises(ConfigError, match="has no features"):
        model.features(torch.rand(2, *SHAPE))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": [0.5]}, "mean and deviation belong together"),
        ({"value_range": [0, 255]}, "needs mean and deviation"),
        ({"value_range": [1, 0]}, "must rise"),
        ({"mean": [0], "deviation": [0]}, "must be positive"),
        ({"mean": [0, 0], "deviation": [1, 1]}, "must hold 1 or 1 values"),
        ({"chanel_order": "BGR"}, "unknown key"),
    ],
)
def test_a_preprocessing_that_cannot_be_meant_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build("Viewing", preprocessing=given)


def test_building_draws_nothing_beside_the_weights_and_a_checkpoint_rebuilds_it(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = build("Viewing", preprocessing={"mean": [0.5], "deviation": [0.5]})
    after = torch.rand(1)
    torch.manual_seed(0)
    net = Viewing()
    assert torch.equal(net.m2[2].weight, model.net.m2[2].weight) and torch.equal(torch.rand(1), after)  # type: ignore
    save_model(tmp_path, model, {})
    again, _ = load_model(tmp_path)
    x = torch.rand(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    assert isinstance(again, ForeignModel) and again.preprocessing == Preprocessing(mean=(0.5,), deviation=(0.5,))


def test_the_table_travels_between_processes() -> None:
    assert pickle.loads(pickle.dumps(MODELS)).adapt == MODELS.adapt
