"""Runs the trials of a sweep under Ray Tune, even on machines that run out of memory.

When Ray kills a trial because memory runs out, Tune's whole run ends with an error. It is then restarted with the
remaining trials, which resume from disk.
"""

from __future__ import annotations

import contextlib
import re
import signal
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.exceptions import OutOfMemoryError
from ray.tune.search import Searcher

from mea_ray.core import plugins
from mea_ray.sweep import events, search, tune_classes
from mea_ray.sweep.ahead import Ahead
from mea_ray.sweep.callback import OUT_OF_MEMORY, Finisher
from mea_ray.sweep.feeder import Feeder
from mea_ray.sweep.ready_trials import ReadyTrials
from mea_ray.sweep.trainable import TrialContext, tune_trial

if TYPE_CHECKING:
    from ray.tune import ResultGrid

Prepare = Callable[[Feeder, TrialContext, str, Mapping[str, Any]], None]
_NODE = re.compile(r"\bID: ([0-9a-f]{8,})")
_KILLED = re.compile(r"^Selected to kill: .*?\bpid=(\d+), actual memory used=([\d.]+)GB", re.MULTILINE)


class Tuning:
    """Runs the trials of a sweep.

    Args:
        context: The trials' common context.
        finisher: Follows them.
        data: References to the loaded data, by name.
        at_once: Maximum number of concurrent trials.
        feeder: Knows which trials can run; None for an adaptive search whose models are trained in the trials' slots.
        prepare: Registers the needs of a point of an adaptive search with the feeder, see `Needs.of_suggestion`.
    """

    def __init__(
        self,
        context: TrialContext,
        finisher: Finisher,
        data: Mapping[str, Any],
        at_once: int,
        feeder: Feeder | None = None,
        prepare: Prepare = lambda feeder, context, name, config: None,
    ) -> None:
        self.feeder, self.prepare = feeder, prepare
        self.context, self.finisher, self.data, self.at_once = context, finisher, data, at_once
        self.sweep = context.sweep
        self.grid: ResultGrid | None = None
        """Result grid of the last run of Tune."""
        self._out_of_memory: Counter[str] = Counter()
        budget_s = self.sweep.time_budget_s
        finisher.deadline = None if budget_s is None else time.monotonic() + budget_s

    def run(self, samples: int) -> None:
        """Run until every trial has ended.

        Args:
            samples: Number of trials to run, if the search is adaptive; else those of the context are run.

        Raises:
            KeyboardInterrupt: Tune returned before they had ended, as it does on Ctrl-C.
        """
        while True:
            left = [name for name in self.context.points if name not in self.finisher.ended]
            if self.context.points and not left:
                return
            still = samples - self.finisher.runs_ended
            if not self.context.points and still <= 0:
                return
            if self._out_of_time():
                return
            try:
                with tempfile.TemporaryDirectory(prefix="mea_ray_tune_", ignore_cleanup_errors=True) as notes:
                    self._fit(left, still, notes)
            except Exception as error:
                out_of_memory = _cause(error)
                if out_of_memory is None:
                    raise
                self._blame(out_of_memory)
            else:
                break
        if self.finisher.interrupted(self.context.points or None, samples) and not self._out_of_time():
            raise KeyboardInterrupt

    def _out_of_time(self) -> bool:
        """Return whether the time budget is used up; unfinished trials are then left to the next ``--resume``."""
        finisher, budget_s = self.finisher, self.sweep.time_budget_s
        if finisher.deadline is None or time.monotonic() < finisher.deadline:
            return False
        for name in finisher.under_way():
            finisher.release(name)
        finisher.put_off |= {*self.context.points, *finisher.under_way()} - finisher.ended
        left = f"{len(finisher.put_off):,} trials are" if self.context.points else "the running trials are"
        finisher.emit(events.Warned(f"the time budget of {budget_s:g} s is used up; {left} left to --resume"))
        return True

    def _fit(self, left: list[str], samples: int, notes: str) -> None:
        from ray import tune

        role = self.sweep.base.resources.trial
        trainable = tune.with_resources(
            tune.with_parameters(tune_trial, context=self.context, data=dict(self.data)),
            {"cpu": role.cpus, "gpu": role.gpus},
        )
        searcher: Searcher
        space: dict[str, Any] = {}
        imported = plugins.is_path(self.sweep.search.name)
        scheduler = search.scheduler(self.sweep)
        grouped = tune_classes.waits_for_groups(scheduler)
        if left:
            assert self.feeder is not None
            self.feeder.schedule.again(set(left))  # of an earlier run of Tune, which ended before them
            searcher, samples = ReadyTrials(self.feeder), len(left)
        else:
            folder = self.context.folder
            over = folder.stopped() | set(self.finisher.failed)
            begun = [
                trial.point()
                for trial in folder.trials()
                if folder.result(trial.folder.name) is None and trial.folder.name not in over
            ]
            searcher = (
                tune_classes.searcher(self.sweep)
                if imported
                else search.optuna_search(self.sweep, folder.results(), [p for p in begun if p is not None])
            )
            space = tune_classes.space(self.sweep) if imported else {}
            if self.feeder is not None and isinstance(searcher, Searcher):
                self.feeder.schedule.forget()  # points that an earlier run of Tune held back
                prepare = partial(self.prepare, self.feeder, self.context)
                searcher = Ahead(searcher, self.feeder, prepare, most=self.at_once, samples=samples, only_ahead=grouped)
        deadline = self.finisher.deadline
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=samples,
                # It would count paused trials, too, and the group that they wait for would never be complete.
                max_concurrent_trials=None if grouped else self.at_once,
                time_budget_s=None if deadline is None else max(1.0, deadline - time.monotonic()),
                # Starting a process and importing takes seconds, and a trial leaves no state in its process.
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=f"run-{uuid.uuid4().hex[:8]}",
                # Tune's own files, which nobody reads: not in a storage that could block all trials when unavailable.
                storage_path=notes,
                verbose=0,
                stop=dict(self.sweep.stop) or None,
                callbacks=[self.finisher.callback(), *tune_classes.callbacks(self.sweep)],
                failure_config=tune.FailureConfig(max_failures=self.sweep.max_failures),
            ),
        )
        with _own_signals():
            self.grid = tuner.fit()

    def _blame(self, error: OutOfMemoryError) -> None:
        """Count one failure of the trial that used most memory, and mark it as failed if it had too many.

        If Ray does not report whose process that was, the failure is counted for every running trial.
        """
        text = str(error)
        node = _NODE.search(text)
        killed = sorted(((float(size), int(pid)) for pid, size in _KILLED.findall(text)), reverse=True)
        under_way = self.finisher.under_way()
        largest = [
            name
            for _, pid in killed
            for name, (its_node, its_pid) in under_way.items()
            if its_pid == pid and (node is None or its_node == node[1])
        ][:1]
        for name in largest or list(under_way):
            self._out_of_memory[name] += 1
            if self._out_of_memory[name] > self.sweep.max_failures:
                self.finisher.release(name)
                self.finisher.fail(name, OUT_OF_MEMORY)
                self.finisher.runs_ended += 1
            else:
                self.finisher.emit(events.TrialRestarted(name, OUT_OF_MEMORY))


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the signal handlers that Tune replaces: otherwise the next Ctrl-C would do nothing."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # no other thread may set them, and Tune does not
            for number, handler in before.items():
                if handler is not None:  # one that was not set from Python cannot be set from here
                    signal.signal(number, handler)


def _cause(error: BaseException) -> OutOfMemoryError | None:
    """Return the out-of-memory error that caused an error; None if none did."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OutOfMemoryError):
        seen = seen.__cause__ or seen.__context__
    return seen
