"""A stand-in for the ``wandb`` package that keeps what it is told."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any


class FakeRun:
    def __init__(self, owner: FakeWandb, arguments: dict[str, Any]) -> None:
        self.owner, self.arguments = owner, arguments
        self.logged: list[dict[str, Any]] = []
        self.metrics: dict[str, str | None] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.used: list[Any] = []
        self.finished = False
        self.step = 0
        self.steps: list[int] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, numbers: dict[str, Any], step: int | None = None) -> None:
        if self.owner.fails == "log":
            raise RuntimeError("disk full")
        if step is not None and step < self.step:
            return  # what W&B does with a step that a run has already
        step = self.step if step is None else step
        self.step = step + 1
        self.steps.append(step)
        self.logged.append(numbers)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def use_artifact(self, artifact: Any) -> None:
        if self.arguments["mode"] == "offline":
            raise TypeError("Cannot use artifact when in offline mode.")
        self.used.append(artifact)

    def finish(self) -> None:
        self.finished = True


class FakeArtifact:
    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.type, self.metadata, self.files = name, type, metadata, []  # type: ignore[var-annotated]

    def add_file(self, path: str, policy: str) -> None:
        self.files.append(Path(path).name)


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[FakeRun] = []
        self.fails = ""
        self.environment: dict[str, str] = {}
        self.Artifact = FakeArtifact
        self.Settings = dict
        self.Html = str
        self.plot = types.SimpleNamespace(line_series=lambda **chart: chart)

    def Table(self, columns: list[str], data: list[list[Any]], allow_mixed_types: bool) -> Any:  # noqa: N802
        return [dict(zip(columns, line, strict=True)) for line in data]

    def init(self, **arguments: Any) -> FakeRun:
        if self.fails == "init" or (self.fails == "online" and arguments["mode"] == "online"):
            raise ConnectionError("no route to host")
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        same = [run for run in self.runs if run.arguments["id"] == arguments["id"]]
        if same and arguments.get("resume") == "allow":
            return same[0]
        self.runs.append(FakeRun(self, arguments))
        return self.runs[-1]
