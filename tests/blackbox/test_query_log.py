"""The owner's log: what it counts, that it is PRADA's statistic, and that nothing is noted twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mea_ray.blackbox.ledger import Ledger
from mea_ray.blackbox.local import LocalBlackBox
from mea_ray.blackbox.policies import Response
from mea_ray.blackbox.prada import minimal_distances, query_log_record, shapiro_w, trimmed
from mea_ray.blackbox.query_log import ClientLog, LogEntry, QueryLog, log_entry, sample_size
from mea_ray.blackbox.validate import image_digest
from mea_ray.core.errors import BadQuery
from mea_ray.models.build import build_model

SHAPE = (1, 8, 8)
RNG = np.random.default_rng


def _images(n: int, seed: int = 0) -> np.ndarray:
    return RNG(seed).integers(0, 256, (n, *SHAPE), dtype=np.uint8)


def _answers(n: int, seed: int = 1, classes: int = 3) -> np.ndarray:
    return RNG(seed).dirichlet(np.ones(classes), n).astype(np.float32)


def _note(start: int, images: np.ndarray, answers: np.ndarray, client: str = "c", sample: int = 2000) -> LogEntry:
    return log_entry(
        client, f"{start}-{image_digest(images)}", images, Response.plain(answers), "probabilities", sample
    )


def _plain_prada(images: np.ndarray, outputs: np.ndarray) -> list[float]:
    """The paper's loop, an image at a time."""
    grown: dict[int, list[np.ndarray]] = {}
    joined: dict[int, list[float]] = {}
    threshold: dict[int, float] = {}
    collected = []
    for image, label in zip(images, outputs, strict=True):
        if label not in grown:
            grown[label], joined[label], threshold[label] = [image], [0.0], 0.0
            continue
        nearest = min(float(np.linalg.norm(image - other)) for other in grown[label])
        collected.append(nearest)
        if nearest > threshold[label]:
            grown[label].append(image)
            joined[label].append(nearest)
            threshold[label] = max(threshold[label], float(np.mean(joined[label]) - np.std(joined[label])))
    return collected


def test_the_distances_are_those_of_a_plain_loop() -> None:
    images, answers = _images(150), _answers(150)
    # Close neighbours that do not join the growing sets, and floats beside bytes.
    images[75:] = np.clip(images[:75].astype(int) + RNG(3).integers(-9, 10, images[:75].shape), 0, 255)
    log = QueryLog()
    floats = images[100:].astype(np.float32) / np.float32(255)
    log.add([_note(0, images[:60], answers[:60]), _note(60, images[60:100], answers[60:100])])
    log.add([_note(100, floats, answers[100:])])
    expected = _plain_prada((images / 255.0).reshape(150, -1), answers.argmax(1))
    assert len(set(np.round(expected, 3))) > 100
    by_class = minimal_distances(log.of("c"))
    np.testing.assert_allclose(np.sort(by_class), np.sort(expected), atol=1e-5)
    np.testing.assert_allclose(by_class, expected, atol=1e-5)
    result = query_log_record(log.of("c"), 3)
    remaining = [d for d in expected if abs(d - np.mean(expected)) <= 3 * np.std(expected)]
    assert result.shapiro_w == pytest.approx(stats.shapiro(remaining).statistic, abs=1e-4)
    assert result.distances == 147 and sum(result.distance_counts) == len(remaining)
    assert result.distance_range == pytest.approx((min(remaining), max(remaining)), abs=1e-4)
    assert (result.requests, result.images, result.sampled) == (3, 150, 150)
    assert result.classes == np.bincount(answers.argmax(1), minlength=3).tolist()


