"""The report's charts of an attack, and its table of the owner's query log."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from report_results import trial, with_thief

from mea_ray.report import attacks, curves, html
from mea_ray.tracking.rows import attack_curves, owner_saw, thinned


def test_lines_of_one_kind_share_a_chart_of_at_most_eight() -> None:
    logged = with_thief(trial("t")).rungs[-1].curves
    result = attacks.charts(logged)
    assert list(result) == ["reward", "loss", "policy"]
    assert list(result["reward"]) == ["", "<certainty>"] and result["reward"][""] == logged["reward"]
    assert list(result["policy"]) == [str(label) for label in range(4, 12)], "those that end highest"
    assert len(result["policy"]["4"]) == attacks.POINTS


def test_thinning_keeps_both_ends() -> None:
    points = [(i, float(i)) for i in range(1001)]
    assert thinned(points, 5) == [(0, 0.0), (250, 250.0), (500, 500.0), (750, 750.0), (1000, 1000.0)]
    assert thinned(points[:3], 5) == points[:3] and thinned([], 5) == []


def test_the_page_has_curves_of_the_attack_and_the_owners_log() -> None:
    results = [with_thief(trial("t0", seed=0)), with_thief(trial("t1", seed=1)), trial("t2", "resnet18")]
    page = html.render(results, name="x")
    assert "Progress of the attacks" in page and "The owner's view of the queries" in page
    assert page.count("<figcaption>reward</figcaption>") == 1, "one trial of a point is enough"
    assert "the 8 of 12 that end highest" in page
    assert "&lt;certainty&gt;" in page and "<certainty>" not in page
    assert page.count(">alarm<") == 2 and page.count(">not judged<") == 2 and "2 of 2" in page and "0.710" in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 4 + 3 + 4 + 2
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert not any(colour in picture for colour in curves.COLOURS), "colours are the page's own"
    assert "answers per predicted class: 250, 150, 100" in page
    plain = html.render([trial("t2")], name="x")
    assert "Progress of the attacks" not in plain and "The owner's view" not in plain


def test_a_long_table_is_truncated_with_a_note() -> None:
    many = [with_thief(trial(f"t{i}", seed=i), accounts=30) for i in range(2)]
    page = html.render(many, name="x")
    assert "The first 40 of 60." in page


def test_trackers_get_attack_curves_and_query_log() -> None:
    result = with_thief(trial("t"))
    messages = attack_curves(result)
    assert messages["attack/reward"] == result.rungs[-1].curves["reward"] and len(messages["attack/policy/3"]) == 500
    saw = owner_saw(result)
    assert (saw["query_log.1.client"], saw["query_log.1.images"], saw["query_log.1.alarm"]) == ("t-1", 500, True)
    assert saw["query_log.2.shapiro_w"] is None and saw["query_log.1.classes"] == "250,150,100"
    assert attack_curves(result.model_copy(update={"rungs": []})) == {} == owner_saw(trial("t"))
