"""A thief that steals through HTTP gets what it gets from memory, goes on where it was, and is refused in words."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_service import InProcess
from tiny import TINY

from mea_ray.cli.main import main
from mea_ray.config import BlackBoxConfig, ExperimentConfig, build, merge, write_yaml, yaml_text
from mea_ray.core.errors import ConfigError, OverBudget, ServiceUnavailable
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_local
from mea_ray.experiment.remote_service import read_keys
from mea_ray.experiment.steal import steal
from mea_ray.service.http import admin


def experiment(storage: Path, **changes: Any) -> ExperimentConfig:
    tree = {
        "storage": str(storage),
        "victim": {"insecure_key_from_seed": True, "model": TINY, "training": {"epochs": 1}},
        "thief": {"model": TINY, "training": {"epochs": 1}, "budgets": [48, 96]},
        "verification": {"samples": 50},
        "service": {"request_images": 16},
        "tracking": {"wandb": "disabled"},
    }
    return build(ExperimentConfig, merge(tree, {key.replace("__", "."): value for key, value in changes.items()}))


def substitutes(folder: Path) -> dict[str, str]:
    result = sorted(folder.glob("**/substitutes/*/model.safetensors"))
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in result}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The victim's folder, and the substitutes of a thief in its process."""
    storage = tmp_path_factory.mktemp("memory")
    done = run_local(experiment(storage))
    (victim,) = (storage / "artifacts" / "victims").iterdir()
    return victim, substitutes(done.folder)


@pytest.fixture
def served(
    in_memory: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[InProcess, str]]:
    """The service of the victim over a socket of this machine; the thief's key is in MEA_RAY_KEY."""
    service = InProcess(in_memory[0], tmp_path / "service")
    monkeypatch.setenv("MEA_RAY_KEY", service.keys.add("thief", budget=96))
    with admin.served(service.app, 0) as url:
        yield service, url


