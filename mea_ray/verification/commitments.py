"""A commitment to a key: a hash that can be published before any suspect exists, and opened later in court.

Without it anyone could search for a key that fits a given model, and claim to have had it all along.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

NONCE_BYTES = 32
"""The nonce hides the key: with fewer bits, the key could be found by brute force."""


class Commitment(BaseModel):
    """The content of a commitment. It is as secret as the key; only ``digest`` is published.

    Attributes:
        schema_version: Version of this schema.
        key: SHA-256 of the key, 64 hexadecimal digits.
        model: SHA-256 of the victim's weights.
        admissible: All keys that could have been drawn, and how the key was drawn; empty for a scheme that draws no
            key.
        nonce: Random, 64 hexadecimal digits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    schema_version: Literal[1] = 1
    key: str = Field(pattern="^[0-9a-f]{64}$")
    model: str = Field(pattern="^[0-9a-f]{64}$")
    admissible: dict[str, Any]
    nonce: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def to(cls, key: str, model: str, admissible: Mapping[str, Any]) -> Commitment:
        """Return a commitment with a new nonce from the system's randomness."""
        return cls(key=key, model=model, admissible=dict(admissible), nonce=secrets.token_hex(NONCE_BYTES))

    @property
    def content(self) -> bytes:
        """What is hashed: canonical JSON (sorted keys, no spaces) of all fields, UTF-8."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of ``content``, 64 hexadecimal digits."""
        return hashlib.sha256(self.content).hexdigest()
