"""API keys of a service: shown once, stored as hashes in one file.

A key has 256 random bits, so its plain SHA-256 cannot be inverted by brute force; a slow hash would gain nothing.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mea_ray.blackbox.ledger import MOST_IMAGES, RateLimit
from mea_ray.blackbox.validate import check_name
from mea_ray.core.errors import ArtifactError, BadQuery, ConfigError
from mea_ray.core.words import nearest
from mea_ray.service.accounts import new_secret
from mea_ray.storage.files import write_whole

KEYS, SECRET = "keys.json", "secret"
PREFIX = "mea_"
_LOCK_S = 10.0


def state_folder(victim: Path) -> Path:
    """Return the default folder of a victim's service, for its keys and its ledger: beside the victim."""
    victim = victim.resolve()
    return victim.with_name(f"{victim.name}.service")


def service_secret(state: Path) -> str:
    """Return the secret that replicas present to the ledger, see `accounts`; the first call draws it.

    It is stored in the service's folder, readable only by the owner, so that every replica and every restart has it.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = state / SECRET
    with FileLock(f"{path}.lock", timeout=_LOCK_S):
        if not path.exists():
            write_whole(path, new_secret(), mode=0o600)
    return path.read_text(encoding="utf-8")


def service_name(state: Path) -> str:
    """Return the name of the service of a state folder."""
    return state.resolve().name.removesuffix(".service") or "victim"


class ApiKey(BaseModel):
    """One client of a service and the hash of its key.

    Attributes:
        client: Name of the client; its account in the ledger.
        sha256: Hash of the key.
        budget: Query budget in images; None for no limit.
        images_per_second: Sustained rate; None for no limit.
        burst: Images that it can send at once after a pause.
        created: Date and time in UTC, ISO 8601.
        revoked: When the key was revoked; None while it is valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: str
    sha256: str
    budget: int | None = Field(None, ge=0, le=MOST_IMAGES)
    images_per_second: float | None = Field(None, gt=0, allow_inf_nan=False)
    burst: int = Field(1000, ge=1, le=MOST_IMAGES)
    created: str
    revoked: str | None = None

    @property
    def rate(self) -> RateLimit | None:
        """Rate limit as a token bucket; None for no limit."""
        return None if self.images_per_second is None else RateLimit(self.images_per_second, self.burst)


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()


class KeyStore:
    """The owner's interface to the keys of a service.

    Args:
        folder: Folder of the service; the keys are in its ``keys.json``, readable only by the owner.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / KEYS

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys, including revoked ones, by name.

        Raises:
            ArtifactError: The file is damaged.
        """
        return read_keys(self.path)

    def add(
        self, client: str, *, budget: int | None = None, images_per_second: float | None = None, burst: int = 1000
    ) -> str:
        """Create a key and return it; only its hash is stored.

        A client whose key was revoked gets a new one and keeps its account: earlier charges remain.

        Raises:
            ConfigError: The name is invalid or has a valid key, or a limit is out of range.
        """
        try:
            check_name("a client's name", client)
        except BadQuery as error:
            raise ConfigError(str(error)) from None
        key = PREFIX + secrets.token_urlsafe(32)
        with self._changing() as keys:
            if client in keys and keys[client].revoked is None:
                raise ConfigError(
                    f"client {client!r} has a valid key; revoke it first, or change its limits with `keys limit`"
                )
            keys[client] = _record(
                client=client,
                sha256=key_hash(key),
                budget=budget,
                images_per_second=images_per_second,
                burst=burst,
                created=_now(),
            )
        return key

    def revoke(self, client: str) -> None:
        """Revoke a client's key; a running service rejects it within a second.

        Raises:
            ConfigError: There is no such client, or its key was revoked before.
        """
        with self._changing() as keys:
            record = self._known(keys, client)
            if record.revoked is not None:
                raise ConfigError(f"the key of {client!r} was revoked on {record.revoked}")
            keys[client] = record.model_copy(update={"revoked": _now()})

    def limit(
        self,
        client: str,
        *,
        budget: int | None | Literal["same"] = "same",
        images_per_second: float | None | Literal["same"] = "same",
        burst: int | Literal["same"] = "same",
    ) -> ApiKey:
        """Change a client's limits; "same" leaves a limit unchanged. A budget below the charges counts as spent.

        Raises:
            ConfigError: There is no such client, or a limit is out of range.
        """
        changes = {"budget": budget, "images_per_second": images_per_second, "burst": burst}
        with self._changing() as keys:
            record = self._known(keys, client)
            keys[client] = _record(**{**record.model_dump(), **{k: v for k, v in changes.items() if v != "same"}})
            return keys[client]

    @staticmethod
    def _known(keys: dict[str, ApiKey], client: str) -> ApiKey:
        if client not in keys:
            raise ConfigError(
                f"there is no client {client!r}{nearest(client, sorted(keys)) or '.'} "
                f"Known: {', '.join(sorted(keys)) or 'none; add one with `keys add`'}"
            )
        return keys[client]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, ApiKey]]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with FileLock(f"{self.path}.lock", timeout=_LOCK_S):
                keys = {record.client: record for record in self.list()}
                yield keys
                body = _File(keys=tuple(keys[name] for name in sorted(keys)))
                write_whole(self.path, body.model_dump_json(indent=1), mode=0o600)
        except Timeout:
            raise ConfigError(f"{self.path} is being changed by another process; try again") from None


class KeyRing:
    """The keys of a running service, read again whenever the file changes.

    The file is checked once a second, and whenever a key is unknown: a new key works immediately, and a revoked one is
    rejected within a second.

    Args:
        path: The file; no file means no keys.
        every_s: Minimum time between two checks of the file, in seconds.
        clock: A monotonic clock, in seconds.

    Attributes:
        records: All records, a new tuple whenever the file changes.
    """

    def __init__(self, path: Path, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._every_s, self._clock = path, every_s, clock
        self.records: tuple[ApiKey, ...] = ()
        self._looked: float | None = None
        self._stamp: tuple[int, int, int] | None = (0, 0, 0)
        self._by_hash: dict[str, ApiKey] = {}

    def find(self, key: str) -> ApiKey | None:
        """Return the record of a valid key; None for one that is unknown or revoked."""
        self.refresh()
        digest = key_hash(key)
        record = self._by_hash.get(digest)
        if record is None:  # it may have been added within the last second
            self.refresh(at_once=True)
            record = self._by_hash.get(digest)
        return record if record is not None and record.revoked is None else None

    def refresh(self, *, at_once: bool = False) -> None:
        """Read the file again if it changed. A damaged or missing file changes nothing.

        Args:
            at_once: Check the file even if it was checked a moment ago.
        """
        now = self._clock()
        if not at_once and self._looked is not None and now - self._looked < self._every_s:
            return
        self._looked = now
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except FileNotFoundError:
            stamp = None
        except OSError:
            return
        if stamp == self._stamp:
            return
        try:
            records = read_keys(self.path)
        except (ArtifactError, OSError):
            return
        self._stamp = stamp
        self._by_hash = {record.sha256: record for record in records}
        self.records = records


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the records of a file; none if there is no file.

    Raises:
        ArtifactError: It is damaged.
    """
    try:
        return _File.model_validate_json(path.read_bytes()).keys
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtifactError(f"{path} is damaged ({first['msg']}); restore it, or add the keys again") from None


def key_hash(key: str) -> str:
    """Return the SHA-256 of a key, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _record(**values: object) -> ApiKey:
    try:
        return ApiKey.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}; choose another limit"
        ) from None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
