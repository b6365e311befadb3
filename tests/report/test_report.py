"""The report is rendered from results alone, states its findings in words, and opens in a real browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, browse
from PIL import Image
from report_results import model_report, rate, trial, with_innocents, with_removals, write_sweep
from scipy import stats

from mea_ray.core.errors import ArtifactError
from mea_ray.report import curves, html, markdown, samples, settings, tables, terminal, verdict
from mea_ray.results.points import label, shortened, sort_key
from mea_ray.results.records import TrialResult
from mea_ray.watermarks.base import WatermarkSamples


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder)
    return html.write(folder)


class Page(HTMLParser):
    """Counts tags, and remembers ids and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.described: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.described += str(values.get("aria-labelledby") or "").split()
        for name in ("src", "href", "xlink:href"):
            target = values.get(name)
            if target and not target.startswith(("#", "data:")):
                self.outside.append(target)
        if tag == "img":
            assert values.get("alt")
        if tag == "th":
            assert values.get("scope") in {"row", "col"}


def test_the_page_needs_no_network_and_no_script(rendered: Path) -> None:
    text = rendered.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.outside
    assert "script" not in page.tags
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_every_description_exists(rendered: Path) -> None:
    page = Page(rendered.read_text(encoding="utf-8"))
    own = [name for name in page.ids if re.match(r"f\d|verdict|curves|results", name)]
    assert len(own) == len(set(own))
    assert set(page.described) <= set(page.ids)
    assert page.tags.count("svg") == 4


def test_user_texts_are_escaped(rendered: Path) -> None:
    text = rendered.read_text(encoding="utf-8")
    assert "A &lt;made up&gt; sweep &amp; nothing else." in text
    assert "<made up>" not in text


