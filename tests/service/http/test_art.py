"""The Adversarial Robustness Toolbox steals through the URL with the few lines of docs/serving.md."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from http_service import SHAPE, InProcess, save_victim
from torch import nn

from mea_ray.service.http import admin

pytestmark = pytest.mark.slow
pytest.importorskip("art", reason="pip install adversarial-robustness-toolbox")
BUDGET = 400


def asking(url: str, key: str) -> Callable[[np.ndarray], np.ndarray]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/x-npy", "Accept": "application/x-npy"}

    def ask(images: np.ndarray) -> np.ndarray:
        body = io.BytesIO()
        np.save(body, images.astype(np.float32))
        answer = httpx.post(f"{url}/v1/predict", content=body.getvalue(), headers=headers)
        answer.raise_for_status()
        return np.asarray(np.load(io.BytesIO(answer.content)))

    return ask


def substitute() -> Any:
    from art.estimators.classification import PyTorchClassifier

    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(network.parameters(), 0.01),
        input_shape=SHAPE,
        nb_classes=10,
        clip_values=(0, 1),
    )


@pytest.mark.parametrize("attack", ["KnockoffNets", "CopycatCNN"])
def test_art_steals_through_the_url(tmp_path: Path, attack: str) -> None:
    from art.attacks import extraction
    from art.estimators.classification import BlackBoxClassifier

    service = InProcess(save_victim(tmp_path / "victim"), tmp_path)
    key = service.keys.add("art", budget=BUDGET)
    with admin.served(service.app, 0) as url:
        ask = asking(url, key)
        victim = BlackBoxClassifier(ask, input_shape=SHAPE, nb_classes=10, clip_values=(0, 1))
        pool = np.random.default_rng(0).random((BUDGET, *SHAPE), dtype=np.float32)
        settings: dict[str, Any] = {
            "nb_epochs": 20,
            "nb_stolen": BUDGET,
            "use_probability": True,
            "batch_size_query": 64,
        }
        if attack == "KnockoffNets":
            settings |= {"sampling_strategy": "random", "verbose": False}
        thief = getattr(extraction, attack)(victim, batch_size_fit=64, **settings)
        stolen = thief.extract(pool, thieved_classifier=substitute())
        assert 0 < service.charged("art") <= BUDGET
        with pytest.raises(httpx.HTTPStatusError, match="402"):
            ask(pool)
        service.keys.limit("art", budget=None)
        fresh = np.random.default_rng(1).random((500, *SHAPE), dtype=np.float32)
        agreement = (stolen.predict(fresh).argmax(1) == ask(fresh).argmax(1)).mean()
        before = (substitute().predict(fresh).argmax(1) == ask(fresh).argmax(1)).mean()
    assert agreement > before + 0.1
