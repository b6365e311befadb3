"""What the service tells customers of a victim, from either kind of folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from http_service import SHAPE, save_victim

from mea_ray.core.errors import ArtifactError
from mea_ray.experiment.answers import owners_part
from mea_ray.service.http.engine import about_victim


def test_an_artifact_has_a_name_and_numbers_for_classes(tmp_path: Path) -> None:
    about = about_victim(save_victim(tmp_path / "2d1278fe"))
    assert (about.name, about.shape, about.class_names) == ("2d1278fe", SHAPE, tuple(map(str, range(10))))


def test_a_victim_of_mea_ray_train_has_names_for_its_classes(tmp_path: Path) -> None:
    folder = save_victim(tmp_path / "flowers")
    names = [f"flower {index}" for index in range(10)]
    (folder / "victim.json").write_text(json.dumps({"name": "roses", "class_names": names, "more": 1}))
    assert (about_victim(folder).name, about_victim(folder).class_names) == ("roses", tuple(names))
    for damaged in ("{", "[]", json.dumps({"name": "roses"}), json.dumps({"name": "x", "class_names": ["one"]})):
        (folder / "victim.json").write_text(damaged)
        with pytest.raises(ArtifactError, match=r"victim\.json"):
            about_victim(folder)


def test_the_owners_part_is_found_in_both(tmp_path: Path) -> None:
    assert owners_part(tmp_path) == tmp_path
    (tmp_path / "owner").mkdir()
    assert owners_part(tmp_path) == tmp_path / "owner"
