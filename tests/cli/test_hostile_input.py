"""Whatever somebody types or points at ends in one line and an exit code: no traceback, no hang, nothing written.

`python tests/cli/test_hostile_input.py 20000` tries as many random overrides and files by hand.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mea_ray.cli.errors import report
from mea_ray.cli.main import main
from mea_ray.cli.options import OK, USAGE
from mea_ray.cli.sweeps import find
from mea_ray.config import ExperimentConfig, load_experiment, load_sweep
from mea_ray.config.paths import paths
from mea_ray.core.errors import MeaRayError
from mea_ray.sweep.plan import draft

LIMIT_S = 30.0
QUICKSTART = find(Path("quickstart"))
VALUES = [
    *("", "~", "null", ".nan", "-.inf", ".inf", "1e999", "-0", "0", "1", "-1", "1.5", "9" * 27, "-" + "9" * 27),
    *("true", "[]", "{}", "[[]]", "[1, 2]", "{a: 1}", "{name: 1}", "{name: [pruning]}", "{name: null}", "{<<: *x}"),
    *(
        "*x",
        "&x [*x]",
        "&x {a: *x}",
        "a: b: c",
        "'",
        '"',
        "!!python/object:os.system x",
        "!!binary aGk=",
        "\x00",
        "\ud800",
    ),
    *("[" * 300, "{a: " * 300, "- " * 300, "é", "日本", "../..", "/dev/null", "/proc/self/mem", "a" * 5000, "=", "x=y"),
    *("{grid: []}", "{grid: [.nan]}", "{uniform: [0, .inf]}", "{uniform: [1, 0]}", "{loguniform: [0, 1]}", "{grid: 1}"),
    *("{choice: [{a: [1]}, 2]}", "{uniform: [a, b]}", "{grid: [1], choice: [2]}", "2024-01-01", "0x1F", "1_000", "on"),
    *("package.module:Class", "os:system", "mea_ray.models:MODELS", ":", "a:", ":a", "..:..", "__main__:x"),
]
KEYS = [
    *paths(ExperimentConfig, {}),
    *(f"{key}.more" for key in ("seed", "data", "victim.model", "thief.budgets", "thief.attack.learning_rate")),
    *("", ".", "..", "a", "data..name", "base", "base.data", "name", "space", "space.seed", "space.thief.budgets"),
    *("seeds", "seeds_of", "search", "search.name", "search.metric", "search.mode", "search.samples", "scheduler"),
    *("space.data.name", "space.victim.watermark.target_class", "victim.watermark.source_classes", "splits.thief_pool"),
]
BYTES: dict[str, bytes] = {
    "latin-1": "data: digits # é".encode("latin-1"),
    "UTF-16": "data: digits".encode("utf-16"),
    "UTF-16 without a mark": "data: digits".encode("utf-16-le"),
    "empty": b"",
    "zeros": b"\0" * 100,
    "deep lists": b"[" * 20_000,
    "deep mappings": b"a:\n" + b"".join(b" " * depth + b"a:\n" for depth in range(1, 2000)),
    "a cycle": b"data: &x {name: *x}",
    "a cycle of lists": b"thief: {budgets: &x [*x]}",
    "a billion laughs": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (97 + i, 97 + i, b", ".join([b"*%c" % (96 + i)] * 9)) for i in range(1, 12)),
    "NaN": b"victim: {model: {name: vgg_like, width: .nan}}",
    "infinity": b"thief: {training: {learning_rate: .inf}}",
    "an integer of 27 digits": b"seed: " + b"9" * 27,
    "a list at the top": b"- data\n- digits\n",
    "a text at the top": b"digits",
    "an object of Python's": b"data: !!python/object/apply:os.system ['true']",
    "keys that are no text": b"{[a]: 1}",
    "two documents": b"seed: 1\n---\nseed: 2\n",
}


def outcome(path: Path | None, overrides: list[str], *, sweep: bool) -> str:
    """Read a config as the commands do, and return the title of the error panel; `Bug` for what nobody foresaw."""
    began = time.monotonic()
    try:
        if sweep:
            draft(load_sweep(path or QUICKSTART, overrides))
        else:
            load_experiment(path, overrides)
        title = "fine"
    except Exception as error:
        title = report(error).title
        assert isinstance(error, MeaRayError) or title != "Bug", repr(error)
        assert "\n\n" not in report(error).text
    assert time.monotonic() - began < LIMIT_S, "it took too long"
    return title


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(KEYS), st.one_of(st.sampled_from(VALUES), st.text(max_size=8))), max_size=3),
    st.booleans(),
)
def test_any_override_is_taken_or_refused_in_words(pairs: list[tuple[str, str]], sweep: bool) -> None:
    outcome(None, [f"{key}={value}" for key, value in pairs], sweep=sweep)


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES)
def test_any_file_is_taken_or_refused_in_words(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    for sweep in (False, True):
        outcome(file, [], sweep=sweep)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text(alphabet="ab:{}[],&*!-#'\"\n .1", max_size=60).map(str.encode)))
def test_any_bytes_are_taken_or_refused_in_words(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    outcome(file, [], sweep=False)


def special(kind: str, folder: Path) -> Path:
    """Make something that is no regular file."""
    path = folder / "c.yaml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a socket":
        here = socket.socket(socket.AF_UNIX)
        here.bind(os.path.relpath(path))  # an absolute path may be too long for one
    elif kind == "a device without end":
        path = Path("/dev/zero")
    return path


SPECIAL = ["nothing", "a folder", "a pipe", "a link to itself", "a socket", "a device without end"]


@pytest.mark.parametrize("command", [["run", "--local"], ["sweep"], ["plan"]], ids=lambda command: command[0])
@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_in_one_line(
    kind: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = special(kind, tmp_path)
    began = time.monotonic()
    assert main([command[0], str(file), *command[1:], f"storage={tmp_path / 's'}"]) == USAGE
    assert time.monotonic() - began < LIMIT_S
    output = capsys.readouterr().err
    assert "Traceback" not in output and "Bug" not in output and file.name in output.replace("\n", "")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("callback", ["os:system", "a", "nowhere:Class"])
def test_plan_imports_what_the_sweep_imports(callback: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("name: s\n")
    assert main(["plan", str(file), f"callbacks={callback}"]) == USAGE
    assert "callbacks" in capsys.readouterr().err


@pytest.mark.parametrize("uri", ["s3://", "s3:///", "gs://"])
def test_a_uri_without_a_bucket_is_refused(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("seed: 1\n")
    assert main(["run", str(file), "--local", f"storage={uri}"]) == USAGE
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "names no bucket" in shown or "Missing bucket name" in shown


def test_closed_streams_are_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--version"]) == OK
    assert main(["list", "nothing"]) == USAGE


NOBODY = "~nobody-of-this-name/x"


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "{}", f"storage={NOBODY}"],
        ["run", "{}", "--local", f"storage={NOBODY}"],
        ["run", "{}", f"resources.py_modules=[{NOBODY}]"],
        ["run", "{}", "--local", f"victim.weights={NOBODY}"],
        ["run", "{}", "--local", "data={name: cifar10, root: NOBODY, download: false}".replace("NOBODY", NOBODY)],
        ["run", "{}", "--local", "data={name: arrays, path: NOBODY}".replace("NOBODY", NOBODY)],
        ["run", "{}", "--local", "data={name: parquet, path: NOBODY}".replace("NOBODY", NOBODY)],
        ["steal", "{}", "--url", "http://127.0.0.1:1", "--key", f"file:{NOBODY}"],
        ["steal", "{}", "--url", "http://127.0.0.1:1", "--key", "file:a\0b"],
        ["status", NOBODY],
        ["report", NOBODY],
    ],
    ids=lambda command: " ".join(command)[:60].replace("\0", "0"),
)
def test_the_home_of_nobody_is_refused_in_one_line(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "e.yaml"
    file.write_text("{}\n")
    assert main([each.replace("{}", str(file)) if each == "{}" else each for each in command]) == USAGE
    shown = capsys.readouterr().err
    assert "Bug" not in shown and "Traceback" not in shown
    assert {path.name for path in tmp_path.iterdir()} <= {"e.yaml", "mea_ray_results"}


def test_a_thousand_million_seeds_are_refused_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    assert outcome(None, ["seeds=1000000000"], sweep=True) == "InvalidSettings"
    assert outcome(None, ["seeds=100000", "space.seed={grid: [1, 2]}"], sweep=True) == "ConfigError"
    assert time.monotonic() - began < LIMIT_S


def _random_override(rng: random.Random) -> str:
    value = rng.choice(VALUES)
    if rng.random() < 0.3:
        value = "".join(rng.choice("ab01:{}[],&*!-#'\" .e\u00e9\n") for _ in range(rng.randrange(12)))
    return f"{rng.choice(KEYS)}={value}"


def _many(count: int) -> None:
    """Try ``count`` random overrides and files, and print what came out."""
    rng, seen = random.Random(0), Counter[str]()
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"hostile-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    file, slowest = folder / "c.yaml", 0.0
    for number in range(count):
        began = time.monotonic()
        content = bytearray()
        if number % 4 == 0:
            content += rng.choice([*BYTES.values(), b"data: {name: digits}\nthief: {budgets: [10, 20]}\n"])[:4000]
            for _ in range(rng.randrange(4)):
                place = rng.randrange(len(content) + 1)
                content[place:place] = bytes([rng.randrange(256)])
            file.write_bytes(content)
        overrides = [_random_override(rng) for _ in range(rng.randrange(4))]
        try:
            seen[outcome(file if number % 4 == 0 else None, overrides, sweep=rng.random() < 0.4)] += 1
        except (Exception, SystemExit) as error:
            seen["BREACH"] += 1
            sys.stdout.write(f"{overrides!r} {bytes(content)[:80]!r}: {error!r}\n")
        slowest = max(slowest, time.monotonic() - began)
    sys.stdout.write(f"{count} tries, slowest {slowest:.1f} s: {dict(seen)}\n")


if __name__ == "__main__":
    _many(int(sys.argv[1]))
