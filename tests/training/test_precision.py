"""The arithmetic of a step: float16 with a loss scale, TF32, and what `auto` means on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyword_training import train
from torch import Tensor, nn

from mea_ray.config import TrainingConfig, build
from mea_ray.training import device as devices
from mea_ray.training import engine, precision, stack
from mea_ray.training.objective import Batch, CrossEntropy
from mea_ray.training.snapshot import SnapshotFile

PLAIN: dict[str, Any] = {"augment": (), "channels_last": False, "schedule": "constant", "batch_size": 16}
RANDOM = np.random.default_rng(0)
IMAGES, LABELS = RANDOM.integers(0, 256, (48, 1, 6, 6), dtype=np.uint8), RANDOM.integers(4, size=48)


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.reshape(-1) for value in model.parameters()]).detach()


class Recorder(CrossEntropy):
    """Cross-entropy that keeps the positions and the type of what the network returned."""

    def __init__(self) -> None:
        super().__init__()
        self.indices, self.dtypes = list[Tensor](), set[torch.dtype]()

    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.dtypes.add(outputs.dtype)
        return super().losses(outputs, targets)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.indices.append(batch.indices)
        return super().inputs(batch)


class OwnBackward(Recorder):
    """Computes its gradient itself."""

    def backward(self, terms: dict[str, Tensor], model: nn.Module) -> Tensor:
        return super().backward(terms, model)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_float16_is_torchs_scaled_loop(clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 2)  # the scale grows until gradients overflow, and is cut
    recorder, model, reference = Recorder(), make_model(), make_model()
    report = train(model, IMAGES, LABELS, recorder, seed=1, epochs=12, precision="float16", gradient_clip=clip, **PLAIN)
    optimiser = torch.optim.Adam(reference.parameters(), lr=1e-3, fused=True)
    scaler, scales, losses = torch.amp.GradScaler("cpu", growth_interval=2), list[float](), list[float]()
    x, y = torch.from_numpy(IMAGES).float() / 255, torch.from_numpy(LABELS)
    for indices in recorder.indices:
        scales.append(scaler.get_scale())
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(reference(x[indices]).float(), y[indices])
        losses.append(float(loss.detach()))
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimiser)
            nn.utils.clip_grad_norm_(reference.parameters(), clip)
        scaler.step(optimiser)
        scaler.update()
    assert recorder.dtypes == {torch.float16}
    assert any(after < before for before, after in zip(scales, scales[1:], strict=False)), "some gradients overflowed"
    assert torch.equal(flat(model), flat(reference))
    assert report.history[-1]["loss"] == pytest.approx(np.mean(losses[-3:]), rel=1e-6)
    assert report.history[-1]["utility"] == pytest.approx(np.mean(losses[-3:]), rel=1e-6)


def test_float16_agrees_with_float32_up_to_rounding() -> None:
    half, full = make_model(), make_model()
    for model, name in ((half, "float16"), (full, "float32")):
        train(model, IMAGES, LABELS, CrossEntropy(), seed=1, epochs=4, precision=name, optimizer="sgd", **PLAIN)
    difference = (flat(half) - flat(full)).abs().max() / flat(full).abs().max()
    assert 0 < difference < 2e-3


def test_a_killed_training_in_float16_goes_on_with_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 2)

    class Killed(Exception):
        """Stands for the death of the process."""

    def run(die: bool, snapshots: SnapshotFile | None) -> tuple[Tensor, list[float]]:
        def on_epoch(record: dict[str, Any]) -> None:
            if die and record["epoch"] == 7:
                raise Killed

        model, settings = make_model(), {**PLAIN, "epochs": 12, "precision": "float16"}
        report = train(
            model, IMAGES, LABELS, CrossEntropy(), seed=1, on_epoch=on_epoch, snapshots=snapshots, **settings
        )
        return flat(model), [record["loss"] for record in report.history]

    weights, losses = run(False, None)
    with pytest.raises(Killed):
        run(True, SnapshotFile(tmp_path / "state", every_s=0))
    state = SnapshotFile(tmp_path / "state", every_s=0).load()
    assert state is not None and state["scaler"]["scale"] != 2.0**16, "a scale that a fresh scaler would not have"
    resumed, again = run(False, SnapshotFile(tmp_path / "state", every_s=0))
    assert torch.equal(resumed, weights) and again == losses


def test_an_objective_that_does_more_than_sum_its_losses_stays_in_float32() -> None:
    own, plain = OwnBackward(), Recorder()
    for objective in (own, plain):
        train(make_model(), IMAGES, LABELS, objective, seed=1, epochs=1, precision="float16", **PLAIN)
    assert own.dtypes == {torch.float32} and plain.dtypes == {torch.float16}
    assert not own.sums_terms and plain.sums_terms


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16), ((6, 1), None)],
)
def test_auto_is_what_a_gpu_computes_fast(
    capability: tuple[int, int], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: capability)
    assert precision.autocast_dtype("auto", torch.device("cuda")) == dtype
    assert precision.autocast_dtype("float32", torch.device("cuda")) is None
    assert precision.autocast_dtype("tf32", torch.device("cuda")) is None


def test_tf32_is_for_a_gpu_and_ends_with_the_training() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(RuntimeError, match="stop"), devices.tf32(torch.device("cuda"), enabled=True):
        assert torch.get_float32_matmul_precision() == "high"
        raise RuntimeError("stop")
    assert torch.get_float32_matmul_precision() == "highest"
    for where, enabled in (("cpu", True), ("cuda", False)):
        with devices.tf32(torch.device(where), enabled=enabled):
            assert torch.get_float32_matmul_precision() == "highest"
    exact, rounded = make_model(), make_model()
    for model, name in ((exact, "float32"), (rounded, "tf32")):
        train(model, IMAGES, LABELS, CrossEntropy(), seed=1, epochs=1, precision=name, **PLAIN)
    assert torch.equal(flat(exact), flat(rounded)), "a CPU has no TF32"


def test_networks_with_a_loss_scale_are_not_stacked(caplog: pytest.LogCaptureFixture) -> None:
    training = build(TrainingConfig, {**PLAIN, "epochs": 1, "precision": "float16", "stack": 2})
    models, alone = [make_model(), make_model()], make_model()
    due = [stack.Training(model, IMAGES, LABELS, CrossEntropy(), training, seed=1) for model in models]
    stack.train_together(due)
    assert "a loss scale of its own" in caplog.text
    stack.Training(alone, IMAGES, LABELS, CrossEntropy(), training, seed=1).run()
    assert all(torch.equal(flat(model), flat(alone)) for model in models)


def test_sgd_survives_an_overflow_in_its_very_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**34)
    monkeypatch.setattr(engine, "loss_scale", lambda where, dtype: scaler)
    model = make_model()
    train(model, IMAGES, LABELS, CrossEntropy(), seed=1, epochs=20, precision="float16", optimizer="sgd", **PLAIN)
    assert scaler.get_scale() < 2.0**34 and torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), flat(make_model()))
