"""The owner's view: a page and its data on the loopback interface, from a service or from its files."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from http_service import InProcess, images, save_victim
from PIL import Image
from starlette.testclient import TestClient

from mea_ray.core.errors import ArtifactError, ConfigError, ServiceUnavailable
from mea_ray.service.http import admin
from mea_ray.service.http.deployment import Spec
from mea_ray.service.http.running import RUNNING, Running, find_running, offline_usage
from mea_ray.service.http.settings import HttpConfig
from mea_ray.storage.process import identity

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BAR = (0x3B, 0x6E, 0xA5)
"""Colour of the bars in usage.html.j2."""


class Owned:
    """A service that was asked, as the owner's page sees it."""

    def __init__(self, service: InProcess, folder: Path) -> None:
        self.service = service
        self.spec = Spec(folder / "victim", folder, "flowers", HttpConfig())
        self.updates: list[Path] = []

    def usage(self) -> list[dict[str, Any]]:
        return self.service.ledger.usage(self.service.secret, 10)

    def update(self, victim: Path) -> None:
        if not victim.exists():
            raise ArtifactError(f"{victim} holds no readable model")
        self.updates.append(victim)


@pytest.fixture
def owned(tmp_path: Path) -> Owned:
    service = InProcess(save_victim(tmp_path / "victim"), tmp_path)
    key = service.keys.add("<b>".replace("<", "-").replace(">", "-"), budget=500)
    service.keys.add("bob")

    async def ask() -> None:
        async with service.client(key) as client:
            for seed in range(2):
                await client.post("/v1/predict", json={"images": images(60, seed).tolist()})

    asyncio.run(ask())
    service.keys.revoke("bob")
    return Owned(service, tmp_path)


def test_the_page_shows_each_client(owned: Owned) -> None:
    with TestClient(admin.create_admin(owned), base_url="http://localhost") as client:  # type: ignore[arg-type]
        page = client.get("/")
        data = client.get("/usage.json").json()
    assert page.status_code == 200 and 'data-client="-b-"' in page.text and "bob (revoked)" in page.text
    assert '<td class="charged">120</td>' in page.text
    (row,) = [row for row in data["clients"] if row["client"] == "-b-"]
    assert (row["charged"], row["remaining"], sum(row["log"]["classes"])) == (120, 380, 120)
    assert row["log"]["shapiro_w"] is not None and row["log"]["requests"] == 2


def test_another_site_cannot_reach_it(owned: Owned) -> None:
    app = admin.create_admin(owned)  # type: ignore[arg-type]
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/usage.json", headers={"host": "evil.example"}).status_code == 400
        body = {"victim": str(owned.spec.victim)}
        assert client.post("/update", json=body).status_code == 403
        app.state.running = Running({}, "", "", "secret", "")
        assert client.post("/update", json=body, headers={"X-Token": "guess"}).status_code == 403
        assert owned.updates == []
        assert client.post("/update", json=body, headers={"X-Token": "secret"}).status_code == 200
        refused = client.post("/update", json={"victim": "/nowhere"}, headers={"X-Token": "secret"})
        assert refused.status_code == 422 and "holds no readable model" in refused.json()["detail"]
    assert owned.updates == [owned.spec.victim]


def test_it_listens_on_the_loopback_interface_only(owned: Owned) -> None:
    with admin.served(admin.create_admin(owned), 0) as url:  # type: ignore[arg-type]
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/usage.json").json()["service"] == "flowers"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/usage.json")


def test_a_port_that_is_taken_is_named(owned: Owned) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServiceUnavailable, match=f"port {port} .* is taken"),
            admin.served(admin.create_admin(owned), port),  # type: ignore[arg-type]
        ):
            pass


def test_the_files_of_a_service_that_ended_say_the_same(owned: Owned, tmp_path: Path) -> None:
    running = owned.usage()
    owned.service.ledger.close()
    assert offline_usage(tmp_path, 10) == running
    with pytest.raises(ConfigError, match="no client has queried"):
        offline_usage(tmp_path / "nowhere", 10)


def test_a_service_that_ended_without_a_word_is_not_taken_for_running(tmp_path: Path) -> None:
    def written(process: dict[str, Any]) -> Running | None:
        (tmp_path / RUNNING).write_text(json.dumps(asdict(Running(process, "http://here", "", "token", "victim"))))
        return find_running(tmp_path)

    here = identity()
    result = written(here)
    assert result is not None and result.url == "http://here" and str(result).startswith(f"process {here['pid']} on ")
    assert written({**here, "started": here["started"] + 1}) is None, "another process has its number now"
    assert written({**here, "machine": "elsewhere"}) is None
    (tmp_path / RUNNING).write_text('{"pid": 1, "url": "http://here"}')
    assert find_running(tmp_path) is None


@pytest.mark.slow
def test_a_browser_draws_the_page(owned: Owned, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of these browsers is installed: {', '.join(BROWSERS)}")
    picture = tmp_path / "page.png"
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    with admin.served(admin.create_admin(owned), 0) as url:  # type: ignore[arg-type]
        subprocess.run([*command, "--window-size=1000,700", f"--screenshot={picture}", url], check=True, timeout=300)
        dom = subprocess.run([*command, "--dump-dom", url], check=True, timeout=300, capture_output=True, text=True)
    rows = re.findall(r'<tr[^>]*data-client="([^"]+)"[^>]*>(.*?)</tr>', dom.stdout, re.DOTALL)
    assert [name for name, _ in rows] == ["-b-", "bob"] and rows[0][1].count("<i ") == 10
    with Image.open(picture) as visible:
        pixels = np.asarray(visible.convert("RGB")).reshape(-1, 3)
    bars = (pixels == BAR).all(1).sum()
    assert 50 < bars < 20_000, "the bars of the classes are drawn, and do not fill the page"
