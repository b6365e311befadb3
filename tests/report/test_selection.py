"""How settings were chosen: the config refuses test images, and every report states the criterion."""

from __future__ import annotations

from typing import Any

import pytest
from report_results import trial

from mea_ray.config import SweepConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.core.types import ImageSet
from mea_ray.data import DATASETS
from mea_ray.data.splits import make_splits
from mea_ray.report import html, markdown, selection, terminal
from mea_ray.results.records import SelectionRecord, TrialResult
from mea_ray.sweep.search import check_metric
from mea_ray.sweep.trainable import selection as carried


def sweep(select: dict[str, Any], **more: Any) -> SweepConfig:
    return build(SweepConfig, {"name": "s", "seeds_of": "both", "select": select, **more})


DEVELOPMENT: dict[str, Any] = {"base": {"splits": {"held_out": "validation"}}, "seeds": [0, 1, 2]}


def test_a_sweep_chooses_on_validation_images_and_another_reports_on_test_images() -> None:
    tuning = sweep({"metric": "wsr", "seeds": [0, 1, 2], "constraints": {"victim_gap": 0.02}}, **DEVELOPMENT)
    report = sweep({"metric": "wsr", "seeds": [0, 1, 2], "sweep": "s"}, seeds=[10, 11])
    check_metric(tuning)
    first, second = carried(tuning), carried(report)
    assert first is not None and first.sweep == "" and first.constraints == {"victim_gap": 0.02}
    assert second is not None and (second.seeds, second.sweep, second.data) == ([0, 1, 2], "s", "validation")
    assert carried(build(SweepConfig, {"name": "s"})) is None


@pytest.mark.parametrize(
    ("select", "more", "words"),
    [
        ({"seeds": [0], "data": "test"}, DEVELOPMENT, "chosen on validation images, not on 'test'"),
        ({"seeds": [0, 1, 2]}, {"seeds": 3}, "measures wsr on test images; set base.splits.held_out=validation"),
        ({"seeds": [0, 1]}, DEVELOPMENT, r"set seeds=\[0, 1\]"),
        ({"seeds": [0, 1], "sweep": "s"}, DEVELOPMENT, "reports judges on test images"),
        ({"seeds": [0, 1], "sweep": "s"}, {"seeds": [1, 2]}, r"the seeds \[1\] chose the settings"),
        ({"seeds": [0], "sweep": "s"}, {}, r"the seeds \[0\] chose the settings"),
        ({"seeds": []}, DEVELOPMENT, "seeds"),
        (
            {"seeds": [0, 1, 2]},
            {**DEVELOPMENT, "space": {"splits.held_out": {"grid": ["test", "validation"]}}},
            "remove splits.held_out from space",
        ),
    ],
)
def test_choosing_on_test_images_is_refused(select: dict[str, Any], more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sweep(select, **more)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"select\.metric='wrs' is not a metric"):
        check_metric(sweep({"metric": "wrs", "seeds": [0, 1, 2]}, **DEVELOPMENT))


def test_validation_images_are_held_out_of_everything() -> None:
    dataset = DATASETS.build("digits", image_size=8)
    usual = make_splits(dataset, validation_fraction=0.2)
    chosen = make_splits(dataset, validation_fraction=0.2, held_out="validation")

    def rows(*parts: ImageSet) -> list[bytes]:
        return sorted(image.tobytes() for part in parts for image in part.images)

    assert rows(chosen.test, chosen.verification) == rows(usual.victim_validation)
    assert rows(chosen.victim_train) == rows(usual.victim_train), "the victim is the same"
    assert rows(chosen.thief_pool) == rows(chosen.victim_train), "the thief is judged by what it never trained on"
    assert rows(usual.thief_pool) == rows(dataset.train)


def tried(name: str, scheme: str, rate: float, seed: int, wsr: float, **record: Any) -> TrialResult:
    base = trial(name, end=wsr - 0.02 * seed)
    return base.model_copy(
        update={
            "point": {"victim.watermark": {"name": scheme, "rate": rate}, "seed": seed},
            "config": {"victim": {"watermark": {"name": scheme}}, "splits": {"held_out": "validation"}},
            "selection": SelectionRecord(metric="wsr", seeds=[0, 1], **record),
        }
    )


TRIED = [
    tried(f"{scheme}{rate}{seed}", scheme, rate, seed, wsr)
    for scheme, rate, wsr in (("ewe", 0.1, 0.3), ("ewe", 0.2, 0.6), ("cfw", 0.1, 0.2))
    for seed in (0, 1)
]


def test_the_best_setting_of_each_scheme_is_the_one_with_the_best_mean() -> None:
    ewe, cfw = selection.chosen(TRIED)
    assert ewe.cells == ("victim.watermark=ewe(rate=0.2)", "2 settings", "wsr 59.0%", "2")
    assert cfw.cells == ("victim.watermark=cfw(rate=0.1)", "1 setting", "wsr 19.0%", "2")


def test_settings_beyond_a_constraint_are_not_chosen() -> None:
    limits = {"constraints": {"victim_gap": -0.1}}
    none = selection.chosen([tried("a", "ewe", 0.1, 0, 0.3, **limits)])
    assert [line.setting for line in none] == ["ewe: none"] and "0 within the constraints" in none[0].tried


def test_every_report_states_how_settings_were_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert selection.sentence([trial("a")]) is None and selection.chosen([trial("a")]) == []
    outputs = "Settings are chosen here, by the largest wsr on validation images, development seeds 0-1."
    assert selection.sentence(TRIED) == f"{outputs} These are no results to report."
    update = {"selection": SelectionRecord(metric="wsr", seeds=[0, 1, 2], sweep="tuning"), "point": {"seed": 10}}
    fresh = [trial("a").model_copy(update=update), trial("b").model_copy(update={**update, "point": {"seed": 12}})]
    words = (
        "chosen in the sweep tuning, by the largest wsr on validation images, development seeds 0-2; reported on test "
    )
    words += "images, seeds 10, 12."
    for results, sentence in ((TRIED, outputs), (fresh, words)):
        terminal.print_results(terminal.make_console(), results)
        printed = " ".join(capsys.readouterr().out.split())
        assert sentence in html.render(results, name="s") and sentence in printed
        assert sentence in markdown.verdict_list("s", results)


def test_a_page_lists_the_chosen_settings_and_the_criterion() -> None:
    text = markdown.TABLES["chosen"]("s", TRIED)
    assert "| victim.watermark=ewe(rate=0.2) | 2 settings | wsr 59.0% | 2 |" in text
    assert text.endswith(str(selection.sentence(TRIED)))
    assert markdown.TABLES["chosen"]("s", [trial("a")]) == "The sweep chooses no settings."
