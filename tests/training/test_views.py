from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.core.errors import ConfigError
from mea_ray.pretext import PRETEXTS
from mea_ray.training.views import Views

STILL: dict[str, Any] = {"crop_scale": (1.0, 1.0), "flip": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0), "grey": 0.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 64, channels: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=generator(seed))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_view_has_the_images_shape_and_range_and_follows_its_seed(channels: int) -> None:
    images = pictures(channels=channels)
    before = images.clone()
    first, again, other = (Views()(images, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == images.shape and first.dtype == torch.float32
    assert first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(images, before)


def test_with_everything_off_a_view_is_the_image() -> None:
    images = pictures()
    assert torch.allclose(Views(**STILL)(images, generator()), images, atol=1e-6)


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    images = pictures(400)
    views = Views(**{**STILL, "flip": 0.5})(images, generator())
    mirrored = (views - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    same = (views - images).abs().amax((1, 2, 3)) < 1e-5
    assert (mirrored ^ same).all()
    assert 150 < int(mirrored.sum()) < 250


def test_a_crop_shows_a_part_of_the_image_of_the_drawn_size() -> None:
    # Pixels are their own positions, so that a crop tells where it was taken.
    line = (torch.arange(32) + 0.5) / 32
    images = torch.stack([line.expand(32, 32), line[:, None].expand(32, 32)]).expand(500, 2, 32, 32)
    views = Views(**{**STILL, "crop_scale": (0.25, 0.25)})(images, generator())
    # Between the centres of the second and the last but one pixel lie 29 / 32 of a crop's side; no border blurs these.
    wide, tall = views[:, 0, 16, 30] - views[:, 0, 16, 1], views[:, 1, 30, 16] - views[:, 1, 1, 16]
    area = (wide * tall) / (29 / 32) ** 2
    assert torch.allclose(area, torch.full((500,), 0.25), atol=0.02)
    assert 0.7 < float((wide / tall).min()) < 0.8 and 1.25 < float((wide / tall).max()) < 1.4
    left = views[:, 0, 16, 1]
    assert float(left.min()) < 0.1 and float(left.max()) > 0.4  # anywhere in the image


def test_colours_change_as_documented_one_image_at_a_time() -> None:
    """Against pixel-by-pixel arithmetic with the factors that the same stream of random numbers gives."""
    images = 0.3 + 0.3 * pictures(20, size=5)  # nothing is clipped
    most = (0.2, 0.3, 0.4, 0.0)
    views = Views(**{**STILL, "jitter": most}, jitter_probability=0.5)(images, generator(7))
    stream = generator(7)
    changed = torch.rand(20, generator=stream) < 0.5
    factors = [1 - m + 2 * m * torch.rand(20, generator=stream) for m in most[:3]]
    luma = np.array([0.299, 0.587, 0.114])
    for index in range(20):
        pixels = images[index].permute(1, 2, 0).numpy().astype(np.float64)
        if changed[index]:
            bright, contrast, saturation = (float(f[index]) for f in factors)
            pixels = pixels * bright
            pixels = contrast * pixels + (1 - contrast) * (pixels @ luma).mean()
            pixels = saturation * pixels + (1 - saturation) * (pixels @ luma)[..., None]
        np.testing.assert_allclose(views[index].permute(1, 2, 0).numpy(), pixels, atol=1e-5)
    assert 0 < int(changed.sum()) < 20


def test_the_hue_turns_and_the_lightness_stays() -> None:
    images = torch.tensor([0.6, 0.3, 0.3])[None, :, None, None].expand(200, 3, 2, 2)
    views = Views(**{**STILL, "jitter": (0.0, 0.0, 0.0, 0.25)}, jitter_probability=1.0)(images, generator())
    luma = torch.tensor([0.299, 0.587, 0.114])
    assert torch.allclose((views * luma[:, None, None]).sum(1), (images * luma[:, None, None]).sum(1), atol=2e-3)
    hues = [colorsys.rgb_to_hsv(*view[:, 0, 0].tolist())[0] for view in views]
    turned = [(hue + 0.5) % 1 - 0.5 for hue in hues]
    assert min(turned) < -0.15 and max(turned) > 0.15


def test_a_grey_image_has_one_lightness_in_all_channels() -> None:
    images = pictures(100)
    views = Views(**{**STILL, "grey": 0.3})(images, generator())
    grey = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-5
    assert 15 < int(grey.sum()) < 45
    lightness = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert torch.allclose(views[grey][:, 0], lightness[grey], atol=1e-5)
    assert torch.allclose(views[~grey], images[~grey], atol=1e-5)


@pytest.mark.parametrize("pretext", ["simclr", "moco", "byol"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.9, 0.5)),
        ("flip", 1.5),
        ("grey", -0.1),
        ("jitter", (0.4, 0.4, 0.4, 0.6)),
        ("jitter", (1.4, 0.4, 0.4, 0.1)),
    ],
)
def test_a_setting_out_of_range_is_refused(setting: str, value: object, pretext: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        PRETEXTS.build(pretext, **{setting: value})


def test_a_probability_that_is_no_setting_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="jitter_probability"):
        Views(jitter_probability=2.0)
