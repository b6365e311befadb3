"""Ctrl-C: one line at once, whatever the program is doing, and nothing that was paid for is lost."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from certificate import self_signed
from foreign_service import ForeignService
from http_service import images, save_victim
from starlette.requests import Request

from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.cli.interrupts import answered, line_of
from mea_ray.cli.options import INTERRUPTED, OK
from mea_ray.models.build import build_model
from mea_ray.service.http import admin
from mea_ray.service.http.bodies import NPY
from mea_ray.service.http.keys import KeyStore
from mea_ray.service.http.running import offline_usage
from mea_ray.training.checkpoint import load_model

AT_ONCE_S = 2.0
WAIT_S = 900  # for what hangs


def at_once_s() -> float:
    """Return the longest time that is at once: on a busy machine a process waits that much longer for its turn."""
    return AT_ONCE_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _listens_to_ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also if the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_line_comes_at_once_and_once_whichever_handler_acts() -> None:
    said: list[str] = []
    signal.signal(signal.SIGINT, lambda number, frame: None)  # as Ray Tune's handler, which says nothing
    with answered("ending", said.append) as say_so:
        signal.raise_signal(signal.SIGINT)
        end = time.monotonic() + at_once_s()
        while not said and time.monotonic() < end:
            time.sleep(0.01)
        assert said == ["ending"]
        signal.raise_signal(signal.SIGINT)
        say_so()
    assert said == ["ending"]


def test_nothing_is_printed_without_a_signal_and_threads_are_left_alone() -> None:
    said: list[str] = []
    with answered("ending", said.append):
        pass
    thread = threading.Thread(target=lambda: answered("ending", said.append).__enter__())
    thread.start()
    thread.join()
    assert said == [] and signal.set_wakeup_fd(-1) == -1


def test_every_long_command_has_a_line_of_its_own() -> None:
    lines = {line_of(command) for command in ("sweep", "train", "nulls", "calibrate", "steal", "verify", "serve", None)}
    assert len(lines) == 8 and all(line.startswith("interrupted, ending: ") for line in lines)


class Command:
    """A command of the program in a process of its own, whose output is read line by line."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mea_ray", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.lines: list[tuple[float, str]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.strip()))

    def wait_for(self, text: str, seconds: float = WAIT_S) -> float:
        """Return when a line with a text came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for at, line in self.lines:
                if text in line:
                    return at
            if self.process.poll() is not None:
                time.sleep(0.2)
                break
            time.sleep(0.05)
        found = [at for at, line in self.lines if text in line]
        assert found, f"no {text!r} in: {[line for _, line in self.lines]}"
        return found[0]

    def interrupt(self) -> tuple[float, int]:
        """Send Ctrl-C to the whole group, as a terminal does; return the seconds to the line, and the exit code."""
        sent = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        took = self.wait_for("interrupted, ending: ", WAIT_S) - sent
        return took, self.process.wait(WAIT_S)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


@contextmanager
def command(arguments: list[str], folder: Path) -> Iterator[Command]:
    started = Command(arguments, folder)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()


TINY = """
data: {name: digits}
storage: store
victim:
  model: {name: vgg_like, width: 0.0625}
  watermark: {name: mea_defender}
  training: {epochs: 1, augment: []}
