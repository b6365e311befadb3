"""Every geometry against a loop over pixels."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.core.errors import ConfigError
from mea_ray.watermarks.combiners import COMBINERS
from mea_ray.watermarks.combiners.base import to_uint8
from mea_ray.watermarks.combiners.halves import CropPaste

FILL = (0.2, 0.4, 0.6)
SIZES = [(3, 32, 32), (3, 33, 33), (1, 8, 8), (3, 24, 40)]
GEOMETRIES = sorted(set(COMBINERS.names()) - {"autoencoder"})


def pair(shape: Any, count: Any = 40, seed: Any = 0) -> Any:
    """Images whose every pixel is different, A below 0.5 and B above."""
    rng = np.random.default_rng(seed)
    size = count * int(np.prod(shape))
    values = (rng.permutation(2 * size) / (2 * size)).astype(np.float32)
    values.sort()
    a, b = rng.permutation(values[:size]), rng.permutation(values[size:])
    return torch.from_numpy(a.reshape(count, *shape)), torch.from_numpy(b.reshape(count, *shape))


def build(name: Any, shape: Any, **options: Any) -> Any:
    return COMBINERS.build(name, shape, FILL[: shape[0]], 7, **options)


def mix(name: Any, shape: Any, count: Any = 40, seed: Any = 0, **options: Any) -> Any:
    a, b = pair(shape, count)
    return a.numpy(), b.numpy(), build(name, shape, **options)(a, b, torch.Generator().manual_seed(seed)).numpy()


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_shape_range_inputs_untouched_and_seeded(name: Any, shape: Any) -> None:
    a, b = pair(shape)
    before = a.clone(), b.clone()
    combiner = build(name, shape)
    one = combiner(a, b, torch.Generator().manual_seed(3))
    two = build(name, shape)(a, b, torch.Generator().manual_seed(3))
    assert one.shape == a.shape and one.dtype == torch.float32
    assert one.min() >= 0 and one.max() <= 1
    assert torch.equal(one, two)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def rows_of(mixed: Any, first: Any, second: Any, h: Any, jitter: Any) -> Any:
    """All (cut, start in first, start in second) that explain one image of halves, by the authors' loops."""
    collected = []
    half = h // 2
    for j in range(-jitter, jitter + 1):
        cut = half + j
        for p1, p2 in itertools.product(range(h - cut), range(cut)):
            expected = np.empty_like(mixed)
            for row in range(h):
                expected[:, row] = first[:, p1 + row] if row < cut else second[:, p2 + row - cut]
            if np.array_equal(expected, mixed):
                collected.append((j, p1, p2))
    return collected


@pytest.mark.parametrize("name,axis", [("crop_paste", 1), ("top_bottom", 1), ("left_right", 2)])
@pytest.mark.parametrize("size", [8, 13])
def test_halves_are_the_authors_rows(name: Any, axis: Any, size: Any) -> None:
    a, b, mixed = mix(name, (1, size, size), count=30)
    jitter = round(3 * size / 32)
    orders = set()
    for x, y, z in zip(a, b, mixed, strict=True):
        x, y, z = (np.moveaxis(v, axis, 1) for v in (x, y, z))
        ways = [(o, w) for o, (p, q) in enumerate([(x, y), (y, x)]) for w in rows_of(z, p, q, size, jitter)]
        assert len(ways) == 1
        orders.add(ways[0][0])
    assert orders == {0, 1}


def test_halves_draw_every_cut_and_offset_of_the_authors_ranges() -> None:
    # 32 pixels: j in {-3..3}, p1 in {0..15-j}, p2 in {-j..15}: the code's own formulas, on an image that counts rows.
    count = 6000
    row = torch.arange(32).float()[None, None, :, None].expand(count, 1, 32, 1)
    mixed = CropPaste((1, 32, 32), (0.0,), 0, order="fixed")(row, row + 100, torch.Generator().manual_seed(0))[
        :, 0, :, 0
    ]
    seen = set()
    for line in mixed.numpy().astype(int):
        cut = int((line < 100).sum())
        j = cut - 16
        assert (line[:cut] == line[0] + np.arange(cut)).all() and (line[cut:] == line[cut] + np.arange(32 - cut)).all()
        assert 0 <= line[0] <= 15 - j and -j <= line[cut] - 100 - j <= 15
        seen.add((j, "first", line[0]))
        seen.add((j, "second", line[cut] - 100))
    every = {(j, "first", p) for j in range(-3, 4) for p in range(16 - j)}
    every |= {(j, "second", p + j) for j in range(-3, 4) for p in range(-j, 16)}
    assert seen == every


