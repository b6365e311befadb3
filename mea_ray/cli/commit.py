"""What ``mea-ray commit`` does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from mea_ray.core.errors import ConfigError
from mea_ray.experiment.commitment import REPLY, REQUEST, ROOTS, Committed, add_reply, commit, committed
from mea_ray.report.terminal import make_console
from mea_ray.storage.files import read_at_most

_LARGEST = 2**20
"""Maximum size of a reply or of certificates, in bytes."""


def run(victim: Path, tsa: str | None, reply: Path | None, roots: Path | None) -> None:
    """Commit to a victim's key, get a time stamp if an authority is given, and show where everything is.

    Args:
        victim: Folder of the victim.
        tsa: URL of a time-stamp authority; None requests no time stamp.
        reply: File with an authority's reply, or None.
        roots: File of root certificates in PEM; None trusts those of this system.

    Raises:
        ConfigError: Both a URL and a reply are given, or a file cannot be read.
        ArtifactError: See ``commit`` and ``add_reply``.
    """
    from mea_ray.verification.timestamps import ask_authority

    if tsa and reply:
        raise ConfigError("--tsa requests a reply and --reply supplies one; give one of the two")
    trusted = None if roots is None else _content(roots)
    given = None if reply is None else _content(reply)
    _, folder = commit(victim)
    if tsa:
        given = ask_authority(tsa, (folder / REQUEST).read_bytes())
    if given is not None:
        add_reply(victim, given, trusted)
    elif trusted is not None and not (folder / REPLY).exists():
        raise ConfigError("--roots is for checking a reply; give --tsa URL or --reply FILE as well")
    opened = committed(victim, trusted)
    assert opened is not None
    _show(make_console(), opened, victim, folder)


def _show(console: Console, opened: Committed, victim: Path, folder: Path) -> None:
    console.print(f"commitment  {opened.digest}", soft_wrap=True)
    console.print(f"saved in    {folder} (secret: it opens the commitment)", soft_wrap=True, highlight=False)
    if opened.time is not None:
        console.print(f"stamped     {opened.time:%Y-%m-%d %H:%M:%S} UTC by {opened.authority}", soft_wrap=True)
        if not (folder / ROOTS).exists():
            console.print("            (checked against the certificates that this system trusts)", highlight=False)
        return
    request = folder / REQUEST
    console.print(
        f"request     {request}\n\nThere is no time stamp yet. Request one from an authority:\n"
        f"  mea-ray commit {victim} --tsa URL\n"
        f"or send the request yourself, and pass the reply:\n"
        f"  curl -H 'Content-Type: application/timestamp-query' --data-binary @{request} -o reply.tsr URL\n"
        f"  mea-ray commit {victim} --reply reply.tsr",
        soft_wrap=True,
        highlight=False,
    )


def _content(path: Path) -> bytes:
    try:
        return read_at_most(path, _LARGEST)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
