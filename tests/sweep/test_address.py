"""A Ray that cannot be reached is refused within seconds, in one sentence; without an address we start our own."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import tiny_sweep

from mea_ray.core.errors import ConfigError
from mea_ray.sweep import address
from mea_ray.sweep.address import check, find_cluster
from mea_ray.sweep.runner import run_sweep


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that listens and is no Ray; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                answer(connection)
                done.wait(10)

        done = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        done.set()
        thread.join(10)


def refusal(given: str) -> str:
    with pytest.raises(ConfigError) as caught:
        find_cluster(given)
    text = str(caught.value)
    assert "\n" not in text and "omit --address" in text, text
    return text


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("ray://127.0.0.1:10001", "cannot run through Ray Client"),
        ("http://127.0.0.1:8265", "dashboard"),
        ("https://head.example:443", "dashboard"),
        ("127.0.0.1", "host:port"),
        ("", "host:port"),
        (":6379", "host:port"),
        ("head:port", "host:port"),
        ("head:0", "host:port"),
        ("head:65536", "host:port"),
        ("redis://head:6379", "host:port"),
        ("a b:6379", "host:port"),
    ],
)
def test_an_address_of_another_form_is_refused_with_the_form(given: str, part: str) -> None:
    text = refusal(given)
    assert text.startswith(f"--address={given} ") or text.startswith(f"--address={given}:")
    assert part in text


def test_a_port_that_nobody_listens_on() -> None:
    port = closed_port()
    assert f"--address=127.0.0.1:{port} cannot be reached: Connection refused" in refusal(f"127.0.0.1:{port}")


def test_a_host_that_does_not_exist() -> None:
    assert "--address=no-such-host.invalid:6379 cannot be reached" in refusal("no-such-host.invalid:6379")


def test_a_server_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "CONNECT_S", 0.2)
    with server(lambda connection: None) as port:
        assert "no answer within 0.2 s" in refusal(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n", b"-ERR unknown command\r\n", b"SSH-2.0-x\r\n", b"x"]
)
def test_a_server_that_is_no_ray(answer: bytes) -> None:
    with server(lambda connection: connection.sendall(answer)) as port:
        assert "is not the head of a Ray cluster" in refusal(f"127.0.0.1:{port}")


def test_a_server_that_speaks_as_ray_does_and_lets_nobody_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "JOIN_S", 1.0)
    with server(lambda connection: connection.sendall(b"\0\0\0\4\0\0\0\0\0")) as port:
        text = refusal(f"127.0.0.1:{port}")
    assert "could not join within 1 s" in text and f"ray start --address=127.0.0.1:{port}" in text


def test_auto_without_a_cluster(tmp_path: Path) -> None:
    text = refusal("auto")
    assert "--address=auto" in text and str(tmp_path / "ray" / "ray_current_cluster") in text and "ray start" in text


def test_auto_names_where_a_dead_address_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    port = closed_port()
    file.write_text(f"127.0.0.1:{port}")
    text = refusal("auto")
    assert f"{file}=127.0.0.1:{port} cannot be reached" in text and "ray stop" in text
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert refusal("auto").startswith("RAY_ADDRESS=http://127.0.0.1:8265 is the address of Ray's dashboard")


def test_a_cluster_is_found_and_one_of_another_version_is_refused(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.experimental import internal_kv

    here = ray.get_runtime_context().gcs_address
    monkeypatch.setenv("RAY_ADDRESS", here)
    assert find_cluster("auto") == here
    key, space = b"CLUSTER_METADATA", b"cluster"  # where a head says what it is
    before = internal_kv._internal_kv_get(key, namespace=space)
    try:
        other = {**json.loads(before), "ray_version": "2.9.3", "python_version": "3.8.1"}
        internal_kv._internal_kv_put(key, json.dumps(other).encode(), namespace=space)
        text = refusal(here)
    finally:
        internal_kv._internal_kv_put(key, before, namespace=space)
    assert f"--address={here} cannot be joined: Version mismatch" in text and "2.9.3" in text and "3.8.1" in text


@pytest.mark.parametrize("folder", ["", "tmp", "./x", "~/x"])
@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_below_the_working_directory(
    variable: str, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(variable, folder)
    with pytest.raises(ConfigError, match=f"^{variable}={folder} is not an absolute path; set RAY_TMPDIR"):
        check(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_temporary_folder_that_is_too_long_for_a_socket(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    long = "/tmp/slurm_job_0000000000/scratch_of_a_user/tmp_dir_of_the_job_0000"
    monkeypatch.setenv(variable, long)
    with pytest.raises(ConfigError, match=f"^{variable}={long} is [0-9]+ bytes too long.*set RAY_TMPDIR"):
        check(None)
    assert not Path(long).exists()


def test_a_temporary_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/x")
    with pytest.raises(ConfigError, match="RAY_TMPDIR=/dev/null/x cannot hold Ray's files: Not a directory"):
        check(None)


def test_the_longest_temporary_folder_that_is_let_through_fits_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    for length in range(20, 60):
        folder = "/tmp/" + "x" * length
        monkeypatch.setenv("RAY_TMPDIR", folder)
        try:
            check(None)
        except ConfigError:
            break
        (Path(folder) / "ray").rmdir()
        Path(folder).rmdir()
        longest = folder
    name = f"{longest}/ray/session_2026-01-31_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    assert len(name) == 107, "the limit of Linux, without the final zero"


def test_a_refused_address_leaves_the_name_of_the_sweep_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    storage = tmp_path / "storage"
    with pytest.raises(ConfigError, match="--address=127.0.0.1 "):
        run_sweep(tiny_sweep(storage), address="127.0.0.1")
    assert not storage.exists()
