"""Pages of the documentation whose tables and curves are rendered from records.

A page marks the rendered blocks; everything between the two comments is replaced:

    <!-- record: budgets/results -->
    <!-- end -->

The part before the slash is a folder of records, the part after it ``results``, ``largest`` (the same for only the
largest budget), ``removals``, ``detections``, ``statistics``, ``front``, ``leaning``, ``chosen`` (tables), ``verdict``
(the report's first screen), ``made`` (command, commit, date, device) or ``curve`` (a picture, stored in the pages'
folder of images). A recorded calibration has ``statistics``, ``verdicts`` and ``made``.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from mea_ray.core.errors import ConfigError
from mea_ray.core.words import nearest_and_known
from mea_ray.report import calibration, curves, markdown
from mea_ray.report.tables import common_prefix, grouped, with_short_points
from mea_ray.results.records import TrialResult, read_results
from mea_ray.storage.files import write_whole

_BLOCK = re.compile(r"(<!-- record: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OPENING = re.compile(r"<!-- record: (\S+) -->")
PARTS = tuple(dict.fromkeys((*markdown.TABLES, *calibration.CALIBRATION_PARTS, "made", "curve")))


def render(page: Path, records: Path, images: Path) -> tuple[str, dict[Path, str]]:
    """Render the marked blocks of a page.

    Args:
        page: A Markdown file.
        records: The folder of records.
        images: Folder of the pictures.

    Returns:
        The up-to-date page, and its pictures (SVG by file).

    Raises:
        ConfigError: A block is not closed, or names an unknown record or part.
        ArtifactError: A record is missing or damaged.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{page} cannot be read ({error}); give a Markdown file in UTF-8") from error
    pictures: dict[Path, str] = {}
    if len(_OPENING.findall(text)) != len(_BLOCK.findall(text)):
        raise ConfigError(f"{page}: a `<!-- record: ... -->` has no `<!-- end -->` after it; add it")

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_part(match[2], page, records, images, pictures)}\n\n{match[3]}"

    return _BLOCK.sub(block, text), pictures


def write(page: Path, records: Path, images: Path) -> bool:
    """Rewrite a page and its pictures where they are out of date; return whether anything changed."""
    text, pictures = render(page, records, images)
    changed = out_of_date(page, records, images)
    for path, svg in pictures.items():
        if _digest(path) != _digest_of(svg):
            write_whole(path, svg)
    if page.read_text(encoding="utf-8") != text:
        write_whole(page, text)
    return bool(changed)


def out_of_date(page: Path, records: Path, images: Path) -> list[Path]:
    """Return what a rewrite of a page would change: the page, and its pictures.

    A picture is compared by the data from which it was drawn, since its bytes depend on matplotlib's version.
    """
    text, pictures = render(page, records, images)
    stale = [path for path, svg in pictures.items() if _digest(path) != _digest_of(svg)]
    return ([page] if page.read_text(encoding="utf-8") != text else []) + stale


def _part(name: str, page: Path, records: Path, images: Path, pictures: dict[Path, str]) -> str:
    record, _, part = name.partition("/")
    if part not in PARTS:
        raise ConfigError(f"{page}: {name!r} is not a part of a record{nearest_and_known(part, list(PARTS))}")
    folder = records / record
    if not folder.is_dir():
        known = sorted(path.name for path in records.iterdir() if path.is_dir()) if records.is_dir() else []
        raise ConfigError(f"{page}: there is no record {record!r} in {records}{nearest_and_known(record, known)}")
    if part == "made":
        return markdown.provenance(folder)
    if (folder / calibration.CALIBRATION).exists() and part in calibration.CALIBRATION_PARTS:
        return calibration.render(folder, part)
    results = with_short_points(read_results(folder))
    if part in markdown.TABLES:
        return markdown.TABLES[part](record, results)
    path = images / f"{record}.svg"
    pictures[path] = curve(record, results)
    link = Path(os.path.relpath(path, page.parent)).as_posix()
    return f"![{_words(results)}]({link})"


def curve(name: str, results: list[TrialResult]) -> str:
    """Return the robustness curves of a record as one SVG, which contains a digest of the data."""
    groups = _groups(results)
    drawn = "\n".join(f"{metric}: {curves.describe(groups, metric)}" for metric in curves.METRICS)
    return curves.sheet(groups, name, hashlib.sha256(drawn.encode()).hexdigest()[:16])


def _groups(results: list[TrialResult]) -> dict[str, list[TrialResult]]:
    groups = grouped(results)
    prefix = common_prefix(list(groups))
    shortened = {name.removeprefix(prefix): trials for name, trials in groups.items()}
    return curves.chunks(shortened)[0]


def _words(results: list[TrialResult]) -> str:
    return f"Robustness curves. WSR of the stolen models: {curves.describe(_groups(results), 'wsr')}".replace("]", ")")


def _digest(path: Path) -> str | None:
    try:
        return _digest_of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError):
        return None


def _digest_of(svg: str) -> str | None:
    match = re.search(r"<!-- drawn from ([0-9a-f]+) -->", svg)
    return match[1] if match else None
