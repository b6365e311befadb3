"""The recipe for an attack in the documentation, taken from the page as it is, steals a model within its budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_blocks import ROOT, blocks

from mea_ray.attacks import ATTACKS
from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.cli.main import main
from mea_ray.cli.options import OK
from mea_ray.core.types import Answers

PAGE = ROOT / "docs" / "writing_a_component.md"
SMALL = [
    "data.image_size=8",
    "victim.watermark=none",
    "victim.model.width=0.0625",
    "victim.training.epochs=1",
    "thief.model.width=0.0625",
    "thief.training.epochs=1",
    "thief.budgets=[60, 130]",
    "thief.attack=attacks:Shifted",
    "thief.attack.share=0.5",
    "verification.samples=40",
    "storage=kept",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files of the page."""
    for block in blocks(PAGE):
        if block.title in {"attacks.py", "mine.yaml"}:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("attacks", None)
    ATTACKS._foreign.pop("attacks:Shifted", None)
    ATTACKS._schemas.pop("attacks:Shifted", None)


def test_the_recipe_steals_a_model_within_its_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query, sent = LocalBlackBox.query, []

    def watched(self: LocalBlackBox, images: Any) -> Answers:
        sent.append(images)
        return query(self, images)

    monkeypatch.setattr(LocalBlackBox, "query", watched)
    assert main(["run", "mine.yaml", "--local", *SMALL]) == OK
    (path,) = (folder / "kept" / "local").glob("*/results/*.json")
    result = json.loads(path.read_text())
    assert [(rung["budget"], rung["queries"]) for rung in result["rungs"]] == [(60, 60), (130, 130)]
    # The owner, too, looks at what the answers of victim and innocent model give away; nobody is charged for that.
    looks, sent = [each for each in sent if len(each) == 1000], [each for each in sent if len(each) != 1000]
    assert len(looks) == 2
    assert result["queries_charged"] == 130 and sum(map(len, sent)) == 130
    assert result["config"]["thief"]["attack"] == {"name": "attacks:Shifted", "share": 0.5}
    # Fifty images of the pool, then half of them again, a pixel to the right, cut by the budgets.
    assert [len(images) for images in sent] == [50, 10, 15, 50, 5]
    (transfer,) = (folder / "kept" / "local").glob("*/trials/*/transfer")
    names = TransferSet(transfer).indices
    assert (names[:50] >= 0).all() and (names[50:75] < 0).all() and (names[75:125] >= 0).all()
    shifted = np.roll(np.concatenate(sent[1:3]), -1, axis=3)
    assert {image.tobytes() for image in shifted} <= {image.tobytes() for image in sent[0]}
    assert len({image.tobytes() for image in shifted}) == 25