def test_memory_and_http_give_the_same_substitutes(
    served: tuple[InProcess, str], in_memory: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    service, url = served
    config = experiment(tmp_path / "http", thief__blackbox={"url": url, "key": "env:MEA_RAY_KEY"})
    done = run_local(config)
    assert substitutes(done.folder) == in_memory[1] and len(in_memory[1]) == 2
    assert done.result.queries_charged == service.charged("thief") == 96
    secret = os.environ["MEA_RAY_KEY"]
    assert not any(secret in path.read_text() for path in done.folder.rglob("*") if path.suffix in {".yaml", ".json"})


def test_steal_needs_no_victim_and_goes_on_where_it_was(
    served: tuple[InProcess, str],
    in_memory: tuple[Path, dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    service, url = served
    write_yaml(experiment(tmp_path / "thief"), tmp_path / "theft.yaml")
    command = ["steal", str(tmp_path / "theft.yaml"), "--url", url, "--key", "env:MEA_RAY_KEY"]
    assert main(command) == 0
    folder = tmp_path / "thief" / "stolen" / "theft"
    assert substitutes(folder) == in_memory[1]
    assert not (tmp_path / "thief" / "artifacts").exists(), "a victim was trained"
    assert "accuracy on the thief's test images" in capsys.readouterr().out
    (folder / "rungs" / "96.json").unlink()
    (folder / "substitutes" / "96" / "model.safetensors").unlink()
    assert main(command) == 0
    assert substitutes(folder) == in_memory[1] and service.charged("thief") == 96
    assert main([*command, "seed=3"]) == 2
    assert "holds another theft" in " ".join(capsys.readouterr().err.split())


def test_a_budget_that_ends_early_keeps_what_was_answered(served: tuple[InProcess, str], tmp_path: Path) -> None:
    service, url = served
    blackbox = {"url": url, "key": "env:MEA_RAY_KEY"}
    config = experiment(tmp_path / "thief", thief__blackbox=blackbox, thief__budgets=[48, 200])
    with pytest.raises(OverBudget):
        steal(config, tmp_path / "stolen")
    assert substitutes(tmp_path / "stolen").keys() <= {"48"}
    service.keys.limit("thief", budget=200)
    assert [rung.budget for rung in steal(config, tmp_path / "stolen")] == [48, 200]
    assert service.charged("thief") == 200


def test_what_does_not_fit_is_refused_before_the_first_query(served: tuple[InProcess, str], tmp_path: Path) -> None:
    service, url = served
    blackbox = {"url": url, "key": "env:MEA_RAY_KEY"}
    with pytest.raises(ConfigError, match=r"the data have \[1, 12, 12\]"):
        steal(experiment(tmp_path, thief__blackbox=blackbox, data__image_size=12), tmp_path / "stolen")
    assert service.charged("thief") == 0
    gone = {"url": "http://127.0.0.1:1", "key": "env:MEA_RAY_KEY"}
    with pytest.raises(ServiceUnavailable):
        steal(experiment(tmp_path, thief__blackbox=gone, service__retries=0), tmp_path / "stolen")
    assert not (tmp_path / "stolen" / "theft.txt").exists(), "the folder is free for another theft"


@pytest.mark.parametrize("key", ["mea_secret", "env:", "file:", "http:x"])
def test_a_key_in_the_config_is_refused_and_not_shown(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="write env:NAME or file:PATH") as caught:
        experiment(tmp_path, thief__blackbox={"url": "http://x", "key": key})
    assert "mea_secret" not in str(caught.value)


def test_where_a_key_is_read_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("abc\n")
    monkeypatch.setenv("ANOTHER", "def")
    monkeypatch.delenv("MISSING", raising=False)
    both = BlackBoxConfig(url="http://x", key=(f"file:{tmp_path / 'key'}", "env:ANOTHER"))
    assert read_keys(both, 2) == ["abc", "def"]
    assert read_keys(BlackBoxConfig(url="http://x"), 1) == [None]
    with pytest.raises(ConfigError, match="thief.accounts=3 needs as many keys"):
        read_keys(both, 3)
    with pytest.raises(ConfigError, match="the environment variable MISSING contains no key"):
        read_keys(BlackBoxConfig(url="http://x", key=("env:MISSING",)), 1)
    (tmp_path / "key").write_bytes("abc\r\n".encode("utf-8-sig"))  # as an editor of Windows writes it
    assert read_keys(BlackBoxConfig(url="http://x", key=(f"file:{tmp_path / 'key'}",)), 1) == ["abc"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/dev/zero", "cannot be read: it has more than 65,536 bytes; check the path"),
        ("/dev/null", "contains no key; put the API key there"),
        ("/", "cannot be read: Is a directory; check the path"),
        ("/nowhere", "cannot be read: No such file or directory; check the path"),
    ],
)
def test_a_file_that_is_no_key_is_refused_and_not_read_without_end(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"the file {name} {problem}"):
        read_keys(BlackBoxConfig(url="http://x", key=(f"file:{name}",)), 1)


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ([1, 8, 8], 10, r"http://x takes images of shape \[1, 8, 8\], the data have \[1, 12, 12\]"),
        ([1, 12, 12], 3, "http://x answers 3 numbers per image, the experiment's victim has 10"),
    ],
)
def test_an_api_that_does_not_fit_is_refused_before_anything_is_trained(
    shape: list[int], classes: int, message: str, tmp_path: Path
) -> None:
    described: dict[str, object] = {"image_shape": shape, "classes": [str(label) for label in range(classes)]}
    described |= {"path": "/v1", "encoding": "png_base64", "body": {"inputs": "{images}"}, "rows": "r", "label": "l"}
    (tmp_path / "api.yaml").write_text(yaml_text.dump(described))
    blackbox = {"url": "http://x", "api": str(tmp_path / "api.yaml")}
    made = experiment(tmp_path, data__image_size=12, thief__blackbox=blackbox)
    with pytest.raises(ConfigError, match=message):
        check(made, load_splits(made))
