"""Gives Ray Tune its trials, each when its models and its service are ready."""

from __future__ import annotations

import signal
import threading
from typing import Any

from ray.tune.search import Searcher

from mea_ray.sweep.feeder import Feeder


class ReadyTrials(Searcher):
    """A searcher that suggests the trials that can run now, so that none waits in a slot.

    Tune asks again within a second while there is none. It cannot be interrupted meanwhile: after Ctrl-C it is told
    that there are no more trials.

    Args:
        feeder: Knows which trials can run.
    """

    def __init__(self, feeder: Feeder | None = None) -> None:
        super().__init__(metric=None, mode=None)
        self._feeder = feeder
        self._names: dict[str, str] = {}
        self._handler: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Tune saves its searcher for its own restore, which is never used: a sweep resumes from its folder.
        return ReadyTrials, ()

    @property
    def feeder(self) -> Feeder:
        """Knows which trials can run; None in a copy restored from one of Tune's files."""
        assert self._feeder is not None
        return self._feeder

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return a trial; None if there is none yet, ``FINISHED`` if there will be none."""
        if self._was_interrupted() or not self.feeder.left:
            return str(Searcher.FINISHED)
        name = self.feeder.next_trial()
        if name is None:
            return None
        self._names[trial_id] = name
        return {"trial": name}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Register the end of a trial."""
        name = self._names.pop(trial_id, None)
        if name is not None:
            self.feeder.ended(name)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep resumes from its folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""

    def _was_interrupted(self) -> bool:
        """Whether Tune's own handler of Ctrl-C was called: it then restores the previous one."""
        if threading.current_thread() is not threading.main_thread():
            return False
        now = signal.getsignal(signal.SIGINT)
        self._handler = self._handler or now
        return now is not self._handler
