"""The folder of a victim.

    flowers/
      victim.json          name, class names, preprocessing, accuracy, hashes
      card.md              the same for people
      model.safetensors    the weights
      model.json           the architecture
      model.onnx           copy for ONNX Runtime, if the extra ``onnx`` is installed
      model.pt2            copy for ``torch.export``
      owner/               readable by the owner alone (mode 700, files 600)
        key.json           the key (and key.safetensors)
        config.yaml        the experiment: it names the key's classes
        report.json        what verification measured of the victim
        nulls/             null models, from ``mea-ray nulls``

Everything except ``owner/`` can be given to those who run the model.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from pydantic import ValidationError

from mea_ray.config import ExperimentConfig, load_stored, write_yaml
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.core.versions import versions
from mea_ray.experiment.answers import stored_key
from mea_ray.experiment.victim.card import card_text
from mea_ray.experiment.victim.export import write_copies
from mea_ray.experiment.victim.records import Card, InputFormat, OwnerRecord, VictimRecord
from mea_ray.models.base import ImageModel
from mea_ray.results.records import ModelReport, read_record
from mea_ray.storage.files import sha256, write_whole
from mea_ray.training.checkpoint import WEIGHTS, load_model, save_model
from mea_ray.watermarks.base import Key

VICTIM, CARD, OWNER, CONFIG, REPORT, NULLS = (
    "victim.json",
    "card.md",
    "owner",
    "config.yaml",
    "report.json",
    "nulls",
)


@dataclass(frozen=True)
class Victim:
    """A watermarked model with its key and everything needed to serve and verify it.

    Attributes:
        model: The network, on the CPU, in eval mode.
        key: The owner's secret; None for a victim without a watermark.
        config: The experiment that made it: data, watermark, service, verification.
        about: Name, class names, preprocessing, card, hashes.
        owner: The owner's private record: the name of its artifact, and its verification.
        folder: Where it is stored; None before it is saved.
    """

    model: ImageModel
    key: Key | None
    config: ExperimentConfig
    about: VictimRecord
    owner: OwnerRecord
    folder: Path | None = None

    @property
    def report(self) -> ModelReport:
        """Its verification."""
        return self.owner.report

    @property
    def name(self) -> str:
        """Its name."""
        return self.about.name

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class, in the order of the logits."""
        return self.about.class_names

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        return self.model.shape

    @classmethod
    def made(
        cls,
        name: str,
        model: ImageModel,
        key: Key | None,
        config: ExperimentConfig,
        *,
        artifact: str,
        class_names: tuple[str, ...],
        card: Card,
        report: ModelReport,
    ) -> Victim:
        """Return a victim that was just trained. ``weights_sha256`` is filled in when it is saved."""
        about = VictimRecord(
            name=name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            weights_sha256="",
            class_names=class_names,
            preprocessing=InputFormat.of(model),
            card=card,
            versions=versions(),
        )
        return cls(model, key, config, about, OwnerRecord(artifact=artifact, report=report))

    def save(self, folder: str | Path, *, copies: bool = True) -> Victim:
        """Write the folder atomically: as a whole or not at all.

        Args:
            folder: A folder that does not exist yet, or is empty. Its last part becomes the victim's name.
            copies: Also write ``model.onnx`` (with the extra ``onnx``) and ``model.pt2``.

        Returns:
            The same victim, with its new name, hashes and folder.

        Raises:
            ConfigError: The folder is not empty.
            ArtifactError: The network cannot be stored or exported.
        """
        target = Path(folder).resolve()
        check_free(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        aside.mkdir()
        try:
            about = self._write(aside, target.name, copies)
            if target.exists():
                target.rmdir()
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return replace(self, about=about, folder=target)

    def _write(self, folder: Path, name: str, copies: bool) -> VictimRecord:
        save_model(folder, self.model, {"role": "victim", "name": name})
        owner = folder / OWNER
        owner.mkdir(mode=0o700)
        if self.key is not None:
            self.key.save(owner)
        write_yaml(self.config, owner / CONFIG)
        write_whole(owner / REPORT, self.owner.model_dump_json(indent=1))
        close_to_others(owner)
        written = write_copies(folder, self.model) if copies else []
        changes = {
            "name": name,
            "weights_sha256": sha256(folder / WEIGHTS),
            "exports": {each: sha256(folder / each) for each in written},
        }
        about = self.about.model_copy(update=changes)
        write_about(folder, about)
        return about

    def with_card(self, card: Card) -> Victim:
        """Return the victim with another card, which is written to its folder if it has one."""
        about = self.about.model_copy(update={"card": card})
        if self.folder is not None:
            write_about(self.folder, about)
        return replace(self, about=about)

    @classmethod
    def load(cls, folder: str | Path) -> Victim:
        """Read a victim's folder; loading never runs code from it.

        Raises:
            ArtifactError: It is not a victim's folder, a file is missing or damaged, or the owner's part is missing.
        """
        folder = Path(folder).resolve()
        about = read_about(folder)
        model, _ = load_model(folder)
        if about.weights_sha256 != weights_sha256(folder):
            raise ArtifactError(f"{folder / WEIGHTS} is not what {VICTIM} describes; restore the folder from a copy")
        owner = folder / OWNER
        if not (owner / CONFIG).is_file():
            raise ArtifactError(
                f"{folder} has no readable {OWNER}/ with key and config; use the owner's folder, not a deployed copy"
            )
        with _one_line(owner):
            key, config = stored_key(owner), load_stored(owner / CONFIG)
        measured = read_record(OwnerRecord, owner / REPORT)
        if measured is None:
            raise ArtifactError(f"{owner / REPORT} is missing or damaged; restore it from a copy")
        return cls(model, key, config, about, measured, folder)

    def require_folder(self) -> Path:
        """Return the victim's folder.

        Raises:
            ConfigError: It was never saved.
        """
        if self.folder is None:
            raise ConfigError(f"victim {self.name!r} has no folder yet; save it first: victim.save(FOLDER)")
        return self.folder


def is_victim(folder: Path) -> bool:
    """Return whether a folder is that of a victim."""
    return (folder / VICTIM).is_file()


def check_free(folder: Path) -> None:
    """Reject a folder that would have to be overwritten.

    Raises:
        ConfigError: It is a file, or is not empty.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give a new folder, or remove this one")


def write_about(folder: Path, about: VictimRecord) -> None:
    """Write ``card.md`` and ``victim.json``."""
    write_whole(folder / CARD, card_text(about))
    write_whole(folder / VICTIM, about.model_dump_json(indent=1))


def read_about(folder: Path) -> VictimRecord:
    """Read ``victim.json``.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    try:
        return VictimRecord.model_validate_json((folder / VICTIM).read_bytes())
    except (OSError, ValidationError) as error:
        reason = "is damaged" if (folder / VICTIM).exists() else "is missing"
        raise ArtifactError(
            f"{folder / VICTIM} {reason}; a victim's folder is made by: mea-ray train FILE --to FOLDER"
        ) from error


def close_to_others(owner: Path) -> None:
    """Give the owner's folder mode 700 and each file in it mode 600."""
    owner.chmod(0o700)
    for path in owner.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a victim's weights.

    Raises:
        ArtifactError: They cannot be read.
    """
    try:
        return sha256(folder / WEIGHTS)
    except OSError as error:
        raise ArtifactError(
            f"{folder / WEIGHTS} cannot be read: {error.strerror or error}; restore it from a copy"
        ) from error


@contextmanager
def _one_line(owner: Path) -> Iterator[None]:
    try:
        yield
    except (ConfigError, OSError) as error:
        raise ArtifactError(f"{owner} holds no readable key and config: {error}; restore it from a copy") from error
