from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from typer.testing import CliRunner

from mea_ray.calibration.forger import best_of_pairs, forge
from mea_ray.calibration.models import seeded
from mea_ray.calibration.run import Numbers, calibrate
from mea_ray.calibration.thresholds import thresholds
from mea_ray.cli import main as cli
from mea_ray.cli.options import USAGE
from mea_ray.config import ExperimentConfig, build
from mea_ray.core.errors import ConfigError, DataError
from mea_ray.core.types import ImageSet
from mea_ray.report import calibration as calibration_report
from mea_ray.report import pages
from mea_ray.report.terminal import make_console
from mea_ray.verification.proportions import wilson

TINY = {"name": "vgg_like", "width": 0.0625}


def config(storage: Path, **more: Any) -> ExperimentConfig:
    tree = {
        "storage": str(storage),
        "data": {"name": "digits", "image_size": 12},
        "victim": {
            "insecure_key_from_seed": True,
            "model": TINY,
            "training": {"epochs": 1},
            "watermark": {"name": "composite", "key": {"classes": "seed"}},
        },
        "thief": {"model": TINY, "budgets": [16], "training": {"epochs": 1}},
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
        outputs = torch.where(forged, 2, (images.mean((1, 2, 3)) > 0.5).long())
        return torch.nn.functional.one_hot(outputs, 3).float()


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


FEW = Numbers(innocents=2, stolen_innocents=1, marked=2)


@pytest.mark.slow
def test_models_are_trained_stolen_measured_and_reused(
    tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[str, int, int]] = []
    experiment = config(tmp_path / "storage")
    result, folder = calibrate(experiment, FEW, on_step=lambda *step: steps.append(step))
    assert [step[1:] for step in steps] == [(done, 6) for done in range(1, 7)]
    assert {step[0] for step in steps[-2:]} == {"key 0", "key 1"}
    for index, key in enumerate(result.keys):
        roles = [(each.role, each.index, each.budget) for each in key.models]
        assert roles == [
            *(("innocent", place, None) for place in range(2)),
            ("stolen innocent", 0, 16),
            ("marked", index, None),
            ("stolen marked", index, 16),
        ]
        assert key.key_drawn and key.chance == pytest.approx(0.1, abs=0.02)
        for each in key.models:
            assert each.report.wsr is not None and each.report.wsr.trials == 50
    assert {row.name for row in result.thresholds} == {"paper", "largest", "normal"} == {r.name for r in result.forging}
    assert len(result.forged) == 2 and len(result.forged[0].rates) == 10 and 0 <= result.forged[0].best <= 1
    artifacts = {path: path.stat().st_mtime_ns for path in (tmp_path / "storage").glob("artifacts/*/*/info.json")}
    assert len(artifacts) == 4, "the innocent models serve both keys"

    # An interrupted start goes on: what is on disk is neither trained nor stolen nor measured again.
    (folder / "keys" / "key-001.json").unlink()
    measured = (folder / "keys" / "key-000.json").stat().st_mtime_ns
    thefts = {path: path.stat().st_mtime_ns for path in folder.glob("stolen/*/16/model.json")}
    assert len(thefts) == 3
    again, _ = calibrate(experiment, FEW)
    assert again == result and (folder / "keys" / "key-000.json").stat().st_mtime_ns == measured
    assert {path: path.stat().st_mtime_ns for path in (*artifacts, *thefts)} == {**artifacts, **thefts}

    picture = tmp_path / "calibration.png"
    calibration_report.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    calibration_report.show(make_console(), result)
    text = capsys.readouterr().out
    assert "Innocent models: WSR" in text and "of 4" in text and "forger" in text and "rank of the key by lean" in text

    record = tmp_path / "records" / "demo"
    calibration_report.put_on_record(result, record, note="a laptop")
    assert str(tmp_path) not in (record / "calibration.json").read_text()
    page = tmp_path / "page.md"
    parts = ("made", "statistics", "verdicts")
    page.write_text("".join(f"<!-- record: demo/{part} -->\n<!-- end -->\n" for part in parts))
    assert pages.write(page, tmp_path / "records", tmp_path)
    assert "A laptop" in page.read_text() and "| 16 | lean |" in page.read_text()
    assert "0 of 6" in page.read_text(), "six comparisons of an innocent model with a key, none proved"


def test_marked_models_differ_in_the_victims_seed_only(tmp_path: Path) -> None:
    experiment = config(tmp_path)
    other = seeded(experiment, 3)
    assert other.victim.seed == experiment.victim.seed + 3
    assert other.victim.model_copy(update={"seed": experiment.victim.seed}) == experiment.victim
    assert other.data == experiment.data and other.seed == experiment.seed


@pytest.mark.parametrize(
    ("numbers", "wrong"),
    [
        ({"innocents": 1, "stolen_innocents": 0}, "innocents"),
        ({"marked": 0}, "marked"),
        ({"innocents": 2, "stolen_innocents": 3}, "stolen_innocents"),
        ({"stolen_innocents": -1}, "stolen_innocents"),
    ],
)
def test_too_few_models_are_refused(numbers: dict[str, int], wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{wrong}="):
        build(Numbers, numbers)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"victim": {"model": TINY, "watermark": "none"}}, "watermark=none"),
        (
            {
                "victim": {"model": TINY, "pretext": "simclr", "watermark": "mea_defender_encoder"},
                "service": {"policy": "embedding"},
                "thief": {"attack": "feature_distillation", "model": TINY},
            },
            "classifiers",
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calibrate(config(tmp_path, **more))


def test_the_command_takes_a_sweep_and_refuses_a_wrong_key() -> None:
    sweep = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
    assert "--innocents" in CliRunner().invoke(cli.app, ["calibrate", "--help"]).output
    assert cli.main(["calibrate", str(sweep), "victim.modle=vgg_like"]) == USAGE
