"""The commitment to a victim's key: made, time-stamped and checked in the victim's folder.

commitment/        beside the key, readable by the owner alone
commitment.json  what was hashed: hashes of key and weights, the admissible keys, and a nonce
request.tsq      the request to a time-stamp authority (RFC 3161); it holds the hash alone
reply.tsr        the authority's reply
roots.pem        the authority's root certificate, if it was given
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from mea_ray.core.class_keys import AdmissibleKeys
from mea_ray.core.errors import ArtifactError, ConfigError
from mea_ray.experiment import artifacts
from mea_ray.experiment.answers import stored_key
from mea_ray.experiment.victim.folder import OWNER, is_victim, weights_sha256
from mea_ray.results.records import FilterRecord, KeyRecord
from mea_ray.storage.files import write_whole
from mea_ray.verification.commitments import Commitment
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.chosen_samples import chosen_of_all
from mea_ray.watermarks.several_keys import SeveralKeys

FOLDER, COMMITMENT, REQUEST, REPLY, ROOTS = (
    "commitment",
    "commitment.json",
    "request.tsq",
    "reply.tsr",
    "roots.pem",
)


@dataclass(frozen=True)
class Committed:
    """A commitment that matches the key and weights of its victim.

    Attributes:
        digest: The published hash, 64 hexadecimal digits.
        time: When a time-stamp authority signed it, UTC; None without a reply.
        authority: Name of the authority; empty without a reply.
    """

    digest: str
    time: datetime | None = None
    authority: str = ""

    def before(self, moment: datetime) -> bool:
        """Return whether the key was committed to, provably, before a moment (with time zone)."""
        return self.time is not None and self.time < moment


def commit(victim: Path) -> tuple[Commitment, Path]:
    """Commit to a victim's key, and write a request to a time-stamp authority.

    An existing commitment is never replaced: its time stamp would be lost.

    Args:
        victim: A victim's folder (``mea-ray train``), or an artifact ``STORAGE/artifacts/victims/NAME``.

    Returns:
        The commitment and its folder.

    Raises:
        ArtifactError: The victim is damaged or has no key, or it is not the one that was committed to.
    """
    from mea_ray.verification.timestamps import make_request

    key, weights = _subject(victim)
    folder = _place(victim)
    commitment = _read(folder)
    if commitment is not None:
        _check_subject(commitment, key, weights, folder)
    else:
        commitment = Commitment.to(key.digest(), weights, key.draw)
        folder.mkdir(mode=0o700, exist_ok=True)
        write_whole(folder / COMMITMENT, commitment.model_dump_json(indent=1), mode=0o600)
    if not (folder / REQUEST).exists():
        write_whole(folder / REQUEST, make_request(commitment.content), mode=0o600)
    return commitment, folder


def add_reply(victim: Path, reply: bytes, roots: bytes | None = None) -> Committed:
    """Check an authority's reply, and save it.

    Args:
        victim: See ``commit``.
        reply: The reply, DER.
        roots: The authority's root certificate, PEM; None takes those that this system trusts.

    Raises:
        ArtifactError: The victim was not committed to, or the reply is not one to its request.
        ConfigError: ``roots`` holds no certificate.
    """
    from mea_ray.verification.timestamps import check_reply, read_roots

    commitment, folder = _opened(victim)
    stamp = check_reply(reply, commitment.content, read_roots(roots))
    if roots is not None:
        write_whole(folder / ROOTS, roots, mode=0o600)
    write_whole(folder / REPLY, reply, mode=0o600)
    return Committed(commitment.digest, stamp.time, stamp.authority)


def committed(victim: Path, roots: bytes | None = None) -> Committed | None:
    """Check a victim's commitment: that it is to this key and these weights, and that its time stamp is valid.

    Args:
        victim: See ``commit``.
        roots: Root certificates that are trusted, PEM; None takes the saved ones, else those of this system.

    Returns:
        The commitment; None if there is none.

    Raises:
        ArtifactError: It is not to this key and these weights, or its time stamp is invalid.
    """
    from mea_ray.verification.timestamps import check_reply, read_roots

    folder = _place(victim)
    if not (folder / COMMITMENT).exists():
        return None
    commitment, folder = _opened(victim)
    if not (folder / REPLY).exists():
        return Committed(commitment.digest)
    stored_roots = folder / ROOTS
    trusted = roots if roots is not None else (stored_roots.read_bytes() if stored_roots.exists() else None)
    stamp = check_reply((folder / REPLY).read_bytes(), commitment.content, read_roots(trusted))
    return Committed(commitment.digest, stamp.time, stamp.authority)


def key_record(key: Key | None, committed: Committed | None) -> KeyRecord | None:
    """Return the public record of a key and of the commitment to it; None without a key."""
    if key is None:
        return None
    admissible = key.draw.get("admissible")
    return KeyRecord(
        fingerprint=key.digest()[:16],
        classes=str(key.draw.get("classes", "")),
        seed_from=key.seed_from,
        admissible=None if admissible is None else len(AdmissibleKeys.from_tree(admissible)) ** key.draw.get("keys", 1),
        beacon=str(key.draw.get("beacon", "")),
        commitment="" if committed is None else committed.digest,
        committed_at=None
        if committed is None or committed.time is None
        else committed.time.isoformat(timespec="seconds"),
        authority="" if committed is None else committed.authority,
        filter=_filter_record(key),
    )


def _filter_record(key: Key) -> FilterRecord | None:
    parts = SeveralKeys.parts(key) if key.scheme == SeveralKeys.name else [key]
    chosen = chosen_of_all(parts)
    if not chosen:
        return None
    return FilterRecord(
        candidates=sum(each.candidates for each in chosen),
        passed=sum(each.passed for each in chosen),
        chosen=sum(len(each.images) for each in chosen),
        thieves=chosen[0].thieves,
        null_models=chosen[0].null_models,
    )


def _place(victim: Path) -> Path:
    return (victim / OWNER if is_victim(victim) else victim) / FOLDER


def _subject(victim: Path) -> tuple[Key, str]:
    """Return a victim's key and the SHA-256 of its weights."""
    if is_victim(victim):
        key = stored_key(victim / OWNER)
    elif (victim / artifacts.INFO).is_file():
        artifacts.check(victim)
        key = stored_key(victim)
    else:
        raise ConfigError(
            f"{victim} is not a victim; give a folder that `mea-ray train` wrote, or STORAGE/artifacts/victims/NAME"
        )
    if key is None:
        raise ConfigError(f"{victim} has no key to commit to: it carries no watermark")
    return key, weights_sha256(victim)


def _opened(victim: Path) -> tuple[Commitment, Path]:
    folder = _place(victim)
    commitment = _read(folder)
    if commitment is None:
        raise ArtifactError(f"{victim} was not committed to; run first: mea-ray commit {victim}")
    _check_subject(commitment, *_subject(victim), folder)
    return commitment, folder


def _read(folder: Path) -> Commitment | None:
    path = folder / COMMITMENT
    if not path.exists():
        return None
    try:
        return Commitment.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(f"{path} is damaged, so that its hash cannot be opened; restore it from a copy") from error


def _check_subject(commitment: Commitment, key: Key, weights: str, folder: Path) -> None:
    changed = [
        name
        for name, committed_to, now in (
            ("the key", commitment.key, key.digest()),
            ("the weights", commitment.model, weights),
            ("the set of admissible keys", commitment.admissible, dict(key.draw)),
        )
        if committed_to != now
    ]
    if changed:
        raise ArtifactError(
            f"{folder} commits to something else: {' and '.join(changed)} changed since; restore the victim from a copy"
        )
