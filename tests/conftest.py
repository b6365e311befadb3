"""Fixtures that several test files share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import FakeWandb
from hypothesis import settings

from mea_ray.bench.object_store import CREDENTIALS, LoopbackS3

settings.register_profile("no deadline", deadline=None)  # a busy machine is slow now and then, which is no fault
settings.load_profile("no deadline")

# Ray runs its workers at nice 15: on a machine that is busy with something else they would hardly run at all.
os.environ.setdefault("RAY_worker_niceness", "0")

# Ray waits 30 s for a raylet that it started; a machine that runs much else at the same time takes longer.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")

# What a terminal's width changes is tested at widths of its own; pytest-xdist sets that of its processes to 80.
os.environ.pop("COLUMNS", None)

RAY = re.compile(r"ray_session|RAY_ADDRESS|^ *import ray$", re.MULTILINE)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite on two cores or more; a part of it, and slow tests, run in one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    if not whole or (os.cpu_count() or 1) < 2:
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each has a core of its own
    return 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each file in one process, and all files that start Ray or look for it in the same one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndRay(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if needs_ray(config.rootpath / file) else file

    return ByFileAndRay(config, log)


@cache
def needs_ray(file: Path) -> bool:
    return RAY.search(file.read_text(encoding="utf-8")) is not None


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small Ray for the whole run; starting one per test would cost more than the tests."""
    import ray

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=300 * 1024**2,
        ignore_reinit_error=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the tracker sets
    return fake


@pytest.fixture(scope="module")
def s3() -> Iterator[LoopbackS3]:
    """An S3 server on this machine, with its credentials in the environment."""
    patch = pytest.MonkeyPatch()
    for name, value in CREDENTIALS.items():
        patch.setenv(name, value)
    with LoopbackS3() as server:
        yield server
    patch.undo()
