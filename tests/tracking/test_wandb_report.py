"""The W&B report of a sweep, saved through W&B's own client on a stand-in for its server."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mea_ray.core.errors import ConfigError, TrackingUnavailable
from mea_ray.tracking import wandb_report
from mea_ray.tracking.wandb_report import save_report, varied

POINTS: list[dict[str, Any]] = [
    {"thief.model": {"name": name, "width": 0.5}, "thief.training.learning_rate": rate, "seed": seed}
    for seed, (name, rate) in enumerate([("cnn9", 0.1), ("vgg_like", 0.01), ("cnn9", 0.001)])
]


class Server:
    """Answers the queries of W&B's client as its server does, as far as a report needs them."""

    def __init__(self) -> None:
        self.saved: list[dict[str, Any]] = []
        self.refuses = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = server.answer(json.loads(body)) if self.path == "/graphql" else {}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, given = asked["query"], asked.get("variables") or {}
        if "upsertView" in query:
            if self.refuses:
                return {"errors": [{"message": "permission denied"}], "data": None}
            self.saved.append(given)
            project = {"id": "p", "name": given["projectName"], "entityName": given["entityName"]}
            same = {name: given[name] for name in ("type", "name", "displayName", "description", "spec")}
            view = {"id": given["id"] or "VmlldzoxMjM=", "project": project, "updatedAt": "2026-01-01T00:00:00", **same}
            return {"data": {"upsertView": {"view": view, "inserted": not given["id"]}}}
        if "ProjectInternalId" in query:
            return {"data": {"project": {"id": "p", "internalId": "1"}}}
        if "upsertModel" in query:
            made = {"id": "p", "name": "marks", "entityName": "lab"}
            return {"data": {"upsertModel": {"model": made, "project": made, "inserted": True}}}
        if "models(" in query:
            return {"data": {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}}
        viewer = {"id": "u", "entity": "lab", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"data": {"viewer": viewer, "serverInfo": {}}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("wandb_workspaces")
    stand_in = Server()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{stand_in.http.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield stand_in
    stand_in.http.shutdown()
    stand_in.http.server_close()


def test_settings_that_vary_are_those_of_the_runs_configs() -> None:
    assert varied(POINTS) == ["thief.model.name", "thief.training.learning_rate"]


@pytest.mark.slow
def test_a_report_is_saved_over_the_runs_of_the_sweep_and_then_updated(server: Server, tmp_path: Path) -> None:
    def save() -> str:
        return save_report(
            tmp_path, POINTS, sweep="curves", project="marks", description="Three thieves.", command="mea-ray sweep c"
        )

    first, second = save(), save()
    assert first == second and "/lab/marks/reports/curves--" in first
    new, again = server.saved
    assert new["id"] is None and again["id"] == "VmlldzoxMjM=", "the same report, not another one"
    assert (new["entityName"], new["projectName"], new["displayName"]) == ("lab", "marks", "curves")
    spec = json.dumps(json.loads(new["spec"]))
    assert "Three thieves." in spec and "mea-ray sweep c" in spec
    (grid,) = [block for block in json.loads(new["spec"])["blocks"] if block["type"] == "panel-grid"]
    filters = json.dumps(grid["metadata"]["runSets"][0]["filters"])
    assert '"tags"' in filters and '"curves"' in filters and '"jobType"' in filters and '"trial"' in filters
    panels = grid["metadata"]["panelBankSectionConfig"]["panels"]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert [line["metrics"][0] for line in lines] == ["wsr", "accuracy", "fidelity"]
    assert {line["xAxis"] for line in lines} == {"queries"}
    (columns,) = [panel["config"]["columns"] for panel in panels if panel["viewType"] == "Parallel Coordinates Plot"]
    assert [column["accessor"] for column in columns] == [
        "config:set.value.thief.model.name",
        "config:set.value.thief.training.learning_rate",
        "summary:wsr",
        "summary:accuracy",
        "summary:victim_gap",
    ]


@pytest.mark.slow
def test_a_server_that_refuses_is_a_typed_error(server: Server, tmp_path: Path) -> None:
    server.refuses = True
    with pytest.raises(TrackingUnavailable, match=r"report of 'curves' was not saved.*permission denied.*wandb login"):
        save_report(tmp_path, POINTS, sweep="curves", project="marks", entity="lab")
    assert not (tmp_path / "wandb" / wandb_report.KNOWN).exists()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ConfigError, match=r"needs the package wandb-workspaces.*pip install 'mea_ray\[wandb-report\]'"):
        save_report(tmp_path, POINTS, sweep="curves", project="marks")
