"""DAWN: which answers are wrong follows from the key and the image alone, and the log is all that a proof needs."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.attacks.transfer import TransferSet
from mea_ray.blackbox import POLICIES
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.marking import MarkingPolicy
from mea_ray.blackbox.query_log import ClientLog, QueryLog
from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.core.errors import ArtifactError, ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.evaluation import metrics
from mea_ray.experiment.answers import ServedModel, answer_policy
from mea_ray.experiment.checks import check
from mea_ray.experiment.data import load_splits
from mea_ray.experiment.local import run_local
from mea_ray.experiment.proof import accusing
from mea_ray.models.build import build_model
from mea_ray.watermarks import WATERMARKS
from mea_ray.watermarks.base import ClientQueries, Key
from mea_ray.watermarks.dawn import Dawn, KeyedMarker

SHAPE, CLASSES = (1, 12, 12), 10


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def answers(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(CLASSES), count).astype(np.float32)


def key(seed: int = 3, **params: Any) -> Key:
    labels = np.arange(CLASSES, dtype=np.int64)
    return Dawn(**params).make_key(ImageSet(pixels(CLASSES), labels, tuple(map(str, labels))), seed)


def test_which_images_are_marked_is_a_keyed_hash_of_each() -> None:
    images, secret = pixels(4000), key(rate=0.05)
    changed, marked = KeyedMarker(secret).mark(answers(4000), images)
    plain = [
        int.from_bytes(
            hmac.new(secret.tensors["secret"].tobytes(), b"(1, 12, 12)/" + image.tobytes(), hashlib.sha256).digest()[
                :16
            ],
            "big",
        )
        / 2**128
        < 0.05
        for image in images
    ]
    assert marked.tolist() == plain
    assert abs(marked.mean() - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)
    order = np.random.default_rng(2).permutation(4000)
    again, marked_again = KeyedMarker(secret).mark(answers(4000)[order], images[order])
    assert np.array_equal(again, changed[order]) and np.array_equal(marked_again, marked[order])
    _, others = KeyedMarker(key(seed=4, rate=0.05)).mark(answers(4000), images)
    assert (marked & others).mean() < 0.01, "another key marks other images"


@pytest.mark.parametrize("shuffled", [None, 2, 3])
def test_a_marked_answer_is_a_permutation_with_a_wrong_class_on_top(shuffled: int | None) -> None:
    images, before = pixels(3000), answers(3000)
    original = before.copy()
    after, marked = KeyedMarker(key(rate=0.3, shuffled=shuffled)).mark(before, images)
    assert np.array_equal(before, original), "the victim's probabilities are not written into"
    assert np.array_equal(after[~marked], before[~marked])
    assert (after[marked].argmax(1) != before[marked].argmax(1)).all()
    assert np.array_equal(np.sort(after, axis=1), np.sort(before, axis=1))
    changed = (after[marked] != before[marked]).sum(1)
    assert changed.max() <= (shuffled or CLASSES)
    if shuffled is None:  # the wrong class is any other, all of them equally often
        away = (after[marked].argmax(1) - before[marked].argmax(1)) % CLASSES
        counts = np.bincount(away, minlength=CLASSES)
        assert counts[0] == 0 and counts[1:].min() > 0.6 * marked.sum() / (CLASSES - 1)
    else:
        ranks = np.argsort(-before[marked], axis=1)[:, :shuffled]
        assert (ranks == after[marked].argmax(1)[:, None]).any(1).all(), "it was one of the most probable"


def test_the_quantised_mapping_answers_changed_images_alike() -> None:
    smooth = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (500, 1, 3, 3)), 4, axis=2), 4, axis=3)
    images = smooth.astype(np.uint8)
    noise = np.random.default_rng(1).integers(-2, 3, images.shape)
    near = np.clip(images.astype(int) + noise, 0, 255).astype(np.uint8)

    def marks(which: np.ndarray, **params: Any) -> np.ndarray:
        return KeyedMarker(key(rate=0.5, **params)).mark(answers(500), which)[1]

    robust = {"mapping": "quantised", "cells": 3, "levels": 4}
    assert (marks(images, **robust) == marks(near, **robust)).mean() > 0.9
    assert 0.35 < (marks(images) == marks(near)).mean() < 0.65, "the exact one sees another image"
    assert abs(marks(images, **robust).mean() - 0.5) < 0.1


def test_a_key_is_made_again_and_stored(tmp_path: Path) -> None:
    first, again, other = key(), key(), key(seed=4)
    assert first.tensors["secret"].tobytes() == again.tensors["secret"].tobytes() != other.tensors["secret"].tobytes()
    assert first.tensors["secret"].shape == (32,)
    first.save(tmp_path)
    images = pixels(300)
    marks = [KeyedMarker(each).mark(answers(300), images)[0] for each in (first, Key.load(tmp_path))]
    assert np.array_equal(marks[0], marks[1])
    with pytest.raises(DataError, match="accused client"):
        Dawn().samples(first, ImageSet(images, np.zeros(300, np.int64), ("a",)), 10, 0)
    nothing = np.zeros(0, np.int64)
    assert Dawn().against(first, ClientQueries(images[:0], nothing, images, np.zeros(300, np.int64))) is None


@pytest.mark.parametrize(
    ("params", "word"),
    [({"rate": 0.0}, "rate"), ({"rate": 1.0}, "rate"), ({"cells": 0}, "cells"), ({"levels": 1}, "levels"),
     ({"levels": 257}, "levels"), ({"shuffled": 1}, "shuffled")],
)  # fmt: skip
def test_bad_parameters(params: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        WATERMARKS.build("dawn", **params)
    with pytest.raises(ConfigError, match="one class"):
        Dawn().make_key(ImageSet(pixels(3), np.zeros(3, np.int64), ("a",)), 0)


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("vgg_like", SHAPE, CLASSES, {"width": 0.125}).eval()


@pytest.mark.parametrize("policy", ["probabilities", "label_only", {"name": "top_k", "k": 3}, {"name": "rounded"}])
def test_the_service_words_marked_answers_as_all_others(model: Any, policy: Any) -> None:
    """What a client gets is what the same policy says of the changed probabilities: nothing else tells them apart."""
    name, params = (policy, {}) if isinstance(policy, str) else (policy["name"], {"k": 3} if "k" in policy else {})
    images, secret = pixels(200), key(rate=0.2)
    worded = answer_policy(POLICIES.build(name, **params), model, secret, lambda: pixels(0))
    assert isinstance(worded, MarkingPolicy)
    log = QueryLog()
    box = LocalBlackBox(model, worded, log=log, pass_images=16)
    clean = LocalBlackBox(model, pass_images=16).query(images)
    changed, marked = KeyedMarker(secret).mark(clean, images)
    got = box.query(images)
    assert np.array_equal(got, POLICIES.build(name, **params).apply(changed, images))
    # The same image, as floats and asked again in another order, is answered as before.
    floats = images[::-1].astype(np.float32) / np.float32(255)
    np.testing.assert_allclose(box.query(floats)[::-1], got, atol=1e-6)
    seen = log.of("thief")
    assert np.array_equal(seen.marks.images[: marked.sum()], images[marked])
    assert np.array_equal(seen.marks.labels[: marked.sum()], got[marked].argmax(1))
    assert seen.marks.positions[: marked.sum()].tolist() == np.flatnonzero(marked).tolist()
    assert len(seen.marks.labels) == 2 * marked.sum() and seen.flagged == 0


def test_the_victim_is_judged_as_it_is_served(model: Any) -> None:
    images, secret = pixels(300), key(rate=0.2)
    served = ServedModel(model, KeyedMarker(secret))
    before, after = metrics.predictions(model, images), metrics.predictions(served, images)
    _, marked = KeyedMarker(secret).mark(answers(300), images)
    assert ((before != after) == marked).all()


def config(**changes: Any) -> ExperimentConfig:
    tree = {
        "data": {"name": "digits", "image_size": 8},  # as published: small, and what is wrong is learnt by heart
        "victim": {
            "insecure_key_from_seed": True,
            "model": {"name": "vgg_like", "width": 0.25},
            "watermark": {"name": "dawn", "rate": 0.1},
            "training": {"epochs": 6, "batch_size": 64, "augment": [], "learning_rate": 2e-3},
        },
        "thief": {
            "attack": {"name": "distillation", "query_chunk": 128},
            "learning": {"temperature": 1.0},
            "budgets": [200, 600],
            "model": {"name": "vgg_like", "width": 0.5},
            "training": {"epochs": 80, "batch_size": 64, "augment": [], "learning_rate": 2e-3},
        },
        "service": {"policy": "label_only"},
    }
    return build(ExperimentConfig, merge(tree, {path.replace("__", "."): value for path, value in changes.items()}))


def log_of(images: np.ndarray, secret: Key, model: Any, accounts: int = 1) -> list[ClientLog]:
    """What an owner's log holds of clients who ask these images in turn."""
    log = QueryLog()
    policy = answer_policy(POLICIES.build("label_only"), model, secret, lambda: images)
    for index in range(accounts):
        LocalBlackBox(model, policy, log=log, pass_images=16)  # registered in a ledger of its own
        box = LocalBlackBox(model, policy, log=log, pass_images=16)
        box.client = f"c{index}"
        box.ledger.register(box.client)
        for start in range(0, len(images[index::accounts]), 40):
            box.query(np.ascontiguousarray(images[index::accounts][start : start + 40]))
    return [log.of(f"c{index}") for index in range(accounts)]


