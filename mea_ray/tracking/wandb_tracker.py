"""Weights & Biases: a run per trial, grouped by victim, with its curve over queries; models as linked artifacts."""

from __future__ import annotations

import hashlib
import netrc
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from mea_ray.results.numbers import rung_metrics, threshold
from mea_ray.results.records import TrialResult
from mea_ray.storage.remote import Storage
from mea_ray.tracking.rows import (
    TrialSettings,
    attack_curves,
    flatten,
    follow_up,
    groups_of,
    innocent_band,
    name_of,
    nested,
    owner_saw,
    rows,
)

_CURVES = (
    "wsr",
    "wsr_low",
    "wsr_high",
    "wfpr",
    "wfpr_classes",
    "accuracy",
    "fidelity",
    "p_value",
    "null_wsr",
    "stolen_null_wsr",
    "null_low",
    "null_high",
    "threshold",
)
_INIT_TIMEOUT_S = 20.0
_LOGGED = "logged"
"""Set in a run's summary when it is completely logged."""
LIVE = "live"
"""File in an offline run that is being written; `mea-ray sync` skips it until it is finished or no longer updated."""
_FIRST_FINAL_STEP = 1_000_000
"""Steps of a finished trial's points begin here: a fixed place of each, behind all that was logged while it worked."""
IGNORED_VARIABLES = (
    "WANDB_RUN_ID",
    "WANDB_NAME",
    "WANDB_RUN_NAME",
    "WANDB_RESUME",
    "WANDB_RESUME_FROM",
    "WANDB_FORK_FROM",
    "WANDB_REINIT",
    "WANDB_RUN_GROUP",
    "WANDB_JOB_TYPE",
    "WANDB_RUN_JOB_TYPE",
    "WANDB_TAGS",
    "WANDB_RUN_TAGS",
    "WANDB_NOTES",
    "WANDB_RUN_NOTES",
    "WANDB_CONFIG_PATHS",
    "WANDB_SYNC_TENSORBOARD",
    "WANDB_PROJECT",
    "WANDB_MODE",
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
)
"""Variables that say which run, project or sweep a process logs to: each trial has a run of its own."""


@dataclass(frozen=True)
class StartedTrial:
    """A trial that has begun, and has no result yet; see ``rows.TrialSettings``."""

    trial: str
    victim: str
    point: Mapping[str, Any]
    config: Mapping[str, Any]
    versions: Mapping[str, str]


