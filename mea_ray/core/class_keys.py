"""Keys of classes: two source classes and the target of their mixes; and the set of all admissible keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any

from mea_ray.core.errors import DataError


@dataclass(frozen=True)
class ClassKey:
    """One admissible key.

    Attributes:
        sources: Labels of the two mixed classes, (first, second).
        target: Label that a watermarked model predicts for the mixes.
        geometry: How the classes are mixed; empty where the geometry is not part of the key.
    """

    sources: tuple[int, int]
    target: int
    geometry: str = ""


@dataclass(frozen=True)
class AdmissibleKeys:
    """The set of keys from which the owner's was drawn.

    Attributes:
        classes: Number of classes, at least 3.
        ordered: Whether (a, b) and (b, a) are two keys. They are one where the mix is symmetric.
        geometries: Names of the geometries from which the key's was drawn; empty where it was fixed beforehand.

    Raises:
        DataError: There are too few classes, or a geometry is named twice.
    """

    classes: int
    ordered: bool = False
    geometries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.classes < 3:
            raise DataError(f"a key needs two source classes and a target, but there are {self.classes} classes")
        if len(set(self.geometries)) < len(self.geometries):
            raise DataError(f"geometries={list(self.geometries)} must be different")

    def __len__(self) -> int:
        pairs = math.perm(self.classes, 2) if self.ordered else math.comb(self.classes, 2)
        return pairs * (self.classes - 2) * max(1, len(self.geometries))

    def __iter__(self) -> Iterator[ClassKey]:
        choose = permutations if self.ordered else combinations
        for geometry in self.geometries or ("",):
            for first, second in choose(range(self.classes), 2):
                for target in range(self.classes):
                    if target not in {first, second}:
                        yield ClassKey((first, second), target, geometry)

    def canonical(self, key: ClassKey) -> ClassKey:
        """Return the key in canonical form: sources sorted unless ordered.

        Raises:
            DataError: The key is not admissible.
        """
        first, second = key.sources if self.ordered else (min(key.sources), max(key.sources))
        labels = (first, second, key.target)
        geometry = key.geometry if self.geometries else ""
        known = all(0 <= label < self.classes for label in labels) and len(set(labels)) == 3
        if not known or (self.geometries and geometry not in self.geometries):
            raise DataError(
                f"{key} is not one of the admissible keys: three different labels below {self.classes}"
                + (f" and a geometry of {list(self.geometries)}" if self.geometries else "")
            )
        return ClassKey((first, second), key.target, geometry)

    def as_tree(self) -> dict[str, Any]:
        """Return the set as plain JSON types."""
        return {"classes": self.classes, "ordered": self.ordered, "geometries": list(self.geometries)}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> AdmissibleKeys:
        """Return the set that ``as_tree`` described.

        Raises:
            KeyError, TypeError: The tree describes none.
        """
        return cls(int(tree["classes"]), bool(tree["ordered"]), tuple(tree["geometries"]))
