"""API keys: shown once, stored as hashes, limited, revoked, and read again when they change."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.service.http.keys import KEYS, KeyRing, KeyStore, service_name, state_folder


def test_the_file_holds_hashes_and_is_the_owners_alone(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    key = store.add("alice", budget=10, images_per_second=2.5, burst=7)
    file = tmp_path / KEYS
    assert key.startswith("mea_") and len(key) > 40 and key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (record,) = store.list()
    assert (record.client, record.budget, record.rate) == ("alice", 10, (2.5, 7))
    assert KeyRing(file).find(key) == record


def test_a_name_has_one_valid_key(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    first = store.add("alice")
    with pytest.raises(ConfigError, match="has a valid key; revoke it first"):
        store.add("alice")
    store.revoke("alice")
    with pytest.raises(ConfigError, match="was revoked on"):
        store.revoke("alice")
    second = store.add("alice")
    ring = KeyRing(tmp_path / KEYS)
    assert ring.find(first) is None and ring.find(second) is not None


@pytest.mark.parametrize(
    ("name", "limits", "says"),
    [
        ("a b", {}, "must have 1 to 128 letters"),
        ("", {}, "must have 1 to 128 letters"),
        ("a", {"budget": -1}, "budget=-1"),
        ("a", {"images_per_second": 0.0}, "images_per_second=0.0"),
        ("a", {"images_per_second": float("nan")}, "images_per_second=nan"),
        ("a", {"burst": 0}, "burst=0"),
    ],
)
def test_bad_limits_are_refused_and_nothing_is_written(
    tmp_path: Path, name: str, limits: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        KeyStore(tmp_path).add(name, **limits)
    assert KeyStore(tmp_path).list() == ()


def test_a_mistyped_client_is_named(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.add("alice")
    with pytest.raises(ConfigError, match="alice"):
        store.limit("alise", budget=3)


def test_limits_that_are_not_given_stay(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.add("alice", budget=10, images_per_second=2.0)
    assert store.limit("alice", budget=None).images_per_second == 2.0
    assert store.limit("alice", images_per_second=None).budget is None


def test_two_commands_at_once_lose_no_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: KeyStore(tmp_path).add(f"client-{index}"), range(16)))
    assert len(KeyStore(tmp_path).list()) == 16


def test_a_running_service_reads_changes_within_a_second_and_survives_damage(tmp_path: Path) -> None:
    now = [0.0]
    store, ring = KeyStore(tmp_path), KeyRing(tmp_path / KEYS, clock=lambda: now[0])
    assert ring.find("anything") is None
    key = store.add("alice")
    assert ring.find(key) is not None, "a key can be used as soon as it was added"
    (tmp_path / KEYS).write_text("{")
    now[0] = 1.1
    assert ring.find(key) is not None, "a damaged file changes nothing"
    with pytest.raises(ArtifactError, match="is damaged"):
        store.list()
    (tmp_path / KEYS).unlink()
    again = store.add("alice")
    assert ring.find(again) is not None and ring.find(key) is None
    store.revoke("alice")
    now[0] = 1.2
    assert ring.find(again) is not None
    now[0] = 2.3
    assert ring.find(again) is None


def test_names_of_folders() -> None:
    assert state_folder(Path("/v/flowers")) == Path("/v/flowers.service")
    assert service_name(Path("/v/flowers.service")) == "flowers"
