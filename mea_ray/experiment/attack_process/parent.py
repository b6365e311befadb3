"""The parent's side of an attack's process: starts it, answers its queries, takes its substitutes, ends it."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Pipe
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from mea_ray.attacks.base import Rung, Target
from mea_ray.attacks.transfer import OnEpoch, TransferSet
from mea_ray.core import mapped, plugins
from mea_ray.core.errors import AttackDied, AttackFailed, MeaRayError
from mea_ray.core.types import BlackBox, Images
from mea_ray.experiment.attack_process.fork_server import FORK_SERVER
from mea_ray.experiment.attack_process.protocol import (
    MessagePipe,
    Tree,
    array_block,
    array_header,
    read_array,
    read_error,
    refusal,
)
from mea_ray.experiment.attack_process.sandbox import readable
from mea_ray.experiment.checks import build_network
from mea_ray.experiment.theft import Theft
from mea_ray.models.base import ImageModel
from mea_ray.storage.files import PATIENCE
from mea_ray.training.device import gpu_share

_GRACE_S = 5.0
"""Maximum wait for the exit status of a process that closed its connection, in seconds."""


def steal(theft: Theft, targets: Sequence[Target]) -> Iterator[tuple[int, Rung]]:
    """Carry out a theft in a separate process, see ``Theft.run``.

    The process gets ``theft``, the answers to its queries, and folders to store them in. It gets no handle of the
    service, a minimal environment, and, where Linux offers Landlock, no other files and no network. Its messages are
    parsed as JSON and plain arrays.

    Args:
        theft: The thief's settings and data.
        targets: The models. Their black boxes answer in this process; after each rung their transfer sets hold the
            other process's answers.

    Yields:
        The index of a target and one of its rungs.

    Raises:
        AttackFailed: The attack raised an error that is not from this package, or broke the protocol.
        AttackDied: Its process ended before the theft was finished.
        MeaRayError: As in a single process.
    """
    blackboxes = [target.blackbox for target in targets]
    transfers = [target.transfer for target in targets]
    budgets = theft.settings.budgets
    owed = [[budget for budget in budgets if budget not in target.skip] for target in targets]
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="mea_ray_attack_", ignore_cleanup_errors=True))
        wire, pid = _start(stack, theft.pool)
        order, labels = _order(theft, blackboxes, transfers, scratch)
        order["skips"] = [[budget for budget in budgets if budget not in wanted] for wanted in owed]
        listeners = [None if transfer is None else transfer.on_epoch for transfer in transfers]
        relay = _Relay(wire, pid, theft, blackboxes, owed, next(filter(None, listeners), None))
        try:
            wire.send(order, labels)
            for place, rung in relay.rungs():
                _refresh(transfers[place])
                yield place, rung
        finally:
            for transfer in transfers:
                _refresh(transfer)


def _refresh(transfer: TransferSet | None) -> None:
    if transfer is not None:
        transfer.refresh()


def _start(stack: contextlib.ExitStack, pool: Images) -> tuple[MessagePipe, int]:
    """Start the process; it is always ended when the stack is left."""
    ours, theirs = Pipe()
    wire = MessagePipe(ours)
    stack.callback(wire.close)
    life, owners_end = os.pipe()
    stack.callback(os.close, owners_end)
    images = stack.enter_context(_shared(pool))
    try:
        pid = FORK_SERVER.fork([theirs.fileno(), life, images])
    finally:
        theirs.close()
        os.close(life)
    stack.callback(FORK_SERVER.end, pid)
    return wire, pid


@contextlib.contextmanager
def _shared(pool: Images) -> Iterator[int]:
    """Write images to an unnamed file, in memory where the system supports it, unless they are memory-mapped."""
    in_memory = hasattr(os, "memfd_create") and not mapped.is_mapped(pool)
    where = mapped.folder() if mapped.is_mapped(pool) else None
    with open(os.memfd_create("pool"), "wb") if in_memory else tempfile.TemporaryFile(dir=where) as file:
        file.write(array_block(pool))
        file.flush()
        yield file.fileno()


def _order(
    theft: Theft, blackboxes: Sequence[BlackBox], transfers: Sequence[TransferSet | None], scratch: str
) -> tuple[Tree, memoryview]:
    thief = {**theft.settings.resolved(), "blackbox": None}  # it need not know the URL or the API key
    paths = [None if transfer is None else transfer.path for transfer in transfers]
    folders = [None if path is None else str(path.absolute()) for path in paths]
    outside = [name.partition(":")[0] for name in _texts(thief) if plugins.is_path(name)]
    marker = None if PATIENCE.marker is None else str(PATIENCE.marker)
    order = {
        "read": readable(outside),
        "write": [scratch, *filter(None, folders)],
        "scratch": scratch,
        "path": [os.path.abspath(entry) for entry in sys.path],
        "threads": torch.get_num_threads(),
        "gpus": gpu_share(),
        "patience": [PATIENCE.seconds, marker] if PATIENCE.seconds else None,
        "thief": thief,
        "seed": theft.seed,
        "shape": list(theft.shape),
        "classes": theft.classes,
        "answers": [blackbox.classes for blackbox in blackboxes],
        "pool": array_header(theft.pool),
        "labelled": theft.labels is not None,
        "transfers": folders,
        "snapshot_every_s": theft.snapshot_every_s,
    }
    return order, memoryview(b"") if theft.labels is None else array_block(theft.labels)


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(value)


class _Relay:
    """Answers the requests of an attack's process until it is done.

    Args:
        wire: Pipe to the process.
        pid: The process id.
        theft: The theft.
        blackboxes: The black boxes that answer its queries.
        owed: For each black box, the budgets whose substitutes are outstanding.
        on_epoch: Called with the progress of its trainings.
    """

    def __init__(
        self,
        wire: MessagePipe,
        pid: int,
        theft: Theft,
        blackboxes: Sequence[BlackBox],
        owed: Sequence[Sequence[int]],
        on_epoch: OnEpoch | None = None,
    ) -> None:
        self.wire, self.pid, self.theft, self.blackboxes = wire, pid, theft, blackboxes
        self.owed = [list(budgets) for budgets in owed]
        self.on_epoch = on_epoch
        self._refused: tuple[str, BaseException] | None = None

    def rungs(self) -> Iterator[tuple[int, Rung]]:
        """Yield the substitutes, each with the index of its black box."""
        while True:
            header, block = self._next()
            kind = header.get("do")
            if kind == "query":
                self._answer(partial(self._queried, header, block))
            elif kind == "remaining":
                self._answer(partial(self._remaining, header))
            elif kind == "rung":
                yield self._rung(header, block)
                self._send({})
            elif kind == "warn":
                PATIENCE.notify(f"the attack: {str(header.get('text'))[:1000]}")
            elif kind == "epoch":
                self._epoch(header)
            elif kind == "failed":
                raise self._failure(header)
            elif kind == "done" and not any(self.owed):
                return
            else:
                raise AttackFailed(f"its process sent {str(kind)[:40]!r} while budgets {self.owed} were owed")

    def _next(self) -> tuple[Tree, bytes]:
        try:
            return self.wire.receive()
        except (EOFError, OSError):
            raise self._death() from None
        except ValueError as error:
            raise AttackFailed(f"its process sent an invalid message: {error}") from None

    def _send(self, header: Tree, block: bytes | memoryview = b"") -> None:
        try:
            self.wire.send(header, block)
        except OSError:
            raise self._death() from None

    def _death(self) -> AttackDied:
        # Its end of the connection closes a little before its exit status can be read.
        status = FORK_SERVER.end(self.pid, _GRACE_S)
        return AttackDied(f"its process was killed by signal {-status}" if status < 0 else "its process ended")

    def _answer(self, make: Callable[[], tuple[Tree, bytes | memoryview]]) -> None:
        try:
            header, block = make()
        except Exception as error:
            refused = refusal(error)
            self._refused = refused["kind"], error
            header, block = {"error": refused}, b""
        self._send(header, block)

    def _place(self, header: Mapping[str, Any]) -> int:
        """Return the index of the black box that a message refers to."""
        place = header.get("box", 0)
        if type(place) is not int or not 0 <= place < len(self.blackboxes):
            raise AttackFailed(f"its process asked for black box {str(place)[:40]} of {len(self.blackboxes)}")
        return place

    def _remaining(self, header: Mapping[str, Any]) -> tuple[Tree, bytes]:
        return {"remaining": self.blackboxes[self._place(header)].remaining}, b""

    def _queried(self, header: Mapping[str, Any], block: bytes) -> tuple[Tree, memoryview]:
        images = read_array(header, block, ("uint8", "float32"), 4)
        answers = self.blackboxes[self._place(header)].query(images)
        return array_header(answers), array_block(answers)

    def _epoch(self, header: Mapping[str, Any]) -> None:
        """Pass on the progress of a training; malformed progress is dropped, since nothing depends on it."""
        epoch, epochs, loss = (header.get(key) for key in ("epoch", "epochs", "loss"))
        if self.on_epoch is None or not isinstance(loss, (int, float)):
            return
        if type(epoch) is int and type(epochs) is int and 0 < epoch <= epochs and math.isfinite(loss):
            self.on_epoch(epoch, epochs, float(loss))

    def _failure(self, header: Mapping[str, Any]) -> BaseException:
        """Return why the theft failed: the error of this process, if that ended it."""
        if self._refused is not None and header.get("kind") == self._refused[0]:
            return self._refused[1]
        error: MeaRayError = read_error(header)
        error.__cause__ = _Trace(str(header.get("trace"))[-20_000:])
        return error

    def _rung(self, header: Mapping[str, Any], block: bytes) -> tuple[int, Rung]:
        place = self._place(header)
        owed = self.owed[place]
        budget, queries, epochs, seconds = (header.get(key) for key in ("budget", "queries", "epochs", "seconds"))
        if not owed or budget != owed[0] or type(queries) is not int or not 0 <= queries <= owed[0]:
            raise AttackFailed(f"it gave a substitute for {queries} queries of budget {budget}; owed are {owed}")
        if type(epochs) is not int or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
            raise AttackFailed(f"its substitute for budget {budget} was trained {epochs} epochs in {seconds} seconds")
        model = self._substitute(block)
        return place, Rung(owed.pop(0), queries, model, epochs, float(seconds), _curves(header.get("curves")))

    def _substitute(self, weights: bytes) -> ImageModel:
        """Fill the network of the thief's settings with weights; no code and no other network comes along."""
        theft = self.theft
        model = build_network(theft.settings.model, theft.shape, theft.classes)
        try:
            model.load_state_dict(load(weights))
        except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise AttackFailed(
                f"its substitute is not a {theft.settings.model.name}, as thief.model says: {error}; build it with "
                "make_model"
            ) from error
        return model.eval()


def _curves(given: Any) -> dict[str, list[tuple[int, float]]]:
    try:
        return {str(name): [(int(at), float(value)) for at, value in points] for name, points in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise AttackFailed(f"its curves are not (queries, value) points by name: {error}") from None


class _Trace(Exception):
    """Represents an error of another process: shows where it was raised there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"
