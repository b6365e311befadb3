"""Names of classes: their order, which decides the labels, and names that are easily confused."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mea_ray.data.skipped import warn

_INTEGER = re.compile(r"[-+]?[0-9]{1,100}")


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names of classes: as numbers if all are whole numbers (2 before 10), else as text, by code points."""
    listed = sorted(names)
    return sorted(listed, key=int) if _all_numbers(listed) else listed


def warn_of_names(names: Sequence[str], where: str) -> None:
    """Warn of misleading names.

    These are numbers other than the indices of their classes, empty names, and names that differ only in case, spaces
    or the form of a character.

    Args:
        names: In the order of the classes.
        where: The folder or file that was read, for the warning.
    """
    if _all_numbers(names) and list(names) != list(map(str, range(len(names)))):
        places = [0, 1, len(names) - 1] if len(names) > 2 else range(len(names))
        examples = ", ".join(f"{names[place]!r} is class {place}" for place in places)
        warn(
            f"{where}: the class names are whole numbers and are sorted as numbers: {examples}; settings "
            "without quotes (target_class: 3) mean the class, with quotes (target_class: '3') its name"
        )
    if blank := [name for name in names if not name.strip()]:
        warn(f"{where}: {blank[0]!r} is the name of a class; if it stands for a missing label, make it null")
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike["".join(unicodedata.normalize("NFKC", name).casefold().split())].append(name)
    if groups := [group for group in alike.values() if len(group) > 1]:
        warn(
            f"{where}: {', '.join(map(repr, groups[0]))} are {len(groups[0])} classes that differ in case or spaces "
            f"alone{f', and {len(groups) - 1:,} others do' if len(groups) > 1 else ''}; give them one name if they are "
            "one class"
        )


def _all_numbers(names: Sequence[str]) -> bool:
    return bool(names) and all(_INTEGER.fullmatch(name) for name in names)
