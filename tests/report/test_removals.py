from __future__ import annotations

from xml.etree import ElementTree

import pytest
from report_results import model_report, trial, with_innocents, with_removals

from mea_ray.report import html, removals
from mea_ray.report.terminal import make_console, print_results
from mea_ray.tracking.rows import follow_up


def test_losses_are_means_over_seeds_in_points() -> None:
    trials = [with_removals(trial("a", seed=0)), with_removals(trial("b", seed=1))]
    gone = {(loss.removal, loss.on): loss for loss in removals.losses(trials)}
    hard = gone["pruning(rate=0.9)", "substitute"]
    before = [t.rungs[-1].report for t in trials]
    assert len(hard.results) == 2 and hard.strength == 0.9
    assert hard.accuracy == pytest.approx(100 * (sum(b.accuracy for b in before) / 2 - 0.80))
    assert hard.wsr == pytest.approx(100 * (sum(b.wsr.rate for b in before if b.wsr) / 2 - 0.10))


def test_the_table_has_proofs_and_false_accusations_after_removal() -> None:
    lines = {(line.removal, line.on): line for line in removals.lines([with_removals(with_innocents(trial("a"), 400))])}
    assert lines["pruning(rate=0.1)", "stolen model"].verdict == "proved"
    lines = {(line.removal, line.on): line for line in removals.lines([with_removals(trial("a"))])}
    assert lines["pruning(rate=0.9)", "stolen model"].verdict == "not proved"
    assert lines["pruning(rate=0.1)", "stolen model"].verdict == "suggestive"
    assert lines["pruning(rate=0.9)", "null model"].verdict == "not accused"
    result = with_removals(trial("a"))
    framed = result.removals[-1].model_copy(update={"after": model_report(0.8, 0.9)})
    (*_, last) = removals.lines([result.model_copy(update={"removals": [framed]})])
    assert (last.verdict, last.tone) == ("accused falsely", "bad")


def test_the_verdict_after_a_removal_is_the_worst_over_seeds() -> None:
    trials = [with_removals(trial("a", seed=0)), with_removals(trial("b", seed=1))]
    weak = trials[1].removals[1].model_copy(update={"after": model_report(0.9, 0.2)})
    changed = [trials[1].removals[0], weak, *trials[1].removals[2:]]
    trials[1] = trials[1].model_copy(update={"removals": changed})
    lines = {(line.removal, line.on): line for line in removals.lines(trials)}
    assert lines["pruning(rate=0.1)", "stolen model"].verdict == "not proved"


def test_the_plane_has_a_line_per_removal_by_strength_and_escapes_names() -> None:
    (figure,) = removals.figures([with_removals(trial("a"))])
    assert [line["name"] for line in figure["legend"]] == ["pruning", "<tune>"]
    picture = ElementTree.fromstring(str(figure["svg"]))
    about = next(node.text for node in picture.iter() if node.tag.endswith("desc"))
    assert about is not None and about.index("5 points of WSR") < about.index("70 points of WSR") and "<tune>" in about


def test_report_and_terminal_have_removals_only_if_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    with_them, without = with_removals(trial("a")), trial("b")
    page = html.render([with_them], name="s")
    assert ">Watermark removal<" in page and "&lt;tune&gt;" in page and "<tune>" not in page
    assert ">Watermark removal<" not in html.render([without], name="s")
    print_results(make_console(), [with_them])
    assert "suggestive" in capsys.readouterr().out


def test_trackers_get_numbers_after_removals() -> None:
    numbers = follow_up(with_removals(trial("a")))
    assert numbers["removal.pruning(0.9).substitute.wsr"] == 0.1
    assert numbers["removal.pruning(0.9).null_model.accuracy"] == 0.85
    assert len(numbers) == 8 and follow_up(trial("b")) == {}
