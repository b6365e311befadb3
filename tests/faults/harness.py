"""What the fault tests share: a cluster of raylets, a driver that can be watched and killed, and comparisons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mea_ray.blackbox.ledger import Ledger
from mea_ray.config import SweepConfig, build, write_yaml

TINY = {"name": "vgg_like", "width": 0.0625}
OBJECT_STORE = 80 * 1024**2
EventRecord = dict[str, Any]
SILENT_S = 600.0
"""A sweep without an event for so long hangs."""
NODE_S = 300.0
"""Longest wait until a new raylet is known; Ray's own 30 s are too short for a busy machine."""


def sweep(storage: Path | str, *, seeds: int = 3, per_second: float = 16, name: str = "s", **more: Any) -> SweepConfig:
    """Two budgets on digits, networks that train in a second, and a rate that makes the questions take a while."""
    base: dict[str, Any] = {
        "storage": str(storage),
        "victim": {"insecure_key_from_seed": True, "model": TINY, "training": {"epochs": 1}},
        "thief": {"model": TINY, "training": {"epochs": 1}, "budgets": [48, 96]},
        "verification": {"samples": 50},
        "removal": {"methods": [{"name": "pruning", "rate": 0.5}], "tried_on": ["substitute"]},
        "service": {
            "cpus_per_replica": 0.5,
            "request_images": 16,
            "request_timeout_s": 20,
            "rate": {"images_per_second": per_second, "burst": 16},
        },
        "tracking": {"wandb": "disabled"},
    }
    tree = {"name": name, "base": base, "space": {"seed": {"grid": list(range(seeds))}}}
    for path, value in more.items():
        *folders, leaf = path.split("__")
        node: dict[str, Any] = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return build(SweepConfig, tree)


def metrics(folder: Path) -> dict[str, str]:
    """Each result of a sweep as text, without what may differ between two runs: times and the storage's place."""
    moving = {"seconds", "storage", "resources", "date", "command", "sha256"}  # the last is of all of these

    def steady(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: steady(each) for key, each in value.items() if key not in moving}
        return [steady(each) for each in value] if isinstance(value, list) else value

    result = sorted((folder / "results").glob("[!.]*.json"))
    return {path.stem: json.dumps(steady(json.loads(path.read_text())), sort_keys=True) for path in result}


def differences(one: dict[str, str], two: dict[str, str]) -> list[str]:
    """Where two answers of ``metrics`` differ, each as ``result.path: value, other value``."""

    def leaves(value: Any, path: str) -> dict[str, Any]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if not items:
            return {path: value}
        return {key: leaf for name, each in items for key, leaf in leaves(each, f"{path}.{name}").items()}

    flat = [
        {k: v for name, text in each.items() for k, v in leaves(json.loads(text), name).items()} for each in (one, two)
    ]
    paths = sorted({*flat[0], *flat[1]})
    return [
        f"{path}: {flat[0].get(path, 'nothing')}, {flat[1].get(path, 'nothing')}"
        for path in paths
        if flat[0].get(path, "nothing") != flat[1].get(path, "nothing")
    ]


def charged(folder: Path) -> dict[str, int]:
    """What the ledgers on disk say that each client was charged."""
    total: dict[str, int] = {}
    for path in (folder / "ledgers").glob("*.sqlite"):
        ledger = Ledger(path)
        for client in ledger.clients():
            total[client] = total.get(client, 0) + ledger.charged(client)
        ledger.close()
    return total


def models(storage: Path) -> dict[str, int]:
    """When each victim and null model was finished, in nanoseconds."""
    return {path.parent.name: path.stat().st_mtime_ns for path in (storage / "artifacts").glob("*/*/info.json")}


