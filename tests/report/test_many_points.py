"""Sweeps of many points: derived numbers, the page, the table and the terminal output."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, browse
from report_results import trial
from rich.console import Console
from scipy import stats

from mea_ray.bench.drawn_results import drawn, write_drawn
from mea_ray.config import PricesConfig, SearchConfig
from mea_ray.core.errors import ConfigError
from mea_ray.report import html, points, rung_table, spending, tables, terminal, verdict
from mea_ray.report.points import PointResult
from mea_ray.results.points import short_paths
from mea_ray.results.records import TrialResult, read_results
from mea_ray.verification.evidence import judge_rungs

COUNT = 60


@pytest.fixture(scope="module")
def results() -> list[TrialResult]:
    return list(drawn(COUNT))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_drawn(folder, COUNT)
    return html.write(folder)


def point(margin: float | None, gap: float | None, **more: Any) -> PointResult:
    known: dict[str, Any] = {
        "name": f"{margin}/{gap}",
        "values": {},
        "trials": ("t",),
        "wsr": margin,
        "least": margin,
        "accuracy": 0.9,
        "fidelity": 0.9,
        "verdict": "suggestive",
        "proved": 0.0,
    }
    return PointResult(**{**known, "margin": margin, "gap": gap, **more})


def test_paths_are_shortened_while_they_stay_distinct() -> None:
    paths = ["thief.training.learning_rate", "victim.training.learning_rate", "thief.model.name", "seed"]
    assert short_paths(paths) == {
        "thief.training.learning_rate": "thief.training.learning_rate",
        "victim.training.learning_rate": "victim.training.learning_rate",
        "thief.model.name": "model",
        "seed": "seed",
    }
    assert short_paths(["seed", "victim.seed"]) == {"seed": "seed", "victim.seed": "victim.seed"}


def test_the_front_is_the_set_of_points_that_none_dominates() -> None:
    rng = np.random.default_rng(0)
    cloud = [point(float(m), float(g)) for m, g in rng.random((200, 2))] + [point(None, 0.1), point(0.5, None)]
    front = points.front(cloud)
    known = [each for each in cloud if each.margin is not None and each.gap is not None]

    def beats(a: PointResult, b: PointResult) -> bool:
        assert None not in (a.margin, b.margin, a.gap, b.gap)
        return a.margin >= b.margin and a.gap <= b.gap and (a.margin > b.margin or a.gap < b.gap)  # type: ignore[operator]

    assert front and {id(each) for each in front} == {
        id(each) for each in known if not any(beats(other, each) for other in known)
    }


def test_importance_is_epsilon_squared_of_the_f_test() -> None:
    rng = np.random.default_rng(1)
    groups = [rng.normal(mean, 0.1, 30) for mean in (0.2, 0.4, 0.5)]
    cloud = [point(float(v), 0.0, values={"a": name}) for name, part in zip("xyz", groups, strict=True) for v in part]
    result = points.importance(cloud, "a", "wsr")
    f = stats.f_oneway(*groups).statistic
    between, within = 2, 87
    assert result == pytest.approx((between * (f - 1)) / (between * f + within))
    shuffled = [point(float(v), 0.0, values={"a": "xyz"[i % 3]}) for i, v in enumerate(rng.normal(0.5, 0.1, 90))]
    assert points.importance(shuffled, "a", "wsr") < 0.1
    assert math.isnan(points.importance(cloud, "a", "accuracy")), "it does not vary"


def test_numbers_are_binned_into_ranges_of_equal_size_and_names_are_not() -> None:
    cloud = [point(0.5, 0.0, values={"rate": i / 100, "model": "ab"[i % 2]}) for i in range(60)]
    by_rate = points.levels(cloud, "rate")
    assert by_rate.value_counts(sort=False).tolist() == [10] * points.BINS
    assert by_rate.iloc[0] == "0 to 0.09" and by_rate[59] == "0.5 to 0.59", "by the point's place"
    assert points.levels(cloud, "model").value_counts().to_dict() == {"a": 30, "b": 30}


def test_a_marginal_is_the_mean_of_the_points_where_the_number_is_known() -> None:
    cloud = [point(0.0, 0.1, values={"a": 10}), point(0.5, None, values={"a": 2}), point(1.0, 0.3, values={"a": 10})]
    lines = points.marginals([*cloud, point(0.9, 0.9)], "a")
    assert [(line.value, line.points, line.wsr, line.gap) for line in lines] == [
        ("2", 1, 0.5, None),
        ("10", 2, 0.5, 0.2),
    ]


def test_points_are_ranked_by_verdict_then_by_remaining_mark() -> None:
    cloud = [
        point(0.9, 0.0, verdict="not specific", name="unspecific"),
        point(0.5, 0.0, least=0.1, name="removed"),
        point(0.4, 0.0, least=0.4, name="kept"),
    ]
    assert [each.name for each in points.ranked(cloud)] == ["kept", "removed", "unspecific"]


def test_a_point_has_the_worst_verdict_and_the_mean_numbers_of_its_seeds() -> None:
    trials = [trial("a", seed=0, end=0.8), trial("b", seed=1, end=0.02)]
    (result,) = points.point_results(trials, judge_rungs(trials))
    assert result.trials == ("a", "b") and result.name == "model=vgg_like"
    assert result.wsr == pytest.approx((0.8 + 0.04) / 2)
    assert result.margin == pytest.approx(0.42 - 0.013), "minus the highest WSR of an innocent model"
    assert result.verdict == "not proved"
    assert result.gap == pytest.approx(0.004)


def test_the_page_of_many_points_is_small_and_has_all_sections(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('role="img" aria-labelledby') == 6, "no picture for each point"
    for heading in ("What survived", "What undoes it", "What it cost", "Proof against cost to customers"):
        assert heading in text
    for heading in ("Which settings matter", "Parallel coordinates", "Setting by setting", "What the search found"):
        assert heading in text
    assert "2026-01-31 · commit drawn" in text
    assert not re.search(r'(?:src|href)="(?!data:|#|report\.csv)', text)


def test_the_table_and_the_csv_hold_every_rung(page: Path, results: list[TrialResult]) -> None:
    text = page.read_text(encoding="utf-8")
    (data,) = re.findall(r'id="rungs-data">(.*?)</script>', text, flags=re.DOTALL)
    columns = {column["name"]: column for column in json.loads(data)["columns"]}
    with (page.parent / "report.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(columns["wsr"]["values"]) == 3 * COUNT
    trials = {result.trial: result for result in results}
    judged = judge_rungs(results)
    for place, line in enumerate(lines):
        rung = next(r for r in trials[line["trial"]].rungs if r.budget == int(line["budget"]))
        assert rung.report.wsr is not None
        assert float(line["wsr"]) == rung.report.wsr.rate
        assert columns["wsr"]["values"][place] == pytest.approx(rung.report.wsr.rate, abs=1e-3)
        assert line["verdict"] == judged[line["trial"], rung.budget].verdict
        assert columns["trial"]["texts"][columns["trial"]["values"][place]] == line["trial"]


def test_a_setting_cannot_close_the_script_element() -> None:
    table = [{"thief.model.name": "</script><b>", **dict.fromkeys(rung_table.MEASURED)}]
    assert "<" not in rung_table.as_json(table)
    assert json.loads(rung_table.as_json(table))["columns"][0]["texts"] == ["</script><b>"]


def test_selected_trials_are_judged_together_with_all_others(tmp_path: Path) -> None:
    write_drawn(tmp_path, 30)
    name = f"{3:016x}"
    one = html.write(tmp_path, only=[name])
    text = one.read_text(encoding="utf-8")
    assert one.name == f"report-{name}.html" and "1 trial of 30, with verdicts corrected for all of them" in text
    assert "corrected for 90 suspects" in text
    assert "<script" not in text, "one point needs no script"
    everything = list(drawn(30))
    picked = html.some(everything, ["model=cnn9"])
    assert picked and {each.point["thief.model.name"] for each in picked} == {"cnn9"}
    with pytest.raises(ConfigError, match=r"--only model=nothing.*thief\.model\.name"):
        html.some(everything, ["model=nothing"])


def test_costs_are_given_in_money_if_prices_are_set() -> None:
    trials = [trial("a").model_copy(update={"seconds": 7200.0}), trial("b").model_copy(update={"seconds": 3600.0})]
    assert spending.sentence(trials).text == "2 trials took 3.0 hours on cpu, and 2,000 queries."
    priced = spending.sentence(trials, PricesConfig(hour=2.5, query=0.01, currency="EUR"))
    assert "27.50 EUR (7.50 for machines, 20.00 for queries)" in priced.text


def printed(results: list[TrialResult], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    terminal.print_results(console, results)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_terminal_shows_setting_and_verdict_in_thirty_lines(results: list[TrialResult], width: int) -> None:
    lines = printed(results, width)
    assert max(map(len, lines)) <= width
    assert len(lines) < 120
    table = lines[: next(i for i, line in enumerate(lines) if "Variance" in line)]
    assert len(table) <= terminal.TABLE_LINES
    assert sum("learning_rate=" in line for line in table) >= 6, "three of the best and of the worst at least"
    assert sum("suggestive" in line for line in table) >= 3


@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_terminal_table_of_a_small_sweep_has_every_setting_and_verdict(width: int) -> None:
    trials = [trial(f"{m}{s}", m, s) for m in ("vgg_like", "resnet18") for s in range(4)]
    lines = printed(trials, width)
    end = next(i for i, line in enumerate(lines) if "lines; all are in the report" in line or "Means over" in line)
    head = lines[: min(end, next(i for i, line in enumerate(lines[3:], 3) if not line.strip()) + 1)]
    assert len(head) <= terminal.TABLE_LINES and max(map(len, lines)) <= width
    for model in ("vgg_like", "resnet18"):
        for seed in range(4):
            assert any(f"model={model}, seed={seed}" in line and "suggestive" in line for line in head)


@pytest.mark.parametrize("width", [80, 120, 160])
def test_no_other_table_is_longer_and_no_removal_is_wrapped(results: list[TrialResult], width: int) -> None:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    search = SearchConfig.model_validate({"name": "optuna", "metric": ["wsr", "victim_gap"], "mode": ["max", "min"]})
    terminal.print_results(console, results, search)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    start = next(i for i, line in enumerate(lines) if "Best by wsr" in line)
    end = next(i for i, line in enumerate(lines) if "Statistic" in line)
    assert end - start <= terminal.TABLE_LINES + 3, "its title, and the heading of the next"
    for text in ("pruning(rate=0.9)", f"0 of {COUNT} proved"):
        assert any(text in line for line in lines)


@pytest.mark.parametrize("width", [80, 120, 150, 200])
def test_no_verdict_is_wrapped_within_a_word(width: int) -> None:
    lines = printed(read_results(Path(__file__).parents[2] / "sweeps/results/quickstart"), width)
    table = lines[: next(i for i, line in enumerate(lines) if "lines; all are in the report" in line)]
    assert max(map(len, lines)) <= width and sum("not proved" in line for line in table) >= 5


def test_columns_that_do_not_fit_are_dropped_in_order() -> None:
    rows = tables.rows([trial(f"t{i:02}", seed=i % 4) for i in range(12)])
    visible = terminal.fitting(rows, 80)
    assert len(rows) == 36 and {row.queries for row in visible} == {"1,000"} and len(visible) == 12


def test_many_points_have_one_sentence_and_no_fitted_distribution(results: list[TrialResult]) -> None:
    texts = [finding.text for finding in verdict.findings(results)]
    assert any(f"Over {COUNT} points" in text for text in texts)
    assert not any("beta-binomial" in text for text in texts)
    assert len(texts) < 12


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; apt-get install chromium runs this test")
@pytest.mark.slow
def test_a_real_browser_sorts_and_filters_the_table(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    act = """<script>
    const type = (text) => { const box = document.getElementById("rungs-filter"); box.value = text;
      box.dispatchEvent(new Event("input")); };
    const note = () => document.getElementById("rungs-note").textContent;
    const wsr = () => [...document.querySelectorAll("#rungs td[data-label=WSR]")].map((c) => parseFloat(c.textContent));
    const out = { all: note() };
    type("wsr>50% budget=20000"); out.filtered = note();
    [...document.querySelectorAll("#rungs thead button")].find((b) => b.textContent === "WSR").click();
    out.sorted = wsr();
    type("cnn9 verdict=suggestive"); out.words = note();
    document.title = JSON.stringify(out);
    </script>"""
    acted = tmp_path / "acted.html"
    acted.write_text(text.replace("</body>", f"{act}</body>"), encoding="utf-8")
    dom = browse(acted, tmp_path / "profile", "--dump-dom")
    match = re.search(r"<title>(\{.*?\})</title>", dom)
    assert match is not None
    result = json.loads(match[1])
    lines = list(csv.DictReader((page.parent / "report.csv").open(encoding="utf-8")))
    high = [float(line["wsr"]) for line in lines if float(line["wsr"]) > 0.5 and line["budget"] == "20000"]
    words = sum(line["thief.model.name"] == "cnn9" and line["verdict"] == "suggestive" for line in lines)
    assert result["all"] == f"{3 * COUNT} of {3 * COUNT} lines"
    assert result["filtered"] == f"{len(high)} of {3 * COUNT} lines"
    assert result["sorted"] == pytest.approx([round(100 * rate, 1) for rate in sorted(high, reverse=True)][:50])
    assert result["words"] == f"{words} of {3 * COUNT} lines"