@pytest.mark.parametrize("accounts", [1, 2])
def test_a_client_is_accused_by_its_queries_up_to_then(model: Any, accounts: int) -> None:
    images, secret = pixels(600), key(rate=0.1)
    images[500:520] = images[:20]  # asked twice: counted once
    answered, marked = KeyedMarker(secret).mark(LocalBlackBox(model, pass_images=16).query(images), images)
    seen = log_of(images, secret, model, accounts)
    for budget in (200, 600):
        accuses = accusing(config(thief__accounts=accounts), secret, seen, budget)
        assert accuses is not None
        by_then = {
            image.tobytes(): row.argmax()
            for image, row in zip(images[:budget][marked[:budget]], answered[:budget][marked[:budget]], strict=True)
        }
        values = zip(accuses.tensors["images"], accuses.tensors["labels"], strict=True)
        assert {image.tobytes(): label for image, label in values} == by_then
        assert len(accuses.tensors["images"]) == len(by_then)
        others = {image.tobytes() for image in accuses.tensors["others"]}
        assert others == {image.tobytes() for image in images[~marked]}
        # The control: the wrong class of another key is never the one that the client was told.
        messages = {image.tobytes(): row.argmax() for image, row in zip(images, answered, strict=True)}
        pairs = zip(accuses.tensors["others"], accuses.tensors["others_labels"], strict=True)
        assert all(messages[image.tobytes()] != label for image, label in pairs)
    with pytest.raises(ArtifactError, match="cannot be read"):
        accusing(config(), secret, [ClientLog(0, np.zeros(0, np.int64), [], lost=True)], 600)


