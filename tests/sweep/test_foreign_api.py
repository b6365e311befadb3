"""A sweep whose thieves steal through somebody else's API, from the processes of Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign_service import ForeignService
from tiny import tiny_sweep

from mea_ray.config import SweepConfig, build, merge
from mea_ray.core.errors import ConfigError
from mea_ray.models.build import build_model
from mea_ray.service.http import admin
from mea_ray.sweep.loading import load_here
from mea_ray.sweep.plan import draft
from mea_ray.sweep.runner import run_sweep

pytestmark = pytest.mark.slow


def test_a_sweep_steals_through_a_foreign_api(ray_session: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    service = ForeignService(build_model("vgg_like", (1, 8, 8), 10, {"width": 0.0625}), top=3)
    (tmp_path / "key").write_text("secret")
    with admin.served(service.app, 0) as url:
        blackbox = {
            "url": url,
            "key": f"file:{tmp_path / 'key'}",
            "api": str(service.describe(tmp_path, 8)),
        }
        changes = {
            "base.data.image_size": 8,
            "base.thief.blackbox": blackbox,
            "base.verification.stolen_null_models": 0,
            "base.removal.methods": [],
            "base.detection.methods": [],
            "space": {"seed": {"grid": [0, 1]}},
        }
        sweep = build(SweepConfig, merge(tiny_sweep(tmp_path / "storage").resolved(), changes))
        with pytest.raises(ConfigError, match=r"takes images of shape \[1, 8, 8\], the data have \[1, 12, 12\]"):
            load_here(draft(build(SweepConfig, merge(sweep.resolved(), {"base.data.image_size": 12}))))  # as plan does
        outcome = run_sweep(sweep)
    assert not outcome.failed and len(outcome.results) == 2
    assert [result.queries_charged for result in outcome.results] == [96, 96]
    assert [[rung.queries for rung in result.rungs] for result in outcome.results] == [[48, 96]] * 2
    assert service.asked == 2 * 96, "every image was asked once"
