"""The transfer set: a thief's queries and their answers. Durable, nested, and never queried twice.

An image is named by its position in the thief's pool or, if the thief made it, by a negative number that follows from
its content. Made images that substitutes are trained on are stored beside their answers; probes are not.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mea_ray.core.errors import ArtifactError, DataError
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.storage.files import patiently, write_whole

Indices = npt.NDArray[np.int64]
OnEpoch = Callable[[int, int, float], None]
"""Called with the epochs done, of how many, and the mean loss of the last one."""


@dataclass(frozen=True)
class _Chunk:
    """Names, answers, which of them are probes, and the made images that substitutes are trained on."""

    indices: Indices
    answers: Answers
    probe: npt.NDArray[np.bool_]
    made: Images | None


class TransferSet:
    """Names of images and the answers received for them, in the order of the queries.

    With a path, each chunk is one file, written under another name, flushed to the disk and renamed. So a process
    killed at any moment leaves whole chunks only, and opening the same path again continues after the last of them.
    Each file is named by its place in the sequence, so a lost or foreign chunk is noticed.

    Args:
        path: Folder of the chunks, created if it is missing; in memory only when None.
        snapshot_every_s: How often trainings on these answers write snapshots beside them, see ``SnapshotFile``.
        on_damage: Called with a message when a chunk cannot be used. That chunk and all later ones are then renamed,
            and their images are queried again. The ledger knows those requests and charges nothing for them.

    Attributes:
        on_epoch: Called after each epoch of a training on these answers.

    Raises:
        ArtifactError: A chunk is damaged, missing in the sequence, or does not fit the others, and there is no
            ``on_damage``.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        snapshot_every_s: float | None = 60.0,
        on_damage: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(path) if path is not None else None
        self.snapshot_every_s = snapshot_every_s
        self.notify = on_damage if on_damage is not None else lambda text: None
        self.on_epoch: OnEpoch | None = None
        self._chunks: list[_Chunk] = []
        self._unwritten: list[_Chunk] = []
        self._length = 0
        if self.path is not None:
            folder = self.path
            patiently(lambda: folder.mkdir(parents=True, exist_ok=True), folder)
            try:
                self._read(folder)
            except ArtifactError as error:
                if on_damage is None:
                    raise
                self._set_aside(folder)
                damage, _, _ = str(error).partition("; delete")
                on_damage(f"{damage}; all after {self._length} answers is queried again and not charged again")

    def __len__(self) -> int:
        return self._length

    @property
    def unwritten(self) -> int:
        """Number of answers that are in memory only until ``flush`` writes them. Always 0 without a path."""
        return sum(len(chunk.indices) for chunk in self._unwritten)

    @property
    def indices(self) -> Indices:
        """Positions in the pool, and negative names of made images, int64, shape (len,)."""
        return self._merged().indices if self._chunks else np.empty(0, np.int64)

    @property
    def answers(self) -> Answers:
        """Answers, float32, shape (len, classes); (0, 0) as long as there are none."""
        return self._merged().answers if self._chunks else np.empty((0, 0), np.float32)

    def append(
        self,
        indices: npt.NDArray[np.integer],
        answers: npt.NDArray[np.floating],
        *,
        made: Images | None = None,
        at_once: bool = True,
    ) -> None:
        """Add answers.

        Args:
            indices: Positions in the pool, or negative names of images that the thief made; shape (n,), n >= 1.
            answers: Their answers, shape (n, classes), finite.
            made: The images, uint8 (n, C, H, W), if the thief made them and will train on them. Without it images with
                negative names are probes: answered, charged, and not trained on.
            at_once: Write them to the disk, if the set has a path, before this returns; else ``flush`` does.

        Raises:
            DataError: The parts do not fit each other, are empty, or are not finite. Nothing was added.
        """
        names = np.array(indices, dtype=np.int64)
        images = np.array(made) if made is not None else None
        chunk = _Chunk(names, np.array(answers, dtype=np.float32), (names < 0) & (images is None), images)
        self._check(chunk)
        self._add(chunk)
        if self.path is not None:
            self._unwritten.append(chunk)
        if at_once:
            self.flush()

    def flush(self) -> None:
        """Write the answers that are in memory only, as one chunk."""
        if self.path is None or not self._unwritten:
            return
        self._write(self.path / f"chunk-{self._length - self.unwritten:012d}.npz", _join(self._unwritten))
        self._unwritten = []

    def refresh(self) -> None:
        """Read the chunks that another process has added in the folder since.

        Raises:
            ArtifactError: One of them is damaged.
        """
        if self.path is not None:
            self._read(self.path)

    def forget_snapshots(self) -> None:
        """Remove the snapshots of trainings on these answers: their substitutes are stored by now."""
        from mea_ray.training.snapshot import SUFFIX  # with it comes torch, which the command line does not need

        for path in self.path.glob(f".*{SUFFIX}") if self.path is not None else ():
            path.unlink(missing_ok=True)

    def prefix(self, count: int) -> tuple[Indices, Answers]:
        """Return the first ``count`` names and answers: the transfer set of a thief that stopped there.

        Raises:
            DataError: There are fewer.
        """
        if not 0 <= count <= self._length:
            raise DataError(
                f"the transfer set holds {self._length} answers, {count} were requested; query the rest first"
            )
        return self.indices[:count], self.answers[:count]

    def digest(self, start: int, stop: int) -> str:
        """Return a digest of the names and answers from ``start`` to before ``stop``, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for column in ("indices", "answers"):
            first = 0
            for chunk in self._chunks:  # one by one: they need not be joined for it
                part = slice(max(start - first, 0), max(stop - first, 0))
                digest.update(np.ascontiguousarray(getattr(chunk, column)[part]).data)
                first += len(chunk.indices)
        return digest.hexdigest()

    def for_training(self, count: int) -> npt.NDArray[np.bool_]:
        """Return which of the first ``count`` answers substitutes are trained on, all but the probes: bool (count,)."""
        return ~self._merged().probe[:count] if self._chunks else np.empty(0, bool)

    def training_images(self, pool: Images, count: int) -> Images:
        """Return the images of the first ``count`` answers, without probes: uint8 (n, C, H, W).

        Args:
            pool: The thief's images.
            count: Number of answers, at most ``len(self)``.
        """
        if not self._chunks:
            return pool[:0]
        chunk = self._merged()
        made = chunk.made
        names = chunk.indices[:count][self.for_training(count)]
        if made is None or (names >= 0).all():
            return pool[names]
        images = np.empty((len(names), *made.shape[1:]), np.uint8)
        images[names >= 0] = pool[names[names >= 0]]
        images[names < 0] = made[: int((names < 0).sum())]
        return images

    def _check(self, chunk: _Chunk) -> None:
        indices, answers, made = chunk.indices, chunk.answers, chunk.made
        if indices.ndim != 1 or answers.ndim != 2 or len(indices) != len(answers) or not len(indices):
            raise DataError(
                f"a chunk needs (n,) indices and (n, classes) answers, got {indices.shape} and {answers.shape}"
            )
        if self._chunks and answers.shape[1] != self._chunks[0].answers.shape[1]:
            raise DataError(
                f"answers have {answers.shape[1]} classes, those before had {self._chunks[0].answers.shape[1]}"
            )
        if not np.isfinite(answers).all():
            raise DataError("answers must be finite; the black box returned NaN or infinity")
        wanted = int(((indices < 0) & ~chunk.probe).sum())
        if (0 if made is None else len(made)) != wanted:
            given = 0 if made is None else len(made)
            raise DataError(f"{wanted} of the images to train on were made by the thief, {given} were given")
        if made is not None and (made.dtype != np.uint8 or made.ndim != 4):
            raise DataError(f"made images must be uint8 (n, C, H, W), got {made.dtype} {made.shape}")

    def _add(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        self._length += len(chunk.indices)

    def _merged(self) -> _Chunk:
        if len(self._chunks) > 1:
            self._chunks = [_join(self._chunks)]
        return self._chunks[0]

    @staticmethod
    def _write(path: Path, chunk: _Chunk) -> None:
        parts = {"indices": chunk.indices, "answers": chunk.answers, "probe": chunk.probe}
        content = io.BytesIO()
        np.savez(content, **parts, **({"made": chunk.made} if chunk.made is not None else {}))  # type: ignore[arg-type]
        write_whole(path, content.getvalue())

    def _set_aside(self, folder: Path) -> None:
        """Rename the chunks that were not read: a person can still inspect them, and no run reads them."""
        for path in sorted(folder.glob("chunk-*.npz")):
            if path.name >= f"chunk-{self._length:012d}.npz":
                path.rename(path.with_name(f"damaged-{path.name}"))

    def _read(self, folder: Path) -> None:
        first = f"chunk-{self._length:012d}.npz"
        # Only renamed chunks count: the unfinished file of a killed writer starts with a dot and is not matched.
        for path in sorted(folder.glob("chunk-*.npz")):
            if path.name < first:
                continue  # read before
            remedy = f"delete {folder} to query again (and be charged again), or restore it"
            if path.name != f"chunk-{self._length:012d}.npz":
                raise ArtifactError(f"{folder} lacks the chunk at {self._length}: next is {path.name}; {remedy}")
            try:
                with np.load(io.BytesIO(patiently(path.read_bytes, path)), allow_pickle=False) as file:
                    made = file.get("made")
                    chunk = _Chunk(file["indices"], file["answers"], file["probe"], made)
                types = [str(part.dtype) for part in (chunk.indices, chunk.answers, chunk.probe)]
                if types != ["int64", "float32", "bool"] or chunk.probe.shape != chunk.indices.shape:
                    raise DataError(f"types are {', '.join(types)}, not int64, float32 and bool")
                self._check(chunk)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DataError) as error:
                raise ArtifactError(f"{path} is damaged ({error}); {remedy}") from error
            self._add(chunk)


def _join(chunks: list[_Chunk]) -> _Chunk:
    made = [chunk.made for chunk in chunks if chunk.made is not None]
    return _Chunk(
        np.concatenate([chunk.indices for chunk in chunks]),
        np.concatenate([chunk.answers for chunk in chunks]),
        np.concatenate([chunk.probe for chunk in chunks]),
        np.concatenate(made) if made else None,
    )


def content_names(images: Images | FloatImages) -> Indices:
    """Name images that are not of the pool by their content: negative int64 (N,), equal only for equal images."""
    digests = (hashlib.sha256(image.tobytes()).digest()[:8] for image in images)
    return np.array([-1 - (int.from_bytes(digest, "big") >> 1) for digest in digests], np.int64)


def foreign_transfer_set(transfer: TransferSet) -> ArtifactError:
    """Return the error for a transfer set that another run filled."""
    return ArtifactError(
        f"the transfer set in {transfer.path or 'memory'} was queried in another order: it belongs to another seed, "
        "pool or training; give this run a folder of its own, or delete that one to query again (and be charged again)"
    )
