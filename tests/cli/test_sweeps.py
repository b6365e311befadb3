from __future__ import annotations

from pathlib import Path

import pytest

from mea_ray.cli import sweeps
from mea_ray.cli.main import main
from mea_ray.cli.options import OK, USAGE
from mea_ray.core.errors import ConfigError


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sweeps.find(Path("quickstart")) == sweeps.shipped() / "quickstart.yaml"
    Path("quickstart").mkdir()
    assert sweeps.find(Path("quickstart")) == sweeps.shipped() / "quickstart.yaml"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("name: mine\n")
    assert sweeps.find(Path("quickstart")) == Path("quickstart")


NEED_A_FOLDER = {"paper_ytf"}
"""Sweeps of data that nobody may pass on."""


def test_an_unknown_name_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstrat"]) == USAGE
    output = " ".join(capsys.readouterr().err.split())
    assert "there is no file quickstrat" in output and "did you mean 'quickstart'?" in output and "budgets" in output


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("mine/experimen.yaml", "did you mean 'mine/experiment.yaml'?"),
        ("nowhere/experiment.yaml", "there is no file nowhere/experiment.yaml; check the path"),
        ("sweeps/quickstart.yaml", "quickstart comes with mea_ray: leave out folder and suffix"),
    ],
)
def test_a_mistyped_path_is_answered_with_a_file_that_is_there(
    typed: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/experiment.yaml").write_text("data: digits\n")
    with pytest.raises(ConfigError) as refused:
        sweeps.find(Path(typed))
    assert says in str(refused.value) and "Known" not in str(refused.value)


def test_a_folder_is_not_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", str(tmp_path)]) == USAGE
    assert "is a folder" in " ".join(capsys.readouterr().err.split())


def test_without_the_link_the_sweeps_of_the_checkout_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "mea_ray").mkdir()
    (tmp_path / "mea_ray" / "sweeps").write_text("../sweeps")  # a link, as git writes it where there are none
    monkeypatch.setattr(sweeps, "PACKAGE", tmp_path / "mea_ray")
    assert sweeps.names() == ["mine"]


@pytest.mark.parametrize("name", sweeps.names())
def test_every_sweep_says_what_it_shows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweeps.description(name).endswith(".") and len(sweeps.description(name)) > 30
    if name in NEED_A_FOLDER:
        assert main(["plan", name]) == USAGE and "data.path is empty; give the folder" in capsys.readouterr().err
        return
    assert main(["plan", name]) == OK
