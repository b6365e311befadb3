from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyword_training import train
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError, DataError, TrainingDiverged
from mea_ray.training.objective import Batch, CrossEntropy, Objective, StepContext
from mea_ray.training.progress import LossMeans

PLAIN: dict[str, Any] = {"augment": (), "precision": "float32", "channels_last": False, "schedule": "constant"}


def make_data(count: int = 96, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images whose class is the quadrant that is bright: easy, but not linearly trivial under noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    images = rng.integers(0, 90, size=(count, 1, 8, 8))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 120
    return images.astype(np.uint8), labels.astype(np.int64)


def make_model(seed: int = 0, dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(96, 4),
        )


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.reshape(-1).float() for value in model.state_dict().values()])


class Recorder(CrossEntropy):
    """Cross-entropy that keeps the batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.batches.append(batch)
        return super().terms(model, batch)


class Loss(Objective):
    """Any loss, for tests."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.function(model, batch)
        return terms


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_gives_the_weights_of_a_plain_loop(optimizer: str) -> None:
    images, labels = make_data(50)
    recorder, model, reference = Recorder(), make_model(), make_model()
    decay: dict[str, Any] = {"weight_decay": 1e-3}
    report = train(
        model, images, labels, recorder, seed=3, epochs=3, batch_size=16, optimizer=optimizer, **PLAIN, **decay
    )
    assert (report.epochs, report.images, len(recorder.batches)) == (3, 150, 12)
    make = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    extra = {"momentum": 0.9} if optimizer == "sgd" else {}
    plain = make(reference.parameters(), lr=1e-3, fused=False, foreach=False, **decay, **extra)
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)
    for batch in recorder.batches:
        torch.testing.assert_close(batch.images, x[batch.indices], rtol=0, atol=0)
        plain.zero_grad()
        F.cross_entropy(reference(x[batch.indices]), y[batch.indices]).backward()
        plain.step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(flat(model), flat(make_model()), atol=1e-4)


def test_every_epoch_sees_every_image_once_in_another_order() -> None:
    images, labels = make_data(37)
    recorder = Recorder()
    train(make_model(), images, labels, recorder, seed=0, epochs=2, batch_size=10, **PLAIN)
    sizes = [len(batch.indices) for batch in recorder.batches]
    assert sizes == [10, 10, 10, 7] * 2
    order = torch.cat([batch.indices for batch in recorder.batches])
    assert sorted(order[:37].tolist()) == sorted(order[37:].tolist()) == list(range(37))
    assert order[:37].tolist() != order[37:].tolist()


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_same_seed_same_weights_and_other_seed_other_weights(precision: str) -> None:
    images, labels = make_data()

    def trained(seed: int) -> Tensor:
        model = make_model(dropout=0.5)
        train(
            model,
            images,
            labels,
            CrossEntropy(),
            seed=seed,
            epochs=2,
            batch_size=32,
            crop_padding=2,
            precision=precision,
        )
        return flat(model)

    first = trained(1)
    torch.manual_seed(99)  # what the caller did with the global generator must not matter
    assert torch.equal(first, trained(1))
    assert not torch.allclose(first, trained(2))


