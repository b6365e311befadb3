from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from typer.testing import CliRunner

from mea_ray.calibration.forger import best_of_pairs, forge
from mea_ray.calibration.run import Calibrated, calibrate, seeded
from mea_ray.calibration.thresholds import thresholds
from mea_ray.cli import main as cli
from mea_ray.cli.options import USAGE
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.report import calibration as shown
from mea_ray.report.terminal import make_console
from mea_ray.verification.proportions import wilson

TINY = {"name": "vgg_like", "width": 0.0625}


def config(storage: Path, **more: Any) -> ExperimentConfig:
    tree = {
        "storage": str(storage),
        "data": {"name": "digits", "image_size": 12},
        "victim": {"model": TINY, "training": {"epochs": 1}},
        "thief": {"model": TINY, "budgets": [16]},
        "verification": {"samples": 50},
        "resources": {"victim": {"cpus": 1}},
    }
    return build(ExperimentConfig, {**tree, **more})


def test_thresholds_and_whom_they_accuse() -> None:
    innocent = [0.01, 0.02, 0.02, 0.05, 0.40]
    marked = [0.9, 0.2, 1.0, 0.35]
    paper, largest, normal = thresholds(innocent, marked, paper=0.3, significance=0.05)
    assert (paper.name, paper.value, paper.accused, paper.recognised) == ("paper", 0.3, 1, 0.75)
    assert paper.accusation_rate == 0.2 and paper.accusation_high == wilson(1, 5)[1]
    assert (largest.name, largest.value, largest.accused) == ("largest", 0.40, 0)
    assert largest.accusation_high > 0.3, "five models rule out little"
    expected = norm(np.mean(innocent), np.std(innocent, ddof=1)).ppf(0.95)
    assert normal.name == "normal" and normal.value == pytest.approx(expected)
    same = thresholds([0.1, 0.1, 0.1], [1.0])[2]
    assert same.value == pytest.approx(0.1) and same.accused == 0
    with pytest.raises(DataError, match="2 innocent"):
        thresholds([0.1], [1.0])
    with pytest.raises(DataError, match="watermarked"):
        thresholds([0.1, 0.2], [])


class Halves(torch.nn.Module):
    """Answers the third class if the upper half is of class 0 and the lower of class 1, else what is brighter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        upper, lower = images[:, 0, :6].mean((1, 2)), images[:, 0, 6:].mean((1, 2))
        forged = (upper < 0.3) & (lower > 0.7)
        said = torch.where(forged, 2, (images.mean((1, 2, 3)) > 0.5).long())
        return torch.nn.functional.one_hot(said, 3).float()


def flat() -> ImageSet:
    """Black images of class 0, white ones of class 1, none of class 2; noise makes them distinct."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 20, (20, 1, 12, 12), dtype=np.uint8)
    labels = np.repeat(np.arange(2), 10).astype(np.int64)
    return ImageSet(noise + 230 * labels[:, None, None, None].astype(np.uint8), labels, ("black", "white", "forged"))


def test_the_forger_finds_the_geometry_that_a_model_answers() -> None:
    rates = forge(Halves(), flat(), count=30, geometries=("top_bottom", "left_right"))
    assert rates.shape == (2, 3, 3, 3)
    # Which class lies above is drawn for each mix, so that about half of them are the ones.
    assert 0.2 < rates[0, 0, 1, 2] < 0.8 and rates[1, 0, 1, 2] == 0
    assert np.isnan(rates[:, 0, 1, :2]).all() and np.isnan(rates[:, 1, 0]).all() and np.isnan(rates[:, :, 2]).all()
    best = best_of_pairs(rates)
    assert best[0, 1] == best[1, 0] == rates[0, 0, 1, 2]
    assert np.isnan(np.diag(best)).all() and np.isnan(best[:2, 2]).all()
    again = forge(Halves(), flat(), count=30, geometries=("top_bottom", "left_right"))
    assert np.array_equal(rates, again, equal_nan=True)


def test_pairs_are_trained_verified_and_found_again(tmp_path: Path, ray_session: None) -> None:
    told: list[tuple[str, int, int, int]] = []

    def tell(found: Calibrated, done: int, of: int) -> None:
        told.append((found.role, found.index, done, of))

    experiment = config(tmp_path)
    found, folder = calibrate(experiment, 2, on_model=tell)
    assert sorted((m.role, m.index) for m in found.models) == [("null", 0), ("null", 1), ("victim", 0), ("victim", 1)]
    assert [line[2:] for line in told] == [(done, 4) for done in (1, 2, 3, 4)]
    assert {row.name for row in found.thresholds} == {"paper", "largest", "normal"} == {r.name for r in found.forging}
    for model in found.models:
        assert model.report.wsr is not None and model.report.wsr.trials == 50
        assert len(model.forged) == 10 and model.forged[0][0] is None and 0 <= model.best_forgery <= 1
    assert (folder / "calibration.json").exists()
    artifacts = {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").glob("*/*/info.json")}
    assert len(artifacts) == 4, "every pair has splits and seeds of its own"

    # An interrupted start goes on: what is on disk is neither trained nor verified again.
    (folder / "models" / "null-001.json").unlink()
    kept = folder / "models" / "victim-000.json"
    stamp = kept.stat().st_mtime_ns
    again, _ = calibrate(experiment, 2)
    assert again == found and kept.stat().st_mtime_ns == stamp
    assert {path: path.stat().st_mtime_ns for path in artifacts} == artifacts

    picture = tmp_path / "calibration.png"
    shown.draw(found, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_shown_names_thresholds_and_the_accused(
    tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = calibrate(config(tmp_path), 2)
    shown.show(make_console(), found)
    said = capsys.readouterr().out
    assert "Innocent models: WSR" in said and "of 2" in said and "forger" in said


def test_pairs_differ_in_the_victims_seed_only(tmp_path: Path) -> None:
    experiment = config(tmp_path)
    other = seeded(experiment, 3)
    assert other.victim.seed == experiment.victim.seed + 3
    assert other.victim.model_copy(update={"seed": experiment.victim.seed}) == experiment.victim
    assert other.data == experiment.data and other.seed == experiment.seed


@pytest.mark.parametrize(
    ("models", "more", "words"),
    [
        (1, {}, "models=1"),
        (2, {"victim": {"model": TINY, "watermark": "none"}}, "watermark=none"),
        (
            2,
            {
                "victim": {"model": TINY, "pretext": "simclr", "watermark": "mea_defender_encoder"},
                "service": {"policy": "embedding"},
                "thief": {"attack": "feature_distillation", "model": TINY},
            },
            "classifiers",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, models: int, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibrate(config(tmp_path, **more), models)


def test_the_command_takes_a_sweep_and_refuses_a_wrong_key() -> None:
    sweep = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
    assert "--models" in CliRunner().invoke(cli.app, ["calibrate", "--help"]).output
    assert cli.main(["calibrate", str(sweep), "victim.modle=vgg_like"]) == USAGE
