"""A GPU without memory for a batch or for the training set; the lack is simulated, so that a CPU shows it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyword_training import train
from torch import Tensor, nn

from mea_ray.core.errors import DeviceOutOfMemory
from mea_ray.training import device as devices
from mea_ray.training.loader import Loader
from mea_ray.training.objective import Batch, CrossEntropy

PLAIN: dict[str, Any] = {"augment": (), "precision": "float32", "channels_last": False, "schedule": "constant"}
CPU = torch.device("cpu")


def make_data(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 1, 6, 6), dtype=np.uint8), rng.integers(4, size=count)


def make_model(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = nn.BatchNorm2d(6) if norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(1, 6, 3), middle, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(96, 4))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.reshape(-1) for value in model.parameters()]).detach()


class Small(CrossEntropy):
    """Cross-entropy on a GPU that has memory for so many images; from the start, or at a few calls only."""

    def __init__(self, most: int, at: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.most, self.at, self.sizes, self.calls = most, at, list[int](), 0

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms = super().terms(model, batch)
        noise = torch.rand((), generator=self.context.generator)
        self.calls += 1
        self.sizes.append(len(batch.indices))
        if len(batch.indices) > self.most and (not self.at or self.calls in self.at):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {**terms, "noise": 0.0 * noise}


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_memory_that_was_short_once_changes_nothing(accumulate_steps: int) -> None:
    data, settings = make_data(40), {**PLAIN, "epochs": 2, "batch_size": 8, "accumulate_steps": accumulate_steps}
    plain, short, objective = make_model(0.3), make_model(0.3), Small(0, at=(2, 9))
    train(plain, *data, Small(99), seed=1, **settings)
    report = train(short, *data, objective, seed=1, **settings)
    assert torch.equal(flat(plain), flat(short)), "what is drawn at random is drawn again"
    assert report.parts == 1 and objective.calls == 10 + 2 * accumulate_steps
    assert report.history[0]["loss"] == pytest.approx(report.history[0]["utility"])


def test_batches_that_never_fit_are_learnt_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    data, settings = make_data(40), {**PLAIN, "epochs": 2, "batch_size": 16}
    plain, short, objective = make_model(), make_model(), Small(4)
    whole = train(plain, *data, CrossEntropy(), seed=1, **settings)
    with caplog.at_level(logging.WARNING):
        report = train(short, *data, objective, seed=1, **settings)
    torch.testing.assert_close(flat(short), flat(plain), rtol=0, atol=1e-5)
    assert [epoch["loss"] for epoch in report.history] == pytest.approx([epoch["loss"] for epoch in whole.history])
    assert report.parts == 4 and report.images == 80
    # The first batch twice whole, then in halves of which the first fails, then in quarters; the last batch has 8.
    assert objective.sizes == [16, 16, 8, *4 * [4], *4 * [4], *4 * [2], *8 * [4], *4 * [2]]
    assert [f"in {parts} parts from here on" in line for parts, line in zip((2, 4), caplog.messages, strict=True)]


def test_the_gradients_are_those_of_a_plain_loop() -> None:
    images, labels = make_data(12)
    model, reference = make_model(), make_model()
    seen: list[np.ndarray] = []

    class Recorded(Small):
        def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            terms = super().terms(model, batch)
            seen.append(batch.indices.numpy())
            return terms

    train(model, images, labels, Recorded(5), seed=1, epochs=1, batch_size=12, optimizer="sgd", momentum=0.0, **PLAIN)
    order = np.concatenate(seen)
    assert sorted(order) == list(range(12)) and [len(part) for part in seen] == [3, 3, 3, 3]
    inputs = torch.from_numpy(images[order]).float() / 255
    F.cross_entropy(reference(inputs), torch.from_numpy(labels[order])).backward()
    torch.optim.SGD(reference.parameters(), lr=1e-3).step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "least", "sizes"),
    [
        (False, 1, [8, 8, 4, 2, 1]),
        (True, 1, [8, 8, 4, 2]),  # batch normalisation cannot learn from one image
        (False, 2, [8, 8]),  # parts of a contrastive loss are another loss
    ],
)
def test_it_ends_with_the_smallest_parts(norm: bool, least: int, sizes: list[int]) -> None:
    objective = Small(0)
    objective.least_batch = least
    with pytest.raises(DeviceOutOfMemory, match=r"a batch of 8 images.*lower training\.batch_size") as caught:
        train(make_model(norm=norm), *make_data(8), objective, seed=1, epochs=1, batch_size=8, **PLAIN)
    assert objective.sizes == sizes
    assert caught.value.__context__ is None, "its traceback would keep tensors alive"


def test_lack_of_memory_elsewhere_is_typed_and_what_is_left_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(devices, "free_memory", lambda: freed.append(True))
    with (
        pytest.raises(DeviceOutOfMemory, match=r"at a step of the trial \(CUDA out of memory\)"),
        devices.device_memory("a step of the trial"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")
    with pytest.raises(KeyError), devices.device_memory("a step"):
        raise KeyError
    assert freed == [True, True]


def test_a_share_of_a_gpu_limits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (600, 1000))
    monkeypatch.setattr(devices, "_share", {})
    cuda = torch.device("cuda")
    for share in (0.0, 0.25, 1.0, 2.0):
        devices.use_gpus(share)
    assert limits == pytest.approx([0.25 * 0.95])
    assert devices.fits(300, cuda) and not devices.fits(301, cuda), "half of what is free"
    devices.use_gpus(0.25)
    assert devices.fits(125, cuda) and not devices.fits(126, cuda), "half of the share"
    assert devices.fits(10**15, CPU)


def test_a_training_set_that_does_not_fit_is_sent_by_batches(tmp_path: Path) -> None:
    images, labels = make_data(23)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")

    def batches(images: np.ndarray, resident: bool | None) -> list[list[Tensor]]:
        order = torch.Generator().manual_seed(5)
        loader = Loader(images, labels, CPU, 4, order, least=1, resident=resident)
        return [[*batch] for _ in range(2) for batch in loader]

    expected = batches(images, None)
    for actual in (batches(images, False), batches(mapped, False)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
