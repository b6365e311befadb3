from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mea_ray.config import TrainingConfig
from mea_ray.core.errors import ConfigError, TrainingDiverged
from mea_ray.training import device as devices
from mea_ray.training.augment import Augment, to_float
from mea_ray.training.schedule import factor


def torch_rates(make: type, updates: int, per: int, **settings: object) -> list[float]:
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    scheduler = make(optimiser, **settings)
    rates = []
    for update in range(updates):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if (update + 1) % per == 0:
            scheduler.step()
    return rates


@pytest.mark.parametrize("updates", [20, 37, 200])
@pytest.mark.parametrize("warmup", [0.15, 0.2, 0.5])
def test_one_cycle_is_torchs(updates: int, warmup: float) -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR
    expected = torch_rates(
        scheduler, updates, 1, max_lr=1.0, total_steps=updates, pct_start=warmup, cycle_momentum=False
    )
    ours = [factor(TrainingConfig(warmup_fraction=warmup), update, updates, 0) for update in range(updates)]
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)


def test_cosine_and_step_are_torchs() -> None:
    schedulers = torch.optim.lr_scheduler
    expected = torch_rates(schedulers.CosineAnnealingLR, 30, 1, T_max=30)
    cosine = TrainingConfig(schedule="cosine")
    np.testing.assert_allclose([factor(cosine, update, 30, 0) for update in range(30)], expected, rtol=1e-6)
    expected = torch_rates(schedulers.StepLR, 30, 5, step_size=2, gamma=0.3)
    steps = TrainingConfig(schedule="step", step_epochs=2, step_factor=0.3)
    ours = [factor(steps, update, 30, update // 5) for update in range(30)]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert factor(TrainingConfig(schedule="constant"), 7, 9, 3) == 1.0


@pytest.mark.parametrize("updates", [1, 2, 3, 5])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 0.99])
def test_short_cycles_still_train(updates: int, warmup: float) -> None:
    rates = [factor(TrainingConfig(warmup_fraction=warmup), update, updates, 0) for update in range(updates)]
    assert max(rates) > 0.4 and min(rates) > 0


def plain_augment(image: np.ndarray, top: int, left: int, flip: bool, padding: int) -> np.ndarray:
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect") if padding else image
    crop = padded[:, top : top + height, left : left + width]
    return crop[:, :, ::-1] if flip else crop


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)])
@pytest.mark.parametrize("kinds", [("flip",), ("crop",), ("crop", "flip"), ()])
def test_augmentation_is_the_plain_one(shape: tuple[int, int, int], kinds: tuple[str, ...]) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(256, size=(64, *shape), dtype=np.uint8))
    padding = 3 if "crop" in kinds else 0
    twin = Augment(shape, torch.Generator().manual_seed(7), augment=kinds, crop_padding=3)
    tops, lefts, flips = twin.draw(len(images))
    got = Augment(shape, torch.Generator().manual_seed(7), augment=kinds, crop_padding=3)(images)
    expected = [
        plain_augment(image.numpy(), int(top), int(left), bool(flip), padding)
        for image, top, left, flip in zip(images, tops, lefts, flips, strict=True)
    ]
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), np.stack(expected))
    # a channels-last batch is the same images
    again = Augment(shape, torch.Generator().manual_seed(7), augment=kinds, crop_padding=3)
    np.testing.assert_array_equal(
        again(images.contiguous(memory_format=torch.channels_last)).numpy(), np.stack(expected)
    )


def test_every_offset_and_both_flips_are_drawn_evenly() -> None:
    augment = Augment((1, 8, 8), torch.Generator().manual_seed(0), augment=("flip", "crop"), crop_padding=2)
    tops, lefts, flips = augment.draw(20_000)
    for offsets in (tops, lefts):
        counts = torch.bincount(offsets, minlength=5)
        assert len(counts) == 5 and (counts - 4000).abs().max() < 300
    assert abs(float(flips.float().mean()) - 0.5) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([tops, lefts]).float())[0, 1])) < 0.03


def test_float_images_are_exact_in_both_layouts() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 4, 4, 4)
    for layout in (False, True):
        floats = to_float(images, layout)
        assert torch.equal(floats, images.float() / 255)
        assert floats.is_contiguous(memory_format=torch.channels_last if layout else torch.contiguous_format)


def test_unknown_augmentation_is_named() -> None:
    with pytest.raises(ConfigError, match="'rotate'"):
        Augment((1, 8, 8), torch.Generator(), augment=("rotate",))


def test_native_bfloat16_reads_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {
        "processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n": True,
        "flags\t\t: fpu amx_bf16 amx_tile\n": True,
        "Features\t: fp asimd bf16 i8mm\n": True,
        "flags\t\t: fpu avx2 avx512f\n": False,
    }
    for number, (text, native) in enumerate(cases.items()):
        path = tmp_path / str(number)
        path.write_text(text)
        monkeypatch.setattr(devices, "_CPUINFO", path)
        devices._cpu_bfloat16.cache_clear()
        assert devices.native_bfloat16(torch.device("cpu")) is native
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "none")
    devices._cpu_bfloat16.cache_clear()
    assert devices.native_bfloat16(torch.device("cpu")) is False
    devices._cpu_bfloat16.cache_clear()


def test_threads_and_device() -> None:
    before = torch.get_num_threads()
    try:
        devices.use_threads(0.5)
        assert torch.get_num_threads() == 1
        devices.use_threads(2)
        assert torch.get_num_threads() == 2
        devices.use_threads(1e9)  # libgomp would end the process
        assert torch.get_num_threads() == devices.MOST_THREADS
    finally:
        torch.set_num_threads(before)
    try:
        devices.use_gpus(0)
        assert devices.device().type == "cpu"
    finally:
        devices._share.clear()


@pytest.mark.skipif(devices._glibc() is None, reason="only glibc can be told to keep memory")
def test_retain_freed_memory_is_reused_and_given_back() -> None:
    # In a process of its own: what other tests left in this one's heap would be counted, too.
    script = """
import json, resource
from pathlib import Path
import torch
from mea_ray.training import device as devices

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(16 * 2**20)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

before, fresh = resident(), faults()
with devices.retain_freed_memory():
    faults()
    with devices.retain_freed_memory():
        pass
    reused, resident_within = faults(), resident()  # the inner one gave nothing back
print(json.dumps({"fresh": fresh, "reused": reused, "within": resident_within - before, "after": resident() - before}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    pages = json.loads(done.stdout)
    # Not none: now and then a small block lies behind a freed one, and the next of 64 MiB needs new pages once.
    assert pages["reused"] < pages["fresh"] / 2
    assert pages["within"] > 12_000 and pages["after"] < 8000


def test_divergence_survives_the_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(TrainingDiverged(2, 5, {"utility": float("inf")})))  # noqa: S301
    assert (error.epoch, error.step, error.terms) == (2, 5, {"utility": float("inf")})
    assert "utility=inf" in str(error)
