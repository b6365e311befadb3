"""The attack's process: sandboxes itself, runs the attack, and gets answers from its parent."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save

from mea_ray.attacks.base import Rung, Target
from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import ThiefConfig, build
from mea_ray.core.errors import StorageUnavailable
from mea_ray.core.types import Answers, FloatImages, Images
from mea_ray.experiment.attack_process.protocol import (
    MessagePipe,
    Tree,
    array_block,
    array_header,
    error_header,
    read_array,
    read_error,
)
from mea_ray.experiment.attack_process.sandbox import close_in
from mea_ray.experiment.theft import Theft
from mea_ray.storage.files import PATIENCE
from mea_ray.training.device import device, use_gpus, use_threads


class PipedBlackBox:
    """The victim's query API over a pipe; implements `types.BlackBox`. Threads can share it.

    Args:
        wire: Pipe to the parent process.
        classes: Length of an answer.
        image_shape: (channels, height, width) that the victim takes.
        place: Index of the black box in the parent process.
    """

    def __init__(self, wire: MessagePipe, classes: int, image_shape: tuple[int, int, int], place: int = 0) -> None:
        self._wire, self._classes, self._shape, self._place = wire, classes, image_shape, place
        self._turn = threading.Lock()

    @property
    def classes(self) -> int:
        """Length of an answer: number of classes, or of embedding dimensions."""
        return self._classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (channels, height, width)."""
        return self._shape

    @property
    def remaining(self) -> int | None:
        """Images that may still be queried; None without a budget."""
        answer, _ = self._ask({"do": "remaining"})
        left: int | None = answer["remaining"]
        return left

    def query(self, images: Images | FloatImages) -> Answers:
        """Answer images in their order, see `types.BlackBox.query`."""
        array = np.asarray(images)
        answer, block = self._ask({"do": "query", **array_header(array)}, array_block(array))
        answers: Answers = read_array(answer, block, ("float32",), 2)
        return answers.copy()

    def _ask(self, header: Tree, block: bytes | memoryview = b"") -> tuple[Tree, bytes]:
        with self._turn:
            self._wire.send({**header, "box": self._place}, block)
            answer, content = self._wire.receive()
        if "error" in answer:
            raise read_error(answer["error"])
        return answer, content


def serve(wire_fd: int, life_fd: int, pool_fd: int) -> NoReturn:
    """Run the theft that the parent describes, and end this process.

    Args:
        wire_fd: Connection to the parent.
        life_fd: A pipe that is closed when the parent ends.
        pool_fd: A file with the thief's images.
    """
    wire = MessagePipe(Connection(wire_fd))
    try:
        order, labels = wire.receive()
        sys.path[:] = order["path"]
        use_gpus(order["gpus"])
        torch.empty(1, device=device())  # a GPU's driver looks for more at its start than it needs later
        # While Python has a single thread, and before any external code is imported.
        close_in(order["read"], order["write"])
        threading.Thread(target=_end_with_owner, args=(life_fd,), daemon=True).start()
        _settle(order)
        _steal(wire, order, _theft(order, pool_fd, labels))
        wire.send({"do": "done"})
    except (EOFError, BrokenPipeError, ConnectionError):
        os._exit(1)  # the parent is gone
    except BaseException as error:
        header = error_header(_as_ours(error, PATIENCE.seconds))
        if not header["kind"]:
            traceback.print_exc()
        wire.send({"do": "failed", **header, "trace": traceback.format_exc()})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_owner(life_fd: int) -> None:
    os.read(life_fd, 1)
    os._exit(1)


def _settle(order: Mapping[str, Any]) -> None:
    """Make the scratch folder the home folder, and apply the trial's resource limits."""
    scratch = order["scratch"]
    os.environ.update(HOME=scratch, TMPDIR=scratch, XDG_CACHE_HOME=scratch)
    tempfile.tempdir = None
    os.chdir(scratch)
    use_threads(order["threads"])


def _theft(order: Mapping[str, Any], pool_fd: int, labels: bytes) -> Theft:
    shape = tuple(order["pool"]["shape"])
    pool = np.frombuffer(mmap(pool_fd, 0, access=ACCESS_READ), np.uint8).reshape(shape)
    return Theft(
        build(ThiefConfig, order["thief"]),
        order["seed"],
        (order["shape"][0], order["shape"][1], order["shape"][2]),
        order["classes"],
        pool,
        np.frombuffer(labels, np.int64) if order["labelled"] else None,
    )


def _steal(wire: MessagePipe, order: Mapping[str, Any], theft: Theft) -> None:
    def warn(text: str) -> None:
        wire.send({"do": "warn", "text": text})

    if order["patience"] is not None:
        seconds, marker = order["patience"]
        PATIENCE.begin(seconds, None if marker is None else Path(marker), warn)
    epochs, every_s = _Epochs(wire), order["snapshot_every_s"]

    def transfer_set(folder: str | None) -> TransferSet | None:
        if folder is None:
            return None
        transfer = TransferSet(Path(folder), snapshot_every_s=every_s, on_damage=warn)
        transfer.on_epoch = epochs
        return transfer

    targets = [
        Target(PipedBlackBox(wire, classes, theft.shape, place), transfer_set(folder), skip)
        for place, (classes, folder, skip) in enumerate(
            zip(order["answers"], order["transfers"], order["skips"], strict=True)
        )
    ]
    for place, rung in theft.run(targets):
        header, block = _rung_message(rung)
        wire.send({**header, "box": place}, block)
        wire.receive()  # the parent judges it first: both share the CPUs of one trial


class _Epochs:
    """Reports the progress of a training to the parent, at most once in ``EVERY_S``, and its end."""

    EVERY_S = 2.0

    def __init__(self, wire: MessagePipe) -> None:
        self._wire, self._sent = wire, float("-inf")

    def __call__(self, epoch: int, epochs: int, loss: float) -> None:
        now = time.monotonic()
        if now - self._sent < self.EVERY_S and epoch < epochs:
            return
        self._sent = now
        self._wire.send({"do": "epoch", "epoch": epoch, "epochs": epochs, "loss": loss})


def _rung_message(rung: Rung) -> tuple[Tree, bytes]:
    weights = {name: value.detach().cpu().contiguous() for name, value in rung.model.state_dict().items()}
    curves = {name: [list(point) for point in points] for name, points in rung.curves.items()}
    header = {
        "do": "rung",
        "budget": rung.budget,
        "queries": rung.queries,
        "epochs": rung.epochs,
        "seconds": rung.seconds,
        "curves": curves,
    }
    return header, save(weights)


def _as_ours(error: BaseException, patience_s: float) -> BaseException:
    """Return the error to report: a remounted folder is closed to this process, and open to the next."""
    if isinstance(error, PermissionError) and patience_s:
        return StorageUnavailable(str(error.filename), "away", 0.0, str(error))
    return error
