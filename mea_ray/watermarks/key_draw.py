"""The draw of a key's classes: by hand, or uniformly from all admissible keys.

The rank of a key among all admissible keys is a p-value only if the key was drawn from them. How it was drawn is part
of the key artifact.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import Any, Literal

from pydantic import Field, model_validator

from mea_ray.core.class_keys import AdmissibleKeys, ClassKey
from mea_ray.core.seeding import derive
from mea_ray.core.settings import Settings

Origin = Literal["chosen", "seed", "system", "beacon"]


class KeyDraw(Settings):
    """Where the classes of a key come from."""

    classes: Origin = Field(
        "chosen",
        description="chosen: source_classes and target_class, and the key has no p-value. Otherwise they are drawn "
        "uniformly from all ordered pairs and targets: from the system's randomness (system), from a public beacon's "
        "value (beacon), or from the key's own seed (seed: see victim.insecure_key_from_seed).",
    )
    beacon: str = Field(
        "", description="The beacon's value, as it was published, e.g. 128 hexadecimal digits of NIST's; for beacon."
    )
    geometry: Literal["chosen", "drawn"] = Field(
        "chosen",
        description="drawn: how the classes are mixed belongs to the secret, too. It is drawn from mixing.combiner and "
        "the geometries of mixing.adverse, so that a rank read on mixes is among so many times more keys.",
    )
    number: int = Field(0, ge=0, description="Number of this key, where several are drawn from one origin.")

    @model_validator(mode="after")
    def _beacon_where_it_is_used(self) -> KeyDraw:
        if (self.classes == "beacon") != bool(self.beacon):
            raise ValueError(
                f"classes={self.classes} and beacon={self.beacon!r} do not fit: classes=beacon needs the value that "
                "the beacon published, and every other origin needs none"
            )
        return self

    @model_validator(mode="after")
    def _geometry_with_classes(self) -> KeyDraw:
        if self.geometry == "drawn" and self.classes == "chosen":
            raise ValueError("geometry=drawn needs drawn classes; set classes to system, beacon or seed")
        return self

    @property
    def repeatable(self) -> bool:
        """Whether the same settings draw the same key again."""
        return self.classes != "system"

    def draw(self, admissible: AdmissibleKeys, seed: int) -> ClassKey:
        """Draw one of the admissible keys uniformly.

        Args:
            admissible: All keys that can be drawn.
            seed: Seed of the victim's key, for ``seed``.
        """
        keys = list(admissible)
        if self.classes == "system":
            return keys[secrets.randbelow(len(keys))]
        origin = self.beacon if self.classes == "beacon" else str(derive(seed, "classes"))
        if self.number:
            origin += f"\n{self.number}"
        described = json.dumps(admissible.as_tree(), sort_keys=True)
        # 256 bits modulo the number of keys: no key is likelier than another by more than 1e-60.
        number = int.from_bytes(hashlib.sha256(f"mea_ray key\n{described}\n{origin}".encode()).digest(), "big")
        return keys[number % len(keys)]

    def record(self, admissible: AdmissibleKeys | None) -> dict[str, Any]:
        """Return how a key was drawn, as plain JSON types, for the key artifact."""
        if self.classes == "chosen" or admissible is None:
            return {"classes": "chosen"}
        tree = {"classes": self.classes, "admissible": admissible.as_tree()}
        return {**tree, "beacon": self.beacon} if self.beacon else tree
