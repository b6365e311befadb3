from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mea_ray.attacks.learning import DistillationObjective, Learning
from mea_ray.config.training import TrainingConfig
from mea_ray.core.errors import DeviceOutOfMemory, TrainingDiverged
from mea_ray.core.seeding import derive
from mea_ray.models.build import build_model
from mea_ray.training import stack as stacks
from mea_ray.training.objective import Batch, CrossEntropy, Objective, OutputLoss
from mea_ray.training.snapshot import SnapshotFile
from mea_ray.training.stack import StackedModel, Training, train_stack, train_together

RELATIVE, ABSOLUTE = 1e-3, 2e-5
"""What stacked and single trainings may differ by after a few steps in float32."""
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
OTHERS = np.random.default_rng(1).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
LABELS = np.arange(40) % 4
CONFIG: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 16,
    "optimizer": "sgd",
    "learning_rate": 0.02,
    "crop_padding": 2,
    "precision": "float32",
    "stack": 8,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "vgg_like": {"width": 0.125, "dropout": 0.5},
    "cnn9": {"width": 0.0625, "dropout": 0.25},
    "resnet18": {"width": 0.0625},
}


def network(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(name, (1, 8, 8), 4, NETWORKS[name])


def answers(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(4), len(IMAGES)).astype(np.float32)


def due(
    seeds: list[int], name: str = "vgg_like", images: list[np.ndarray] | None = None, mixing: str = "none", **more: Any
) -> list[Training]:
    """One training for each seed, each on answers of its own."""
    learning = Learning.model_validate({"mixing": mixing, "temperature": 2.0})
    return [
        Training(
            network(name, seed),
            IMAGES if images is None else images[place],
            None,
            DistillationObjective(learning, answers(place)),
            TrainingConfig(**{**CONFIG, **more}),
            seed,
        )
        for place, seed in enumerate(seeds)
    ]


def assert_equal(stacked: list[Training], single: list[Training]) -> None:
    for one, other in zip(stacked, single, strict=True):
        for (name, x), y in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=RELATIVE, atol=ABSOLUTE, msg=partial("{}: {}".format, name))
        assert not one.model.training


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seeds", [[7, 7, 7], [7, 8, 9]], ids=["one seed", "own seeds"])
def test_a_stack_gives_what_each_training_gives_alone(name: str, seeds: list[int]) -> None:
    together, alone = due(seeds, name), due(seeds, name)
    initial = [flat(each.model) for each in together]
    reports = train_stack(together)
    expected = [each.run() for each in alone]
    assert_equal(together, alone)
    for report, other, start, each in zip(reports, expected, initial, together, strict=True):
        assert (report.epochs, report.images, report.parts) == (other.epochs, other.images, other.parts)
        for record, wanted in zip(report.history, other.history, strict=True):
            assert set(record) == set(wanted)
            assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
            assert record["learning_rate"] == wanted["learning_rate"]
        assert not torch.allclose(flat(each.model), start, atol=1e-3)  # far more than rounding was learnt


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.reshape(-1).float() for value in model.state_dict().values()]).clone()


