"""What the driver does when a trial ends: keeps its result, shows it, lets go of its service."""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune

from mea_ray.core.errors import MeaRayError, ReplicasAway
from mea_ray.results.records import TrialResult
from mea_ray.sweep import events
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.trainable import TrialContext
from mea_ray.tracking import TrackerSet


class Finisher:
    """Follows the trials of a sweep. Trackers are served in a thread, so that a slow one holds up no trial.

    Args:
        folder: The sweep's folder.
        shown: The trackers.
        tell: Where events go.

    Attributes:
        failed: Trials that were given up, with the reason.
        ended: Trials that ended, in whatever way.
        before_telling: Called before a trial's end is told, so that what the trial told itself comes first.
    """

    def __init__(self, folder: SweepFolder, shown: TrackerSet, tell: events.OnEvent) -> None:
        self.folder, self.shown, self.tell = folder, shown, tell
        self.failed: dict[str, str] = {}
        self.ended: set[str] = set()
        self.before_telling: Callable[[], None] = lambda: None
        self._context: TrialContext | None = None
        self._names: dict[str, str] = {}
        self._queue: queue.Queue[str | None] = queue.Queue()  # names: trackers may lag, and results are large
        self._thread = threading.Thread(target=self._serve, name="trackers", daemon=True)
        self._thread.start()

    def begin(self, context: TrialContext) -> None:
        """Learn what the trials share, before Tune starts them."""
        self._context = context

    def show(self, trial: str) -> None:
        """Have the trackers shown a trial's result."""
        self._queue.put(trial)

    def drain(self) -> None:
        """Wait until the trackers have seen every result."""
        self._queue.join()

    def close(self, timeout_s: float = 60.0) -> None:
        """End the trackers' thread; results that they have not seen by then are shown by the next ``--resume``."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def fail(self, trial: str, reason: str) -> None:
        """Give a trial up."""
        self.failed[trial] = reason
        self.ended.add(trial)
        self.before_telling()
        self.tell(events.TrialFailed(trial, reason))

    def finish(self, trial: str) -> None:
        """Take the result of a trial that ended by itself or by the scheduler."""
        self.ended.add(trial)
        self.release(trial)
        self.folder.wait()
        work = self.folder.trial(trial)
        path = self.folder.result_path(trial)
        reason = work.failure()
        if reason is not None:
            self.fail(trial, reason)
            return
        if not path.exists():
            work.pull()
            self.folder.storage.pull(f"{self.folder.name}/results/{path.name}")
        if not path.exists():
            stopped = work.partial()
            if stopped is None:
                self.fail(trial, "it ended without a result; its logs are in Ray's session folder")
                return
            self.folder.save_result(stopped)  # stopped by the scheduler after a rung
        result = TrialResult.load(path)
        self.before_telling()
        self.tell(events.TrialFinished(trial, str(path), result.status == "stopped"))
        self.show(trial)

    def name_of(self, tune_trial: Any) -> str:
        """Return our name of a trial of Tune."""
        assert self._context is not None
        if tune_trial.trial_id not in self._names:
            self._names[tune_trial.trial_id] = self._context.name_of(tune_trial.config)
        return self._names[tune_trial.trial_id]

    def interrupted(self, trials: Mapping[str, Any] | None, samples: int) -> bool:
        """Return whether Tune came back before its trials had ended, which it does on Ctrl-C."""
        return not self.ended.issuperset(trials) if trials is not None else len(self._names) < samples

    def callback(self) -> Any:
        """Return the callback for Ray Tune."""
        return TuneCallback(self)

    def release(self, trial: str) -> None:
        """Let go of a trial's service, whether or not its process could."""
        if self._context is not None:
            self._context.broker.release.remote(trial)

    def _serve(self) -> None:
        while True:
            trial = self._queue.get()
            try:
                if trial is None:
                    self.shown.close()
                    return
                result = self.folder.result(trial)
                if result is not None:
                    self.shown.log(result, self.folder.models(result))
            finally:
                self._queue.task_done()


class TuneCallback(tune.Callback):
    """Tells a ``Finisher`` how Tune's trials end."""

    def __init__(self, finisher: Finisher | None = None) -> None:
        self.finisher = finisher

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune saves its settings for a restore of its own, which is never asked for: a sweep resumes from its folder.
        return TuneCallback, ()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Take the result."""
        if self.finisher is not None:
            self.finisher.finish(self.finisher.name_of(trial))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell that a killed trial goes on, or one that made way for its service."""
        if self.finisher is not None:
            error = _error(trial)
            kind = events.TrialMadeWay if isinstance(error, ReplicasAway) else events.TrialRestarted
            self.finisher.tell(kind(self.finisher.name_of(trial), _reason(error)))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Give the trial up."""
        if self.finisher is not None:
            name = self.finisher.name_of(trial)
            self.finisher.release(name)
            self.finisher.fail(name, _reason(_error(trial)))


def _error(trial: Any) -> Exception | None:
    """Return what a trial of Tune ended with, of our own errors without Ray's around them; None if that is lost."""
    with contextlib.suppress(Exception):
        # Where Tune writes it first; it reaches Tune's storage later than this is called.
        error = pickle.loads(Path(trial.local_path, trial.run_metadata.pickled_error_filename).read_bytes())
        cause = getattr(error, "cause", None)
        found: Exception = cause if isinstance(cause, MeaRayError) else error
        return found
    return None


def _reason(error: Exception | None) -> str:
    """Say in one line what happened to a trial: an error of ours as it is, and of Ray's what it means."""
    if isinstance(error, MeaRayError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its node is gone" if "its node" in str(error) else "its process died"
    lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "unknown"
