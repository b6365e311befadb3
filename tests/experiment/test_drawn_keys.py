"""A key that the system draws: once, before the victim is trained, and the same after every mishap."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY

from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ArtifactError
from mea_ray.core.seeding import derive, secret_bytes, system_seed
from mea_ray.experiment.artifacts import Store
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.local import run_in_memory, run_local
from mea_ray.experiment.model_sources import StoredModels
from mea_ray.experiment.names import Names
from mea_ray.verification.evidence import committed_before, evidence
from mea_ray.watermarks.base import Key


def config(storage: Path, **more: Any) -> ExperimentConfig:
    tree = {
        "storage": str(storage),
        "data": {"name": "digits", "image_size": 12},
        "victim": {
            "model": TINY,
            "training": {"epochs": 1},
            "watermark": {"name": "composite", "key": {"classes": "system"}},
        },
        "thief": {"model": TINY, "budgets": [16], "training": {"epochs": 1}},
        "verification": {"samples": 30, "stolen_null_models": 1, **more},
    }
    return build(ExperimentConfig, tree)


def test_the_key_outlives_a_victim_that_is_trained_again(tmp_path: Path) -> None:
    settings = config(tmp_path)
    data = load_splits(settings)
    check(settings, data)
    names = Names.of(settings, Fingerprints.of(data, settings))

    def victim() -> tuple[Path, Key | None]:
        models = StoredModels(Store(str(tmp_path)), settings, data, names)
        return models.victim_folder(), models.victim()[1]

    folder, key = victim()
    assert key is not None and key.drawn and key.draw["classes"] == "system"
    weights = (folder / "model.safetensors").read_bytes()
    remaining = tmp_path / "keys" / names.victim / "key.json"
    assert stat.S_IMODE(remaining.stat().st_mode) == 0o600 and stat.S_IMODE(remaining.parent.stat().st_mode) == 0o700
    shutil.rmtree(folder)
    again, same = victim()
    assert same is not None and same.digest() == key.digest()
    assert again == folder and (folder / "model.safetensors").read_bytes() == weights
    # In another storage another key is drawn, under the same name.
    drawn = set()
    for place in range(6):
        other = StoredModels(Store(str(tmp_path / str(place))), config(tmp_path / str(place)), data, names)
        result = other._drawn_key()
        assert result is not None
        drawn.add((result.source_classes, result.target_class))
    assert len(drawn) > 1


def test_a_result_says_how_its_key_was_drawn_and_what_was_measured(tmp_path: Path) -> None:
    result = run_local(config(tmp_path, commitment="required")).result
    assert result.key_drawn and result.key is not None and result.date
    assert (result.key.classes, result.key.admissible, result.key.committed_at) == ("system", 720, None)
    assert result.victim_sha256 and result.rungs[0].weights_sha256
    extracted = evidence(result, result.rungs[0].report, 16)
    assert (
        extracted is not None
        and extracted.key_drawn
        and extracted.key_p_value is not None
        and extracted.committed is False
    )
    stamped = result.key.model_copy(update={"committed_at": "2020-01-01T00:00:00+00:00"})
    assert committed_before(result.model_copy(update={"key": stamped}))
    later = result.key.model_copy(update={"committed_at": "2999-01-01T00:00:00+00:00"})
    assert not committed_before(result.model_copy(update={"key": later}))


def test_two_keys_are_verified_together(tmp_path: Path) -> None:
    settings = config(tmp_path)
    several = {"name": "several_keys", "of": {"name": "composite", "key": {"classes": "seed"}}}
    settings = build(ExperimentConfig, settings.over({"victim": {"watermark": several}}))
    result = run_local(settings).result
    assert result.key_drawn and result.key is not None and result.key.admissible == 720**2
    report = result.rungs[0].report
    assert {name: rank.references for name, rank in report.key_ranks.items()} == {
        **dict.fromkeys(("lean", "lean_labels"), 360**2 - 1),
        **dict.fromkeys(("log_probability", "wsr"), 720**2 - 1),
    }
    assert report.wsr is not None and report.wsr.trials == 60 and report.null_ranks["lean"].references == 1


def secrets_of(key: Key) -> list[bytes]:
    """The secret parts of a key as they might be written somewhere: its seed in text, its tensors in bytes and text."""
    raw = [tensor.tobytes() for tensor in key.tensors.values()]
    return [str(key.seed).encode(), *raw, *(each.hex().encode() for each in raw)]


def test_nothing_but_files_of_mode_600_gives_the_key_away(tmp_path: Path) -> None:
    changes = {"victim": {"watermark": {"name": "dawn", "rate": 0.3}}, "thief": {"budgets": [64]}}
    settings = build(ExperimentConfig, config(tmp_path).over(changes))
    result = run_local(settings).result
    key = Key.load(tmp_path / "keys" / result.victim)
    assert key.seed_from == "system" and result.key is not None and result.key.seed_from == "system"
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        if path.name in {"key.json", "key.safetensors"}:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
            continue
        content = path.read_bytes()
        assert not any(secret in content for secret in secrets_of(key)), path
    # Whoever has the config draws another one.
    data = load_splits(settings)
    rebuilt = settings.victim.watermark.build().make_key(data.victim_train, derive(settings.victim.seed, "key"))
    assert rebuilt is not None and rebuilt.seed != key.seed
    assert not any(secret in secrets_of(key) for secret in secrets_of(rebuilt))


def test_a_key_from_the_seed_says_so_and_comes_again(tmp_path: Path) -> None:
    settings = build(ExperimentConfig, config(tmp_path / "a").over({"victim": {"insecure_key_from_seed": True}}))
    settings = build(ExperimentConfig, settings.over({"victim": {"watermark": {"name": "composite"}}}))
    first, second = run_in_memory(settings), run_in_memory(settings)
    assert first.key is not None and second.key is not None and first.key.seed_from == "config"
    assert first.key.fingerprint == second.key.fingerprint and first.rungs[0].report == second.rungs[0].report


def test_a_trial_does_not_go_on_with_the_answers_of_a_victim_with_another_key(tmp_path: Path) -> None:
    settings = config(tmp_path)
    names = run_local(settings).result
    (folder,) = tmp_path.glob("local/*")
    shutil.rmtree(folder / "results")
    shutil.rmtree(tmp_path / "keys")
    shutil.rmtree(tmp_path / "artifacts" / "victims")
    with pytest.raises(ArtifactError, match=f"restore keys/{names.victim}.*or delete the trial's folder"):
        run_local(settings)


def test_all_bits_of_a_systems_seed_count() -> None:
    assert len({system_seed() for _ in range(100)}) == 100
    assert all(system_seed().bit_length() == 256 for _ in range(100))
    one = system_seed()
    others = [one ^ 1 << bit for bit in range(255)]
    assert len({secret_bytes(seed, 32, "secret") for seed in [one, *others]}) == 256
