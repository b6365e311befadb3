"""The contract of every table: entries resolve, are documented, build from defaults and refuse unknown arguments.

A new component is tested by this file the day its line is added; ``test_trials.py`` takes it through a whole trial.
"""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from policy_answers import answers, ready

from mea_ray.cli.catalogue import TABLES, table
from mea_ray.config import TrainingConfig
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.registry import Table
from mea_ray.core.types import Dataset, ImageSet
from mea_ray.data import DATASETS
from mea_ray.evaluation import metrics
from mea_ray.models import MODELS
from mea_ray.models.base import ImageModel
from mea_ray.models.build import build_model
from mea_ray.training.objective import Objective
from mea_ray.watermarks.base import ClientQueries, Key, Stage, Watermark

ENTRIES = [(kind, name) for kind in TABLES for name in table(kind).names()]
IDS = [f"{kind}-{name}" for kind, name in ENTRIES]
SHAPE = (3, 32, 32)


def names(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", table(kind).names())


@pytest.fixture(params=ENTRIES, ids=IDS)
def entry(request: pytest.FixtureRequest) -> tuple[Table, str]:
    kind, name = request.param
    return table(kind), name


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Sixty images of three classes that a network can tell apart: each class is bright in a channel of its own."""
    rng = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int64) % 3
    pixels = rng.integers(0, 90, (60, *SHAPE), dtype=np.uint8)
    pixels[np.arange(60), labels] += 150
    return ImageSet(pixels, labels, ("red", "green", "blue"))


def test_an_entry_resolves_and_says_what_it_is(entry: tuple[Table, str]) -> None:
    known, name = entry
    component = known.resolve(name)
    assert callable(component)
    assert (component.__doc__ or "").strip()


def test_every_parameter_is_typed_documented_and_has_a_default(entry: tuple[Table, str]) -> None:
    known, name = entry
    for parameter in known.parameters(name):
        where = f"{known.kind} {name}: {parameter.name}"
        assert parameter.default is not inspect.Parameter.empty, where
        assert parameter.type not in {"", "_empty", "inspect._empty"}, where
        assert len(parameter.doc) > 3, f"{where} has no documentation under Args:"


def test_no_parameter_is_documented_that_does_not_exist(entry: tuple[Table, str]) -> None:
    from mea_ray.core.registry import documented_arguments

    known, name = entry
    component = known.resolve(name)
    accepted = set(inspect.signature(component).parameters)
    assert set(documented_arguments(component.__doc__)) <= accepted


def test_defaults_pass_their_own_check(entry: tuple[Table, str]) -> None:
    known, name = entry
    assert set(known.check(name, {})) == {parameter.name.split(".")[0] for parameter in known.parameters(name)}


def test_an_unknown_argument_is_refused_with_the_nearest(entry: tuple[Table, str]) -> None:
    known, name = entry
    with pytest.raises(ConfigError, match="no parameter 'zzz_unknown'") as refused:
        known.check(name, {"zzz_unknown": 1})
    assert " on_" not in str(refused.value)  # no config can give a function
    options = {p.name.split(".")[0] for p in known.parameters(name) if not p.name.startswith("on_")}
    longest = max(sorted(options), key=len, default="")
    if len(longest) > 3:
        with pytest.raises(ConfigError, match=f"did you mean '{longest}'"):
            known.check(name, {f"{longest[:-1]}": 1})


def test_an_entry_survives_the_trip_to_another_process(entry: tuple[Table, str]) -> None:
    known, name = entry
    assert pickle.loads(pickle.dumps(known)).resolve(name) is known.resolve(name)


@names("models")
def test_a_model_gives_features_and_logits_for_any_images(name: str) -> None:
    for shape, classes in ((SHAPE, 10), ((1, 32, 48), 4)):
        with torch.device("meta"), torch.no_grad():
            model = build_model(name, shape, classes).eval()
            pixels = torch.zeros((2, *shape))
            assert model(pixels).shape == (2, classes)
            assert model.features(pixels).shape == (2, model.feature_size)
        assert isinstance(model, ImageModel)
        assert model.spec["name"] == name
        assert model.spec["params"] == MODELS.check(name, {})


@names("models")
def test_a_model_is_the_same_under_a_seed(name: str) -> None:
    options = {p.name for p in MODELS.parameters(name)}
    params = {"width": 0.1} if "width" in options else {}

    def build() -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return build_model(name, SHAPE, 3, params).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[key], second[key]) for key in first)


@names("datasets")
def test_a_dataset_loads_or_says_what_it_needs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    try:
        loaded = DATASETS.build(name)
    except (DataError, ConfigError) as error:
        assert len(str(error)) > 20  # a message, not just a name
    else:
        assert isinstance(loaded, Dataset)
        assert loaded.train.classes == loaded.test.classes
        assert loaded.train.shape == loaded.test.shape


@names("pretexts")
def test_a_pretext_builds_from_its_defaults_and_is_an_objective(name: str) -> None:
    assert isinstance(table("pretexts").build(name), Objective)


@names("combiners")
def test_a_combiner_builds_from_its_defaults(name: str) -> None:
    table("combiners").build(name, SHAPE, (0.0, 0.0, 0.0), 0)


@names("policies")
def test_a_policy_answers_from_its_defaults(name: str) -> None:
    policy = ready(name, classes=5)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), 12).astype(np.float32)
    pixels = rng.integers(0, 256, (12, *SHAPE), dtype=np.uint8)
    before = probabilities.copy()
    first, second = (answers(policy, probabilities, pixels) for _ in range(2))
    assert first.shape == (12, 5) and first.dtype == np.float32
    assert np.isfinite(first).all() and (policy.source == "features" or (first >= 0).all())
    assert np.array_equal(first, second), "the same images must get the same answers"
    assert np.array_equal(probabilities, before), "a policy must not change what it was given"
    order = rng.permutation(12)
    assert np.array_equal(answers(policy, probabilities[order], pixels[order]), first[order]), (
        "answers depend on traffic"
    )


def marking(scheme: Watermark, key: Key, stages: list[Stage], images: ImageSet) -> Key:
    """Mark answers as a service does, and return the key that accuses the client who was given them."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build_model("vgg_like", SHAPE, 3, {"width": 0.0625}).eval()
    for stage in stages:
        stage.objective.attach(model, torch.device("cpu"))
    marker = scheme.marker(scheme.learned(key, stages))
    assert marker is not None
    answered = np.full((60, 3), 0.1, np.float32) + 0.7 * np.eye(3, dtype=np.float32)[images.labels]
    features = metrics.features(model, images.images) if marker.reads_features else None
    changed, marked = marker.mark(answered, images.images, features)
    rows = changed.argmax(1)
    assert ((rows != images.labels) == marked).all() and np.allclose(changed.sum(1), 1, atol=1e-5)
    assert scheme.needs_log == marked.any() and not np.array_equal(changed, answered)
    result = scheme.against(
        key, ClientQueries(images.images[marked], rows[marked], images.images[~marked], rows[~marked])
    )
    assert result is not None
    return result


# Sixty queries leave no mark at the paper's rate.
MARKED: dict[str, dict[str, Any]] = {"dawn": {"rate": 0.4}}


@names("watermarks")
def test_a_watermark_makes_a_key_stages_and_samples(name: str, images: ImageSet, tmp_path: Any) -> None:
    scheme: Watermark = table("watermarks").build(name, **MARKED.get(name, {}))
    key = scheme.make_key(images, 3)
    # A scheme marks classifiers, encoders, or (``none``) both; what it does not mark, it refuses.
    stages: list[Stage] = []
    refused = 0
    for make in (
        lambda: scheme.stages(key, images),
        lambda: scheme.encoder_stages(key, images, table("pretexts").build("simclr")),
    ):
        try:
            stages += make()
        except ConfigError as error:
            assert "victim.pretext" in str(error)
            refused += 1
    assert refused < 2
    assert stages and all(isinstance(stage, Stage) for stage in stages)
    for stage in stages:
        assert set(stage.overrides) <= set(TrainingConfig.model_fields)
    if key is None:
        return
    again = scheme.make_key(images, 3)
    assert again is not None and (again.seed, again.settings) == (key.seed, key.settings)
    assert all(np.array_equal(key.tensors[each], again.tensors[each]) for each in key.tensors)
    if scheme.marks_answers:
        key = marking(scheme, key, stages, images)
    else:
        assert scheme.marker(key) is None
    key.save(tmp_path)
    loaded = Key.load(tmp_path)
    made, remade = (scheme.samples(each, images, 25, 1) for each in (key, loaded))
    assert np.array_equal(made.images, remade.images)
    # Schemes that mix have more pairs than that; one that patches a single class has as many as images of it.
    count = len(made.images)
    assert 20 <= count <= 25 and made.images.shape == (count, *SHAPE) and made.images.dtype == np.uint8
    assert len(np.unique(made.images.reshape(count, -1), axis=0)) == count
    assert made.target == key.target_class
    # A scheme that mixes no classes names none (-1), and must then have no sources; any other must have all of them.
    assert set(np.unique(made.source_labels)) == {label for label in key.source_classes if label >= 0}
    assert made.adverse and all(len(mixed) for mixed in made.adverse.values())
