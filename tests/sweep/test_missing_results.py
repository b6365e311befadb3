"""A sweep is no success without all of its results, whoever removes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_results import trial
from tiny import tiny_sweep

from mea_ray.sweep import runner
from mea_ray.sweep.folder import SweepFolder
from mea_ray.sweep.plan import plan
from mea_ray.sweep.trial import run_trial


@pytest.mark.parametrize("damage", ["none", "removed", "damaged", "copied"])
def test_a_result_that_was_lost_in_mid_sweep_is_a_failed_trial(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(tmp_path)
    folder = SweepFolder(str(tmp_path), sweep.name)
    planned = {each.name: each.point for each in plan(sweep).trials}
    names = list(planned)

    def run(self: Any, left: Any, samples: int) -> None:
        for each in left:
            folder.save_result(trial(each.name).model_copy(update={"point": planned[each.name]}))
            self.finisher.ended.add(each.name)
        victim = folder.result_path(names[1])
        if damage == "removed":
            victim.unlink()
        elif damage == "damaged":
            victim.write_text("{")
        elif damage == "copied":  # and named after the trial whose place it takes
            trial(names[1]).model_copy(update={"point": planned[names[0]]}).save(victim)

    monkeypatch.setattr(runner._Driver, "run", run)
    ray: Any = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "here"))
    start = runner._Start(ray, None, 1, None, False)  # type: ignore[arg-type]
    outcome = runner._run(sweep, plan(sweep), folder, start, None, run_trial, resume=False)
    lost = (
        {}
        if damage == "none"
        else {names[1]: "its result was removed or damaged meanwhile; --resume computes it again"}
    )
    assert outcome.failed == lost
    assert len(outcome.results) == len(names) - len(lost)
