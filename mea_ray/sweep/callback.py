"""The driver's work when a trial ends: store its result, pass it to the trackers, release its service."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from mea_ray.core.errors import ReplicasAway
from mea_ray.results.records import TrialResult
from mea_ray.sweep import events
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.reports import EPOCHS, RUNGS
from mea_ray.sweep.trainable import TrialContext
from mea_ray.tracking import TrackerSet


class Finisher:
    """Follows the trials of a sweep. The trackers are called in a thread, so that a slow one delays no trial.

    Args:
        folder: The sweep's folder.
        trackers: They get each finished trial.
        emit: Where events go.

    Attributes:
        failed: Failed trials, with the reason.
        ended: Trials that ended in any way.
        put_off: Trials that the sweep's time budget postponed to a later start.
        deadline: When that budget is used up, by ``time.monotonic``; None without one.
        runs_ended: Runs of Tune that ended; more than ``ended`` where a search suggests a trial twice.
        before_emitting: Called before the event of a trial's end, so that the trial's own events come first.
    """

    def __init__(self, folder: SweepFolder, trackers: TrackerSet, emit: events.OnEvent) -> None:
        self.folder, self.trackers, self.emit = folder, trackers, emit
        self.failed: dict[str, str] = {}
        self.ended: set[str] = set()
        self.put_off: set[str] = set()
        self.deadline: float | None = None
        self.runs_ended = 0
        self._under_way: dict[str, tuple[str, int]] = {}
        self.before_emitting: Callable[[], None] = lambda: None
        self._context: TrialContext | None = None
        self._names: dict[str, str] = {}
        self._queue: queue.Queue[str | None] = queue.Queue()  # names only: trackers can lag, and results are large
        self._thread = threading.Thread(target=self._serve, name="trackers", daemon=True)
        self._thread.start()

    def begin(self, context: TrialContext) -> None:
        """Set the trials' common context, before Tune starts them."""
        self._context = context

    def show(self, trial: str) -> None:
        """Queue a trial's result for the trackers."""
        self._queue.put(trial)

    def drain(self) -> None:
        """Wait until the trackers have got every result."""
        self._queue.join()

    def close(self, timeout_s: float = 60.0) -> None:
        """End the trackers' thread; results that they have not got by then are passed on by the next ``--resume``."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def fail(self, trial: str, reason: str) -> None:
        """Mark a trial as failed."""
        self.failed[trial] = reason
        self.ended.add(trial)
        self.before_emitting()
        self.emit(events.TrialFailed(trial, reason))

    def finish(self, trial: str, epochs: int = 0) -> None:
        """Process the result of a trial that ended by itself or by the scheduler.

        Args:
            trial: Its name.
            epochs: Epochs that it reported before its first rung, if the scheduler stopped it there.
        """
        self.ended.add(trial)
        self.release(trial)
        self.folder.wait()
        work = self.folder.trial(trial)
        path = self.folder.result_path(trial)
        # Of a trial on another node, only its result, or the reason why there is none, is downloaded.
        if self.folder.fetch_result(trial) is None:
            work.pull_one(work.error.name)
        reason = work.failure()
        if reason is not None:
            self.fail(trial, reason)
            return
        if not path.exists() and self.deadline is not None and time.monotonic() >= self.deadline:
            self.put_off.add(trial)  # the scheduler did not stop it: --resume continues from its rungs
            return
        if not path.exists():
            work.pull_one("partial.json")
            stopped = work.partial()
            if stopped is None and epochs:
                work.save_stopped(epochs)
                self.before_emitting()
                self.emit(events.TrialFinished(trial, "", stopped=True))
                return
            if stopped is None:
                self.fail(trial, "it ended without a result; its logs are in Ray's session folder")
                return
            self.folder.save_result(stopped)  # stopped by the scheduler after a rung
        result = TrialResult.load(path)
        self.before_emitting()
        self.emit(events.TrialFinished(trial, str(path), result.status == "stopped"))
        self.show(trial)

    def follow(self, event: events.Event) -> None:
        """Note where a trial runs."""
        if isinstance(event, events.TrialStarted):
            self._under_way[event.trial] = (event.node, event.pid)

    def under_way(self) -> dict[str, tuple[str, int]]:
        """Return the running trials, each with the id of its node and its process."""
        return {name: place for name, place in self._under_way.items() if name not in self.ended}

    def name_of(self, tune_trial: Any) -> str:
        """Return our name of a trial of Tune."""
        assert self._context is not None
        if tune_trial.trial_id not in self._names:
            self._names[tune_trial.trial_id] = self._context.name_of(tune_trial.config)
        return self._names[tune_trial.trial_id]

    def interrupted(self, trials: Mapping[str, Any] | None, samples: int) -> bool:
        """Return whether Tune returned before its trials had ended, as it does on Ctrl-C."""
        return not self.ended.issuperset(trials) if trials is not None else self.runs_ended < samples

    def callback(self) -> Any:
        """Return the callback for Ray Tune."""
        return TuneCallback(self)

    def release(self, trial: str) -> None:
        """Release a trial's service, whether or not its process could."""
        if self._context is not None:
            # Not retried by Ray: it can be in flight when the broker is stopped.
            self._context.broker.release.options(max_task_retries=0).remote(trial)

    def _serve(self) -> None:
        while True:
            trial = self._queue.get()
            try:
                if trial is None:
                    self.trackers.close()
                    return
                result = self.folder.result(trial)
                if result is not None:
                    self.trackers.log(result, self.folder.models(result))
            finally:
                self._queue.task_done()


