"""Layers whose bits depend on the number of rows compute as many as they need, and no other layer does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mea_ray.blackbox import least_rows
from mea_ray.blackbox.least_rows import LeastRows, need_least_rows


class Uneven(nn.Linear):
    """Adds up in another order where there are fewer than four rows, as libraries do."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.seen: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(len(input))
        return super().forward(input) + (1e-3 if len(input) < 4 else 0.0)


def test_missing_rows_are_added_and_cut_off() -> None:
    layer = Uneven()
    LeastRows(layer).rows = 4
    x = torch.rand(5, 3)
    assert torch.allclose(layer(x)[:1], layer(x[:1])) and layer.seen == [5, 4]
    assert layer(x[:1]).shape == (1, 2)


def test_each_layer_gets_the_fewest_rows_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_rows, "_SUMMING", (nn.Linear, Uneven))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3), uneven := Uneven())
    x = torch.rand(8, 3, 1)
    with torch.inference_mode():
        full = model(x)
        need_least_rows(model, lambda: model(x))
        uneven.seen.clear()
        for place in range(8):
            assert torch.allclose(model(x[place : place + 1]), full[place : place + 1], atol=1e-5)
    assert set(uneven.seen) == {4}
