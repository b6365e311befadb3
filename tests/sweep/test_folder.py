"""A sweep writes to its own folder only; one that is refused takes nothing away that it did not bring."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_results import trial

from mea_ray.config import RESERVED_NAMES, SweepConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.results.portable import portable_point
from mea_ray.sweep.folder import PARTS, SweepFolder, read_result
from mea_ray.sweep.plan import plan

HOSTILE = [".", "..", "../x", "a/b", "/etc", "", "-x", "_x", ".git", "...", "artifacts", "Local", "calibration", "a\\b"]
HOSTILE += ["a\n", "a\0", "~", "$HOME", "*", "a" * 101, "x/../../y", "é", " a", "a "]
NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(alphabet="./\\~-_aA0 \0\n", max_size=12),
    st.text(max_size=12),
    st.text(alphabet=string.ascii_letters + string.digits + "._-", min_size=1, max_size=20),
)


def sweep(storage: Path, name: str) -> SweepConfig:
    return build(SweepConfig, {"name": name, "base": {"storage": str(storage)}})


def contents(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def populate(root: Path) -> Path:
    """A storage among a user's own files; `data` is such a folder, `begun` a sweep from before."""
    storage = root / "storage"
    for file in ("artifacts/victims/abc/model.safetensors", "local/run/result.json", "data/a/0.png", "notes.txt"):
        (storage / file).parent.mkdir(parents=True, exist_ok=True)
        (storage / file).write_text("mine")
    (root / "beside.txt").write_text("mine, too")
    return storage


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_elsewhere_or_are_taken_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name="):
        sweep(tmp_path, name)


@given(name=NAMES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_refused_start_leaves_everything_as_it_was(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("names")
    storage = populate(root)
    before = contents(root)
    try:
        config = sweep(storage, name)
    except ConfigError:
        assert contents(root) == before
        return
    folder = SweepFolder(str(storage), name)
    try:
        folder.open(config, plan(config), resume=False)
    except ConfigError:
        assert contents(root) == before
        return
    added = set(contents(root)) - set(before)
    assert added
    assert all(Path(path).parts[:2] == ("storage", name) for path in added), "written outside the sweep's own folder"
    folder.discard_if_unused()
    assert contents(root) == before


def test_a_user_s_folder_of_the_same_name_is_refused(tmp_path: Path) -> None:
    storage = populate(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="not the folder of a sweep.*it holds a.*another name"):
        SweepFolder(str(storage), "data").open(sweep(storage, "data"), plan(sweep(storage, "data")), resume=False)
    assert contents(tmp_path) == before


def test_what_others_put_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    config = sweep(tmp_path, "mine")
    folder = SweepFolder(str(tmp_path), "mine")
    folder.open(config, plan(config), resume=False)
    (tmp_path / "mine" / "note.txt").write_text("a user's")
    (tmp_path / "mine" / "ledgers" / "0.journal").write_text("charged")
    folder.discard_if_unused()
    assert set(contents(tmp_path / "mine")) == {"note.txt", "ledgers", "ledgers/0.journal"}


@pytest.mark.parametrize("part", ["trials", "results"])
def test_a_sweep_with_a_trial_is_never_removed(tmp_path: Path, part: str) -> None:
    config = sweep(tmp_path, "mine")
    folder = SweepFolder(str(tmp_path), "mine")
    folder.open(config, plan(config), resume=False)
    (tmp_path / "mine" / part / "t.json").write_text("{}")
    folder.discard_if_unused()
    assert (tmp_path / "mine" / "plan.json").exists()


def test_a_process_that_did_not_open_the_sweep_removes_nothing(tmp_path: Path) -> None:
    config = sweep(tmp_path, "mine")
    SweepFolder(str(tmp_path), "mine").open(config, plan(config), resume=False)
    SweepFolder(str(tmp_path), "mine").discard_if_unused()
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {*PARTS, "plan.json", "sweep.yaml"}


def test_the_reserved_names_are_those_that_the_product_uses() -> None:
    assert {"artifacts", "calibration", "local"} <= RESERVED_NAMES


def test_a_result_is_known_by_what_the_sweep_set_though_it_names_no_folder(tmp_path: Path) -> None:
    point = {"data.path": "/home/ann/v1/set", "seed": 1}
    written = trial("t").model_copy(update={"point": portable_point(point)})
    written.save(tmp_path / "t.json")
    assert read_result(tmp_path / "t.json", {"t": point}) == written
    other = {**point, "data.path": "/home/ann/v2/set"}
    assert read_result(tmp_path / "t.json", {"t": other}) is None, "a copy of another trial's file"
    trial("t").model_copy(update={"point": point}).save(tmp_path / "t.json")
    assert read_result(tmp_path / "t.json", {"t": point}) is not None, "of a version that wrote folders down"
