"""A trial's reports to Ray Tune: the metrics of each rung and, if configured, the loss of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mea_ray.config import SearchConfig
from mea_ray.results.numbers import METRICS
from mea_ray.sweep.objective import JUDGED, judged

EPOCHS, RUNGS, LOSS = "epochs", "rungs", "loss"


class Reports:
    """The reports of one process of a trial.

    A report of a rung has ``METRICS``, and the number that a scheduler compares. With ``epochs``, every report also has

    - ``epochs``: epochs trained so far, of the victim and of all rungs together; it never decreases;
    - ``loss``: training loss of the epoch, first of the victim, then of the substitutes;
    - ``rungs``: rungs that are finished.

    The metrics of a report between two rungs are those of the last rung, NaN before the first.

    Args:
        send: Sends a report to Tune, which may end the process.
        search: The search of the sweep.
        epochs: Whether epochs are reported as well.
    """

    def __init__(self, send: Callable[[dict[str, float]], None], search: SearchConfig, *, epochs: bool) -> None:
        self._send, self._search, self.with_epochs = send, search, epochs
        self._numbers = dict.fromkeys(METRICS, math.nan)
        self._epochs = self._rungs = 0
        self._at_rung = 0
        self._loss = math.nan

    def rung(self, numbers: Mapping[str, float], epochs: int = 0) -> None:
        """Report a rung.

        Args:
            numbers: Its metrics.
            epochs: Epochs that its substitute was trained; an earlier process may have reported them.
        """
        self._numbers = dict(numbers)
        self._rungs += 1
        self._at_rung += epochs
        self._epochs = max(self._epochs, self._at_rung)
        self._report()

    def epoch(self, loss: float) -> None:
        """Report an epoch of a substitute."""
        if self.with_epochs:
            self._epochs += 1
            self._loss = loss
            self._report()

    def victim(self, losses: list[float]) -> None:
        """Report the epochs of the victim's finished training."""
        for loss in losses:
            self.epoch(loss)
        self._at_rung = self._epochs

    def _report(self) -> None:
        more = {EPOCHS: self._epochs, RUNGS: self._rungs, LOSS: self._loss} if self.with_epochs else {}
        self._send({**self._numbers, JUDGED: judged(self._search, self._numbers), **more})