thief: {budgets: [40, 80], model: {name: vgg_like, width: 0.0625}, training: {epochs: 1, augment: []}}
verification: {samples: 20}
service: {request_images: 8, max_in_flight: 1}
"""


@pytest.mark.slow
def test_a_service_answers_ctrl_c_and_ends(tmp_path: Path) -> None:
    save_victim(tmp_path / "victim")
    with command(["serve", "victim", "--port", "0", "--admin-port", "0", "cpus_per_replica=0.1"], tmp_path) as serve:
        serve.wait_for("Ctrl-C ends it")
        took, code = serve.interrupt()
    assert took < at_once_s() and code == OK and serve.text.count("ending") == 1 and "Traceback" not in serve.text


@pytest.mark.slow
def test_a_service_over_tls_answers_what_is_under_way_and_ends_when_its_group_is_terminated(tmp_path: Path) -> None:
    """As `timeout`, a shell's `kill %1` and job schedulers do it."""
    victim = LocalBlackBox(load_model(save_victim(tmp_path / "victim"))[0])
    self_signed(tmp_path)
    keys = [KeyStore(tmp_path / "victim.service").add(f"client-{index}") for index in range(4)]
    arguments = [
        "serve",
        "victim",
        "--port",
        "0",
        "--admin-port",
        "0",
        "--tls-cert",
        "cert.pem",
        "--tls-key",
        "key.pem",
    ]
    answered: list[int] = [0] * len(keys)
    failures: list[Exception] = []

    def ask(url: str, index: int) -> None:
        queries = images(64, seed=index)
        body = io.BytesIO()
        np.save(body, queries)
        headers = {"Authorization": f"Bearer {keys[index]}", "Content-Type": NPY, "Accept": NPY}
        trusted = str(tmp_path / "cert.pem")
        try:
            while True:
                answer = requests.post(
                    f"{url}/v1/predict", body.getvalue(), headers=headers, verify=trusted, timeout=60
                )
                if answer.status_code != 200:
                    break  # it takes nothing new
                assert np.array_equal(np.load(io.BytesIO(answer.content)), victim.query(queries))
                answered[index] += len(queries)
        except requests.ConnectionError:
            pass  # it is gone
        except Exception as error:
            failures.append(error)

    with command([*arguments, "cpus_per_replica=0.1"], tmp_path) as serve:
        serve.wait_for("Ctrl-C ends it")
        url = next(line.split()[1] for _, line in serve.lines if line.startswith("service "))
        curl = ["curl", "-sS", f"{url}/healthz", "--cacert"]
        done = subprocess.run([*curl, str(tmp_path / "cert.pem")], capture_output=True, text=True, check=True)
        assert url.startswith("https://") and json.loads(done.stdout) == {"status": "ok"}
        with pytest.raises(requests.ConnectionError):
            requests.get(url.replace("https", "http") + "/healthz", timeout=60)
        clients = [threading.Thread(target=ask, args=(url, index)) for index in range(len(keys))]
        for each in clients:
            each.start()
        end = time.monotonic() + WAIT_S
        while not all(answered) and not failures and time.monotonic() < end:
            time.sleep(0.1)
        os.killpg(serve.process.pid, signal.SIGTERM)
        sent = time.monotonic()
        assert serve.process.wait(WAIT_S) == OK and "Traceback" not in serve.text
        took = time.monotonic() - sent
        for each in clients:
            each.join()
    assert not failures and all(answered), failures
    rows = offline_usage(tmp_path / "victim.service", 10)
    assert [row["charged"] for row in rows] == [row["log"]["images"] for row in rows] == answered
    assert took < 5 * at_once_s(), f"{took:.0f} s"


@pytest.mark.slow
def test_a_sweep_answers_ctrl_c_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "name: s\nbase:\n"
        + "".join(f"  {line}\n" for line in TINY.replace("epochs: 1,", "epochs: 40,", 1).splitlines())
    )
    with command(["sweep", "sweep.yaml"], tmp_path) as sweep:
        sweep.wait_for("training victim")
        took, code = sweep.interrupt()
    assert took < at_once_s() and code == INTERRUPTED and "Traceback" not in sweep.text
    assert sweep.text.count("interrupted") == 1 and "--resume" in sweep.text


@pytest.mark.slow
def test_null_models_answer_ctrl_c_and_go_on(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text(TINY)
    with command(["train", "e.yaml", "--to", "v", "--no-copies"], tmp_path) as train:
        assert train.process.wait(WAIT_S) == OK
    with command(["nulls", "v", "--count", "200"], tmp_path) as nulls:
        end = time.monotonic() + 120
        while not any((tmp_path / "v" / "owner").rglob("*null*/*.json")) and time.monotonic() < end:
            time.sleep(0.1)
        took, code = nulls.interrupt()
    assert took < at_once_s() and code == INTERRUPTED and "Traceback" not in nulls.text
    with command(["nulls", "v", "--count", "2"], tmp_path) as again:
        again.wait_for("null models")
        assert again.process.wait(WAIT_S) == OK
    (tmp_path / "slow_suspect.py").write_text(
        "import time\n\ndef ask(images):\n    print('asked', flush=True)\n    time.sleep(60)\n"
    )
    with command(["verify", "v", "--suspect", "slow_suspect:ask"], tmp_path) as verify:
        verify.wait_for("asked")
        took, code = verify.interrupt()
    assert took < at_once_s() and code == INTERRUPTED and "Traceback" not in verify.text
    assert not (tmp_path / "v" / "owner" / "verdicts").exists()


class Slow(ForeignService):
    """Somebody else's API that takes its time."""

    async def classify(self, request: Request) -> dict[str, Any]:
        await asyncio.sleep(0.3)
        return await super().classify(request)


@pytest.mark.slow
def test_a_theft_answers_ctrl_c_and_pays_for_no_answer_twice(tmp_path: Path) -> None:
    service = Slow(build_model("vgg_like", (1, 8, 8), 10, {"width": 0.0625}), top=3)
    description = service.describe(tmp_path, 8)
    (tmp_path / "key").write_text("secret")
    (tmp_path / "e.yaml").write_text(TINY)
    with admin.served(service.app, 0) as url:
        arguments = ["steal", "e.yaml", "--url", url, "--api", str(description), "--key", "file:key"]
        with command(arguments, tmp_path) as steal:
            end = time.monotonic() + 90
            while service.asked < 24 and time.monotonic() < end:
                time.sleep(0.05)
            took, code = steal.interrupt()
        assert took < at_once_s() and code == INTERRUPTED and "Traceback" not in steal.text
        under_way = 8
        assert service.asked < 80
        with command(arguments, tmp_path) as again:
            assert again.process.wait(WAIT_S) == OK, again.text
    assert 80 <= service.asked <= 80 + under_way, "at most what was under way is asked again"
