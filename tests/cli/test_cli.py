"""The command line: what it shows, where it stops, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from report_results import trial, write_sweep
from rich.console import Console

from mea_ray.cli import catalogue
from mea_ray.cli import main as cli
from mea_ray.cli.options import FAILED, INTERRUPTED, OK, USAGE
from mea_ray.cli.progress import SweepProgress
from mea_ray.sweep import address, events

RunSweep = Callable[..., Any]


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "my experiment.yaml"
    path.write_text(f"storage: {tmp_path}\nthief:\n  budgets: [50, 100]\n", encoding="utf-8")
    return path


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        f"name: small\nbase:\n  storage: {tmp_path}\n  thief: {{budgets: [50, 100]}}\n"
        "space:\n  thief.model.name: {grid: [vgg_like, cnn9]}\n  seed: {grid: [0, 1]}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunSweep], None]:
    """Replaces ``mea_ray.sweep.runner.run_sweep`` by a function, whether or not another test imported it before."""
    from mea_ray.sweep import runner as module

    def install(run_sweep: RunSweep) -> None:
        monkeypatch.setattr(module, "run_sweep", run_sweep)

    return install


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys\nfrom mea_ray.cli.main import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'ray', 'numpy', 'pydantic', 'matplotlib', 'wandb', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("run", "sweep", "plan", "report", "list", "bench"):
        assert verb in done.stdout


@pytest.mark.parametrize("verb", ["run", "sweep", "plan", "report", "list"])
def test_every_command_shows_an_example_and_the_exit_codes(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "--help"]) == OK
    output = capsys.readouterr().out
    assert f"mea-ray {verb}" in output.split("For example", 1)[1]
    assert "130" in output


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mea_ray", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    from mea_ray import __version__

    assert (done.returncode, done.stdout.strip()) == (0, __version__)


@pytest.mark.parametrize("argv", [["runn"], ["run"], ["run", "a.yaml", "--no-such-option"], ["list", "modles"]])
def test_usage_errors_exit_with_2(argv: list[str]) -> None:
    assert cli.main(argv) == USAGE


def test_a_mistyped_key_is_answered_with_the_nearest_one(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(experiment), "thief.budgest=[10]"]) == USAGE
    output = " ".join(capsys.readouterr().err.split())
    assert "thief.budgest" in output and "did you mean 'thief.budgets'?" in output
    assert "Traceback" not in output


def test_a_mistyped_parameter_and_component_too(experiment: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(experiment), "victim.model.name=resnet81"]) == USAGE
    assert "did you mean 'resnet18'?" in capsys.readouterr().err
    assert cli.main(["run", str(experiment), "thief.attack.query_chunks=2"]) == USAGE
    assert "did you mean 'query_chunk'?" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from mea_ray.core.errors import ConfigError

    with pytest.raises(ConfigError):
        cli.main(["plan", str(tmp_path / "missing.yaml"), "--debug"])
    with pytest.raises(ConfigError):
        cli.main(["--debug", "plan", str(tmp_path / "missing.yaml")])
    assert cli.main(["plan", str(tmp_path / "missing.yaml")]) == USAGE


def test_a_sweep_given_to_run_and_the_other_way_round(
    experiment: Path, sweep_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(sweep_file)]) == USAGE
    assert "mea-ray sweep" in capsys.readouterr().err
    assert cli.main(["sweep", str(experiment)]) == USAGE
    assert "mea-ray run" in capsys.readouterr().err


def test_sweep_runs_and_prints_table_and_paths(
    sweep_file: Path,
    tmp_path: Path,
    runner: Callable[[RunSweep], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(address, "check", lambda given: None)
    queries: dict[str, Any] = {}
    folder = tmp_path / "out"

    def run_sweep(sweep: Any, *, resume: bool, address: str | None, on_event: events.OnEvent) -> SimpleNamespace:
        queries.update(name=sweep.name, resume=resume, address=address, budgets=sweep.base.thief.budgets)
        on_event(events.SweepStarted(str(folder), 6, 0, 1, 1, 6000))
        (folder / "wandb").mkdir(parents=True)
        return SimpleNamespace(folder=folder, results=write_sweep(folder), failed={}, grid=None)

    runner(run_sweep)
    argv = ["sweep", str(sweep_file), "thief.budgets=[5,7]", "name=other", "--resume", "--address", "auto"]
    assert cli.main(argv) == OK
    assert queries == {"name": "other", "resume": True, "address": "auto", "budgets": (5, 7)}
    output = capsys.readouterr()
    for word in ("Victim", "Null", "Fidelity", "WSR", "WFPR", "p-value", "suggestive"):
        assert word in output.out
    for path in (folder / "results", folder / "wandb", folder / "report.html"):
        assert str(path) in output.out
        assert path.exists()
    assert "6,000 queries" in output.err


def test_failed_trials_exit_with_1_and_keep_the_others(
    sweep_file: Path, tmp_path: Path, runner: Callable[[RunSweep], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    runner(
        lambda *_, **__: SimpleNamespace(
            folder=folder, results=write_sweep(folder, 1), failed={"t7": "out of [memory]"}, grid=None
        )
    )
    assert cli.main(["sweep", str(sweep_file)]) == FAILED
    output = capsys.readouterr().out
    assert "--resume" in output and str(folder / "report.html") in output
    assert "t7: out of [memory]" in output


def test_ctrl_c_exits_with_130_and_says_how_to_go_on(
    sweep_file: Path, runner: Callable[[RunSweep], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def run_sweep(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    runner(run_sweep)
    assert cli.main(["sweep", str(sweep_file)]) == INTERRUPTED
    assert "--resume" in capsys.readouterr().err


def test_run_is_a_sweep_of_one_trial(
    experiment: Path, tmp_path: Path, runner: Callable[[RunSweep], None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def run_sweep(sweep: Any, **_: Any) -> SimpleNamespace:
        seen.append(sweep)
        return SimpleNamespace(folder=tmp_path / "o", results=write_sweep(tmp_path / "o", 1), failed={}, grid=None)

    runner(run_sweep)
    assert cli.main(["run", str(experiment), "seed=4"]) == OK
    (sweep,) = seen
    assert (sweep.name, sweep.space, sweep.base.seed) == ("my-experiment", {}, 4)
    assert sweep.base.thief.budgets == (50, 100)


def test_run_local_needs_no_ray(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mea_ray.experiment import local

    def run(config: Any, name: str, *, on_epoch: Callable[..., None], warn: Callable[[str], None]) -> local.LocalRun:
        on_epoch("victim", "v", {"stage": "embed", "epoch": 1})
        result = trial("alone", config=config.resolved())
        result.save(tmp_path / "local" / name / "results" / "alone.json")
        return local.LocalRun(result, tmp_path / "local" / name, reused=True)

    monkeypatch.setattr(local, "run_local", run)
    assert cli.main(["run", str(experiment), "--local"]) == OK
    assert (tmp_path / "local" / "my-experiment" / "report.html").exists()
    assert "already finished" in capsys.readouterr().err


def test_plan_says_what_it_will_cost(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(sweep_file), "verification.null_models=2"]) == OK
    lines = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"trials 4", "distinct victims 1", "null models 2", "substitutes 8", "queries 400"} <= lines
    assert any("thief.model=cnn9, seed=1" in line for line in lines)


def test_settings_that_a_change_of_component_drops_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "one.yaml"
    file.write_text(f"base: {{storage: {tmp_path}, data: {{name: digits, image_size: 16}}}}\n", encoding="utf-8")
    assert cli.main(["plan", str(file), "data.name=figures"]) == OK
    assert "data.image_size=16" in capsys.readouterr().err
    assert cli.main(["plan", str(file), "data.name=figures", "data.image_size=16"]) == OK
    assert "image_size" not in capsys.readouterr().err


def test_plan_refuses_an_unknown_path_of_the_space(sweep_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_file.write_text("space:\n  thief.budgest: {grid: [[1], [2]]}\n", encoding="utf-8")
    assert cli.main(["plan", str(sweep_file)]) == USAGE
    assert "did you mean 'thief.budgets'?" in capsys.readouterr().err


def test_report_renders_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path / "s")
    assert cli.main(["report", str(tmp_path / "s"), "--png", str(tmp_path / "c.png")]) == OK
    assert (tmp_path / "s" / "report.html").exists() and (tmp_path / "c.png").exists()
    assert str(tmp_path / "s" / "report.html") in capsys.readouterr().out
    assert cli.main(["report", str(tmp_path / "nothing")]) == USAGE


@pytest.mark.parametrize("kind", [kind for kind in catalogue.TABLES if kind != "benchmarks"])
def test_list_shows_every_component_with_its_parameters(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", kind]) == OK
    output = capsys.readouterr().out
    table = catalogue.table(kind)
    for name in table.names():
        assert name in output
        for parameter in table.parameters(name):
            assert parameter.name in output


def test_list_without_a_kind_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == OK
    output = capsys.readouterr().out
    for kind in catalogue.TABLES:
        if kind != "benchmarks":
            assert all(name in output for name in catalogue.table(kind).names())


def test_list_config_shows_paths_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "config", "service"]) == OK
    output = capsys.readouterr().out
    assert "service.max_wait_ms" in output and "service.rate.images_per_second" in output
    assert "thief.budgets" not in output
    assert cli.main(["list", "config", "servise"]) == USAGE
    assert "did you mean 'service'?" in capsys.readouterr().err


def test_list_answers_an_unknown_name_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "models", "resnet81"]) == USAGE
    assert "did you mean 'resnet18'?" in capsys.readouterr().err


@pytest.mark.parametrize("plain", [False, True], ids=["record", "dict"])
def test_bench_checks_its_settings_and_writes_json(
    plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = ModuleType("fake_bench")

    def measure(*, steps: int = 30) -> Any:
        measured = {"speed": 12.5, "steps": steps, "rounds": [1]}
        return measured if plain else SimpleNamespace(to_dict=lambda: measured)

    fake.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_bench", fake)
    monkeypatch.setitem(catalogue.BENCHMARKS.entries, "train", "fake_bench:measure")
    monkeypatch.setattr(catalogue.BENCHMARKS, "_schemas", {})
    output = tmp_path / "b.json"
    assert cli.main(["bench", "train", "steps=3", "--json", str(output)]) == OK
    assert json.loads(output.read_text()) == {"speed": 12.5, "steps": 3, "rounds": [1]}
    assert "12.5" in capsys.readouterr().out
    assert cli.main(["bench", "train", "stesp=3"]) == USAGE
    assert "did you mean 'steps'?" in capsys.readouterr().err


EVENTS: list[events.Event] = [
    events.SweepStarted("out", 2, 1, 1, 1, 200),
    events.ModelEpoch("victim", "0123456789", 1, 1, {"loss": 0.5}),
    events.ModelReady("victim", "0123456789", "out/v"),
    events.ServiceStarted("victim-0123", "0123456789"),
    events.TrialStarted("t1", {"thief.model.name": "[bold]odd"}, 1, "n", (50, 100), 0),
    events.Queried("t1", 50, 100),
    events.Queried("t1", 100, 100),
    events.Phase("t1", "substitute", 2, 2),
    events.RungFinished("t1", 100, 100, 0.9, 0.8, 0.7, 0.1, 0.0),
    events.Tried("t1", "wrk", "null_model", 0.8, 0.015),
    events.Tried("t1", "neural_cleanse", "substitute", flagged=("deer", "dog")),
    events.TrialRestarted("t1", "killed"),
    events.TrialMadeWay("t1", "ReplicasAway: for 20 s"),
    events.TrialStarted("t1", {"thief.model.name": "[bold]odd"}, 2, "n", (50, 100), 1),
    events.TrialFinished("t1", "out/results/t1.json"),
    events.TrialFailed("t2", "no [memory]"),
    events.Warned("W&B is away"),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_everything_with_and_without_a_terminal(terminal: bool) -> None:
    import io

    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=160, highlight=False, color_system=None)
    with SweepProgress(console, clock=lambda: 3.0) as progress:
        for event in EVENTS:
            progress(event)
    output = stream.getvalue()
    for word in ("1 finished before", "victim 01234567 is ready", "thief.model=[bold]odd", "WSR 70.0%", "no [memory]"):
        assert word in output
    assert "wrk on the null model: accuracy 80.0%, WSR 1.5%" in output
    assert "neural_cleanse on the substitute: flags deer, dog" in output
    assert "started\n" in output and "goes on, 1 of 2 rungs done before" in output and "ReplicasAway" not in output
    assert "100 queries answered" in output and "W&B is away" in output
    assert ("\x1b[" in output) is terminal


def test_a_log_is_never_silent_for_long_and_names_the_phase_and_the_time_left() -> None:
    import io

    now = [0.0]
    stream = io.StringIO()
    progress = SweepProgress(Console(file=stream, width=200, color_system=None), clock=lambda: now[0])
    progress.beat()
    assert stream.getvalue() == "", "something was printed just now"
    now[0] = 9.0
    progress.beat()
    assert "waiting for the first trial" in stream.getvalue()
    progress(events.SweepStarted("out", 3, 0, 1, 1, 200))
    for name in ("t1", "t2"):
        progress(events.TrialStarted(name, {"seed": int(name[1])}, 1, "n", (50, 100), 0))
    progress(events.Phase("t1", "substitute", 1, 2))
    progress(events.Phase("t2", "removal", 3, 12))
    now[0] = 19.0
    progress(events.TrialFinished("t1", "out/results/t1.json"))
    now[0] = 28.0
    progress.beat()
    *_, last = stream.getvalue().splitlines()
    assert last.endswith("seed=2: removal 3/12; 2 left, about 38 s")
    lines = len(stream.getvalue().splitlines())
    progress.beat()
    assert len(stream.getvalue().splitlines()) == lines


def test_progress_shows_an_event_that_it_does_not_know() -> None:
    import io

    class Later(events.Event):
        def __str__(self) -> str:
            return "something new"

    stream = io.StringIO()
    SweepProgress(Console(file=stream, width=120))(Later())
    assert "something new" in stream.getvalue()


def test_a_renamed_option_is_one_plain_line_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("victim: {watermark: {name: mea_carrier, carrier_rho: 0.3}}\n")
    assert (
        cli.main(["run", str(file), "--local", "victim.watermark.target_class=0", f"storage={tmp_path / 's'}"]) == USAGE
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "note watermark 'mea_carrier': 'carrier_rho' is now 'carrier.rho'; write carrier.rho=0.3, the old name is "
        "removed in the next version"
    )
    assert not any("carrier_rho" in line for line in lines[1:])
