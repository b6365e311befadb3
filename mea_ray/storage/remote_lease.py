"""A lease in an object store, which can neither create an object exclusively nor rename one.

Each process that wants the lease writes a claim of its own and then lists all claims. That is sound where a list shows
what was written before it, as S3, Google Cloud Storage and Azure promise:

- A claim carries an epoch, one more than that of the last holder. The active claim of the highest epoch is the
  holder's; a holder that was paused and writes again changes nothing.
- A process that sees a living claim makes none of its own. Without this, processes that ask again and again would keep
  each other from going on.
- A process that sees an active claim of its own epoch withdraws.
- Of claims that are still being made the one with the smallest token goes on, once each other one of its epoch was
  withdrawn. One with a larger token withdraws as soon as it sees a smaller one.

So of two that begin at the same time at least one sees the other, and never do both go on.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from mea_ray.storage import process
from mea_ray.storage.lease import Lease
from mea_ray.storage.objects import PART, write_object

_WAIT_S = 0.5


class RemoteLease(Lease):
    """A lease among all processes that see a folder of an object store.

    Args:
        system: A file system of ``pyarrow.fs``.
        folder: Path of the leases in it.
        name: See `Lease`.
        beat_s: See `Lease`.
        expiry_s: See `Lease`.
        on_lost: See `Lease`.
    """

    def __init__(
        self,
        system: Any,
        folder: str,
        name: str,
        *,
        beat_s: float = 10.0,
        expiry_s: float = 60.0,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name, beat_s=beat_s, expiry_s=expiry_s, on_lost=on_lost)
        self.system, self.folder = system, f"{folder}/{name}"
        self._writing = threading.Lock()
        self._beats = self._epoch = 0

    def holder(self) -> dict[str, Any] | None:
        """See `Lease.holder`."""
        claims = self._claims()
        return claims.get(_active(claims))

    def _claim(self, token: str) -> bool:
        claims = self._claims()
        holder = _active(claims)
        if holder and not self._is_dead(holder, claims[holder]):
            return False
        self._epoch = _epoch(claims.get(holder, {})) + 1
        # One silence is watched at a time, as in `_is_first`.
        for name in sorted(self._rivals(token, claims))[:1]:
            if not self._is_dead(name, claims[name]):
                return False
        self._write(token, active=False)
        try:
            while not self._is_first(token):
                if self._has_lost(token):
                    self._withdraw(token)
                    return False
                time.sleep(_WAIT_S)
            self._write(token, active=True)
            # This process may have been paused before that write, for so long that another one went on.
            claims = self._claims()
            if any(_epoch(claim) >= self._epoch for name, claim in claims.items() if name != token and claim["active"]):
                self._withdraw(token)
                return False
        except BaseException:
            with contextlib.suppress(OSError):
                self._withdraw(token)
            raise
        for name, claim in claims.items():
            if _epoch(claim) < self._epoch:
                self._withdraw(name)
        return True

    def _rivals(self, token: str, claims: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the other claims of this epoch or a later one."""
        return {name: claim for name, claim in claims.items() if name != token and _epoch(claim) >= self._epoch}

    def _is_first(self, token: str) -> bool:
        rivals = self._rivals(token, self._claims())
        for name in sorted(rivals)[:1]:  # silence is watched of one after the other
            if not rivals[name]["active"] and self._is_dead(name, rivals[name]):
                self._withdraw(name)
        return not rivals

    def _has_lost(self, token: str) -> bool:
        return any(claim["active"] or name < token for name, claim in self._rivals(token, self._claims()).items())

    def _is_dead(self, token: str, claim: dict[str, Any]) -> bool:
        return process.is_gone(claim) or self._is_silent(token, str(claim.get("beat")))

    def _is_mine(self, token: str) -> bool:
        with self._writing:
            return _active(self._claims()) == token

    def _beat(self, token: str) -> None:
        self._write(token, active=True)

    def _write(self, token: str, *, active: bool) -> None:
        with self._writing:
            self._beats += 1
            claim = {**process.identity(), "epoch": self._epoch, "active": active, "beat": self._beats}
            write_object(self.system, f"{self.folder}/{token}", json.dumps(claim).encode())

    def _withdraw(self, token: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.delete_file(f"{self.folder}/{token}")

    def _claims(self) -> dict[str, dict[str, Any]]:
        from pyarrow import fs

        claims: dict[str, dict[str, Any]] = {}
        for info in self.system.get_file_info(fs.FileSelector(self.folder, allow_not_found=True)):
            if info.base_name.endswith(PART):
                continue
            try:
                with self.system.open_input_stream(info.path) as file:
                    claim = json.loads(file.read())
                    claims[info.base_name] = {**claim, "active": bool(claim["active"]), "epoch": int(claim["epoch"])}
            except FileNotFoundError:
                continue  # withdrawn meanwhile
            except (ValueError, KeyError, TypeError):
                # Half-written, on a file system that shows it: one that is being made.
                claims[info.base_name] = {"active": False, "epoch": sys.maxsize}
        return claims


def _epoch(claim: dict[str, Any]) -> int:
    return int(claim.get("epoch", 0))


def _active(claims: dict[str, dict[str, Any]]) -> str:
    """Return the token of the active claim with the highest epoch; empty if there is none."""
    active = [(_epoch(claim), token) for token, claim in claims.items() if claim["active"]]
    return max(active)[1] if active else ""
