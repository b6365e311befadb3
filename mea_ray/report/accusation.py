"""The verdict on one suspect on one page: for the terminal, as HTML, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mea_ray.experiment.suspect.judging import StatisticRecord, Verdict, held_out
from mea_ray.experiment.victim.folder import Victim
from mea_ray.report.samples import PER_STRIP, PictureStrip, strips
from mea_ray.report.settings import filter_text
from mea_ray.report.tables import percent, tone_of
from mea_ray.report.terminal import pairs_table
from mea_ray.results.records import KeyRecord
from mea_ray.storage.files import write_whole
from mea_ray.watermarks.base import Watermark

JSON, HTML = "verdict.json", "verdict.html"
HEADLINES = {
    "void": "Nothing is proved: innocent models would be accused as well.",
    "too poor to judge": "Nothing is proved: the suspect is too poor to judge.",
    "not specific": "Nothing is proved: the suspect also responds to samples that only look like the owner's.",
    "not proved": "Theft is not proved: the suspect cannot be distinguished from innocent models.",
    "not committed": "Nothing is proved yet: the suspect is recognised, but nobody can check that the key is older.",
    "suggestive": "The evidence is suggestive, but not a proof.",
    "proved": "Theft is proved.",
}
COLOURS = {"good": "green", "mixed": "yellow", "bad": "red"}


def headline(verdict: Verdict) -> str:
    """Return the verdict in one sentence."""
    return HEADLINES[verdict.verdict]


def rows(verdict: Verdict) -> list[tuple[str, str]]:
    """Return the basis of the verdict, as names and texts."""
    suspect, key, report = verdict.suspect, verdict.key, verdict.report
    size = suspect.preprocessing["size"]
    given = [f"images resized to {size[0]} x {size[1]}"] if size else []
    grey = suspect.preprocessing.get("channels") == 1
    given += ["in grey" if grey else f"channels {suspect.preprocessing['channel_order']}"]
    isolation = {"": "", "namespace": ", in a process without network", "python": ", in a separate process"}
    commitment = "none"
    if key is not None and key.commitment:
        when = f"seen {key.committed_at} by {key.authority}" if key.committed_at else "not time-stamped"
        commitment = f"{key.commitment} ({when})"
    stolen = f", {verdict.stolen_null_models} stolen with {verdict.budget:,} queries" if verdict.budget else ""
    table = [
        ("suspect", f"{suspect.name} ({suspect.kind}{isolation[suspect.network]})"),
        ("suspect's SHA-256", suspect.sha256 or "none: it is not a file"),
        ("asked", f"{', '.join(given)}; answers {suspect.outputs}; order of classes {suspect.order}"),
        ("victim", f"{verdict.victim}, {verdict.watermark}"),
        ("victim's SHA-256", verdict.victim_sha256),
        ("key", "none" if key is None else _key(key)),
        *([] if key is None or key.filter is None else [("its samples", filter_text(key.filter))]),
        ("commitment", commitment),
        ("innocent models", f"{verdict.null_models}{stolen}"),
        ("accuracy", f"{percent(report.accuracy)} (victim {percent(verdict.victim_report.accuracy)})"),
        ("fidelity", percent(report.fidelity)),
        ("p-value", f"{verdict.p_value:.2g}, significance {verdict.significance:g}, by {verdict.statistic}"),
        ("paper's rule", f"WSR {'above' if verdict.above_threshold else 'not above'} its threshold"),
        ("date", verdict.date),
        ("command", verdict.command or "from Python"),
    ]
    return table


def _key(key: KeyRecord) -> str:
    insecure = "; insecure: anyone with the victim's config can rebuild it" if key.seed_from == "config" else ""
    return f"{key.fingerprint} ({key.classes or 'fixed'}{insecure})"


def statistic_rows(verdict: Verdict) -> list[tuple[str, str, str, str, str, str]]:
    """Return one row per statistic: name, suspect, victim, largest null model, rank among models, rank of the key."""
    return [
        (
            each.name,
            f"{each.suspect:.4g}",
            "–" if each.victim is None else f"{each.victim:.4g}",
            f"{each.largest_null:.4g}",
            f"{each.position} of {each.total}",
            _key_rank(each),
        )
        for each in verdict.statistics
    ]


def _key_rank(each: StatisticRecord) -> str:
    return "–" if each.key_position is None else f"{each.key_position} of {each.key_total}"


STATISTIC_HEADINGS = ("Statistic", "Suspect", "Victim", "Largest innocent", "Rank among models", "Rank of the key")


def show(console: Console, verdict: Verdict) -> None:
    """Print the page."""
    from rich.table import Table

    console.print(f"\n[bold {COLOURS[tone_of(verdict.verdict)]}]{escape(headline(verdict))}[/]")
    for reason in verdict.reasons:
        console.print(f"  [{COLOURS[tone_of(reason.verdict)]}]•[/] {escape(reason.text)}", highlight=False)
    console.print(pairs_table("", rows(verdict)))
    table = Table(*STATISTIC_HEADINGS, box=None, pad_edge=False)
    for row in statistic_rows(verdict):
        table.add_row(*row)
    console.print(table)
    for title, lines in (("What would change this conclusion", verdict.would_change), ("Remarks", verdict.notes)):
        if lines:
            console.print(f"\n[bold]{title}[/]")
            for line in lines:
                console.print(f"  • {escape(line)}", highlight=False, soft_wrap=True)


def write(folder: Path, verdict: Verdict, victim: Victim) -> tuple[Path, Path]:
    """Write ``verdict.json`` and ``verdict.html``, readable only by the owner: the pictures show the key's samples.

    Args:
        folder: Output folder; created if missing.
        verdict: The verdict.
        victim: The victim, whose samples are shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_whole(folder / JSON, verdict.model_dump_json(indent=1), mode=0o600)
    write_whole(folder / HTML, render(verdict, pictures(victim)), mode=0o600)
    return folder / JSON, folder / HTML


def pictures(victim: Victim) -> list[PictureStrip]:
    """Return the samples that the suspect was queried with, and those that only look like them."""
    assert victim.key is not None
    watermark: Watermark = victim.config.victim.watermark.build()
    test_images = held_out(victim).verification
    samples = watermark.samples(victim.key, test_images, PER_STRIP, victim.config.seed)
    return strips(samples, test_images.class_names)


def render(verdict: Verdict, drawn: list[PictureStrip]) -> str:
    """Return the page as HTML: one file, no network, no scripts."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mea_ray.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    values: dict[str, Any] = {
        "verdict": verdict,
        "headline": headline(verdict),
        "tone": tone_of(verdict.verdict),
        "reasons": [(each.text, tone_of(each.verdict)) for each in verdict.reasons],
        "rows": rows(verdict),
        "headings": STATISTIC_HEADINGS,
        "statistics": statistic_rows(verdict),
        "strips": drawn,
        "css": Markup((Path(__file__).parent / "report.css").read_text(encoding="utf-8")),  # ours, not the user's
    }
    return environment.get_template("verdict.html.j2").render(values)