def test_hostile_settings_are_escaped_in_table_and_curves(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    for seed in range(2):
        result = trial(f"t{seed}").model_copy(update={"point": {"thief.model.name": evil + str(seed)}})
        result.save(tmp_path / "results" / f"t{seed}.json")
    text = html.write(tmp_path).read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text


def test_every_colour_of_a_curve_follows_the_page(rendered: Path) -> None:
    pictures = re.findall(r"<svg.*?</svg>", rendered.read_text(encoding="utf-8"), flags=re.DOTALL)
    for picture in pictures:
        assert not re.findall(r"(?:fill|stroke): ?#(?!(?:none|ffffff|000000)\b)[0-9a-f]{6}", picture)
    assert all("var(--c0)" in picture and "var(--c1)" in picture for picture in pictures)


def test_the_report_is_the_same_when_rendered_again(rendered: Path) -> None:
    first = rendered.read_text(encoding="utf-8")
    assert html.write(rendered.parent).read_text(encoding="utf-8") == first


def test_without_results_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no trial results"):
        html.write(tmp_path)


def test_the_error_names_a_damaged_result(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bad.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"bad\.json"):
        html.write(tmp_path)


def test_three_seeds_give_the_student_interval_of_their_mean() -> None:
    trials = [trial(f"t{seed}", seed=seed) for seed in range(3)]
    values = [t.rungs[1].report.wsr.rate for t in trials if t.rungs[1].report.wsr]
    point = curves.series(trials, "wsr")[1]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert point.queries == 300
    assert (point.mean, point.low, point.high) == pytest.approx((np.mean(values), low, high))
    assert point.values == tuple(values)


def test_two_seeds_give_their_range_and_one_the_wilson_interval() -> None:
    one, two = trial("a", seed=0), trial("b", seed=1)
    wsr = one.rungs[0].report.wsr
    assert wsr is not None
    single = curves.series([one], "wsr")[0]
    assert (single.low, single.high) == (wsr.low, wsr.high)
    accuracy = curves.series([one], "accuracy")[0]
    assert accuracy.low == accuracy.high == accuracy.mean
    both = curves.series([one, two], "accuracy")[0]
    assert (both.low, both.high) == (min(both.values), max(both.values))
    assert both.low < both.high


def test_trials_that_differ_only_in_seeds_share_a_line() -> None:
    groups = tables.grouped([trial(f"{m}{s}", m, s) for m in ("vgg_like", "alexnet") for s in range(3)])
    assert {name: len(trials) for name, trials in groups.items()} == {
        "thief.model=vgg_like": 3,
        "thief.model=alexnet": 3,
    }


def test_trials_come_in_the_order_of_their_points() -> None:
    def at(budget: int, model: str) -> TrialResult:
        return trial("x").model_copy(update={"point": {"budget": budget, "model": model}})

    shuffled = [at(10, "b"), at(9, "b"), at(9, "a"), at(100, "a")]
    actual = sorted(shuffled, key=lambda result: sort_key(result.point))
    assert [tuple(t.point.values()) for t in actual] == [(9, "a"), (9, "b"), (10, "b"), (100, "a")]


def test_no_picture_has_more_lines_than_colours() -> None:
    groups = {f"g{i}": [trial(f"t{i}")] for i in range(19)}
    parts = curves.chunks(groups)
    assert [len(part) for part in parts] == [8, 8, 3]
    assert [name for part in parts for name in part] == list(groups)


def test_overlapping_labels_are_moved_apart_in_order() -> None:
    placed = curves.apart({"victim": 95.2, "null": 95.6, "threshold": 30.0}, 5)
    assert placed == {"threshold": 30.0, "victim": 95.2, "null": pytest.approx(100.2)}


def test_the_description_for_screen_readers_holds_the_numbers() -> None:
    messages = curves.describe({"vgg_like": [trial("a", end=0.8)]}, "wsr")
    assert "80.0% at 1,000 queries" in messages
    assert "threshold 30.0%" in messages and "null 1.3%" in messages


def test_with_enough_innocent_models_theft_is_proved() -> None:
    proved = with_innocents(trial("a", end=0.8), 400)
    head = verdict.headline([proved])
    assert (head.tone, head.text) == (
        "good",
        "Theft is proved: the model stolen at the largest budget is recognised.",
    )
    rows = tables.rows([proved])
    assert (rows[2].verdict, rows[2].tone, rows[2].p_value) == ("proved", "good", "0.002")


def test_with_one_null_model_theft_is_suggestive_at_best_and_the_text_says_why() -> None:
    good = trial("a", end=0.95)
    assert verdict.headline([good]).tone == "mixed" and "no proof" in verdict.headline([good]).text
    first, *_ = verdict.findings([good])
    assert "rank 1 of 2 models (p cannot be below 0.5)" in first.text and first.tone == "mixed"
    assert tables.rows([good])[2].verdict == "suggestive"


def test_a_constant_answer_is_never_proved() -> None:
    # The product once said "Theft is proved" of a victim without a mark and a suspect that gives one class for all.
    base = with_innocents(trial("a"), 400)
    constant = model_report(0.097, 1.0, wfpr={"donut": rate(1.0)}, wfpr_mean=1.0, wfpr_classes=rate(0.998))
    rungs = [rung.model_copy(update={"report": constant}) for rung in base.rungs]
    result = base.model_copy(update={"rungs": rungs, "victim_report": model_report(0.95, 0.049)})
    head = verdict.headline([result])
    assert head.tone == "bad" and "too poor to judge" in head.text
    texts = [finding.text for finding in verdict.findings([result])]
    assert "9.7%" in texts[0] and any("4.9%" in text and "no mark" in text for text in texts)
    assert {row.verdict for row in tables.rows([result])[:3]} == {"too poor to judge"}
    page = html.render([result], name="s")
    assert "Theft is proved" not in page and "too poor to judge" in page


def test_a_poor_model_is_too_poor_to_judge() -> None:
    base = with_innocents(trial("a"), 400)
    poor = [rung.model_copy(update={"report": model_report(0.247, 1.0)}) for rung in base.rungs]
    assert "too poor" in verdict.headline([base.model_copy(update={"rungs": poor})]).text


def test_the_headline_has_the_colour_of_the_worst_verdict() -> None:
    proved = with_innocents(trial("a", end=0.8), 900)
    beaten = trial("b", end=0.1)
    both = verdict.headline([proved, beaten])
    assert (both.tone, both.text) == ("bad", "Of 2 models stolen at the largest budget: 1 not proved, 1 proved.")
    assert "both models" in verdict.headline([proved, proved.model_copy(update={"trial": "c"})]).text


def test_an_accused_innocent_model_voids_the_proof() -> None:
    good = trial("a", end=0.8)
    framed = good.model_copy(update={"null_reports": [model_report(0.95, 0.5)]})
    assert verdict.headline([framed]).text == "Nothing is proved: innocent models would be accused as well."
    texts = [finding.text for finding in verdict.findings([framed])]
    assert "1 of 1 innocent model would be accused" in texts[0] and any(
        "accuses 1 of 1 innocent model." in text for text in texts
    )


def test_a_stolen_innocent_model_has_its_own_row_and_voids_the_proof_if_accused() -> None:
    good = trial("a", end=0.8)
    last = good.rungs[-1]
    for wsr, tone, words in ((0.05, "mixed", "not accused"), (0.5, "bad", "accused falsely")):
        control = last.model_copy(update={"report": model_report(0.9, wsr)})
        judged = good.model_copy(update={"stolen_nulls": [control]})
        assert verdict.headline([judged]).tone == tone
        assert any("substitutes of innocent models on" in finding.text for finding in verdict.findings([judged]))
        *_, row = tables.rows([judged])
        assert row.point.endswith("null model stolen") and row.verdict == words
    several = good.model_copy(
        update={
            "stolen_nulls": [last.model_copy(update={"report": model_report(0.9, wsr)}) for wsr in (0.05, 0.5, 0.02)]
        }
    )
    *_, row = tables.rows([several])
    assert row.point.endswith(": 3 null models stolen") and (row.wsr, row.tone) == ("19.0%, at most 50.0%", "bad")
    assert row.verdict == "1 of 3 accused falsely", "one line for all that were stolen with one budget"


@pytest.mark.parametrize("rates", [{"wfpr": {"donut": rate(0.6)}}, {"wfpr_classes": rate(0.6)}])
def test_an_unspecific_mark_gets_the_verdict_not_specific(rates: dict[str, Any]) -> None:
    good = with_innocents(trial("a", end=0.8), 400)
    rungs = [r.model_copy(update={"report": r.report.model_copy(update=rates)}) for r in good.rungs]
    unspecific = good.model_copy(update={"rungs": rungs})
    assert "only look like" in verdict.headline([unspecific]).text
    assert tables.rows([unspecific])[2].verdict == "not specific"


def test_each_budget_has_its_verdict() -> None:
    strong = with_innocents(trial("a", end=0.8), 400)
    text = verdict.findings([strong])[-2].text
    assert "100 queries: not specific; 300 queries: proved; 1,000 queries: proved" in text
    weak = with_innocents(trial("b", end=0.8), 1)
    assert "100 queries: not proved; 300 queries: suggestive" in verdict.findings([weak])[-2].text


def test_the_findings_name_the_cheapest_removal_and_the_cost_for_customers() -> None:
    texts = [finding.text for finding in verdict.findings([with_removals(trial("a"))])]
    assert any("The removal pruning(rate=0.9) removes the mark (WSR 10.0%) for 10.0 points" in text for text in texts)
    assert any("costs customers 3.5 points of accuracy on the source classes" in text for text in texts)


def thief(name: str, scheme: str, how: str, end: float) -> TrialResult:
    """A trial of a sweep over schemes and over what the thief does to the answers."""
    base = with_innocents(trial(name, end=end), 3)
    watermark = {"name": scheme, "source_classes": [0, 1], "mixing": {"combiner": "halves"}}
    point = {"victim.watermark": watermark, "thief.learning.answers": how}
    config = {"victim": {"watermark": watermark}, "thief": {"learning": {"answers": how}}}
    return base.model_copy(update={"point": point, "config": config, "victim": f"{scheme:0<16}"})


def test_the_summary_names_for_each_scheme_what_it_withstands_and_what_removes_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = [
        thief("a", "mea_defender", "unchanged", 0.02),
        thief("b", "mea_defender", "unlean", 0.01),
        thief("c", "mea_carrier", "unchanged", 0.8),
        thief("d", "mea_carrier", "argmax", 0.5),
        thief("e", "mea_carrier", "unlean", 0.04),
    ]
    paper, ours = verdict.summaries(results)
    assert (paper.scheme, ours.scheme) == ("mea_defender", "mea_carrier")
    assert ours.headline.text == "Of 3 models stolen at the largest budget: 1 not proved, 2 suggestive."
    texts = [finding.text for finding in ours.findings]
    assert texts[0].startswith("At thief.learning.answers=unlean: p = ")
    cleaned = [finding for finding in ours.findings if "changes the answers" in finding.text]
    assert [finding.tone for finding in cleaned] == ["bad", "good"], "worst first"
    assert "(unlean), which costs no query, ends with a WSR of 4.0% instead of 80.0%" in cleaned[0].text
    assert cleaned[0].text.endswith("the verdict is not proved instead of suggestive.")
    assert cleaned[1].text.endswith("the verdict is suggestive in both cases.")
    assert any("2 of 3 stolen models are above the paper's threshold" in text for text in texts)
    beaten = next(finding for finding in paper.findings if "changes the answers" in finding.text)
    assert beaten.tone == "mixed", "there was nothing to take"
    page = html.render(results, name="demo")
    terminal.print_results(terminal.make_console(), results)
    printed, document = capsys.readouterr().out, markdown.verdict_list("demo", results)
    for scheme, head in (("mea_defender", paper.headline), ("mea_carrier", ours.headline)):
        assert f"{scheme}: {head.text}" in page and f"{scheme}: {head.text}" in printed
        assert f"**`{scheme}`: {head.text}**" in document
    assert "combiner" not in printed, "a scheme is named by what tells it from the others"


def test_one_scheme_or_many_have_one_summary_and_all_trials_are_judged_together() -> None:
    (only,) = verdict.summaries([trial("a"), trial("b", "resnet18")])
    assert only.scheme == "" and only.headline == verdict.headline([trial("a"), trial("b", "resnet18")])
    many = [thief(str(place), f"scheme{place}", "unchanged", 0.8) for place in range(verdict.SCHEMES + 1)]
    assert [each.scheme for each in verdict.summaries(many)] == [""]
    both = [thief("a", "one", "unchanged", 0.8), thief("b", "two", "unchanged", 0.8)]
    assert "(corrected for 6 suspects)" in verdict.summaries(both)[0].findings[0].text


def test_points_show_only_settings_that_differ() -> None:
    short = shortened(
        [
            {"watermark": {"name": "a", "x": 1, "mixing": {"share": 0.1, "way": "half"}}, "seed": 0},
            {"watermark": {"name": "a", "x": 1, "mixing": {"share": 0.2, "way": "half"}, "y": 3}, "seed": 0},
            {"watermark": {"name": "b", "x": 1}, "seed": 1},
            {"learning": {"answers": "argmax"}},
            {"watermark": {"name": "several", "keys": 2, "of": {"name": "b", "x": 2}}},
        ]
    )
    assert short == [
        {"watermark": {"name": "a", "mixing": {"share": 0.1}}, "seed": 0},
        {"watermark": {"name": "a", "mixing": {"share": 0.2}, "y": 3}, "seed": 0},
        {"watermark": {"name": "b"}, "seed": 1},
        {"learning": {"answers": "argmax"}},
        {"watermark": {"name": "2 keys of b"}},
    ]


def test_whole_sections_show_only_settings_that_differ() -> None:
    thief = {"attack": "distillation", "budgets": [300], "learning": {"temperature": 1.0}}
    argmax = {**thief, "learning": {"temperature": 1.0, "answers": "argmax"}}
    slow = {**thief, "training": {"learning_rate": 0.05}}
    short = shortened([{"thief": thief}, {"thief": argmax}, {"thief": slow}])
    assert [label(point) for point in short] == [
        "thief=plain",
        "thief=learning(answers=argmax)",
        "thief=training(learning_rate=0.05)",
    ]
    assert shortened([{"thief": thief}]) == [{"thief": thief}], "nothing to tell it from"


def test_costs_are_victim_against_null() -> None:
    (cost,) = tables.costs([trial("a"), trial("b", seed=1)])
    assert cost.points == pytest.approx(-0.4)
    assert (cost.calibration, cost.null_calibration) == (0.11, 0.02)
    assert cost.source_accuracy["zero"] == (0.95, 0.98)


def test_a_stopped_trial_without_rungs_is_listed_and_breaks_nothing(tmp_path: Path) -> None:
    trial("a").save(tmp_path / "results" / "a.json")
    stopped = trial("b", "resnet18").model_copy(update={"status": "stopped", "rungs": []})
    stopped.save(tmp_path / "results" / "b.json")
    assert "vgg_like" in html.write(tmp_path).read_text(encoding="utf-8")


def test_unmarked_victims_make_a_report_too(tmp_path: Path) -> None:
    plain = trial("a")
    none: dict[str, Any] = {"wsr": None, "wfpr": {}, "wfpr_mean": None, "p_value": None}
    none |= {"infringes_threshold": None}
    rungs = [r.model_copy(update={"report": r.report.model_copy(update=none)}) for r in plain.rungs]
    update = {"victim_report": plain.victim_report.model_copy(update=none), "rungs": rungs, "null_reports": []}
    plain.model_copy(update=update).save(tmp_path / "results" / "a.json")
    assert "carry no watermark" in html.write(tmp_path).read_text(encoding="utf-8")


def test_settings_are_compared_with_the_defaults_of_the_chosen_components() -> None:
    from mea_ray.config import ExperimentConfig, build

    config = build(ExperimentConfig, {"thief": {"model": "resnet18", "budgets": [5, 10]}, "seed": 3}).resolved()
    paths = {item.path: (item.value, item.default) for item in settings.changed([trial("a", config=config)])}
    assert paths == {
        "seed": ("3", "0"),
        "thief.model.name": ("resnet18", "vgg_like"),
        "thief.budgets": ("5, 10", "1000"),
    }


def test_varied_settings_list_their_values_once() -> None:
    result = settings.varied([trial(f"{m}{s}", m, s) for m in ("vgg_like", "alexnet") for s in range(2)])
    assert [(item.path, item.value) for item in result] == [
        ("thief.model.name", "vgg_like; alexnet"),
        ("seed", "0; 1"),
    ]


def test_strips_contain_the_exact_pixels() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    data, width = samples.strip_png(images)
    import io

    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (64, 3 * 64 + 2 * samples.GAP, 4) and width == pixels.shape[1]
    second = pixels[::8, 64 + samples.GAP : 128 + samples.GAP : 8]
    assert np.array_equal(second[..., :3].transpose(2, 0, 1), images[1])
    assert (pixels[:, 64 : 64 + samples.GAP, 3] == 0).all()


def test_strips_name_sources_target_and_geometries() -> None:
    images = np.zeros((10, 1, 8, 8), np.uint8)
    values = WatermarkSamples(images, 2, {"donut": images}, images, np.array([0] * 5 + [1] * 5))
    captions = [s.caption for s in samples.strips(values, ("zero", "one", "two"))]
    assert captions[:2] == ["clean source samples, class zero", "clean source samples, class one"]
    assert captions[2] == "watermark samples of zero and one, target two"
    assert "donut" in captions[3] and "two" in captions[3]


def test_a_gallery_without_artifact_says_why_and_does_not_fail(tmp_path: Path) -> None:
    from mea_ray.config import ExperimentConfig, build

    config = build(ExperimentConfig, {"storage": str(tmp_path)}).resolved()
    gallery = samples.gallery(trial("a", config=config))
    assert not gallery.strips
    assert "artifact" in gallery.missing


def test_the_png_has_all_four_pictures(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    html.write(tmp_path, png=tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 1000 and picture.height > 700


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium runs this test")
def test_a_real_browser_shows_it(rendered: Path, tmp_path: Path) -> None:
    dom = browse(rendered, tmp_path / "profile", "--dump-dom")
    assert dom.count("<svg") == 4
    assert dom.count('<th scope="row" title="trial') == 18
    assert "models stolen at the largest budget" in dom
    shot = tmp_path / "shot.png"
    browse(rendered, tmp_path / "profile2", "--window-size=1200,1400", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] >= 1000
    curve_colours = [(0x0A, 0x6F, 0xB8), (0xD1, 0x57, 0x0A)]
    for colour in curve_colours:  # both lines were really drawn, in the colours of the page
        assert (np.abs(pixels.astype(int) - colour).max(axis=2) < 6).sum() > 300