class TuneCallback(tune.Callback):
    """Reports the end of Tune's trials to a ``Finisher``."""

    def __init__(self, finisher: Finisher | None = None) -> None:
        self.finisher = finisher

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune saves its callbacks for its own restore, which is never used: a sweep resumes from its folder.
        return TuneCallback, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Process the result."""
        if self.finisher is not None:
            self.finisher.runs_ended += 1
            last = trial.last_result or {}
            epochs = int(last.get(EPOCHS, 0)) if not last.get(RUNGS, 0) else 0
            self.finisher.finish(self.finisher.name_of(trial), epochs)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Report that a trial continues after it was killed, or after it released its slot."""
        if self.finisher is not None:
            failure = Failure.of(trial.error_file)
            kind = events.TrialMadeWay if failure.kind == ReplicasAway.__name__ else events.TrialRestarted
            self.finisher.emit(kind(self.finisher.name_of(trial), failure.reason))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Mark the trial as failed."""
        if self.finisher is not None:
            name = self.finisher.name_of(trial)
            self.finisher.runs_ended += 1
            self.finisher.release(name)
            self.finisher.fail(name, Failure.of(trial.error_file).reason)


@dataclass(frozen=True)
class Failure:
    """Why a process of a trial ended, parsed from Tune's error file.

    Tune also stores the exception as a pickle. That is not opened: it comes from the trial's process, and unpickling it
    would run that process's code in the driver.

    Attributes:
        kind: Name of an error of this package; empty for anything else.
        reason: One line.
    """

    kind: str
    reason: str

    @classmethod
    def of(cls, error_file: str | None) -> Failure:
        """Read the last entry of ``error.txt`` of a trial of Tune; None if there is none."""
        try:
            text = Path(error_file or "").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return cls("", "unknown")
        text = text.rpartition(_ENTRY)[2]
        ours = _OUR_ERROR.findall(text)
        if ours:
            kind, message = ours[-1]
            return cls(kind, f"{kind}: {message}"[:_LONGEST_REASON])
        for part, reason in _REASONS.items():
            if part in text:
                return cls("", reason)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return cls("", lines[-1][:300] if lines else "unknown")


OUT_OF_MEMORY = (
    "its machine ran out of memory; raise resources.trial.cpus, so that fewer trials run at once, use smaller models "
    "or batches, or machines with more memory"
)
_ENTRY = "Failure # "
_OUR_ERROR = re.compile(r"^(?:ray\.exceptions\.RayTaskError\()?mea_ray\.core\.errors\.(\w+): (.+)$", re.MULTILINE)
_LONGEST_REASON = 1000
_REASONS = {
    "OutOfMemoryError": OUT_OF_MEMORY,
    "running low on memory": OUT_OF_MEMORY,
    "its node": "its node is gone",
    "The actor": "its process died",
}
