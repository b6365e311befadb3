"""The HTTP service in this process: the application of a replica, with its ledger beside it instead of in an actor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from fastapi import FastAPI

from mea_ray.models.build import build_model
from mea_ray.service.http.app import Api, create_app
from mea_ray.service.http.engine import Engine, about_victim
from mea_ray.service.http.keys import KEYS, KeyRing, KeyStore, service_secret
from mea_ray.service.http.ledger import HttpLedger
from mea_ray.service.http.settings import HttpConfig
from mea_ray.training.checkpoint import save_model

SHAPE = (1, 8, 8)


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


def save_victim(folder: Path) -> Path:
    """A network of ten classes that is sure of nothing and sees every pixel."""
    torch.manual_seed(0)
    model = build_model("vgg_like", SHAPE, 10, {"width": 0.25})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_model(folder, model, {})
    return folder


class Handle:
    """Stands for the handle of an actor: its methods answer at once, in this process."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self.target, name))


class _Method:
    def __init__(self, method: Any) -> None:
        self.method = method

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(self.method(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class InProcess:
    """A service with its keys, its ledger and its application."""

    def __init__(self, victim: Path, folder: Path, settings: HttpConfig | None = None) -> None:
        self.keys = KeyStore(folder)
        self.secret = service_secret(folder)
        self.ledger = HttpLedger(str(folder / "ledger.sqlite"), None, {}, self.secret)
        settings = settings or HttpConfig()
        self.engine = Engine(victim, "test", settings.serving, self.secret, Handle(self.ledger))
        self.api = Api(
            about=about_victim(victim),
            engine=self.engine,
            keys=KeyRing(folder / KEYS, every_s=0),
            settings=settings.serving,
            limits=settings,
        )
        self.app: FastAPI = create_app(self.api)

    def charged(self, client: str) -> int:
        return self.ledger._ledger.charged(client)

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)