def test_fixed_offsets_leave_each_half_in_its_place() -> None:
    a, b, mixed = mix("crop_paste", (3, 32, 32), offsets="fixed", order="fixed", jitter=0, orientation="vertical")
    expected = b.copy()
    expected[..., :16] = a[..., :16]
    assert np.array_equal(mixed, expected)


def test_random_orientation_gives_both() -> None:
    a, b = pair((1, 32, 32), 200)
    mixed = (
        build("crop_paste", (1, 32, 32), orientation="random")(a, b, torch.Generator().manual_seed(0)).numpy() >= 0.5
    )
    flat = np.array([(m[0] == m[0, :, :1]).all() for m in mixed])
    upright = np.array([(m[0] == m[0, :1]).all() for m in mixed])
    assert (flat ^ upright).all()
    assert 60 < flat.sum() < 140


def test_ratio_gives_three_tenths_of_the_width() -> None:
    a, b, mixed = mix("ratio", (1, 40, 40), order="fixed", jitter=0)
    assert ((mixed < 0.5).sum(axis=(1, 2, 3)) == 12 * 40).all()


def loop(name: Any, a: Any, b: Any, fill: Any) -> Any:
    channels, h, w = a.shape
    out = np.empty_like(a)
    for c, i, k in itertools.product(range(channels), range(h), range(w)):
        if name == "donut":
            inside = h // 5 <= i < 4 * h // 5 and w // 5 <= k < 4 * w // 5
            out[c, i, k] = a[c, i, k] if inside else b[c, i, k]
        elif name == "hotdog":
            out[c, i, k] = b[c, i, k] if h // 4 <= i < 3 * h // 4 else a[c, i, k]
        elif name == "diagonal":
            out[c, i, k] = a[c, i, k] if k <= w - i - 1 else b[c, i, k] if k >= w - i + 1 else fill[c]
        elif name == "pixel_merge":
            out[c, i, k] = 0.3 * a[c, i, k] + 0.7 * b[c, i, k]
    return out


@pytest.mark.parametrize("name", ["donut", "hotdog", "diagonal", "pixel_merge"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 11, 11)], ids=str)
def test_masks_against_a_loop(name: Any, shape: Any) -> None:
    options = {"alpha": 0.3} if name == "pixel_merge" else {}
    a, b, mixed = mix(name, shape, count=2, order="fixed", **options)
    for x, y, z in zip(a, b, mixed, strict=True):
        np.testing.assert_allclose(z, loop(name, x, y, FILL), atol=1e-7)


def test_a_faded_blend_keeps_its_mean_and_a_part_of_its_contrast() -> None:
    a, b, mixed = mix("pixel_merge", (3, 9, 9), count=3, order="fixed", alpha=0.4, contrast=0.7)
    for x, y, z in zip(a, b, mixed, strict=True):
        blend = 0.4 * x + 0.6 * y
        np.testing.assert_allclose(z, blend.mean() + 0.7 * (blend - blend.mean()), atol=1e-6)


def test_a_contrast_between_two_numbers_is_drawn_for_each_blend() -> None:
    a, b, mixed = mix("pixel_merge", (1, 9, 9), count=300, order="fixed", contrast=[0.4, 0.8])
    blend = 0.5 * a + 0.5 * b
    drawn = [float(np.std(z) / np.std(x)) for x, z in zip(np.asarray(blend), np.asarray(mixed), strict=True)]
    assert 0.4 < min(drawn) < 0.45 and 0.75 < max(drawn) < 0.8 and np.mean(drawn) == pytest.approx(0.6, abs=0.03)
    half = build("pixel_merge", (1, 9, 9), order="fixed", contrast=[0.4, 0.8])
    a, b = (torch.as_tensor(each).bfloat16() for each in (a, b))
    assert half(a, b, torch.Generator()).dtype == torch.bfloat16, "as views are under autocast"


def test_published_bounds_at_32_pixels() -> None:
    a, b, donut = mix("donut", (1, 32, 32), count=1, order="fixed")
    inside = donut[0, 0] < 0.5
    assert inside[6:25, 6:25].all() and inside.sum() == 19 * 19
    a, b, hotdog = mix("hotdog", (1, 32, 32), count=1, order="fixed")
    assert (hotdog[0, 0, 8:24] >= 0.5).all() and (hotdog[0, 0] >= 0.5).sum() == 16 * 32


