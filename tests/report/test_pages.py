from __future__ import annotations

import csv
import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_results import trial, with_removals, write_sweep

from mea_ray.cli.main import main
from mea_ray.cli.options import OK
from mea_ray.config import load_sweep
from mea_ray.core.errors import ConfigError
from mea_ray.report import pages, published
from mea_ray.report.markdown import largest_table, removals_table, results_table, table
from mea_ray.report.record import make_record
from mea_ray.results.records import TrialResult
from mea_ray.sweep.space import experiment_at, points

PAGE = """# Title

<!-- record: demo/results -->
old
<!-- end -->

between

<!-- record: demo/made -->
<!-- end -->
<!-- record: demo/curve -->
<!-- end -->
after
"""


@pytest.fixture
def records(tmp_path: Path) -> Path:
    write_sweep(tmp_path / "sweep")
    make_record(tmp_path / "sweep", tmp_path / "records" / "demo", command="mea-ray sweep demo.yaml", note="a laptop")
    return tmp_path / "records"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(PAGE, encoding="utf-8")
    return path


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_only_record_blocks_change_and_rendering_is_idempotent(page: Path, records: Path) -> None:
    images = page.parent / "images"
    assert set(pages.out_of_date(page, records, images)) == {page, images / "demo.svg"}
    assert pages.write(page, records, images)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- record: demo/results -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert "\nbetween\n" in text and "\nold\n" not in text
    assert "```console\n$ mea-ray sweep demo.yaml\n```" in text and "A laptop. Commit `abc1234`" in text
    assert "](images/demo.svg)" in text
    assert pages.out_of_date(page, records, images) == [] and not pages.write(page, records, images)


def test_a_changed_number_makes_page_and_picture_out_of_date(page: Path, records: Path) -> None:
    images = page.parent / "images"
    pages.write(page, records, images)
    path = records / "demo" / "results" / "tvgg_like0.json"
    result = TrialResult.load(path)
    first = result.rungs[0].model_copy(update={"report": result.rungs[0].report.model_copy(update={"accuracy": 0.123})})
    result.model_copy(update={"rungs": [first, *result.rungs[1:]]}).save(path)
    assert pages.out_of_date(page, records, images) == [page, images / "demo.svg"]


def test_a_picture_drawn_by_another_matplotlib_is_up_to_date(page: Path, records: Path) -> None:
    images = page.parent / "images"
    pages.write(page, records, images)
    picture = images / "demo.svg"
    assert ElementTree.fromstring(picture.read_text(encoding="utf-8")).tag.endswith("svg")
    picture.write_text(picture.read_text(encoding="utf-8").replace("<path", "<path  ", 5), encoding="utf-8")
    assert pages.out_of_date(page, records, images) == []
    picture.unlink()
    assert pages.out_of_date(page, records, images) == [picture]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("<!-- record: demo/result -->\n<!-- end -->", "did you mean 'results'"),
        ("<!-- record: dem/results -->\n<!-- end -->", "did you mean 'demo'"),
        ("<!-- record: demo -->\n<!-- end -->", "is not a part"),
        ("<!-- record: demo/results -->\n", "add it"),
    ],
)
def test_a_block_that_cannot_be_rendered_says_why(page: Path, records: Path, block: str, reason: str) -> None:
    page.write_text(block, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason):
        pages.write(page, records, page.parent)
    assert page.read_text(encoding="utf-8") == block


def test_the_table_has_means_over_seeds_and_each_seeds_wsr(tmp_path: Path) -> None:
    rows = cells(results_table("demo", write_sweep(tmp_path)))
    assert rows[0] == ["Model", "Queries", "Accuracy", "Fidelity", "WSR", "WFPR", "Verdict"]
    by_name = {(row[0], row[1]): row[2:] for row in rows[1:]}
    assert by_name["victim", ""] == ["95.2%", "–", "99.6%", "15.0%", ""]
    assert by_name["innocent model", ""][:3] == ["95.6%", "94.0%", "1.3%"]
    assert by_name["substitute, vgg_like", "1,000"] == [
        "91.0%",
        "92.0%",
        "87.0% (85.0, 87.0, 89.0)",
        "15.0%",
        "suggestive",
    ]
    assert by_name["substitute, resnet18", "300"][-1] == "not proved"
    assert [row[0] for row in rows].count("victim") == 1


def test_the_short_table_has_the_rows_of_the_largest_budget_with_the_same_verdicts(tmp_path: Path) -> None:
    results = write_sweep(tmp_path)
    rows, short = cells(results_table("demo", results)), cells(largest_table("demo", results))
    assert {row[1] for row in short[1:]} == {"", "1,000"} < {row[1] for row in rows[1:]}
    assert [row for row in rows if row in short] == short


def test_the_papers_figures_are_in_a_column_next_to_ours(tmp_path: Path) -> None:
    config = {"victim": {"model": {"name": "vgg_like"}}, "thief": {"model": {"name": "alexnet", "width": 0.5}}}
    result = trial("t1", config=config).model_copy(update={"point": {}})
    table = results_table("architectures", [result])
    assert cells(table)[-1][-1] == "accuracy 79.46% ± 0.27, WSR 71.65% ± 3.55"
    assert table.endswith("\n\nPaper: MEA-Defender, table II.")
    assert "Paper" not in results_table("quickstart", [result])


@pytest.mark.parametrize("sweep", sorted({entry.sweep for entry in published.all_published()}))
def test_every_published_figure_stands_beside_a_trial_of_its_sweep(sweep: str) -> None:
    loaded = load_sweep(Path(f"sweeps/{sweep}.yaml"))
    configs = [experiment_at(loaded, point).resolved() for point in points(loaded)]
    for entry in published.all_published():
        if entry.sweep == sweep:
            matched = [
                published.find(sweep, entry.model, config, queries=budget, removal=removal, tried_on=entry.tried_on)
                for config in configs
                for budget in config["thief"]["budgets"]
                for removal in config["removal"]["methods"] or [None]
            ]
            assert entry in matched, entry


def test_removals_have_a_separate_table() -> None:
    rows = cells(removals_table("removal", [with_removals(trial("a"))]))
    assert rows[0] == ["Removal", "stolen model: accuracy, WSR", "null model: accuracy, WSR"]
    assert rows[1] == ["pruning(rate=0.9)", "80.0%, 10.0%", "85.0%, 2.0%"]
    assert rows[2] == ["pruning(rate=0.1)", "90.0%, 75.0%", ""]


def test_the_command_line_prints_markdown_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path)
    assert main(["report", str(tmp_path), "--markdown"]) == OK
    output = capsys.readouterr().out
    assert output.startswith("## demo\n\n| Model | Queries |") and not (tmp_path / "report.html").exists()
    assert main(["report", str(tmp_path), "--csv"]) == OK
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == 30 and {line["model"] for line in lines} == {"victim", "null model", "substitute"}


def test_the_command_line_rewrites_pages(page: Path, records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["report", str(records), "--page", str(page), "--images", str(page.parent / "images")]
    assert main(argv) == OK and "rewritten" in capsys.readouterr().out
    assert main(argv) == OK and "up to date" in capsys.readouterr().out


def test_a_name_from_the_data_is_escaped_in_its_cell() -> None:
    written = table(["class", "WSR"], [["a|b\n<script>x</script>", "1%"]])
    assert written.splitlines() == ["| class | WSR |", "| --- | ---: |", "| a\\|b &lt;script>x&lt;/script> | 1% |"]