class WandbTracker:
    """Logs to W&B. Files go below ``<folder>/wandb``; nothing is written elsewhere.

    A run's id follows from the names of the sweep and the trial, so logging a trial again reaches the same run.
    Offline runs reach an account later with ``mea-ray sync``. If an online run cannot be started, this and all later
    runs are stored offline instead.

    Args:
        folder: The sweep's folder.
        sweep: The sweep's name.
        mode: ``offline`` or ``online``.
        project: W&B project.
        entity: W&B entity; None for the account's default.
        log_models: Log victims and substitutes as artifacts.
        group: How runs are grouped. The other two groups are in each run's config; the seed is also in its tags.
        runs_per_minute: Online: maximum number of runs started per minute.
        storage: Storage that holds the folder; finished offline runs are copied to it if it is a remote one.
        command: The command line of the sweep; empty if it is not known.
        warn: Called with a message when online becomes offline, and when an environment variable is ignored.
    """

    def __init__(
        self,
        folder: Path,
        sweep: str,
        *,
        mode: Literal["offline", "online"] = "offline",
        project: str = "mea_ray",
        entity: str | None = None,
        log_models: bool = True,
        group: Literal["victim", "seed", "setting"] = "victim",
        runs_per_minute: float = 60.0,
        storage: Storage | None = None,
        command: str = "",
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.folder, self.sweep, self.mode = folder, sweep, mode
        self.project, self.entity, self.log_models, self.warn = project, entity, log_models, warn
        self.group, self.storage, self.command = group, storage, command
        self._pause_s, self._next = 60.0 / runs_per_minute, float("-inf")
        self._config: dict[str, Any] = {}
        self._live: dict[str, Any] = {}
        self._warned = False

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Save the sweep's config for the summary run."""
        self._config = nested(flatten(config))

    def log(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Log one trial as a run; the victim that it attacked first, if this sweep has not logged it yet."""
        if self.log_models and "victim" in models:
            self._once(f"victim-{result.victim}", lambda: self._log_victim(result, models["victim"]))
        self._once(f"trial-{result.trial}", lambda: self._log_trial(result, models))

    def begin(self, trial: StartedTrial) -> None:
        """Start the run of a started trial; ``progress`` and ``log`` continue it."""
        if trial.trial in self._live or self._is_logged(f"trial-{trial.trial}"):
            return
        run = self._start_trial(trial)
        if run.summary.get(_LOGGED) or run.step >= _FIRST_FINAL_STEP:  # online, by a start that was killed at its end
            self._finish(run)
            return
        run.define_metric("live/queries")
        run.define_metric("live/*")
        self._live[trial.trial] = run
        self._touch(run)

    def progress(self, trial: str, numbers: Mapping[str, float | str]) -> None:
        """Log the progress of a trial as ``live/<name>``; ignored for a trial that was not started here."""
        if (run := self._live.get(trial)) is not None:
            run.log({f"live/{name}": value for name, value in numbers.items()})
            self._touch(run)

    def end(self, trial: str) -> None:
        """Finish the run of a trial that ended without a result."""
        if (run := self._live.pop(trial, None)) is not None:
            self._finish(run)

    @staticmethod
    def _touch(run: Any) -> None:
        """Mark an offline run as being written."""
        place = _place(run)
        if place.name.startswith("offline-run-"):
            (place / LIVE).touch()

    def summarize(self, results: Iterable[TrialResult]) -> None:
        """Log one run with the table of all trials and the best of each curve."""
        lines: list[dict[str, Any]] = []
        trials = charged = 0
        for result in results:
            lines += rows(result)
            trials, charged = trials + 1, charged + result.queries_charged
        if not lines:
            return
        import wandb

        columns = list(dict.fromkeys(name for line in lines for name in line))
        # A W&B table takes one type per column.
        data: list[Iterable[Any]] = [[_cell(line.get(name)) for name in columns] for line in lines]
        run = self._start(f"summary-{self.sweep}", "summary", self._config, group=None)
        try:
            run.log({"trials": wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})
            run.summary.update({"trials": trials, "queries_charged": charged})
        finally:
            self._finish(run)

    def attach(self, files: Iterable[Path]) -> None:
        """Attach the sweep's rendered report, as a page to look at and as an artifact, to a run of its own.

        Args:
            files: ``report.html`` and the files beside it; those that are not there are left out.
        """
        import wandb

        there = [file for file in files if file.is_file()]
        if not there:
            return
        run = self._start(f"report-{self.sweep}", "report", {"command": self.command}, group=None)
        try:
            artifact = wandb.Artifact(f"report-{self.sweep}", type="report", metadata={"sweep": self.sweep})
            for file in there:
                artifact.add_file(str(file), policy="immutable")
            run.log_artifact(artifact)
            pages = {
                file.stem: wandb.Html(file.read_text(encoding="utf-8")) for file in there if file.suffix == ".html"
            }
            run.log(pages, step=0)
        finally:
            self._finish(run)

    def close(self) -> None:
        """Finish the runs of trials that did not end; all others are finished where they were started."""
        for trial in list(self._live):
            self.end(trial)

    def _once(self, name: str, do: Callable[[], None]) -> None:
        """Do something at most once, even across interrupted starts of a sweep."""
        if self._is_logged(name):
            return
        done = self._done(name)
        do()
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text("done\n", encoding="utf-8")
        self._collect(done)

    def _done(self, name: str) -> Path:
        return self.folder / "wandb" / "logged" / name

    def _is_logged(self, name: str) -> bool:
        done = self._done(name)
        # Another node may have logged it into a remote storage.
        return done.exists() or (self.storage is not None and bool(self.storage.pull(self._relative(done))))

    def _relative(self, path: Path) -> str:
        assert self.storage is not None
        return path.relative_to(self.storage.root).as_posix()

    def _collect(self, path: Path) -> None:
        """Copy a file or an offline run to a remote storage, where runs of all nodes meet."""
        if self.storage is not None and path.exists():
            self.storage.push(self._relative(path))

    def _finish(self, run: Any) -> None:
        place = _place(run)
        run.finish()
        (place / LIVE).unlink(missing_ok=True)
        if place.name.startswith("offline-run-"):
            self._collect(place)

    def _start_trial(self, trial: TrialSettings) -> Any:
        groups = groups_of(trial)
        config = {
            **nested(flatten(trial.config)),
            "set": nested(flatten(trial.point)),
            "group": groups,
            "git": {"commit": trial.versions.get("commit", "unknown")},
            "command": self.command,
        }
        return self._start(
            trial.trial,
            "trial",
            config,
            group=groups[self.group],
            tags=[groups["seed"]],
            title=name_of(trial),
        )

    def _log_trial(self, result: TrialResult, models: Mapping[str, Path]) -> None:
        begun = self._live.pop(result.trial, None)
        run = self._start_trial(result) if begun is None else begun
        try:
            if run.summary.get(_LOGGED):  # online, by a start that was killed before it noted so on the disk
                return
            self._log_curves(run, result)
            if self.log_models:
                self._link_models(run, result, models)
            run.summary.update({**self._summary(result), **follow_up(result), _LOGGED: True})
        finally:
            self._finish(run)

    @staticmethod
    def _log_curves(run: Any, result: TrialResult) -> None:
        """Log every point with a step of its own; W&B drops those that a run has already."""
        run.define_metric("queries")
        for name in _CURVES:
            run.define_metric(name, step_metric="queries")
        points: list[dict[str, Any]] = [
            {**rung_metrics(result, rung), "threshold": threshold(result), **innocent_band(result, rung.budget)}
            for rung in result.rungs
        ]
        if chart := _robustness(points):
            points[-1] = {**points[-1], "robustness": chart}
        for name, curve in attack_curves(result).items():
            run.define_metric(name, step_metric="queries")
            points += [{"queries": queries, name: value} for queries, value in curve]
        for step, numbers in enumerate(points):
            run.log(numbers, step=_FIRST_FINAL_STEP + step)

    @staticmethod
    def _summary(result: TrialResult) -> dict[str, Any]:
        report = result.victim_report
        numbers = {
            "victim": result.victim,
            "status": result.status,
            "queries_charged": result.queries_charged,
            "victim_accuracy": report.accuracy,
            "victim_wsr": report.wsr.rate if report.wsr else None,
            "victim_wfpr": report.wfpr_mean,
            "victim_wfpr_classes": report.wfpr_classes.rate if report.wfpr_classes else None,
            **{f"set.{path}": value for path, value in flatten(result.point).items()},
            **owner_saw(result),
        }
        return nested({name: value for name, value in numbers.items() if value is not None})

    def _log_victim(self, result: TrialResult, folder: Path) -> None:
        run = self._start(f"victim-{result.victim}", "victim", {}, group=f"victim-{result.victim}")
        try:
            run.log_artifact(self._victim_artifact(result, folder))
        finally:
            self._finish(run)

    @staticmethod
    def _victim_artifact(result: TrialResult, folder: Path) -> Any:
        import wandb

        artifact = wandb.Artifact(
            f"victim-{result.victim}",
            type="victim",
            metadata={"victim": result.victim, "accuracy": result.victim_report.accuracy},
        )
        # Key and config are the owner's secret: they are not uploaded.
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith(("key.", "config.", ".")):
                artifact.add_file(str(file), policy="immutable")
        return artifact

    def _link_models(self, run: Any, result: TrialResult, models: Mapping[str, Path]) -> None:
        """Log the substitutes; online, the victim is declared as their input.

        Offline there is no server to declare it to: the substitutes name their victim in their metadata.
        """
        import wandb

        if self.mode == "online" and "victim" in models:
            run.use_artifact(self._victim_artifact(result, models["victim"]))
        for rung in result.rungs:
            folder = models.get(f"substitute-{rung.budget}")
            if folder is None or not folder.is_dir():
                continue
            artifact = wandb.Artifact(
                f"substitute-{result.trial}-{rung.budget}",
                type="substitute",
                metadata={
                    "victim": result.victim,
                    "made_from": f"victim-{result.victim}:latest",
                    "trial": result.trial,
                    **rung_metrics(result, rung),
                },
            )
            for file in sorted(folder.iterdir()):
                if file.is_file() and not file.name.startswith("."):
                    artifact.add_file(str(file), policy="immutable")
            run.log_artifact(artifact)

    def _start(
        self,
        name: str,
        job_type: str,
        config: Mapping[str, Any],
        group: str | None,
        tags: Iterable[str] = (),
        title: str = "",
    ) -> Any:
        """Start or resume a run: quiet, within a time limit, and offline if online fails."""
        import wandb

        home = self.folder / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        # Read by wandb when it writes caches and artifacts, which settings of a run do not reach.
        for variable, place in (
            ("WANDB_CACHE_DIR", "cache"),
            ("WANDB_DATA_DIR", "data"),
            ("WANDB_CONFIG_DIR", "config"),
        ):
            os.environ.setdefault(variable, str(home / place))
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = wandb.Settings(
            console="off",
            silent=True,
            init_timeout=_INIT_TIMEOUT_S,
            login_timeout=_INIT_TIMEOUT_S,
            x_disable_stats=True,
            x_disable_meta=True,
            save_code=False,
            disable_git=True,
        )
        identity = run_id(self.sweep, name)
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "id": identity,
            "name": title or name,
            "group": group,
            "job_type": job_type,
            "config": dict(config),
            "tags": [self.sweep[:64], *(tag[:64] for tag in tags)],
            "dir": str(self.folder),
            "reinit": "create_new",
            "settings": settings,
        }
        with self._own_environment():
            if self.mode == "online":
                time.sleep(max(0.0, self._next - time.monotonic()))
                self._next = time.monotonic() + self._pause_s
                try:
                    _require_key()
                    return wandb.init(mode="online", resume="allow", **arguments)
                except Exception as error:  # no account, no network, a refused key: all mean the same here
                    reason = " ".join(str(error).split())[:200]
                    self.mode = "offline"
                    self.warn(
                        f"W&B cannot be reached ({type(error).__name__}: {reason}); runs are stored offline in {home}, "
                        f"send them later with `mea-ray sync {self.folder}`"
                    )
            for path in home.glob(f"offline-run-*-{identity}"):  # a start that was interrupted, or an older summary
                if not any(path.glob("*.synced")):
                    shutil.rmtree(path, ignore_errors=True)
            return wandb.init(mode="offline", **arguments)

    @contextmanager
    def _own_environment(self) -> Iterator[None]:
        """Hide environment variables that would redirect our run; warn about them once, by name."""
        hidden = {name: os.environ.pop(name) for name in IGNORED_VARIABLES if name in os.environ}
        if hidden and not self._warned:
            self._warned = True
            self.warn(
                f"{', '.join(hidden)} {'is' if len(hidden) == 1 else 'are'} ignored: every trial has a W&B run of its "
                "own; use tracking.project, tracking.group and tracking.wandb"
            )
        try:
            yield
        finally:
            os.environ.update(hidden)


def _place(run: Any) -> Path:
    """Return the folder of a run; its ``dir`` is ``<folder>/files``."""
    return Path(str(getattr(run, "dir", ""))).parent


def _robustness(points: list[dict[str, Any]]) -> Any:
    """Return the chart of WSR over queries with the threshold and the band of innocent models; None without WSR."""
    known = [point for point in points if "wsr" in point]
    if not known:
        return None
    import wandb

    names = ["wsr", "threshold", *(name for name in ("null_low", "null_high") if all(name in each for each in known))]
    return wandb.plot.line_series(
        xs=[point["queries"] for point in known],
        ys=[[point[name] for point in known] for name in names],
        keys=names,
        title="WSR, threshold, and the range of innocent models",
        xname="queries",
    )


def run_id(sweep: str, name: str) -> str:
    """Return the id of the W&B run of a trial, a victim or a summary; the same for the same names."""
    return hashlib.sha256(f"{sweep}/{name}".encode()).hexdigest()[:16]


def _require_key() -> None:
    """Reject online mode without an account: wandb would prompt for one in the terminal, and wait."""
    if not (os.environ.get("WANDB_API_KEY") or _saved_key()):
        raise PermissionError("no account: run `wandb login`, or set WANDB_API_KEY")


def _saved_key() -> bool:
    """Whether the netrc file has a key for the server from `wandb login`."""
    server = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        return server in netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _cell(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
