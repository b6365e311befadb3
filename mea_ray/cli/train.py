"""``mea-ray train``: the victim of an experiment as a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mea_ray import api
from mea_ray.cli.commands import read_base
from mea_ray.core.errors import ConfigError
from mea_ray.experiment.victim import Victim
from mea_ray.experiment.victim.card import card_text
from mea_ray.experiment.victim.folder import check_free
from mea_ray.report.terminal import make_console, pairs_table
from mea_ray.storage.files import refusing, try_writing
from mea_ray.storage.remote import Storage


def train(source: Path, overrides: Sequence[str], to: Path, copies: bool) -> None:
    """Train a victim, or convert the artifact of one, and write its folder.

    Args:
        source: YAML file of an experiment or a sweep, or the folder of a victim's artifact.
        overrides: Config paths to override.
        to: The folder to write.
        copies: Also write the copies for ONNX and ``torch.export``.

    Raises:
        ConfigError: The folder is not empty or cannot be written, or the experiment cannot be run.
        ArtifactError: The artifact is damaged.
    """
    from mea_ray.experiment.victim.make import victim_of_artifact

    with refusing(f"{to} cannot be written", "choose another folder"):
        target = to.resolve()
        check_free(target)
        try_writing(target.parent)
    if source.is_dir():
        if overrides:
            raise ConfigError(f"{source} is already trained, so {overrides[0]} changes nothing; leave it out")
        victim = victim_of_artifact(source, to.name)
    else:
        config = read_base(source, overrides)
        Storage(config.storage).check_writable()
        victim = api.watermark(config=config, name=to.name)
    with refusing(f"{to} cannot be written", "choose another folder"), make_console(stderr=True).status("writing"):
        victim = victim.save(to, copies=copies)
    show(victim)


def show(victim: Victim) -> None:
    """Print a victim's card and the next steps."""
    console = make_console()
    lines = [line.strip("| ").split(" | ", 1) for line in card_text(victim.about).splitlines() if line.startswith("| ")]
    rows: list[tuple[str, object]] = [(name, value) for name, value in (each for each in lines if len(each) == 2)]
    console.print(pairs_table(f"[bold]{victim.name}[/]", rows))
    console.print(f"\nvictim   {victim.folder}", soft_wrap=True)
    console.print(f"secret   {victim.require_folder() / 'owner'}: the key; never deploy it", soft_wrap=True)
