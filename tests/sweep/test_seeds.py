"""Seeds as an axis of their own: every point is repeated with each, and the report shows means with intervals."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import pytest
from report_results import trial
from rich.console import Console

from mea_ray.config import SweepConfig, build
from mea_ray.core.errors import ConfigError
from mea_ray.report import html, seeds
from mea_ray.report.terminal import print_results
from mea_ray.sweep.plan import plan
from mea_ray.sweep.space import points


def sweep(**settings: Any) -> SweepConfig:
    return build(SweepConfig, settings)


def test_every_point_is_repeated_with_every_seed_and_keeps_its_draw() -> None:
    space = {
        "thief.model": {"grid": ["vgg_like", "cnn9"]},
        "thief.training.learning_rate": {"loguniform": [1e-4, 1e-2]},
    }
    result = points(sweep(space=space, search={"name": "random", "samples": 2}, seeds=[5, 7, 11]))
    assert [point["seed"] for point in result] == [5, 7, 11] * 4
    rates = [point["thief.training.learning_rate"] for point in result]
    assert all(len(set(rates[at : at + 3])) == 1 for at in range(0, 12, 3)) and len(set(rates)) == 4
    without = points(sweep(space=space, search={"name": "random", "samples": 2}))
    assert [{k: v for k, v in point.items() if k != "seed"} for point in result[::3]] == without


@pytest.mark.parametrize(("of", "victims"), [("thief", 1), ("victim", 3), ("both", 3)])
def test_seeds_of_the_victim_train_a_victim_each(of: str, victims: int) -> None:
    made = plan(sweep(seeds=3, seeds_of=of))
    assert (made.trial_count, made.victim_count) == (3, victims)
    assert {trial.config.seed for trial in made.trials} == ({0} if of == "victim" else {0, 1, 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds"),
        ({"seeds": [1, 1]}, "distinct"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": 2, "space": {"seed": {"grid": [0, 1]}}}, r"space\.seed.*`seeds` sets it"),
        (
            {"seeds": 2, "search": {"name": "optuna"}, "space": {"thief.training.momentum": {"uniform": [0.1, 0.5]}}},
            "every point once",
        ),
    ],
)
def test_seeds_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(sweep(**settings))


def test_means_have_students_interval_over_seeds_at_each_budget() -> None:
    results = [trial(f"t{seed}", seed=seed, end=0.6) for seed in range(4)]
    lines = seeds.lines(results)
    assert [(line.point, line.queries, line.seeds) for line in lines] == [
        ("thief.model=vgg_like", text, "4") for text in ("100", "300", "1,000")
    ]
    values = [wsr.rate for result in results if (wsr := result.rungs[-1].report.wsr) is not None]
    half = 3.182446 * stdev(values) / 2  # t(0.975, 3), from a table
    centre = fmean(values)
    assert lines[-1].wsr == f"{100 * centre:.1f}% [{100 * (centre - half):.1f}, {100 * (centre + half):.1f}]"
    assert lines[-1].verdicts == "suggestive" and lines[0].verdicts == "not proved"


def test_two_seeds_have_a_range_equal_ones_no_width_and_one_seed_no_line() -> None:
    first, second = trial("a", seed=0), trial("b", seed=1)
    low, high = (100 * wsr.rate for each in (first, second) if (wsr := each.rungs[-1].report.wsr) is not None)
    assert seeds.lines([first, second])[-1].wsr == f"{(low + high) / 2:.1f}% [{low:.1f}, {high:.1f}]"
    assert seeds.lines([first]) == []
    same = [first.model_copy(update={"trial": name, "point": {"seed": i}}) for i, name in enumerate("abc")]
    assert seeds.lines(same)[-1].wsr == f"{low:.1f}% [{low:.1f}, {low:.1f}]"


def test_a_seed_whose_trial_was_stopped_counts_only_where_it_came_to() -> None:
    results = [trial(f"t{seed}", seed=seed) for seed in range(3)]
    results[2] = results[2].model_copy(update={"rungs": results[2].rungs[:1], "status": "stopped"})
    assert [line.seeds for line in seeds.lines(results)] == ["3", "2", "2"]


def test_terminal_and_page_show_the_means() -> None:
    results = [trial(f"{model}{seed}", model, seed) for model in ("vgg_like", "cnn9") for seed in range(3)]
    console = Console(record=True, width=200)
    print_results(console, results)
    output = console.export_text()
    assert "95% Student interval" in output and seeds.lines(results)[0].wsr in output
    page = html.render(results, name="x")
    assert 'id="means"' in page and seeds.lines(results)[-1].wsr in page
