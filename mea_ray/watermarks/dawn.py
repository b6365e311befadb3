"""DAWN: a keyed fraction of the service's answers is wrong on purpose; a model trained on them learns the mark."""

from __future__ import annotations

import hmac
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.seeding import secret_bytes
from mea_ray.core.types import Images, ImageSet
from mea_ray.training.objective import CrossEntropy
from mea_ray.watermarks.base import ClientQueries, Key, Stage, WatermarkSamples, require_key
from mea_ray.watermarks.labelled_queries import UNSEEN, LabelledQueries

Row = npt.NDArray[np.float32]
SECRET_BYTES = 32


class Dawn(LabelledQueries):
    """The service answers a keyed fraction of the images wrongly, and its owner logs the answers of each client.

    Choose it to mark the answers of a service and leave its model alone.

    HMAC-SHA256 of the image under the secret decides whether it is marked, and seeds the permutation of its
    probabilities that moves the top one to another class. The victim itself is trained as if there were no watermark. A
    client is accused with the images that were marked for *it*: WSR is the fraction of them on which a model gives the
    wrong class that this client was answered. False positives are other images that the client sent, with the wrong
    class that another key would have given: a model that learnt the marks of this service has no reason to give those.

    Args:
        rate: Fraction of all images that is answered wrongly: the accuracy that every customer loses. The paper has
            about 0.005; a proof needs about ten marks, so that few queries need a higher rate.
        mapping: What is hashed. ``exact``: the image. ``quantised``: the means of ``cells`` x ``cells`` parts of it
            in ``levels`` steps. Then most slightly changed images get the same answer, and so do different images
            with equal means. The paper hashes a learnt embedding instead.
        cells: Side of the grid of means.
        levels: Steps of a mean.
        shuffled: Number of the largest probabilities that are permuted; null permutes all, as in the paper. Few make a
            wrong answer more plausible, and an innocent model more likely to give it.

    References:
        Szyller, Atli, Marchal and Asokan, DAWN: Dynamic Adversarial Watermarking of Neural Networks, ACM Multimedia
        2021, https://arxiv.org/abs/1906.00830.
    """

    name = "dawn"
    marks_answers = True
    needs_log = True
    control = "another_key"

    def __init__(
        self,
        *,
        rate: Annotated[float, Field(gt=0, lt=1)] = 0.005,
        mapping: Literal["exact", "quantised"] = "exact",
        cells: Annotated[int, Field(ge=1)] = 4,
        levels: Annotated[int, Field(ge=2, le=256)] = 8,
        shuffled: Annotated[int, Field(ge=2)] | None = None,
    ) -> None:
        self.rate, self.mapping, self.cells, self.levels, self.shuffled = rate, mapping, cells, levels, shuffled

    def make_key(self, train: ImageSet, seed: int) -> Key:
        """Draw the secret of the hash.

        Raises:
            ConfigError: There is one class only, so that no answer can be wrong.
        """
        if train.classes < 2:
            raise ConfigError("dawn answers with a wrong class, and the data have one class only; take other data")
        secret = np.frombuffer(secret_bytes(seed, SECRET_BYTES, "secret"), np.uint8)
        settings = {
            "rate": self.rate,
            "mapping": self.mapping,
            "cells": self.cells,
            "levels": self.levels,
            "shuffled": self.shuffled,
            "shape": list(train.shape),
            "classes": train.classes,
        }
        # No classes: -1 is no label, so that nothing is mistaken for one.
        return Key(self.name, (-1, -1), -1, seed, settings, {"secret": secret})

    def stages(self, key: Key | None, train: ImageSet) -> list[Stage]:
        """Return one stage with cross-entropy: the model carries no mark."""
        require_key(key, self.name)
        return [Stage("train", CrossEntropy(), train)]

    def marker(self, key: Key) -> KeyedMarker:
        """Return what marks the answers."""
        return KeyedMarker(key)

    def against(self, key: Key, queries: ClientQueries) -> Key | None:
        """Return the key with the marked images of one client, and its other images under another key."""
        if not len(queries.marked_answers):
            return None
        another = KeyedMarker(key, secret=hmac.digest(_secret(key), b"another key", "sha256"))
        others, answers = queries.others[:UNSEEN], queries.other_answers[:UNSEEN]
        certain = np.eye(int(key.settings["classes"]), dtype=np.float32)[answers]
        wrong = np.array([another.wrong(row, image).argmax() for row, image in zip(certain, others, strict=True)])
        tensors = {
            **key.tensors,
            "images": queries.marked,
            "labels": queries.marked_answers,
            "others": others.reshape(-1, *key.settings["shape"]),
            "others_labels": wrong.astype(np.int64),
        }
        return replace(key, tensors=tensors)

    def chance(self, key: Key) -> float:
        """Return one in the number of classes: the paper's rate of a model that has nothing to do with the service."""
        return 1 / int(key.settings["classes"])

    def samples(self, key: Key, held_out: ImageSet, count: int, seed: int) -> WatermarkSamples:
        """Return the marked images of the accused client.

        Raises:
            DataError: The key accuses no client yet (see ``against``), or images are of another shape.
        """
        if "images" not in key.tensors:
            raise DataError(
                "dawn's samples are the marked queries of an accused client, and this key has none; take the key that "
                "`against` makes of a client's log"
            )
        return super().samples(key, held_out, count, seed)

    def unseen(self, key: Key, held_out: ImageSet, count: int, seed: int) -> Images:
        """Return images that the client sent and that were not marked."""
        others: Images = key.tensors["others"][:count]
        return others

    def labels_of(self, key: Key) -> dict[bytes, int]:
        """Return the answer to each marked image, and the one that another key would have given to the others."""
        pairs = zip(key.tensors["others"], key.tensors["others_labels"], strict=True)
        return {**{image.tobytes(): int(label) for image, label in pairs}, **super().labels_of(key)}


