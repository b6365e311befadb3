"""Requests and bytes of a trial on an object store, counted by an S3 server on loopback.

Everything but the trial's work is real: the storage, the trial's journal, its answers, models and records, and what the
driver on another machine fetches when the trial has ended.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mea_ray.bench.object_store import CREDENTIALS, LoopbackS3, Traffic
from mea_ray.config import ExperimentConfig, write_yaml
from mea_ray.core.errors import ConfigError

_TRIAL: dict[str, Any] = {"trial": "t"}
ANSWERS = 256
"""Answers in a file of the transfer set."""


def bench_storage(
    *,
    removals: int = 14,
    budgets: int = 4,
    chunks: int = 16,
    classes: int = 10,
    model: str = "vgg_like",
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Count one trial's requests to an object store, from its first file to its result on the driver.

    Args:
        removals: Removals after the last rung; each leaves a record.
        budgets: Rungs; each leaves a substitute and two records.
        chunks: Files of answers, spread over the rungs, of 256 answers each.
        classes: Numbers in an answer.
        model: Network of the substitutes.
        on_progress: Called with each part that was measured.

    Returns:
        ``requests`` and ``bytes_sent`` of the whole trial; ``files``, and ``requests_per_file``; ``bytes_once``, what
        the files hold together; of the driver ``driver_requests`` and ``driver_bytes``; ``resume_requests`` of another
        node that takes the trial up; and ``by_method``.

    Raises:
        ConfigError: A count is too small, or moto is not installed.
    """
    for name, value in {"removals": removals, "budgets": budgets, "chunks": chunks}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    notify = on_progress or (lambda text: None)
    with tempfile.TemporaryDirectory(prefix="mea_ray_bench_") as home, _credentials(), LoopbackS3() as server:

        def counted(node: str, do: Callable[[Any], None]) -> Traffic:
            folder = _on(node, Path(home), server.location())
            before = server.traffic()
            do(folder)
            used = server.traffic() - before
            notify(f"{node}: {used.total} requests, {used.sent:,} bytes sent, {used.received:,} received")
            return used

        counted("start", _begin)
        trial = counted("trial", lambda folder: _trial(folder, removals, budgets, chunks, classes, model))
        driver = counted("driver", _fetch)
        again = counted("resume", lambda folder: folder.trial("t").pull())
        local = Path(home) / "trial"
        files = [path for path in local.rglob("*") if path.is_file() and "s" in path.parts and path.suffix != ".id"]
    return {
        "requests": trial.total,
        "files": len(files),
        "requests_per_file": trial.total / len(files),
        "bytes_sent": trial.sent,
        "driver_requests": driver.total,
        "driver_bytes": driver.received,
        "resume_requests": again.total,
        "by_method": dict(trial.requests),
        "removals": removals,
        "budgets": budgets,
        "chunks": chunks,
        "model": model,
    }


def _on(node: str, home: Path, location: str) -> Any:
    """Return the sweep's folder as a machine with a cache of its own sees it."""
    from mea_ray.sweep.folder import SweepFolder

    os.environ["XDG_CACHE_HOME"] = str(home / node)
    return SweepFolder(location, "s")


def _begin(folder: Any) -> None:
    (folder.storage.path("s/plan.json")).write_text("{}", encoding="utf-8")
    folder.push("plan.json")


def _trial(folder: Any, removals: int, budgets: int, chunks: int, classes: int, network: str) -> None:
    """Do all that a trial does with its files; numbers stand for what it computes."""
    from mea_ray.models.build import build_model
    from mea_ray.results.records import RungResult, TrialResult
    from mea_ray.storage.files import write_whole

    journal = folder.trial("t")
    journal.pull()
    journal.folder.mkdir(parents=True, exist_ok=True)
    write_yaml(ExperimentConfig(), journal.folder / "config.yaml")
    journal.save_point({"seed": 0})
    model = build_model(network, (3, 32, 32), classes, {})
    so_far = TrialResult.model_construct(**_TRIAL)  # what is in it does not matter here
    each = -(-chunks // budgets)
    for budget in range(1, budgets + 1):
        for _ in range(min(each, chunks - (budget - 1) * each)):
            answers = np.full((ANSWERS, classes), 1 / classes, np.float32)
            journal.transfer.append(np.arange(ANSWERS) + len(journal.transfer), answers)
        numbers: dict[str, Any] = {"budget": budget, "queries": len(journal.transfer)}
        journal.keep_rung(RungResult.model_construct(**numbers), model)
        if budget == budgets:
            for index in range(removals):
                journal.keep(f"removals/{index}", so_far)
        journal.keep_partial(so_far)
    write_whole(folder.result_path("t"), so_far.model_dump_json(indent=1))
    folder.push("results/t.json")


def _fetch(folder: Any) -> None:
    folder.fetch_result("t")


@contextmanager
def _credentials() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "XDG_CACHE_HOME")}
    os.environ.update(CREDENTIALS)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
