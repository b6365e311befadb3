"""DAWN through Ray: the marks are in the owner's log, whatever becomes of the processes that asked and answered."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tiny import tiny_sweep

from mea_ray.attacks.transfer import TransferSet
from mea_ray.config import SweepConfig, build, merge
from mea_ray.experiment.data import load_splits
from mea_ray.sweep import events
from mea_ray.sweep.runner import run_sweep
from mea_ray.watermarks.base import Key
from mea_ray.watermarks.dawn import KeyedMarker


@pytest.mark.slow
def test_a_killed_trial_is_compared_with_all_marks_of_its_queries(tmp_path: Path, ray_session: None) -> None:
    changes = {
        "base.victim.watermark": {"name": "dawn", "rate": 0.3},
        "base.removal.methods": [],
        "base.service.policy": "label_only",
        "space": {"seed": {"grid": [0, 1]}},
    }
    sweep = build(SweepConfig, merge(tiny_sweep(tmp_path).resolved(), changes))
    pids: dict[str, int] = {}
    killed: list[str] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.TrialStarted):
            pids.setdefault(event.trial, event.pid)
        if isinstance(event, events.Queried) and not killed:
            killed.append(event.trial)
            os.kill(pids[event.trial], signal.SIGKILL)

    outcome = run_sweep(sweep, on_event=listen)

    assert len(killed) == 1 and len(outcome.results) == 2 and not outcome.failed
    pool = load_splits(sweep.base).thief_pool.images
    (folder,) = (tmp_path / "artifacts" / "victims").iterdir()
    marker = KeyedMarker(Key.load(folder))
    for result in outcome.results:
        transfer = TransferSet(outcome.folder / "trials" / result.trial / "transfer")
        # The thief's own answers say what the owner must have noted: each image's fate follows from the key alone.
        _, marked = marker.mark(transfer.answers, pool[transfer.indices])
        (log,) = result.query_log.values()
        assert log.images == 96 and log.marked == marked.sum() > 10
        for rung in result.rungs:
            assert rung.report.wsr is not None and rung.report.p_value is not None
            assert rung.report.wsr.trials == marked[: rung.budget].sum()
        innocent = (*result.null_reports, result.stolen_nulls[-1].report)
        assert [report.wsr.trials for report in innocent if report.wsr] == 2 * [log.marked]
        assert result.victim_report.wsr is not None and result.victim_report.wsr.rate == 1.0
        assert "detected" in result.detections[0].numbers
