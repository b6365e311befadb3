from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mea_ray.core.errors import SuspectError
from mea_ray.core.types import ImageSet
from mea_ray.experiment.suspect.network import LUMINANCE, ExpectedInput, SuspectNetwork, arranged, find_form, fitted
from mea_ray.experiment.suspect.outputs import as_logits, class_columns, kind_of, matched_columns, spread_unnamed
from mea_ray.models.foreign import Preprocessing

PLAIN = ExpectedInput(Preprocessing())
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (40, 6)).astype(np.float32)
PROBABILITIES = torch.from_numpy(LOGITS).softmax(1).numpy()
TOP_2 = np.where(np.sort(PROBABILITIES, 1)[:, [-2]] <= PROBABILITIES, PROBABILITIES, 0)


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (LOGITS, "logits"),
        (torch.from_numpy(LOGITS).log_softmax(1).numpy(), "logits"),
        (np.abs(LOGITS), "logits"),
        (PROBABILITIES, "probabilities"),
        (PROBABILITIES.astype(np.float16).astype(np.float32), "probabilities"),
        (TOP_2, "top_k"),
        (TOP_2 / TOP_2.sum(1, keepdims=True), "top_k"),
        (np.eye(6, dtype=np.float32)[LOGITS.argmax(1)], "labels"),
        (LOGITS.argmax(1), "labels"),
        (LOGITS.argmax(1).astype(np.float32)[:, None], "labels"),
    ],
)
def test_kinds_of_answers_are_distinguished_and_name_the_same_class(answers: Any, kind: str) -> None:
    assert kind_of(answers) == kind
    logits = as_logits(np.asarray(answers), kind_of(answers), 6)
    assert np.isfinite(logits).all() and np.array_equal(
        logits.argmax(1), np.abs(LOGITS).argmax(1) if (np.array_equal(answers, np.abs(LOGITS))) else LOGITS.argmax(1)
    )


def test_logits_of_probabilities_have_the_same_softmax() -> None:
    logits = as_logits(PROBABILITIES, "probabilities", 6)
    assert np.allclose(torch.from_numpy(logits).softmax(1), PROBABILITIES, atol=1e-6)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (PROBABILITIES.round(1), "declare the type with --outputs"),
        (1 / (1 + np.exp(-LOGITS)), "a sigmoid for each class"),
        (LOGITS[:, 0], "one number per image that is not a label"),
        (LOGITS[None], "one row of class scores"),
        (100 * PROBABILITIES, "look like percentages"),
        (np.full((3, 6), np.nan), "not finite"),
    ],
)
def test_ambiguous_outputs_must_be_specified(answers: Any, words: str) -> None:
    with pytest.raises(SuspectError, match=words):
        kind_of(answers)


def test_labels_outside_of_the_classes_are_refused() -> None:
    with pytest.raises(SuspectError, match="answers labels 0 to 9, but has 6 classes"):
        as_logits(np.array([0, 9]), "labels", 6)


def test_classes_are_mapped_by_name_or_column() -> None:
    assert class_columns(["cat", "dog", "owl"], ["Owl", "fish", "cat", "dog"]) == (2, 3, 0)
    assert class_columns(["cat", "dog"], {"dog": 0, "cat": 5}) == (5, 0)
    with pytest.raises(SuspectError, match=r"lack \['dog'\]"):
        class_columns(["cat", "dog"], ["cat"])
    with pytest.raises(SuspectError, match="its own column"):
        class_columns(["cat", "dog"], {"dog": 0, "cat": 0})


def test_matching_finds_the_order_of_a_model_that_errs() -> None:
    order = np.array([3, 0, 5, 1, 2, 4])
    labels = RNG.integers(0, 6, 600)
    right = RNG.random(600) < 0.6
    predicted = order[np.where(right, labels, RNG.integers(0, 6, 600))]
    assert matched_columns(predicted, labels, 6, 6) == tuple(order)
    with pytest.raises(SuspectError, match="cannot be matched"):
        matched_columns(predicted, labels, 6, 5)


def drawn() -> ImageSet:
    """Images whose mean colour is their class."""
    labels = np.arange(60) % 6
    images = np.zeros((60, 3, 8, 8), np.uint8)
    images[:] = (40 * labels + 10)[:, None, None, None]
    return ImageSet(images, labels.astype(np.int64), tuple("abcdef"))


def by_colour(order: Any) -> Any:
    def ask(x: Any) -> Any:
        classes = np.rint((x.mean(axis=(1, 2, 3)) * 255 - 10) / 40).astype(int).clip(0, 5)
        return np.eye(6, dtype=np.float32)[np.asarray(order)[classes]] * 9 - 1

    return ask


@pytest.mark.parametrize(("columns", "match"), [((3, 0, 5, 1, 2, 4), False), (None, True)])
def test_a_suspect_in_another_order_of_classes_answers_in_ours(columns: Any, match: bool) -> None:
    test, ask = drawn(), by_colour([3, 0, 5, 1, 2, 4])
    form, assumed = find_form(ask, test, taken=PLAIN, outputs=None, columns=columns, match=match)
    assert form.outputs == "logits" and not assumed
    logits = SuspectNetwork(ask, form)(torch.from_numpy(test.images.astype(np.float32) / 255))
    assert np.array_equal(logits.argmax(1).numpy(), test.labels)


