"""Several keys in one model: drawn apart, trained together, ranked together."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.training.objective import Batch, Objective, StepContext
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.several_keys import SeveralKeys, SumOfObjectives


def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 1, 8, 8), dtype=np.uint8)
    return ImageSet(pixels, np.repeat(np.arange(5), 4).astype(np.int64), tuple("01234"))


def scheme(keys: int = 3, name: str = "composite") -> SeveralKeys:
    built: SeveralKeys = WATERMARKS.build("several_keys", keys=keys, of={"name": name, "key": {"classes": "seed"}})
    return built


def test_every_key_is_drawn_independently_and_read_from_the_file(tmp_path: Path) -> None:
    drawn = set()
    for seed in range(30):
        key = scheme().make_key(images(), seed)
        parts = SeveralKeys.parts(key)
        assert len(parts) == 3 and key.drawn and key.draw["keys"] == 3
        assert all(part.drawn and part.scheme == "composite" for part in parts)
        drawn.add(tuple((part.source_classes, part.target_class) for part in parts))
    assert len(drawn) == 30 and any(len(set(each)) == 3 for each in drawn)
    key.save(tmp_path)
    assert Key.load(tmp_path).digest() == key.digest()
    assert [part.digest() for part in SeveralKeys.parts(Key.load(tmp_path))] == [part.digest() for part in parts]


def test_stages_of_all_keys_run_together() -> None:
    several, data = scheme(2, "mea_carrier"), images()
    key = several.make_key(data, 0)
    single = several.schemes[0].stages(SeveralKeys.parts(key)[0], data)
    result = several.stages(key, data)
    assert [(stage.name, stage.span) for stage in result] == [(stage.name, stage.span) for stage in single]
    assert len(result) == 2 and all(isinstance(stage.objective, SumOfObjectives) for stage in result)


@pytest.mark.parametrize("name", ["composite", "mea_defender"])
def test_gradients_are_the_sum_of_those_of_each_key(name: str) -> None:
    data = images()
    several = scheme(2, name)
    key = several.make_key(data, 0)
    (together,) = several.stages(key, data)
    parts = SeveralKeys.parts(key)
    alone = [each.stages(part, data)[0].objective for each, part in zip(several.schemes, parts, strict=True)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    batch = Batch(torch.rand(8, 1, 8, 8), torch.arange(8) % 5, torch.arange(8))

    def gradients(objectives: list[Objective]) -> list[torch.Tensor]:
        trained = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(1)
        context = StepContext(torch.device("cpu"), generator, lambda x: x.float() / 255, epochs=1, steps_per_epoch=1)
        for objective in objectives:
            objective.attach(trained, context.device)
            objective.start(context)
            objective.start_epoch(0)
        for objective, terms in [(each, each.terms(trained, batch)) for each in objectives]:
            objective.backward(terms, trained)
        return [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]

    assert isinstance(together.objective, SumOfObjectives)
    expected, result = gradients(alone), gradients([together.objective])
    assert len(expected) == len(result) == 2
    for one, other in zip(expected, result, strict=True):
        assert torch.allclose(one, other, atol=1e-6) and one.abs().sum() > 0


@pytest.mark.parametrize(("of", "words"), [("composite", "of.key.classes"), ("ewe", "mixes no two classes")])
def test_schemes_without_drawn_keys_are_refused(of: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WATERMARKS.build("several_keys", of=of)
