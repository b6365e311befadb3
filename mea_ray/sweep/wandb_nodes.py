"""W&B in a sweep: one process per node handles it for all trials there; trials are not involved.

A W&B run costs seconds of CPU and some memory, which would outlive a trial. The driver passes the name of each finished
trial to the owner on the node where the trial ran, which has the stolen models.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mea_ray.config import TrackingConfig, load_tree
from mea_ray.core.versions import command_line, versions
from mea_ray.results.records import TrialResult
from mea_ray.sweep import events
from mea_ray.sweep.folder import SweepFolder
from mea_ray.tracking import TrackerSet
from mea_ray.tracking.base import Tracker, wandb_tracker
from mea_ray.tracking.wandb_tracker import StartedTrial

logger = logging.getLogger(__name__)
_WARN_EVERY_S = 30.0
_LOSSES = 200
"""Maximum number of a victim's epochs logged to the run of a trial that starts later."""


class WandbOwner:
    """Logs finished trials, one after the other. A plain class; ``NodeWandb`` runs one as an actor on each node.

    Args:
        folder: The sweep's folder.
        config: The ``tracking`` section.
        sweep: The sweep's resolved config.
        command: The command line of its driver.
    """

    def __init__(self, folder: SweepFolder, config: TrackingConfig, sweep: Mapping[str, Any], command: str) -> None:
        self.folder = folder
        self._warnings: list[str] = []
        self._tracker = wandb_tracker(
            config, folder.path, folder.name, warn=self._warnings.append, storage=folder.storage, command=command
        )
        self.trackers = TrackerSet([self._tracker], self._warnings.append)
        self.trackers.log_config(sweep)

    def log(self, trial: str) -> list[str]:
        """Log a finished trial once; return its new warnings. Never raises."""
        self.folder.fetch_result(trial)
        result = self.folder.result(trial)
        if result is not None:
            self.trackers.log(result, self.folder.models(result))
        return self._new_warnings()

    def begin(self, trial: str, victim: str) -> list[str]:
        """Start the run of a trial that has begun on this node; return its new warnings. Never raises."""
        work = self.folder.trial(trial)

        def start() -> None:
            config, point = load_tree(work.folder / "config.yaml"), work.point()
            self._tracker.begin(StartedTrial(trial, victim, point or {}, config, versions()))

        self._safely(start)
        return self._new_warnings()

    def progress(self, trial: str, numbers: Mapping[str, float | str]) -> list[str]:
        """Log the progress of a trial; return its new warnings. Never raises."""
        self._safely(lambda: self._tracker.progress(trial, numbers))
        return self._new_warnings()

    def end(self, trial: str) -> list[str]:
        """Finish the run of a trial that failed; return its new warnings. Never raises."""
        self._safely(lambda: self._tracker.end(trial))
        return self._new_warnings()

    def _safely(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # a tracking failure must not harm the results
            reason = " ".join(str(error).split())[:200]
            self._warnings.append(f"W&B failed while a trial works ({type(error).__name__}: {reason})")

    def summarize(self) -> list[str]:
        """Log the table of all trials; return its new warnings."""
        self.folder.storage.pull_folder(f"{self.folder.name}/results")
        self.trackers.summarize(self.folder.results())
        return self._new_warnings()

    def _new_warnings(self) -> list[str]:
        sent, self._warnings[:] = list(self._warnings), []
        return sent


def live_numbers(event: events.Event) -> tuple[str, dict[str, float | str]] | None:
    """Return the trial of an event and the numbers to log in its run; None for other events."""
    if isinstance(event, events.Queried):
        return event.trial, {"queries": event.answers}
    if isinstance(event, events.SubstituteEpoch):
        return event.trial, {"substitute_epoch": event.epoch, "substitute_loss": event.loss}
    if isinstance(event, events.Phase):
        return event.trial, {"phase": f"{event.what} {event.number}/{event.of}"}
    if isinstance(event, events.RungFinished):
        measures = {"accuracy": event.accuracy, "fidelity": event.fidelity, "wsr": event.wsr, "p_value": event.p_value}
        numbers: dict[str, float | str] = {
            f"rung_{name}": value for name, value in measures.items() if value is not None
        }
        return event.trial, {"rung_queries": event.queries, **numbers}
    return None


class NodeWandb:
    """The driver's side: a ``Tracker`` that passes trials to the owners. Without Ray it handles W&B itself.

    Failures of an owner are warnings, and are retried by the next ``--resume``.

    Args:
        folder: The sweep's folder.
        config: The ``tracking`` section.
        warn: Called with a message for each problem.
    """

    def __init__(self, folder: SweepFolder, config: TrackingConfig, warn: Callable[[str], None]) -> None:
        self.folder, self.config, self.warn = folder, config, warn
        self._sweep: Mapping[str, Any] = {}
        self._ray: Any = None
        self._here = ""
        self._nodes: dict[str, str] = {}
        self._working: dict[str, str] = {}
        self._losses: dict[str, list[dict[str, float | str]]] = {}
        self._turn = threading.RLock()
        self._owners: dict[str, Any] = {}
        self._waiting: dict[Any, str] = {}
        self._own: Tracker | None = None
        self._gone = False

    def attach(self, ray: Any) -> None:
        """Use a running Ray."""
        self._ray, self._here = ray, ray.get_runtime_context().get_node_id()

    def detach(self) -> None:
        """End the owners before Ray ends. Unfinished work is left to the next ``--resume``."""
        self._gone = True
        for owner in self._owners.values():
            self._ray.kill(owner)
        self._owners.clear()
        self._waiting.clear()
        self._ray = None

    def follow(self, event: events.Event) -> None:
        """Track the node of a trial, and have its progress logged there."""
        if isinstance(event, events.TrialStarted):
            if self._nodes.get(event.trial, event.node) != event.node:
                self._tell(event.trial, "end")  # it continues on another node
            self._nodes[event.trial] = event.node
        if self._ray is None or self._gone or not self.config.live or self.config.wandb == "disabled":
            return
        if isinstance(event, events.TrialStarted) and event.victim:
            self._working[event.trial] = event.victim
            self._tell(event.trial, "begin", event.victim)
            for numbers in self._losses.get(event.victim, []):
                self._tell(event.trial, "progress", numbers)
        elif isinstance(event, events.ModelEpoch) and event.role == "victim":
            self._victims_epoch(event)
        elif isinstance(event, events.TrialFailed):
            self._tell(event.trial, "end")
            self._working.pop(event.trial, None)
        elif isinstance(event, events.TrialFinished):
            self._working.pop(event.trial, None)
        elif (numbered := live_numbers(event)) is not None:
            trial, values = numbered
            self._tell(trial, "progress", values)

    def _victims_epoch(self, event: events.ModelEpoch) -> None:
        """Log a victim's loss to the runs of its trials, including those that start after its training."""
        loss = event.record.get("loss")
        if not isinstance(loss, (int, float)):
            return
        numbers: dict[str, float | str] = {"victim_epoch": event.epoch, "victim_loss": float(loss)}
        losses = self._losses.setdefault(event.name, [])
        losses.append(numbers)
        del losses[:-_LOSSES]
        for trial, victim in self._working.items():
            if victim == event.name:
                self._tell(trial, "progress", numbers)

    def _tell(self, trial: str, what: str, *values: Any) -> None:
        """Send a message to the owner of a trial; its warnings are collected with the next result.

        Warnings are not emitted here: events are passed on one at a time, and a warning is an event.
        """
        if trial not in self._working or self._ray is None:
            return
        node = self._nodes.get(trial, self._here)
        try:
            with self._turn:
                self._waiting[getattr(self._owner(node), what).remote(trial, *values)] = node
        except Exception as error:  # e.g. Ray is about to end; a tracking failure must not harm the results
            logger.info("the progress of %s could not be sent to W&B: %s", trial, error)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Save the sweep's config for the owners."""
        self._sweep = config

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Pass a trial to the owner on its node."""
        if self._gone:
            return
        if self._ray is None:
            self._itself().log(result, models)
            return
        node = self._nodes.pop(result.trial, self._here)
        with self._turn:
            self._waiting[self._owner(node).log.remote(result.trial)] = node
        self._collect(timeout_s=0.0)

    def summarize(self, results: Iterable[TrialResult]) -> None:
        """Wait for the owners, then have the table of all trials logged by the one on the driver's node."""
        if self._ray is None:
            self._itself().summarize(results)
            return
        warned_at = time.monotonic()
        while self._waiting:
            self._collect(timeout_s=1.0)
            if time.monotonic() - warned_at > _WARN_EVERY_S:
                warned_at = time.monotonic()
                self.warn(f"W&B is {len(self._waiting)} runs behind; Ctrl-C leaves them to the next --resume")
        self._waiting[self._owner(self._here).summarize.remote()] = self._here
        while self._waiting:
            self._collect(timeout_s=1.0)

    def close(self) -> None:
        """Do nothing: every run is finished where it was started."""

    def _itself(self) -> Tracker:
        if self._own is None:
            place, storage = self.folder, self.folder.storage
            self._own = wandb_tracker(
                self.config, place.path, place.name, warn=self.warn, storage=storage, command=command_line()
            )
            self._own.log_config(self._sweep)
        return self._own

    def _owner(self, node: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if node not in self._owners:
            # Soft: for a lost node, an owner elsewhere logs the numbers; its models are lost with it.
            place = NodeAffinitySchedulingStrategy(node, soft=True)
            actor = self._ray.remote(WandbOwner).options(
                num_cpus=0, max_restarts=3, max_task_retries=3, scheduling_strategy=place
            )
            self._owners[node] = actor.remote(self.folder, self.config, self._sweep, command_line())
        return self._owners[node]

    def _collect(self, timeout_s: float) -> None:
        """Collect the results of the owners, several at a time: there can be a thousand."""
        with self._turn:
            waiting = list(self._waiting)
        ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s) if waiting else ([], [])
        for reference in ready:
            with self._turn:
                node = self._waiting.pop(reference, None)
            if node is None:  # another thread collects it
                continue
            try:
                for text in self._ray.get(reference):
                    self.warn(text)
            except self._ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())[:200]
                self.warn(f"W&B's process on node {node[:8]} failed ({reason}); the next --resume logs what is missing")
