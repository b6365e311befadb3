"""The ledger's journal on disk: a small SQLite file, committed before a charge is answered."""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mea_ray.core.errors import ArtifactError, StorageUnavailable

_SCHEMA_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS clients (
    name TEXT PRIMARY KEY, budget INTEGER, images_per_second REAL, burst INTEGER,
    tokens REAL NOT NULL, stamp REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    client TEXT NOT NULL, request_id TEXT NOT NULL, images INTEGER NOT NULL, digest TEXT NOT NULL,
    PRIMARY KEY (client, request_id)
) WITHOUT ROWID;
"""


class LedgerJournal:
    """Durable rows of clients and charged requests.

    The file is locked while it is open: two ledgers on one journal would each grant the whole budget. The lock ends
    with its process, so that the next process can open the file immediately.

    Args:
        path: The file; its folder is created.
        timeout_s: Seconds to wait for another process to release the file.

    Raises:
        ArtifactError: The file is damaged, of another schema, or locked by a running ledger.
    """

    def __init__(self, path: Path, *, timeout_s: float = 10.0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # An actor can run its constructor and its calls in different threads, though never two at once.
        self._database = sqlite3.connect(path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            # Exclusive before WAL: no shared-memory file, hence also safe on network file systems.
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute("BEGIN EXCLUSIVE")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version not in {0, _SCHEMA_VERSION}:
                raise ArtifactError(
                    f"ledger journal {path} has schema {version}, expected {_SCHEMA_VERSION}; move it away"
                )
            for statement in _TABLES.split(";"):
                self._database.execute(statement)
            self._database.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            self._database.close()
            raise ArtifactError(
                f"cannot open ledger journal {path}: {error}; stop the service that uses it, or move the file away"
            ) from error
        except ArtifactError:
            self._database.close()
            raise

    def clients(self) -> Iterator[tuple[Any, ...]]:
        """Yield (name, budget, images_per_second, burst, tokens, stamp)."""
        yield from self._database.execute("SELECT name, budget, images_per_second, burst, tokens, stamp FROM clients")

    def requests(self) -> Iterator[tuple[str, str, int, str]]:
        """Yield (client, request id, images, digest)."""
        yield from self._database.execute("SELECT client, request_id, images, digest FROM requests")

    def write(self, clients: Sequence[tuple[Any, ...]], requests: Sequence[tuple[Any, ...]]) -> None:
        """Commit changed clients and new requests in one transaction.

        Raises:
            StorageUnavailable: The disk is full or unavailable; nothing was written, and the call can be repeated.
        """
        database = self._database
        try:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO clients VALUES (?, ?, ?, ?, ?, ?)", clients)
            database.executemany("INSERT INTO requests VALUES (?, ?, ?, ?)", requests)
            database.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):  # a full disk has already rolled it back
                database.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise storage_error(self.path, error) from error
            raise

    def copy_to(self, path: Path) -> None:
        """Write a copy of the file, whole and readable while this one is open."""
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with contextlib.closing(sqlite3.connect(aside)) as copy:
                self._database.backup(copy)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._database.close()


def storage_error(path: Path, error: sqlite3.OperationalError) -> StorageUnavailable:
    """Return the typed, retryable error for a disk that SQLite found full or unreachable."""
    return StorageUnavailable(str(path), "full" if "full" in str(error) else "away", 0.0, str(error))