@pytest.mark.parametrize(
    "more",
    [
        {"mixing": "cutmix"},
        {"gradient_clip": 0.05},
        {"accumulate_steps": 2, "optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 1e-3},
        {"images": [IMAGES, OTHERS, IMAGES]},
    ],
    ids=["mixing", "clip", "accumulate", "other images"],
)
@pytest.mark.parametrize("seeds", [[7, 7, 7], [7, 8, 9]], ids=["one seed", "own seeds"])
def test_settings_act_on_each_row_by_itself(more: dict[str, Any], seeds: list[int]) -> None:
    together, alone = due(seeds, **more), due(seeds, **more)
    train_stack(together)
    for each in alone:
        each.run()
    assert_equal(together, alone)


def test_labels_and_plain_losses_are_stacked_too() -> None:
    def trainings() -> list[Training]:
        config = TrainingConfig(**CONFIG)
        return [Training(network("cnn9", seed), IMAGES, LABELS, CrossEntropy(), config, seed) for seed in (1, 2)]

    together, alone = trainings(), trainings()
    assert together[0].fits(together[1])
    train_together(together)
    for each in alone:
        each.run()
    assert_equal(together, alone)


class Moving(DistillationObjective):
    def updated(self, model: nn.Module) -> None:
        self.moved = True


def test_only_what_fits_is_stacked_and_at_most_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = [
        *due([1, 2, 3], stack=2),
        *due([4, 5], learning_rate=0.01),
        *due([6], "cnn9"),
        *due([7], images=[IMAGES[:30]]),
        *due([8, 9], compile=True),
    ]
    moving = [
        Training(each.model, IMAGES, None, Moving(Learning(), answers(0)), each.training, each.seed)
        for each in due([10, 11])
    ]
    sizes: list[int] = []

    def run(group: list[Training]) -> list[Any]:
        sizes.append(len(group))
        return [each.seed for each in group]

    monkeypatch.setattr(stacks, "_run", run)
    reports: list[Any] = list(train_together([*trainings, *moving]))
    assert reports == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert sizes == [2, 1, 2, 1, 1, 1, 1, 1, 1]


def test_the_default_stacks_nothing() -> None:
    together, alone = due([1, 2], stack=1), due([1, 2], stack=1)
    train_together(together)
    for one, other in zip(together, alone, strict=True):
        other.run()
        assert torch.equal(flat(one.model), flat(other.model))


class Branching(nn.Module):
    """A network whose way depends on its weights, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(1))
        return out if self.layer.weight.sum() > -1e9 else -out


def test_networks_that_cannot_be_stacked_are_trained_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    trainings = [
        Training(Branching(), IMAGES, LABELS, CrossEntropy(), TrainingConfig(**CONFIG), seed) for seed in (1, 2)
    ]
    before = [flat(each.model) for each in trainings]
    reports = train_together(trainings)
    assert [report.epochs for report in reports] == [2, 2]
    assert "cannot be stacked" in caplog.text
    assert all(not torch.equal(flat(each.model), old) for each, old in zip(trainings, before, strict=True))


class Bad(OutputLoss):
    """Diverges if its target says so."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.images, torch.full((len(batch.images),), float("inf") if self.bad else 1.0)

    def losses(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"bad": F.mse_loss(outputs[:, 0], targets)}


def test_a_training_that_diverges_takes_no_other_with_it() -> None:
    config = TrainingConfig(**CONFIG)
    trainings = [Training(network("vgg_like", 1), IMAGES, None, Bad(place == 2), config, 5) for place in range(3)]
    reference = Training(network("vgg_like", 1), IMAGES, None, Bad(False), config, 5)
    with pytest.raises(TrainingDiverged):
        train_together(trainings)
    reference.run()
    assert torch.equal(flat(trainings[0].model), flat(reference.model))


def test_a_stack_that_does_not_fit_the_memory_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = stacks.train_stack

    def small(trainings: list[Training]) -> list[Any]:
        sizes.append(len(trainings))
        if len(trainings) > 2:
            raise DeviceOutOfMemory("a batch of 16 images")
        return whole(trainings)

    monkeypatch.setattr(stacks, "train_stack", small)
    together, alone = due([1, 2, 3, 4, 5]), due([1, 2, 3, 4, 5])
    train_together(together)
    assert sizes == [5, 2, 3, 2]  # of the three, one is then trained by itself
    for each in alone:
        each.run()
    assert_equal(together, alone)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("seeds", [[7, 7], [7, 8]], ids=["one seed", "own seeds"])
def test_an_interrupted_stack_goes_on_bit_for_bit(seeds: list[int], tmp_path: Path) -> None:
    def trainings(stop: int | None) -> list[Training]:
        def on_epoch(record: dict[str, Any]) -> None:
            seen.append((record["epoch"], record.get("resumed")))
            if record["epoch"] == stop:
                raise Interrupted

        file = SnapshotFile(tmp_path / ".training.state", 0.0)
        return [
            Training(each.model, IMAGES, None, each.objective, each.training, each.seed, None, on_epoch, file)
            for each in due(seeds, mixing="mixup", epochs=3)
        ]

    seen: list[Any] = []
    with pytest.raises(Interrupted):
        train_together(trainings(stop=2))
    (file,) = tmp_path.iterdir()
    assert "stack-of-2" in file.name
    seen.clear()
    resumed, whole = trainings(None), due(seeds, mixing="mixup", epochs=3)
    reports = train_together(resumed)
    assert seen[0] == (2, 2) and seen[-1] == (3, None)
    assert [len(report.history) for report in reports] == [3, 3]
    train_together(whole)
    for one, other in zip(resumed, whole, strict=True):
        assert torch.equal(flat(one.model), flat(other.model))


def test_a_stack_has_as_many_rows_as_networks_and_leaves_them_alone() -> None:
    members = [network("resnet18", seed) for seed in (1, 2, 3)]
    before = [flat(each) for each in members]
    stack = StackedModel(members).eval()
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        expected = torch.stack([each.eval()(images) for each in members])
        torch.testing.assert_close(stack(images), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stack(images[:, None].expand(5, 3, 1, 8, 8)), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in stack.parameters()) == 3 * sum(p.numel() for p in members[0].parameters())
    assert all(torch.equal(flat(each), old) for each, old in zip(members, before, strict=True))


def test_own_dropout_draws_what_torch_draws() -> None:
    together = due([7, 8], "cnn9", images=[IMAGES, IMAGES])
    stack = StackedModel([each.model for each in together])
    streams = stack.draw_dropout([7, 8], torch.device("cpu"))
    stack.train()
    images = torch.rand(6, 1, 8, 8)
    outputs = stack(images)
    for row, each in enumerate(together):
        torch.manual_seed(derive(each.seed, "dropout"))
        torch.testing.assert_close(outputs[row], each.model.train()(images), rtol=1e-4, atol=1e-5)
    assert len(streams) == 2


def test_an_objective_with_more_than_losses_is_not_stacked() -> None:
    plain, moving = (kind(Learning(), answers(0)) for kind in (DistillationObjective, Moving))
    assert plain.alike(DistillationObjective(Learning(), answers(1)))
    assert not plain.alike(DistillationObjective(Learning(temperature=3.0), answers(1)))
    assert not moving.alike(moving)
    assert isinstance(moving, Objective)
