"""Whole experiments and sweeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mea_ray.api import progress as bars
from mea_ray.api.settings import experiment
from mea_ray.config import ExperimentConfig, SweepConfig, build, load_sweep
from mea_ray.results.records import TrialResult, read_results

if TYPE_CHECKING:
    from pandas import DataFrame
    from ray.tune import ResultGrid


@dataclass(frozen=True)
class Results:
    """The results of a sweep.

    Attributes:
        folder: Folder of the sweep.
        failed: Failed trials, with the reason.
        grid: Ray Tune's result grid of the trials that this call ran; None if it ran none.
    """

    folder: Path
    failed: Mapping[str, str] = field(default_factory=dict)
    grid: ResultGrid | None = None

    @property
    def trials(self) -> list[TrialResult]:
        """The finished trials."""
        return read_results(self.folder)

    @property
    def frame(self) -> DataFrame:
        """One row for each measured model, as returned by ``load_results``."""
        from mea_ray.results.frames import load_results

        return load_results(self.folder)


def run(
    config: ExperimentConfig | str | Path | Mapping[str, Any] | None = None,
    *,
    name: str = "experiment",
    progress: bool = True,
) -> TrialResult:
    """Run one experiment in this process; an interrupted one continues where it stopped.

    Args:
        config: The experiment, a YAML file, or a mapping of what differs from the defaults.
        name: Name of its folder in the storage.
        progress: Show a bar.

    Raises:
        ConfigError: The experiment cannot be run; nothing was trained.
        DataError: Its data cannot be read.
    """
    from mea_ray.experiment.local import run_local

    with bars.bar(progress) as update:
        return run_local(experiment(config), name, on_epoch=bars.epochs(update)).result


def run_sweep(
    config: SweepConfig | str | Path | Mapping[str, Any],
    *,
    resume: bool = False,
    address: str | None = None,
    on_event: Callable[[Any], None] | None = None,
    progress: bool = True,
) -> Results:
    """Run a sweep on Ray.

    Args:
        config: The sweep, a YAML file, or a mapping.
        resume: Continue an earlier run.
        address: Ray cluster, ``host:port`` or ``auto``; None starts one on this machine.
        on_event: Called with each event of the sweep.
        progress: Show a bar, unless ``on_event`` is given.

    Raises:
        ConfigError: The sweep cannot be run; nothing was started.
    """
    from mea_ray.sweep import runner

    if isinstance(config, Mapping):
        config = build(SweepConfig, config)
    elif not isinstance(config, SweepConfig):
        config = load_sweep(config)
    with bars.bar(progress and on_event is None) as update:
        listener = bars.events(update) if on_event is None else on_event
        outcome = runner.run_sweep(config, resume=resume, address=address, on_event=listener)
    return Results(Path(outcome.folder), dict(outcome.failed), outcome.grid)