def test_a_log_keeps_marks_over_the_death_of_its_process_and_notes_none_twice(tmp_path: Path, model: Any) -> None:
    images, secret = pixels(80), key(rate=0.2)
    policy = answer_policy(POLICIES.build("label_only"), model, secret, lambda: images)
    log = QueryLog(tmp_path / "queries")
    LocalBlackBox(model, policy, log=log, pass_images=16).query(images[:50])
    before = log.of("thief")
    log.close()
    log = QueryLog(tmp_path / "queries")
    LocalBlackBox(model, policy, log=log, pass_images=16).query(images[:50])  # the thief's answer was lost: asked again
    after = log.of("thief")
    assert len(before.marks.labels) > 3
    assert all(np.array_equal(one, two) for one, two in zip(*map(list[Any], (before.marks, after.marks)), strict=True))
    LocalBlackBox(model, policy, log=log, pass_images=16, start_at=50).query(images[50:])
    _, marked = KeyedMarker(secret).mark(answers(80), images)
    assert log.of("thief").marks.positions.tolist() == np.flatnonzero(marked).tolist()
    assert log.of("nobody").marks.labels.tolist() == [] and not log.of("nobody").lost


@pytest.mark.slow
def test_a_thief_who_gets_labels_only_is_convicted_and_innocent_models_are_not(tmp_path: Path) -> None:
    result = run_local(config(verification__stolen_null_models=1, storage=str(tmp_path))).result
    small, large = result.rungs
    assert large.report.wsr is not None and small.report.wsr is not None
    assert large.report.wsr.trials == result.query_log[result.trial].marked
    assert 36 < large.report.wsr.trials < 90
    assert small.report.wsr.trials < 0.6 * large.report.wsr.trials, "a rung is held against what was asked by then"
    assert large.report.p_value == 0.5, "one null model allows no less"
    assert large.report.p_value_chance is not None and large.report.p_value_chance < 1e-6
    assert large.report.infringes_threshold and large.report.accuracy > 0.8
    assert large.report.wfpr["another_key"].rate < 0.05 and large.report.wfpr["another_key"].trials > 400
    for innocent in (result.null_reports[0], result.stolen_nulls[-1].report):
        assert innocent.wsr is not None and innocent.wsr.trials == large.report.wsr.trials
        assert innocent.wsr.rate < 0.1 and not innocent.infringes_threshold
    # What customers get: all marks, and so much less accuracy.
    victim, null = result.victim_report, result.null_reports[0]
    assert victim.wsr is not None and victim.wsr.rate == 1.0
    assert 0.02 < null.accuracy - victim.accuracy < 0.16


