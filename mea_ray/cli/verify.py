"""``mea-ray verify``: the verdict on someone else's model."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from mea_ray import api
from mea_ray.cli.nulls import with_overrides
from mea_ray.config import ModelChoice, build, yaml_text
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.suspect.judging import Terms, with_data
from mea_ray.experiment.suspect.network import Ask
from mea_ray.experiment.suspect.outputs import KINDS, Kind
from mea_ray.experiment.suspect.process import Limits
from mea_ray.experiment.victim import Victim
from mea_ray.experiment.victim.folder import OWNER
from mea_ray.models.foreign import Preprocessing
from mea_ray.report.terminal import make_console
from mea_ray.storage.files import refusing, try_writing


@dataclass(frozen=True)
class Options:
    """The options of ``verify`` as typed; see the help of each option."""

    classes: str | None = None
    outputs: str | None = None
    preprocessing: str | None = None
    model: str | None = None
    output: str | None = None
    budget: int | None = None
    seen: str | None = None
    key: str | None = None
    api: Path | None = None
    memory_gb: float = 16.0
    seconds: float = 300.0
    to: Path | None = None


def verify(folder: Path, suspect: str, options: Options, overrides: Sequence[str]) -> None:
    """Judge a suspect, print the verdict, and write it as JSON and HTML.

    Args:
        folder: The victim's folder.
        suspect: A file, a folder, a URL or ``package.module:function``.
        options: See ``Options``.
        overrides: Config paths to override, for data that were moved.
    """
    from mea_ray.report import accusation

    victim = Victim.load(folder)
    with refusing(f"{options.to or folder} cannot be written", "give another folder for the verdict with --to"):
        try_writing(options.to or victim.require_folder() / OWNER)
    victim = with_data(victim, with_overrides(victim, overrides))
    verdict = api.verify(victim, suspect, terms(options))
    out = make_console()
    accusation.show(out, verdict)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(suspect).name).strip("-.") or "suspect"
    stamp = re.sub(r"[^0-9T]", "", verdict.date[:19])
    target = options.to or victim.require_folder() / OWNER / "verdicts" / f"{name}-{stamp}"
    written = accusation.write(target, verdict, victim)
    out.print(f"\nJSON   {written[0]}\nHTML   {written[1]}", soft_wrap=True, highlight=False)


def terms(options: Options) -> Terms:
    """Return the typed options as terms.

    Raises:
        ConfigError: An option makes no sense.
    """
    return Terms(
        classes=options.classes,
        outputs=_kind(options.outputs),
        preprocessing=build(Preprocessing, _mapping("--preprocessing", options.preprocessing)),
        architecture=None if options.model is None else build(ModelChoice, _model(options.model)),
        output=options.output,
        budget=options.budget,
        seen=_date(options.seen),
        limits=Limits(memory_gb=options.memory_gb, answer_s=options.seconds),
        open_url=partial(_open_url, options.key, options.api),
        command=_typed(sys.argv[1:], options.key),
    )


def _open_url(key: str | None, description: Path | None, url: str) -> Ask:
    """Open the black box of a service; it takes images in [0, 1], as our services do."""
    from mea_ray.config import BlackBoxConfig, ClientConfig
    from mea_ray.experiment.remote_service import open_url, read_key

    if key is not None and key.startswith(("env:", "file:")):
        key = read_key(key, "--key")
    settings = build(BlackBoxConfig, {"url": url, "api": None if description is None else str(description.absolute())})
    return open_url(settings, key, ClientConfig()).query


def _typed(arguments: Sequence[str], key: str | None) -> str:
    """Return the command without the API key, which can be a separate word or the end of one (``--key=...``)."""
    return shlex.join(["mea-ray", *(each.replace(key, "...") if key else each for each in arguments)])


def _kind(text: str | None) -> Kind | None:
    for kind in KINDS:
        if text == kind:
            return kind
    if text is not None:
        raise ConfigError(f"--outputs {text} must be one of {', '.join(KINDS)}")
    return None


def _mapping(option: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    content = yaml_text.parse(text, option)
    if not isinstance(content, dict):
        raise ConfigError(f"{option} {text!r} must be a mapping, e.g. '{{size: [224, 224], channel_order: BGR}}'")
    return content


def _model(text: str) -> dict[str, Any]:
    return {"name": text} if re.fullmatch(r"[\w.:]+", text) else _mapping("--model", text)


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--seen {text} must be a date, e.g. 2026-01-31 or 2026-01-31T12:00+00:00") from error
    return date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)