@pytest.mark.parametrize("name", ["donut", "hotdog", "diagonal", "stripes"])
def test_random_order_swaps_half_of_the_pairs(name: Any) -> None:
    a, b = pair((1, 16, 16), 400)
    options = {"draw": "key"} if name == "stripes" else {}
    fixed = build(name, (1, 16, 16), order="fixed", **options)
    swapped = build(name, (1, 16, 16), order="random", **options)(a, b, torch.Generator().manual_seed(0))
    generator = torch.Generator()
    as_given = (swapped == fixed(a, b, generator)).flatten(1).all(1)
    other_way = (swapped == fixed(b, a, generator)).flatten(1).all(1)
    assert (as_given ^ other_way).all()
    assert 150 < as_given.sum() < 250


@pytest.mark.parametrize("width", [32, 33, 34, 5, 9])
def test_stripes_are_three_and_two_columns_the_remainder_to_the_last(width: Any) -> None:
    a, b, mixed = mix("stripes", (1, 6, width), count=200)
    bounds = [width // 5 * k for k in range(5)] + [width]
    patterns = set()
    for x, y, z in zip(a, b, mixed, strict=True):
        pattern = tuple(np.array_equal(z[..., lo:hi], x[..., lo:hi]) for lo, hi in itertools.pairwise(bounds))
        for of_first, lo, hi in zip(pattern, bounds, bounds[1:], strict=False):
            assert np.array_equal(z[..., lo:hi], (x if of_first else y)[..., lo:hi])
        patterns.add(pattern)
    assert {sum(p) for p in patterns} == {3}
    assert len(patterns) == 10, "all choices of 3 columns of 5 occur"


def test_stripes_of_a_key_are_the_same_for_every_sample_and_differ_between_keys() -> None:
    a, b = pair((1, 10, 10), 20)
    seen = set()
    for seed in range(8):
        combiner = COMBINERS.build("stripes", (1, 10, 10), (0.0,), seed, draw="key")
        first = combiner(a, b, torch.Generator().manual_seed(seed)) < 0.5
        assert (first == first[:1, :, :1]).all()
        seen.add(tuple(first[0, 0, 0].tolist()))
    assert len(seen) > 1


def test_moved_pixels_survive_the_way_through_floats() -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (300, 1, 16, 16), dtype=np.uint8))
    assert torch.equal(to_uint8(images.float() / 255), images)


@pytest.mark.parametrize(
    "name,options",
    [
        ("crop_paste", {"jitter": 16}),
        ("crop_paste", {"jitter": -1}),
        ("crop_paste", {"orientation": "sideways"}),
        ("stripes", {"columns": 99}),
        ("stripes", {"first_columns": 5}),
        ("pixel_merge", {"alpha": 0.0}),
        ("pixel_merge", {"contrast": 0.0}),
        ("pixel_merge", {"contrast": 1.1}),
        ("pixel_merge", {"contrast": [0.7, 0.3]}),
        ("autoencoder", {"alpha": 1.0}),
        ("autoencoder", {"steps": 0}),
        ("ratio", {"share": 1.0}),
        ("donut", {"order": "sometimes"}),
    ],
)
def test_impossible_options_are_refused(name: Any, options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(name, (3, 32, 32), **options)


def test_autoencoder_learns_its_classes_and_blends_latent_vectors() -> None:
    rng = np.random.default_rng(0)
    # Two classes of one number each: a ramp down or across, of varying contrast.
    contrast = rng.uniform(40, 250, (2, 120, 1, 1, 1))
    first = (contrast[0] * np.linspace(0, 1, 9)[:, None] * np.ones(11)).astype(np.uint8)
    second = (contrast[1] * np.linspace(0, 1, 11) * np.ones((9, 1))).astype(np.uint8)
    combiner = COMBINERS.build("autoencoder", (1, 9, 11), (0.0,), 3, steps=150, latent=32)
    tensors = combiner.fit(first, second)
    a, b = (torch.from_numpy(x[:20]).float() / 255 for x in (first, second))
    generator = torch.Generator()
    itself = combiner(a, a, generator)
    assert (itself - a).square().mean() < 0.1 * a.var(), "reconstructs its classes"
    blended = combiner(a, b, generator)
    network = combiner._network
    latent = 0.5 * network.encode(a) + 0.5 * network.encode(b)
    torch.testing.assert_close(blended, network.decode(latent))
    assert (blended - a).abs().mean() > 0.05 and (blended - b).abs().mean() > 0.05
    again = COMBINERS.build("autoencoder", (1, 9, 11), (0.0,), 3, steps=150, latent=32)
    again.load(tensors)
    assert torch.equal(again(a, b, generator), blended)
