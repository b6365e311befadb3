"""Plans on the command line without the measured steps, which `tests/sweep/test_estimate.py` looks at."""

from __future__ import annotations

import pytest

from mea_ray.sweep import estimate


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "PATIENCE_S", -1.0)