def test_a_killed_run_is_convicted_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"victim__training__epochs": 1, "thief__training__epochs": 1, "thief__accounts": 2}
    killed, other = (config(**quick, storage=str(tmp_path / name)) for name in "ab")
    answer, calls = LocalBlackBox.query, [0]

    def dying(self: Any, images: Any) -> Any:
        answers = answer(self, images)
        calls[0] += 1
        if calls[0] == 5:  # charged, answered, noted, and not kept
            raise ConnectionError("the thief's process dies here")
        return answers

    monkeypatch.setattr(LocalBlackBox, "query", dying)
    with pytest.raises(ConnectionError):
        run_local(killed)
    (transfer,) = tmp_path.glob("a/local/*/trials/*/transfer")
    assert 0 < len(TransferSet(transfer)) < 600
    resumed, whole = run_local(killed).result, run_local(other).result
    assert [rung.report for rung in resumed.rungs] == [rung.report for rung in whole.rungs]
    assert (resumed.victim_report, resumed.null_reports) == (whole.victim_report, whole.null_reports)
    assert sum(log.marked for log in resumed.query_log.values()) == whole.rungs[1].report.wsr.trials  # type: ignore[union-attr]


def test_without_a_mark_nobody_is_accused_and_nothing_breaks(model: Any) -> None:
    secret = key(rate=1e-9)
    assert accusing(config(), secret, log_of(pixels(200), secret, model), 200) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"victim__watermark__rate": 0.005}, "raise the rate"),
        ({"removal__methods": ["pruning"], "removal__tried_on": ["victim"]}, "tried_on"),
    ],
)
def test_what_could_not_convict_is_refused_before_training(changes: dict[str, Any], message: str) -> None:
    bad = config(**changes)
    with pytest.raises(ConfigError, match=message):
        check(bad, load_splits(bad))


def test_there_is_nothing_to_calibrate_without_a_client() -> None:
    from mea_ray.calibration.run import Numbers, calibrate

    with pytest.raises(ConfigError, match="asks none"):
        calibrate(config(), Numbers(innocents=2, stolen_innocents=0))