def test_an_order_that_nobody_named_is_assumed_and_another_number_is_refused() -> None:
    test, given = drawn(), {"taken": ExpectedInput(Preprocessing()), "outputs": None, "match": False}
    form, assumed = find_form(by_colour(range(6)), test, columns=None, **given)  # type: ignore[arg-type]
    assert assumed and form.columns == (0, 1, 2, 3, 4, 5)

    def wider(x: Any) -> Any:
        return np.pad(by_colour(range(6))(x), ((0, 0), (0, 4)), constant_values=-1)

    with pytest.raises(SuspectError, match="the suspect has 10 classes and the victim 6"):
        find_form(wider, test, columns=None, **given)  # type: ignore[arg-type]
    form, _ = find_form(wider, test, columns=(0, 1, 2, 3, 4, 5), **given)  # type: ignore[arg-type]
    assert form.width == 10


def test_the_declared_input_of_a_file_is_followed() -> None:
    plain = Preprocessing()
    assert fitted(plain, (3, 8, 8), [None, 3, 8, 8]) == ExpectedInput(plain)
    resized, rows_last, channels = fitted(plain, (3, 8, 8), [1, 224, 224, 3])
    assert resized.size == (224, 224) and rows_last and channels is None
    assert fitted(Preprocessing(size=(9, 9)), (3, 8, 8), [None, 3, None, None])[0].size == (9, 9)
    for ours, theirs in ((3, 4), (2, 3)):
        with pytest.raises(SuspectError, match=f"takes {theirs} channels and the victim's images have {ours}"):
            fitted(plain, (ours, 8, 8), [None, theirs, 8, 8])
    with pytest.raises(SuspectError, match="package.module:function"):
        fitted(plain, (3, 8, 8), [None, 192])
    x = torch.rand(2, 3, 8, 8)
    given = Preprocessing(channel_order="BGR", value_range=(0, 255), mean=(1, 2, 3), deviation=(4, 5, 6))
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
    expected = ((255 * x.flip(1) - mean) / deviation).permute(0, 2, 3, 1)
    assert np.allclose(arranged(x, ExpectedInput(given, rows_last=True)), expected, atol=1e-4)


def test_grey_and_coloured_images_are_brought_into_each_others_form() -> None:
    plain, grey, colours = Preprocessing(), torch.rand(2, 1, 4, 4), torch.rand(2, 3, 4, 4)
    taken = fitted(plain, (1, 4, 4), [None, 3, 4, 4])
    assert taken.channels == 3 and np.array_equal(arranged(grey, taken), grey.repeat(1, 3, 1, 1).numpy())
    taken = fitted(plain, (3, 4, 4), [None, 1, 4, 4])
    red, green, blue = LUMINANCE
    assert np.allclose(
        arranged(colours, taken)[:, 0], red * colours[:, 0] + green * colours[:, 1] + blue * colours[:, 2], atol=1e-6
    )
    taken = fitted(plain, (1, 4, 4), [1, 4, 4, 3])
    assert taken.rows_last and arranged(grey, taken).shape == (2, 4, 4, 3)


def test_an_input_of_whole_numbers_gets_them_and_no_mean() -> None:
    taken = fitted(Preprocessing(), (3, 4, 4), [None, 3, 4, 4], whole_numbers=True)
    x = torch.arange(48).view(1, 3, 4, 4) / 255
    assert np.allclose(arranged(x, taken), np.arange(48).reshape(1, 3, 4, 4), atol=1e-4)
    with pytest.raises(SuspectError, match="takes whole numbers, so mean"):
        given = Preprocessing(value_range=(0, 255), mean=(104,), deviation=(1,))
        fitted(given, (3, 4, 4), [None, 3, 4, 4], whole_numbers=True)


@pytest.mark.parametrize("match", [False, True])
def test_labels_of_classes_that_the_victim_lacks_favour_no_class(match: bool) -> None:
    test = drawn()
    order = np.array([8, 1, 7, 3, 0, 5])

    def ask(x: Any) -> Any:
        classes = np.rint((x.mean(axis=(1, 2, 3)) * 255 - 10) / 40).astype(int).clip(0, 6)
        return np.append(order, 9)[classes]  # brighter images are of a class of its own

    columns = None if match else tuple(order)
    form, _ = find_form(ask, test, taken=PLAIN, outputs=None, columns=columns, match=match)
    suspect = SuspectNetwork(ask, form)
    x = torch.from_numpy(test.images.astype(np.float32) / 255)
    assert form.columns == tuple(order) and np.array_equal(suspect(x).argmax(1).numpy(), test.labels)
    if match:
        return
    form, _ = find_form(ask, test, taken=PLAIN, outputs=None, columns=tuple(order), match=False)
    other = spread_unnamed(np.full((12, 6), -3, np.float32))
    assert np.array_equal(np.bincount(other.argmax(1)), [2] * 6)


@pytest.mark.parametrize("shape", [(40, 6, 1, 1), (40, 6, 1)])
def test_sides_of_length_one_behind_the_classes_are_left_out(shape: Any) -> None:
    assert kind_of(LOGITS.reshape(shape)) == "logits"
    assert np.array_equal(as_logits(LOGITS.reshape(shape), "logits", 6), LOGITS)