def test_customers_pass_and_signed_steps_alarm() -> None:
    g = RNG(0)
    customer = np.clip(g.normal(0.5, 0.15, (400, *SHAPE)), 0, 1).astype(np.float32)
    stepped = customer.copy()
    for place in range(40, 400):  # a Jacobian thief: every image is an older one, one step of fixed length away
        stepped[place] = np.clip(stepped[place % 40] + 0.1 * g.choice([-1, 1], SHAPE), 0, 1)
    answers = np.eye(2, dtype=np.float32)[np.arange(400) // 5 % 2]
    verdicts = {}
    for name, images in {"customer": customer, "thief": stepped}.items():
        log = QueryLog()
        log.add([_note(0, images, answers)])
        verdicts[name] = query_log_record(log.of("c"), 2)
    assert verdicts["customer"].alarm is False and (verdicts["customer"].shapiro_w or 0) > 0.95
    assert verdicts["thief"].alarm is True and (verdicts["thief"].shapiro_w or 1) < 0.9
    assert query_log_record(log.of("c"), 2, delta=0.01).alarm is False


def test_too_little_or_too_equal_is_not_judged() -> None:
    assert shapiro_w(np.zeros(500)) is None and shapiro_w(RNG(0).random(99)) is None
    assert len(trimmed(np.zeros(0))) == 0 and len(trimmed(np.array([0.0] * 50 + [9.0]))) == 50
    nothing = query_log_record(QueryLog().of("never asked"), 4)
    assert (nothing.requests, nothing.images, nothing.classes, nothing.alarm) == (0, 0, [0, 0, 0, 0], None)
    assert len(minimal_distances(ClientLog(0, np.zeros(0, np.int64), []))) == 0


def test_order_of_arrival_and_repeated_requests_change_nothing(tmp_path: Path) -> None:
    images, answers = _images(130), _answers(130)
    notes = [_note(i, images[i : i + 10], answers[i : i + 10]) for i in range(0, 130, 10)]
    straight, shuffled = QueryLog(), QueryLog(tmp_path / "log")
    straight.add(notes)
    for place in RNG(5).permutation(len(notes)):
        shuffled.add([notes[place]])
        shuffled.add([notes[0], notes[place]])
    assert query_log_record(shuffled.of("c"), 3) == query_log_record(straight.of("c"), 3)
    shuffled.close()
    again = QueryLog(tmp_path / "log")
    again.add(notes[:4])
    assert query_log_record(again.of("c"), 3) == query_log_record(straight.of("c"), 3)
    assert again.of("other").requests == 0


def test_only_the_first_images_are_stored_and_the_counts_go_on() -> None:
    log = QueryLog()
    images, answers = _images(40), _answers(40)
    log.add([_note(20, images[20:], answers[20:], sample=25), _note(0, images[:20], answers[:20], sample=25)])
    seen = log.of("c")
    np.testing.assert_array_equal(np.concatenate([remaining for remaining, _ in seen.sample]), images[:25])
    assert query_log_record(seen, 3).images == 40 and query_log_record(seen, 3).sampled == 25
    # A name that this program's clients do not give: counted, and not placed among the others.
    log.add([log_entry("c", "another-id", images, Response.plain(answers), "probabilities", 25)])
    assert query_log_record(log.of("c"), 3).images == 80 and query_log_record(log.of("c"), 3).sampled == 25
    assert sample_size((3, 32, 32)) == 2000 and sample_size((3, 256, 256)) == 42 and sample_size(SHAPE, 0) == 0
    log.add([_note(0, images, answers, client="counted", sample=0)])
    counted = query_log_record(log.of("counted"), 3)
    assert (counted.images, counted.sampled, counted.shapiro_w) == (40, 0, None)


def test_a_log_that_cannot_be_written_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "log").write_bytes(b"this is no database, and it is long enough to be looked at" * 9)
    log = QueryLog(tmp_path / "log")
    log.add([_note(0, _images(3), _answers(3))])
    assert log.of("c").requests == 0
    assert caplog.text.count("query log is lost") == 1


def test_the_black_box_in_this_process_notes_what_it_answered() -> None:
    torch.manual_seed(0)
    model = build_model("vgg_like", SHAPE, 4, {"width": 0.0625})
    ledger = Ledger()
    ledger.register("a")
    ledger.register("b")
    log = QueryLog()
    box = LocalBlackBox(model, None, ledger, "a", log=log)
    answers = np.concatenate([box.query(_images(20)), box.query(_images(20))])
    LocalBlackBox(model, None, ledger, "b", log=log).query(_images(5))
    # The thief's process died before it kept the second answer, and asks it again.
    LocalBlackBox(model, None, ledger, "a", log=log, start_at=20).query(_images(20))
    assert ledger.charged("a") == 40
    result = query_log_record(log.of("a"), 4)
    assert (result.requests, result.images, query_log_record(log.of("b"), 4).images) == (2, 40, 5)
    assert result.classes == np.bincount(answers.argmax(1), minlength=4).tolist()
    np.testing.assert_allclose(minimal_distances(log.of("a"))[-20:].min(), 0, atol=1e-6)


@pytest.mark.parametrize(("client", "name"), [("c", "1\x00"), ("c", "\ud800"), ("c", "1" * 129), ("c", ""), ("", "1")])
def test_a_malformed_id_is_refused_before_anything_is_stored(client: str, name: str) -> None:
    log, images, answers = QueryLog(), _images(4), _answers(4)
    bad = log_entry(client, name, images, Response.plain(answers), "probabilities", 9)
    with pytest.raises(BadQuery, match="must have 1 to 128"):
        log.add([_note(0, images, answers), bad])
    assert log.of("c").requests == 0
    log.add([_note(0, images, answers)])
    assert log.of("c").requests == 1


@pytest.mark.parametrize(("number", "start"), [("12", 12), ("second-12", 12), ("9" * 16, -1), ("", -1), ("x", -1)])
def test_a_request_counts_whatever_number_its_id_claims(number: str, start: int) -> None:
    """A number beyond the database's integers stopped the whole batch that the entry was in."""
    name = f"{number}-{image_digest(_images(4))}"
    entry = log_entry("c", name, _images(4), Response.plain(_answers(4)), "probabilities", 9)
    assert entry.start == start
    log = QueryLog()
    log.add([entry])
    assert query_log_record(log.of("c"), 3).images == 4


def test_a_client_can_be_forgotten_and_others_stay(tmp_path: Path) -> None:
    log = QueryLog(tmp_path / "log")
    for client, count in (("a", 3), ("b", 5)):
        log.add([_note(0, _images(count), _answers(count), client)])
    assert (log.images("a"), log.images("b"), log.images("nobody")) == (3, 5, 0)
    log.forget("a")
    assert (log.images("a"), log.images("b")) == (0, 5)
    assert log.of("a").requests == 0 and int(log.of("b").classes.sum()) == 5
