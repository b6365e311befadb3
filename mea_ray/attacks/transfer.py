"""The transfer set: what a thief keeps of its queries. Durable, nested, and never asked twice."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mea_ray.errors import ArtifactError, DataError
from mea_ray.types import Answers

Indices = npt.NDArray[np.int64]


class TransferSet:
    """Positions in the thief's pool and the answers received for them, in the order in which they were asked.

    With a path every ``append`` is one file, written aside, flushed to the disk and renamed, so that a process killed
    at any moment leaves whole chunks only; opening the same path again continues after the last of them. Each file
    carries its place in the sequence, so that a lost or foreign chunk is noticed and never read over.

    Args:
        path: Folder of the chunks, made if it is missing; in memory only when None.

    Raises:
        ArtifactError: A chunk is damaged, missing in the sequence, or does not fit the others.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self._indices: list[Indices] = []
        self._answers: list[Answers] = []
        self._length = 0
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._read(self.path)

    def __len__(self) -> int:
        return self._length

    @property
    def indices(self) -> Indices:
        """Positions in the pool, int64, shape (len,)."""
        self._merge()
        return self._indices[0] if self._indices else np.empty(0, np.int64)

    @property
    def answers(self) -> Answers:
        """Answers, float32, shape (len, classes); (0, 0) as long as there are none."""
        self._merge()
        return self._answers[0] if self._answers else np.empty((0, 0), np.float32)

    def append(self, indices: npt.NDArray[np.integer], answers: npt.NDArray[np.floating]) -> None:
        """Keep one chunk; it is on the disk when this returns, if the set has a path.

        Args:
            indices: Positions in the pool, shape (n,), n >= 1.
            answers: Their answers, shape (n, classes), finite.

        Raises:
            DataError: The two do not belong together, are empty, or are not finite. Nothing was kept.
        """
        kept = np.array(indices, dtype=np.int64)
        words = np.array(answers, dtype=np.float32)
        self._check(kept, words)
        if self.path is not None:
            self._write(self.path / f"chunk-{self._length:012d}.npz", kept, words)
        self._keep(kept, words)

    def prefix(self, count: int) -> tuple[Indices, Answers]:
        """Return the first ``count`` positions and answers: the transfer set of a thief who stopped there.

        Raises:
            DataError: There are fewer.
        """
        if not 0 <= count <= self._length:
            raise DataError(
                f"the transfer set holds {self._length} answers, {count} were asked for; query the rest first"
            )
        return self.indices[:count], self.answers[:count]

    def _check(self, indices: Indices, answers: Answers) -> None:
        if indices.ndim != 1 or answers.ndim != 2 or len(indices) != len(answers) or not len(indices):
            raise DataError(
                f"a chunk needs (n,) indices and (n, classes) answers, got {indices.shape} and {answers.shape}"
            )
        if self._answers and answers.shape[1] != self._answers[0].shape[1]:
            raise DataError(f"answers have {answers.shape[1]} classes, those before had {self._answers[0].shape[1]}")
        if not np.isfinite(answers).all() or int(indices.min()) < 0:
            raise DataError("answers must be finite and indices not negative; the black box gave something else")

    def _keep(self, indices: Indices, answers: Answers) -> None:
        self._indices.append(indices)
        self._answers.append(answers)
        self._length += len(indices)

    def _merge(self) -> None:
        if len(self._indices) > 1:
            self._indices = [np.concatenate(self._indices)]
            self._answers = [np.concatenate(self._answers)]

    @staticmethod
    def _write(path: Path, indices: Indices, answers: Answers) -> None:
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with aside.open("wb") as file:
            np.savez(file, indices=indices, answers=answers)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def _read(self, folder: Path) -> None:
        # Only renamed chunks count: what a killed writer left aside starts with a dot and is not matched.
        for path in sorted(folder.glob("chunk-*.npz")):
            remedy = f"delete {folder} to query again (and be charged again), or restore it"
            if path.name != f"chunk-{self._length:012d}.npz":
                raise ArtifactError(f"{folder} lacks the chunk at {self._length}: next is {path.name}; {remedy}")
            try:
                with np.load(path, allow_pickle=False) as chunk:
                    indices, answers = chunk["indices"], chunk["answers"]
                if indices.dtype != np.int64 or answers.dtype != np.float32:
                    raise DataError(f"types are {indices.dtype} and {answers.dtype}, not int64 and float32")
                self._check(indices, answers)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, DataError) as error:
                raise ArtifactError(f"{path} is damaged ({error}); {remedy}") from error
            self._keep(indices, answers)
