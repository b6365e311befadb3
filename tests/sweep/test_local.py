"""One experiment in one process and on Ray: the same names, the same results, the same artifacts."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_sweep, without_durations

from mea_ray.config import SweepConfig, build, merge
from mea_ray.experiment.local import run_local
from mea_ray.report import html
from mea_ray.sweep.runner import run_sweep

DAWN = {
    "base.victim.watermark": {"name": "dawn", "rate": 0.3},
    "base.removal.methods": ["quantisation"],
    "base.service.policy": "label_only",
}


def one(storage: Path, changes: dict[str, Any]) -> SweepConfig:
    """A sweep of one trial, whose two accounts are not slowed down."""
    tree = tiny_sweep(storage, accounts=2, space={}).resolved()
    return build(SweepConfig, merge(tree, {"base.service.rate": None, **changes}))


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """Content of files below a folder."""
    result = sorted(path for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in result}


@pytest.mark.parametrize("changes", [{}, pytest.param(DAWN, marks=pytest.mark.slow)], ids=["mea_defender", "dawn"])
def test_local_and_ray_give_the_same(tmp_path: Path, ray_session: None, changes: dict[str, Any]) -> None:
    sweep = one(tmp_path / "ray", changes)
    (on_ray,) = run_sweep(sweep).results
    here = run_local(one(tmp_path / "local", changes).base, "s")

    plain = [without_durations(json.loads(each.model_dump_json())) for each in (here.result, on_ray)]
    assert "storage" not in plain[0]["config"]
    assert plain[0] == plain[1]
    assert set(here.result.query_log) == {f"{on_ray.trial}-1", f"{on_ray.trial}-2"}

    # The victim with its key, the null model, the answers and the substitutes: file by file.
    for pattern in ("victims/*/key.*", "*/*/model.*"):
        result = digests(tmp_path / "local" / "artifacts", pattern)
        assert result and result == digests(tmp_path / "ray" / "artifacts", pattern)
    for pattern in ("trials/*/transfer/*", "trials/*/substitutes/*/*"):
        result = digests(here.folder, pattern)
        assert result and result == digests(tmp_path / "ray" / "s", pattern)
    names = {str(path.relative_to(here.folder)) for path in here.folder.glob("trials/*/**/*.json")}
    assert names == {
        str(path.relative_to(tmp_path / "ray" / "s"))
        for path in (tmp_path / "ray" / "s").glob("trials/*/**/*.json")
        if path.name != "point.json"
    }
    # The report shows samples of the victim's key, which a local run keeps, too.
    pages = [
        html.write(folder, storage=tmp_path / kind)
        for folder, kind in ((here.folder, "local"), (tmp_path / "ray/s", "ray"))
    ]
    pictures = [re.findall(r"data:image/png;base64,[^\"]+", page.read_text(encoding="utf-8")) for page in pages]
    assert pictures[0] == pictures[1] and (changes or pictures[0])
