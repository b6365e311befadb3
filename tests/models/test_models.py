"""Every network at several image sizes: shapes, the split into features and head, gradients, normalisation, sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.models import MODELS
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model

SHAPES = [(1, 8, 8), (3, 16, 16), (1, 28, 28), (3, 32, 32), (4, 33, 47), (3, 72, 100)]
SMALL = {"width": 0.1}


def images(shape: tuple[int, int, int], count: int = 3) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODELS.names())
def test_logits_come_from_the_head_on_the_features(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = build_model(name, shape, 7, SMALL).eval()
    x = images(shape)
    with torch.no_grad():
        features, logits = model.features(x), model(x)
    assert features.shape == (3, model.feature_size)
    assert logits.shape == (3, 7)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, model.head(features))
    assert not torch.equal(logits[0], logits[1]), "the answer must depend on the image"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 96, 96)], ids=str)
@pytest.mark.parametrize("name", MODELS.names())
def test_gradient_reaches_every_parameter(name: str, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model = build_model(name, shape, 5, {"width": 0.25}).train()
    loss = nn.functional.cross_entropy(model(images(shape, 8)), torch.arange(8) % 5)
    loss.backward()  # type: ignore[no-untyped-call]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", MODELS.names())
def test_normalisation_lies_inside_and_is_saved(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, (3, 16, 16), 4, SMALL).eval()
    x = images((3, 16, 16))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.125)
    with torch.no_grad():
        model.set_normalisation((0, 0, 0), (1, 1, 1))
        by_hand = model((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
        model.set_normalisation(mean, std)
        assert torch.allclose(model(x), by_hand, atol=1e-5)
        copy = build_model(**model.spec).eval()
        copy.load_state_dict(model.state_dict())
        assert torch.equal(copy(x), model(x))
    assert {"mean", "std"} <= set(model.state_dict())


@pytest.mark.parametrize("name", MODELS.names())
def test_the_spec_holds_every_parameter_and_rebuilds_the_network(name: str) -> None:
    model = build_model(name, (1, 12, 12), 3, SMALL)
    assert model.spec["name"] == name
    assert set(model.spec["params"]) == {parameter.name for parameter in MODELS.parameters(name)}
    assert model.spec["params"]["width"] == 0.1
    again = build_model(**model.spec)
    assert again.spec == model.spec
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


def test_a_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_model("vgg_like", (1, 8, 8), 3, SMALL).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("name", MODELS.names())
def test_fresh_networks_keep_the_scale_and_commit_to_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, (3, 32, 32), 10, {"width": 0.25}).train()
    with torch.no_grad():
        features, logits = model.features(images((3, 32, 32), 16)), model(images((3, 32, 32), 16))
    assert 0.05 < features.std() < 20
    assert logits.softmax(1).max() < 0.5


def count(model: ImageModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_vgg_like_is_the_authors_network_at_32() -> None:
    model = build_model("vgg_like", (3, 32, 32), 10)
    sizes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert sizes == [
        (64, 3, 3, 3),
        (64, 64, 3, 3),
        (128, 64, 3, 3),
        (128, 128, 3, 3),
        (256, 3200),
        (256, 256),
        (10, 256),
    ]
    convolutions = 3 * 64 * 9 + 64 + 64 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 128 * 128 * 9 + 128
    assert count(model) == convolutions + 3200 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10
    assert all(m.padding == (0, 0) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_vgg_like_has_no_padding_at_28_and_pads_small_images() -> None:
    at28 = build_model("vgg_like", (1, 28, 28), 10)
    assert [p.shape[1] for p in at28.parameters() if p.ndim == 2][0] == 128 * 4 * 4
    at16 = build_model("vgg_like", (1, 16, 16), 10)
    assert all(m.padding == (1, 1) for m in at16.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "size", "classes", "parameters"),
    [
        # Published or torchvision's counts; for small stems the 7 x 7 convolution is exchanged for a 3 x 3 one.
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet50", 224, 1000, 25_557_032),
        ("resnet18", 32, 10, 11_173_962),
        ("alexnet", 224, 1000, 61_100_840),
    ],
)
def test_parameter_counts_match_the_published_networks(name: str, size: int, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(MODELS.resolve(name)((3, size, size), classes)) == parameters


def test_vggface_is_vgg16_at_224() -> None:
    with torch.device("meta"):
        assert count(MODELS.resolve("vggface")((3, 224, 224), 1000)) == 138_357_544


@pytest.mark.parametrize("name", MODELS.names())
def test_too_small_an_image_is_refused_with_the_smallest_size(name: str) -> None:
    with pytest.raises(ConfigError, match="at least 8 x 8"):
        build_model(name, (3, 7, 32), 10)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2 classes"):
        build_model("vgg_like", (3, 32, 32), 1)
    with pytest.raises(ConfigError, match="width"):
        build_model("vgg_like", (3, 32, 32), 10, {"widht": 0.5})
    model = build_model("vgg_like", (3, 16, 16), 10, SMALL)
    with pytest.raises(ConfigError, match="3 means"):
        model.set_normalisation([0.5], [0.5])
    with pytest.raises(ConfigError, match="positive"):
        model.set_normalisation([0.5] * 3, [0.5, 0, 0.5])
    for mean, std in (([0.5, float("nan"), 0.5], [0.5] * 3), ([0.5] * 3, [0.5, float("inf"), 0.5])):
        with pytest.raises(ConfigError, match="must be finite"):
            model.set_normalisation(mean, std)


@pytest.mark.parametrize("value", [0, -1.0, 16.5, float("nan"), float("inf"), 10**400, "wide", None])
@pytest.mark.parametrize("name", MODELS.names())
def test_a_width_out_of_range_is_refused_when_the_config_is_read(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="width="):
        build(ExperimentConfig, {"victim": {"model": {"name": name, "width": value}}})


@pytest.mark.parametrize("value", [1.5, 1, -0.1, float("nan"), True])
@pytest.mark.parametrize("name", [name for name in MODELS.names() if "dropout" in MODELS.check(name, {})])
def test_a_dropout_out_of_range_is_refused_when_the_config_is_read(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="dropout="):
        build(ExperimentConfig, {"thief": {"model": {"name": name, "dropout": value}}})