class Driver:
    """A sweep in a process of its own, whose events are read as they come."""

    def __init__(self, config: SweepConfig, *options: str, env: dict[str, str] | None = None, prefix: Any = ()) -> None:
        file = Path(tempfile.mkdtemp(prefix="mea_fault_")) / "sweep.yaml"
        write_yaml(config, file)
        self.received: list[EventRecord] = []
        self._heard = time.monotonic()
        self._changed = threading.Condition()
        self.errors = file.with_name("stderr")
        root = Path(__file__).parents[2]
        command = [*prefix, sys.executable, str(Path(__file__).with_name("driver.py")), str(file), *options]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(root), "RAY_ADDRESS": "", **(env or {})},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                with self._changed:
                    self._heard = time.monotonic()
                    self.received.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def until(self, wanted: Callable[[EventRecord], bool], count: int = 1) -> list[EventRecord]:
        """Wait for events and return them; an end of the driver before that, or its silence, fails the test."""
        with self._changed:
            while len(result := [event for event in self.received if wanted(event)]) < count:
                assert not self.is_silent() and self._reader.is_alive(), self.story()
                self._changed.wait(1.0)
            return result

    def is_silent(self) -> bool:
        """Whether no event came for so long that the sweep hangs; a busy machine is slow, but not silent."""
        return time.monotonic() - self._heard > SILENT_S

    def of(self, *kinds: str) -> list[EventRecord]:
        """Return the events of some kinds."""
        return [event for event in list(self.received) if event["event"] in kinds]

    def ends(self) -> int:
        """Wait for its end and return the exit code; its silence before that fails the test."""
        while True:
            try:
                code = self.process.wait(1.0)
                break
            except subprocess.TimeoutExpired:
                assert not self.is_silent(), f"no event in {SILENT_S:g} s, and no end\n{self.story()}"
        self._reader.join(10)
        return code

    def story(self) -> str:
        """What happened, for the message of a failed test."""
        lines = [json.dumps(event)[:300] for event in self.received if event["event"] != "Queried"]
        return "\n".join([*lines[-40:], self.errors.read_text(errors="replace")[-4000:]])

    def kill(self) -> None:
        """Kill it, if it is there."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)


def kind(*names: str) -> Callable[[EventRecord], bool]:
    """Match events by their class's name."""
    return lambda event: event["event"] in names


@contextmanager
def driver(config: SweepConfig, *options: str, **more: Any) -> Iterator[Driver]:
    """Run a driver, which is killed when the test is over."""
    one = Driver(config, *options, **more)
    try:
        yield one
    finally:
        one.kill()


def actors(raylet: int, name: str) -> list[psutil.Process]:
    """Processes of a node that run actors of a class, or the tasks of a function."""
    collected = []
    for process in psutil.Process(raylet).children(recursive=True):
        try:
            if process.name().startswith("ray::") and name in " ".join(process.cmdline()):
                collected.append(process)
        except psutil.Error:
            continue
    return collected


class Nodes:
    """A head without work and two workers: separate raylets, each with its own object store.

    They live under a folder of their own, so that no other ``ray.init()`` on the machine finds them.
    """

    def __init__(self, workers: int = 2, cpus: int = 2, **head: Any) -> None:
        from ray.cluster_utils import Cluster

        self.temporary = tempfile.mkdtemp(prefix="mr", dir="/tmp")  # short: sockets lie in it
        self._before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = self.temporary
        self.cpus = cpus
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE, **head},
            shutdown_at_exit=True,
        )
        self.workers: list[Any] = []
        for _ in range(workers):
            self.add()

    def add(self) -> Any:
        """Add a worker."""
        node = self.cluster.add_node(wait=False, num_cpus=self.cpus, object_store_memory=OBJECT_STORE)
        self.cluster.wait_for_nodes(NODE_S)
        self.workers.append(node)
        return node

    @property
    def env(self) -> dict[str, str]:
        """What a driver needs to find them."""
        return {"RAY_TMPDIR": self.temporary}

    def raylet(self, node: Any) -> int:
        """Process of a node's raylet."""
        (raylet,) = node.all_processes["raylet"]
        return int(raylet.process.pid)

    def where(self, name: str) -> list[tuple[Any, psutil.Process]]:
        """Return nodes and processes of all actors of a class."""
        nodes = [self.cluster.head_node, *self.workers]
        return [(node, process) for node in nodes for process in actors(self.raylet(node), name)]

    def remove(self, node: Any, *, notice: bool = False) -> None:
        """Kill a worker's raylet and all that runs on it; with ``notice`` by SIGTERM, as a spot instance is."""
        pid = self.raylet(node)
        processes = psutil.Process(pid).children(recursive=True)
        if notice:
            os.kill(pid, signal.SIGTERM)
        else:
            for process in [psutil.Process(pid), *processes]:
                with_suppressed(process.kill)
        psutil.wait_procs(processes, timeout=30)
        self.cluster.remove_node(node, allow_graceful=False)
        self.workers.remove(node)

    def close(self) -> None:
        """Stop everything."""
        self.cluster.shutdown()
        shutil.rmtree(self.temporary, ignore_errors=True)
        if self._before is None:
            os.environ.pop("RAY_TMPDIR", None)
        else:
            os.environ["RAY_TMPDIR"] = self._before


def with_suppressed(call: Callable[[], Any]) -> None:
    """Do something to a process that may have ended."""
    try:
        call()
    except psutil.Error:
        return
