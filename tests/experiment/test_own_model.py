"""Networks and weights from outside mea_ray, on the path of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL

from mea_ray.config import ExperimentConfig, build, merge
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import Splits
from mea_ray.experiment.checks import build_network, check
from mea_ray.experiment.data import Fingerprints, load_splits
from mea_ray.experiment.local import run_in_memory
from mea_ray.experiment.names import Names
from mea_ray.experiment.victim.make import make_victim
from mea_ray.models.foreign import ForeignModel
from mea_ray.training.engine import train
from mea_ray.training.objective import CrossEntropy

VIEWING = {"name": "foreign_networks:Viewing", "preprocessing": {"mean": [0], "deviation": [1]}}


def own(**changes: Any) -> ExperimentConfig:
    """A small experiment with these networks; in keyword names ``__`` stands for a dot."""
    tree = {
        "data": "digits",
        "victim": {
            "insecure_key_from_seed": True,
            "model": VIEWING,
            "watermark": "mea_defender",
            "training": {"epochs": 2},
        },
        "thief": {"model": VIEWING, "training": {"epochs": 2}, "budgets": [64]},
        "verification": {"samples": 60},
    }
    settings = {key: value for key, value in SMALL.items() if not key.endswith((".width", ".epochs", ".budgets"))}
    given = {key.replace("__", "."): value for key, value in changes.items()}
    for role in ("victim", "thief"):  # another network has its own options
        if f"{role}.model" in given:
            tree[role]["model"] = given.pop(f"{role}.model")  # type: ignore[index]
    return build(ExperimentConfig, merge(tree, {**settings, **given}))


@pytest.fixture(scope="module")
def data() -> Splits:
    return load_splits(own())


@pytest.fixture(scope="module")
def trained(data: Splits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a classifier without a mark, as a user would bring them."""
    settings = own()
    torch.manual_seed(0)
    model = build_network(settings.victim.model, data.shape, data.classes)
    owned = data.victim_train
    training = settings.victim.training.changed(epochs=20)
    train(model, owned.images, owned.labels, CrossEntropy(), training, seed=0)
    path = tmp_path_factory.mktemp("weights") / "net.pt"
    assert isinstance(model, ForeignModel)
    torch.save({"state_dict": model.net.state_dict()}, path)
    return path


def test_a_network_that_flattens_with_view_is_trained_stolen_and_verified() -> None:
    result = run_in_memory(own(victim__training__channels_last=True))
    assert result.victim_report.wsr is not None and result.rungs[0].report.fidelity is not None


def test_a_trained_classifier_is_marked_by_fine_tuning(trained: Path, data: Splits, tmp_path: Path) -> None:
    settings = own(victim__weights=str(trained), victim__training__epochs=12, storage=str(tmp_path))
    with pytest.raises(ConfigError, match="victim.null_training.epochs"):
        check(settings, data)
    check(own(victim__weights=str(trained), victim__null_training__epochs=3), data)
    victim = make_victim(settings)
    card = victim.about.card
    assert card.accuracy_before is not None and card.accuracy_before > 0.85
    assert card.accuracy > 0.7 and card.source_cost is not None
    assert victim.report.wsr is not None and victim.report.wsr.rate > 0.8


def test_names_follow_from_the_content_of_the_weights_and_null_models_from_neither(
    trained: Path, data: Splits, tmp_path: Path
) -> None:
    (tmp_path / "copy.pt").write_bytes(trained.read_bytes())
    (tmp_path / "other.pt").write_bytes(trained.read_bytes() + b"\0")
    read = Fingerprints(data.fingerprint, data.pool_fingerprint)
    plain, here, there, other = (
        Names.of(own(**({} if path is None else {"victim__weights": str(path)})), read)
        for path in (None, trained, tmp_path / "copy.pt", tmp_path / "other.pt")
    )
    assert here == there and len({plain.victim, here.victim, other.victim}) == 3
    assert plain.nulls == here.nulls == other.nulls
    longer = Names.of(own(victim__null_training__epochs=7), read)
    assert longer.victim == plain.victim and longer.nulls != plain.nulls
    same = {"epochs": 7, "augment": [], "batch_size": 64, "learning_rate": 2e-3}
    assert (
        Names.of(own(victim__null_training=same), read).nulls == Names.of(own(victim__training__epochs=7), read).nulls
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"victim__model": "foreign_networks:Pair"}, "returns a tuple"),
        ({"victim__model": "foreign_networks:WithAuxiliary"}, "returns a tuple"),
        ({"victim__model": "foreign_networks:Probabilities"}, "leave out its softmax"),
        ({"victim__model": "foreign_networks:FixedSize"}, "preprocessing.size"),
        ({"thief__model": "foreign_networks:TooFew"}, "thief.model.*returns"),
        (
            {"victim__model": "foreign_networks:NoFeatures", "victim__watermark": "mea_carrier"},
            "watermark=mea_carrier: features are needed",
        ),
        (
            {"thief__model": "foreign_networks:NoFeatures", "removal__methods": ["fine_pruning"]},
            "fine_pruning: features are needed, and thief.model",
        ),
        ({"victim__weights": "nowhere.pt", "victim__null_training__epochs": 3}, "cannot be read|read safely"),
        ({"victim__model": "foreign_networks:Viewing", "victim__weights": "x"}, "declare victim.model.preprocessing"),
    ],
)
def test_what_cannot_work_is_refused_before_training(data: Splits, changes: dict[str, Any], words: str) -> None:
    from mea_ray.core.errors import MeaRayError

    with pytest.raises(MeaRayError, match=words):
        check(own(**changes), data)


def test_a_network_without_features_is_marked_and_stolen() -> None:
    plain = "foreign_networks:NoFeatures"
    settings = own(
        victim__model=plain, thief__model=plain, removal__methods=["fine_tuning"], removal__tried_on=["substitute"]
    )
    result = run_in_memory(settings)
    assert result.victim_report.wsr is not None and result.removals[0].after.wsr is not None
