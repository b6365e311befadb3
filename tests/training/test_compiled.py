"""Compiled networks of fixed shapes, for CUDA graphs; a backend that compiles nothing shows what it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keyword_training import train
from torch import Tensor, nn

from mea_ray.core.errors import ConfigError
from mea_ray.training import compiled
from mea_ray.training.objective import CrossEntropy
from mea_ray.training.snapshot import SnapshotFile

PLAIN: dict[str, Any] = {"augment": (), "precision": "float32", "batch_size": 16, "epochs": 3, "seed": 2}
RANDOM = np.random.default_rng(0)
IMAGES, LABELS = RANDOM.integers(0, 256, (37, 1, 6, 6), dtype=np.uint8), RANDOM.integers(4, size=37)
Graphs = list[tuple[Any, ...]]


def make_model(*middle: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([value.reshape(-1).float() for value in model.state_dict().values()])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """The mode and the batch of every graph that is compiled."""
    seen: Graphs = []

    def backend(graph: Any, inputs: list[Any], *, mode: str | None = None) -> Callable[..., Any]:
        batches = [tuple(each.shape) for each in inputs if isinstance(each, Tensor) and each.dim() == 4]
        seen.append((mode, next(shape for shape in batches if shape[1:] == (1, 6, 6))))
        compile_graph: Callable[..., Any] = graph.forward
        return compile_graph

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    return seen


@pytest.mark.parametrize(
    ("middle", "sizes"),
    [((), [16]), ((nn.BatchNorm2d(6),), [16, 5]), ((nn.Dropout(0.5),), [16, 5])],
    ids=["padded", "norm", "dropout"],
)
def test_a_step_of_fixed_shapes_is_the_step(middle: tuple[nn.Module, ...], sizes: list[int], graphs: Graphs) -> None:
    plain, fixed = make_model(*middle), make_model(*middle)
    more: dict[str, Any] = {**PLAIN, "optimizer": "sgd"}  # Adam would divide rounding by a gradient that is near zero
    train(plain, IMAGES, LABELS, CrossEntropy(), **more)
    report = train(fixed, IMAGES, LABELS, CrossEntropy(), compile="reduce-overhead", **more)
    assert graphs == [("reduce-overhead", (size, 1, 6, 6)) for size in sizes], "one graph for each shape"
    torch.testing.assert_close(flat(fixed), flat(plain), rtol=1e-4, atol=2e-5)
    assert report.images == 3 * 37, "padding is no image"


def test_padding_has_no_gradient_and_the_layout_of_the_batch(graphs: Graphs) -> None:
    network = compiled.FixedShapes(make_model())
    for layout in (torch.contiguous_format, torch.channels_last):
        whole = torch.rand(8, 1, 6, 6).contiguous(memory_format=layout)
        network(whole)
        part = whole[:3].clone(memory_format=layout).requires_grad_()
        out = network(part)
        assert out.shape == (3, 4)
        torch.testing.assert_close(out, network.network(whole)[:3])
        out.sum().backward()
        assert part.grad is not None and part.grad.shape == part.shape
    assert len(list(network.parameters())) == 4


def test_a_killed_training_of_fixed_shapes_goes_on_bit_for_bit(graphs: Graphs, tmp_path: Path) -> None:
    class Killed(Exception):
        """Stands for the death of the process."""

    def run(die: bool, snapshots: SnapshotFile | None) -> Tensor:
        def on_epoch(record: dict[str, Any]) -> None:
            if die and record["epoch"] == 2:
                raise Killed

        model = make_model(nn.Dropout(0.5))
        more: dict[str, Any] = {**PLAIN, "compile": "reduce-overhead", "on_epoch": on_epoch, "snapshots": snapshots}
        train(model, IMAGES, LABELS, CrossEntropy(), **more)
        return flat(model)

    expected = run(False, None)
    with pytest.raises(Killed):
        run(True, SnapshotFile(tmp_path / "state", every_s=0))
    torch._dynamo.reset()
    assert torch.equal(run(False, SnapshotFile(tmp_path / "state", every_s=0)), expected)


def test_a_compiled_network_gives_what_it_has_beside_its_outputs(graphs: Graphs) -> None:
    class WithFeatures(nn.Module):
        classes = 4

        def features(self, images: Tensor) -> Tensor:
            return images.flatten(1)

        def forward(self, images: Tensor) -> Tensor:
            return self.features(images)[:, :4]

    network = compiled.compiled(WithFeatures(), "reduce-overhead")
    images = torch.rand(2, 1, 6, 6)
    assert network.classes == 4
    assert torch.equal(network.features(images), images.flatten(1))  # type: ignore[operator]
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = network.nothing_like_this


def test_settings_are_true_false_or_the_mode() -> None:
    model = make_model()
    assert compiled.compiled(model, False) is model
    with pytest.raises(ConfigError, match="compile"):
        train(model, IMAGES, LABELS, CrossEntropy(), compile="max", **PLAIN)


@pytest.mark.slow
def test_torchs_own_compiler_computes_the_same() -> None:
    plain, fixed = make_model(), make_model()
    train(plain, IMAGES, LABELS, CrossEntropy(), **PLAIN)
    train(fixed, IMAGES, LABELS, CrossEntropy(), compile="reduce-overhead", **PLAIN)
    torch.testing.assert_close(flat(fixed), flat(plain), rtol=1e-4, atol=1e-5)