class KeyedMarker:
    """Decides by the key which images are answered wrongly, and how; implements `types.Marker`.

    Args:
        key: The owner's key.
        secret: Replaces the key's secret.
    """

    reads_features = False

    def __init__(self, key: Key, *, secret: bytes | None = None) -> None:
        self._secret = _secret(key) if secret is None else secret
        settings = key.settings
        self._below = int(float(settings["rate"]) * 2**128)
        self._mapping, self._cells, self._levels = settings["mapping"], settings["cells"], settings["levels"]
        self._shuffled: int | None = settings["shuffled"]

    def mark(
        self, probabilities: Row, images: Images, features: Row | None = None
    ) -> tuple[Row, npt.NDArray[np.bool_]]:
        """Answer the marked images wrongly, see `types.Marker.mark`."""
        digests = [self._digest(image) for image in images]
        marked = np.array([int.from_bytes(digest[:16], "big") < self._below for digest in digests], bool)
        changed = np.array(probabilities, dtype=np.float32)
        for place in np.flatnonzero(marked):
            changed[place] = self._permuted(changed[place], digests[place])
        return changed, marked

    def wrong(self, row: Row, image: npt.NDArray[np.uint8]) -> Row:
        """Return the answer that a marked image would get, float32 (classes,), whether this one is marked or not."""
        return self._permuted(row, self._digest(image))

    def _permuted(self, row: Row, digest: bytes) -> Row:
        """Permute the largest probabilities so that the first of them moves."""
        places = np.argsort(-row, kind="stable")[: self._shuffled]
        if self._shuffled is None:
            places = np.sort(places)  # all of them: which class gets which does not depend on their order
        generator = np.random.default_rng(int.from_bytes(digest[16:], "big"))
        top = int(row.argmax())
        while True:
            order = generator.permutation(len(places))
            if places[order[int(np.flatnonzero(places == top)[0])]] != top:
                break
        changed = row.copy()
        changed[places[order]] = row[places]
        return changed

    def _digest(self, image: npt.NDArray[np.uint8]) -> bytes:
        return hmac.digest(self._secret, self._mapped(image), "sha256")

    def _mapped(self, image: npt.NDArray[np.uint8]) -> bytes:
        shape = f"{image.shape}/".encode()
        if self._mapping == "exact":
            return shape + image.tobytes()
        return shape + _means(image, self._cells, self._levels).tobytes()


def _means(image: npt.NDArray[np.uint8], cells: int, levels: int) -> npt.NDArray[np.uint8]:
    """Return the means of a grid of parts of an image, in steps 0 to ``levels`` - 1: uint8 (C, rows, columns)."""
    parts = [np.linspace(0, side, min(cells, side) + 1).round().astype(int) for side in image.shape[1:]]
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.int64), parts[0][:-1], axis=1), parts[1][:-1], axis=2)
    counts = np.outer(np.diff(parts[0]), np.diff(parts[1]))
    means: npt.NDArray[np.uint8] = (sums * levels // (counts * 256)).astype(np.uint8)
    return means


def _secret(key: Key) -> bytes:
    return np.asarray(key.tensors["secret"], np.uint8).tobytes()