def test_callers_random_state_and_images_are_untouched() -> None:
    images, labels = make_data()
    images.setflags(write=False)
    copy = images.copy()
    torch.manual_seed(5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    train(make_model(dropout=0.5), images, labels, CrossEntropy(), seed=0, epochs=1, crop_padding=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state(legacy=False)["state"]["key"] == numpy_state).all()  # noqa: NPY002
    assert (images == copy).all()


def test_the_objective_cannot_change_the_batches() -> None:
    images, labels = make_data()

    class Greedy(Recorder):
        def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            self.context.augment(torch.from_numpy(images[:7]))
            torch.rand(3, generator=self.context.generator)
            return super().terms(model, batch)

    seen = []
    for recorder in (Recorder(), Greedy()):
        train(make_model(), images, labels, recorder, seed=0, epochs=1, batch_size=20, crop_padding=2)
        seen.append(torch.cat([batch.images for batch in recorder.batches]))
    assert torch.equal(*seen)


def test_the_objective_is_started_and_lent_what_it_needs() -> None:
    images, labels = make_data(40)
    calls: list[Any] = []

    class Watching(CrossEntropy):
        def start(self, context: StepContext) -> None:
            super().start(context)
            mixed = context.augment(torch.from_numpy(images[:5]))
            calls.append((context.epochs, context.steps_per_epoch, context.device.type, mixed.dtype, mixed.shape))
            assert mixed.min() >= 0 and mixed.max() <= 1

        def start_epoch(self, epoch: int) -> None:
            calls.append(epoch)

    train(make_model(), images, labels, Watching(), seed=0, epochs=2, batch_size=16, crop_padding=2)
    assert calls == [(2, 3, "cpu", torch.float32, (5, 1, 8, 8)), 0, 1]


def test_accumulated_batches_equal_a_bigger_one() -> None:
    images, labels = make_data(64)

    def total(model: nn.Module, batch: Batch) -> dict[str, Tensor]:  # sums, so that gradients add up
        return {"utility": F.cross_entropy(model(batch.images), batch.labels, reduction="sum")}

    settings = {"seed": 0, "epochs": 2, "optimizer": "sgd", "learning_rate": 1e-3, **PLAIN}
    small, big = make_model(), make_model()
    train(small, images, labels, Loss(total), batch_size=8, accumulate_steps=4, **settings)
    train(big, images, labels, Loss(total), batch_size=32, **settings)
    torch.testing.assert_close(flat(small), flat(big), rtol=1e-4, atol=1e-6)


def test_leftover_batches_are_an_update_too() -> None:
    images, labels = make_data(30)
    model, reference, recorder = make_model(), make_model(), Recorder()
    settings = {"seed": 0, "epochs": 1, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.1, **PLAIN}
    train(model, images, labels, recorder, batch_size=10, accumulate_steps=2, **settings)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for group in (recorder.batches[:2], recorder.batches[2:]):
        plain.zero_grad()
        torch.stack([CrossEntropy().terms(reference, batch)["utility"] for batch in group]).sum().backward()
        plain.step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped() -> None:
    images, labels = make_data(32)
    model = make_model()
    before = flat(model)
    settings = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, **PLAIN}
    train(model, images, labels, CrossEntropy(), seed=0, epochs=1, batch_size=32, gradient_clip=1e-3, **settings)
    assert float((flat(model) - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_early_stop_restores_the_best_epoch() -> None:
    images, labels = make_data(32)
    scores, states = iter([0.2, 0.9, 0.5, 0.4, 0.8, 0.99]), []

    def validate(model: nn.Module) -> float:
        assert not model.training
        states.append(flat(model).clone())
        return next(scores)

    model = make_model(norm=True)
    report = train(
        model, images, labels, CrossEntropy(), seed=0, epochs=6, validate=validate, early_stop_patience=2, **PLAIN
    )
    assert report.epochs == len(states) == 4
    assert torch.equal(flat(model), states[1]) and not torch.equal(states[1], states[3])
    assert [epoch["validation"] for epoch in report.history] == [0.2, 0.9, 0.5, 0.4]


def test_without_patience_the_last_epoch_remains() -> None:
    images, labels = make_data(32)
    scores = iter([0.9, 0.1])
    states: list[Tensor] = []
    model = make_model()

    def remember(m: nn.Module) -> float:
        states.append(flat(m).clone())
        return next(scores)

    train(
        model,
        images,
        labels,
        CrossEntropy(),
        seed=0,
        epochs=2,
        validate=remember,
        **PLAIN,
    )
    assert torch.equal(flat(model), states[1])


def test_reports_each_epoch() -> None:
    images, labels = make_data(25)
    seen: list[dict[str, Any]] = []

    def two(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        loss = F.cross_entropy(model(batch.images), batch.labels)
        rare = {"rare": 0 * loss + 5} if len(batch.labels) < 10 else {}
        return {"utility": loss, "size": 0 * loss + len(batch.labels), **rare}

    objective = Loss(two)
    objective.weights = {"size": 2.0, "rare": 0.0}
    report = train(
        make_model(), images, labels, objective, seed=0, epochs=2, batch_size=10, on_epoch=seen.append, **PLAIN
    )
    assert seen == report.history and [epoch["epoch"] for epoch in seen] == [1, 2]
    for epoch in seen:
        assert epoch["epochs"] == 2 and epoch["validation"] is None and epoch["seconds"] > 0
        assert epoch["learning_rate"] == 1e-3
        assert epoch["size"] == pytest.approx((10 * 10 + 10 * 10 + 5 * 5) / 25) and epoch["rare"] == 5
        assert epoch["loss"] == pytest.approx(epoch["utility"] + 2 * epoch["size"], rel=1e-5)


def test_learns_quickly() -> None:
    images, labels = make_data(400)
    held_out, truth = make_data(200, seed=1)
    model = make_model(dropout=0.2)
    train(model, images, labels, CrossEntropy(), seed=0, epochs=8, batch_size=32, learning_rate=1e-2, augment=())
    assert not model.training and all(p.device.type == "cpu" and p.is_contiguous() for p in model.parameters())
    with torch.no_grad():
        predicted = model(torch.from_numpy(held_out).float() / 255).argmax(1).numpy()
    assert (predicted == truth).mean() > 0.95


def test_a_batch_may_be_larger_than_the_data_and_labels_unknown() -> None:
    images, _ = make_data(3)
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        seen.append(batch.labels)
        return {"norm": model(batch.images).square().mean()}

    report = train(make_model(), images, None, Loss(loss), seed=0, epochs=1, batch_size=128, **PLAIN)
    assert report.images == 3 and seen[0].tolist() == [-1, -1, -1]


def test_a_single_last_image_is_left_out_only_for_batch_normalisation() -> None:
    images, labels = make_data(21)
    for norm, sizes in ((False, [10, 10, 1]), (True, [10, 10])):
        recorder = Recorder()
        train(make_model(norm=norm), images, labels, recorder, seed=0, epochs=1, batch_size=10, **PLAIN)
        assert [len(batch.indices) for batch in recorder.batches] == sizes
    with pytest.raises(DataError, match="batch_size"):
        train(make_model(norm=True), images[:1], labels[:1], CrossEntropy(), seed=0)


def test_a_single_last_image_is_left_out_for_losses_that_compare_images() -> None:
    images, labels = make_data(21)
    recorder = Recorder()
    recorder.least_batch = 2
    train(make_model(), images, labels, recorder, seed=0, epochs=1, batch_size=10, **PLAIN)
    assert [len(batch.indices) for batch in recorder.batches] == [10, 10]
    with pytest.raises(DataError, match="batch_size"):
        train(make_model(), images, labels, recorder, seed=0, batch_size=1)


@pytest.mark.parametrize("device_type", ["cpu", "gpu"])
def test_divergence_is_reported_with_its_place(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = make_data(40)
    steps = iter(range(100))

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        utility = F.cross_entropy(model(batch.images), batch.labels)
        return {"utility": utility, "bad": utility * (float("nan") if next(steps) == 6 else 1.0)}

    if device_type == "gpu":  # there the losses are looked at less often, and must tell the same
        monkeypatch.setattr("mea_ray.training.engine.LossMeans", lambda every: LossMeans(32))
    model = make_model()
    with pytest.raises(TrainingDiverged, match=r"epoch 1, step 2.*bad=nan.*learning_rate") as caught:
        train(model, images, labels, Loss(loss), seed=0, epochs=3, batch_size=10, **PLAIN)
    assert (caught.value.epoch, caught.value.step) == (1, 2) and np.isfinite(caught.value.terms["utility"])
    assert not model.training


def test_weights_that_are_not_finite_are_refused() -> None:
    images, labels = make_data(8)

    def loss(
        model: nn.Module, batch: Batch
    ) -> dict[str, Tensor]:  # the root's gradient at 0 is infinite, its value fine
        return {"root": (0 * model(batch.images)).sum().sqrt()}

    with pytest.raises(TrainingDiverged, match="weights are not finite"):
        train(make_model(), images, labels, Loss(loss), seed=0, epochs=1, **PLAIN)


def test_unfitting_data_are_refused() -> None:
    images, labels = make_data(8)
    model = make_model()
    vars(model).update(classes=4, shape=(1, 8, 8))
    bad: list[tuple[Any, Any, str]] = [
        (images[:0], labels[:0], "no images"),
        (images.astype(np.float32), labels, "uint8"),
        (images[0], labels, "uint8"),
        (images[:, :, :6], labels, "do not fit"),
        (images, labels[:4], "labels must be int64"),
        (images, labels.astype(np.float64), "labels must be int64"),
        (images, labels + 4, r"\[0, 4\)"),
        (images, labels - 5, r"\[0, 4\)"),
    ]
    before = flat(model)
    for x, y, message in bad:
        with pytest.raises(DataError, match=message):
            train(model, x, y, CrossEntropy(), seed=0)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    "settings",
    [
        {"early_stop_patience": 2},
        {"schedule": "linear"},
        {"optimizer": "lion"},
        {"precision": "int8"},
        {"augment": ("rotate",)},
        {"augment": ("crop",), "crop_padding": 8},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    images, labels = make_data(8)
    with pytest.raises(ConfigError):
        train(make_model(), images, labels, CrossEntropy(), seed=0, epochs=1, **settings)


def test_narrow_layers_are_trained_in_bfloat16_too_where_channels_last_would_kill_the_process() -> None:
    from mea_ray.models.build import build_model
    from mea_ray.training.device import aligned

    shape = (3, 16, 16)
    narrow, wide = (build_model("resnet18", shape, 2, {"width": width}) for width in (0.1, 0.25))
    assert aligned(wide) and not aligned(narrow)
    images = np.random.default_rng(0).integers(0, 256, (53, *shape), dtype=np.uint8)
    labels = (np.arange(53) % 2).astype(np.int64)
    # 53 images a batch: in channels last, the gradients of 6 channels wrote beyond their memory.
    report = train(narrow, images, labels, CrossEntropy(), seed=0, epochs=3, batch_size=53, precision="bfloat16")
    assert np.isfinite(report.history[-1]["loss"])
    assert all(torch.isfinite(value).all() for value in narrow.state_dict().values())


class WithHead(Objective):
    """Trains a head beside the model, and keeps count of the updates."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = 0

    def attach(self, model: nn.Module, device: torch.device) -> list[nn.Parameter]:
        self.head = nn.Linear(4, 2).to(device)
        self.before = self.head.weight.detach().clone()
        return list(self.head.parameters())

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"utility": F.cross_entropy(self.head(model(batch.images).float()), batch.labels % 2)}

    def updated(self, model: nn.Module) -> None:
        self.updates += 1


def test_an_objective_trains_a_head_of_its_own_and_hears_of_every_update() -> None:
    images, labels = make_data(20)
    objective = WithHead()
    train(make_model(), images, labels, objective, seed=0, epochs=3, batch_size=8, accumulate_steps=2, **PLAIN)
    assert objective.updates == 6  # three batches an epoch make two updates
    assert not torch.equal(objective.head.weight.detach(), objective.before)
