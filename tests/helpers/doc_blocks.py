"""The code blocks of a Markdown page, and how each is run.

A page is a small project: its blocks run in order, in one folder. ``yaml`` and ``toml`` blocks with a title are files,
``python`` blocks share one namespace (those with a title are files, too), lines of ``console`` blocks that begin with
``$`` are commands. ``text`` is for reading. A comment above a block says when it is not simply run:

    <!-- run: slow -->                  only with ``pytest -m slow``
    <!-- run: check -->                 commands are parsed and their configs read, nothing is started
    <!-- run: no, it needs AWS -->      never, with the reason
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
FILES = {"yaml", "toml", "ini"}
LANGUAGES = {*FILES, "python", "console", "text"}
_FENCE = re.compile(r"^( *)```(.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_RUN = re.compile(r"^ *<!-- run: (slow|check|no, .+) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        where: Page and line.
        language: The first word behind the fence.
        title: Name of the file that it is.
        how: ``run``, ``slow``, ``check``, or ``no``.
        text: What is between the fences.
    """

    where: str
    language: str
    title: str
    how: str
    text: str

    def commands(self) -> list[str]:
        """The lines that begin with ``$``, continued lines joined."""
        joined = re.sub(r" *\\\n\s*", " ", self.text)
        return [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """Read the blocks of a page."""
    collected: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if not opening:
            number += 1
            continue
        end = next((i for i in range(number + 1, len(lines)) if lines[i].strip() == "```"), None)
        assert end is not None, f"{page.name}:{number + 1}: the block is not closed"
        above = _RUN.match(lines[number - 1]) if number else None
        info = opening[2].strip()
        title = _TITLE.search(info)
        indent = len(opening[1])
        collected.append(
            Block(
                where=f"{page.name}:{number + 1}",
                language=info.split(" ")[0],
                title=title[1] if title else "",
                how=above[1].partition(",")[0] if above else "run",
                text="\n".join(line[indent:] for line in lines[number + 1 : end]) + "\n",
            )
        )
        number = end + 1
    return collected


class Runner:
    """Runs the blocks of one page in one folder.

    Args:
        folder: An empty folder.
        slow: Whether slow blocks are run; they are checked otherwise.
    """

    def __init__(self, folder: Path, *, slow: bool = False) -> None:
        self.folder, self.slow = folder, slow
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        for name in ("sweeps", "docs"):
            (folder / name).symlink_to(ROOT / name)
        for label, shade in {"cat": 60, "dog": 120, "horse": 180}.items():  # the reader's own pictures
            (folder / "photos" / label).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (32, 32), (shade, index, 0)).save(folder / "photos" / label / f"{index}.png")

    def run(self, block: Block) -> None:
        """Run a block, or check it."""
        started = block.how == "run" or (block.how == "slow" and self.slow)
        with _inside(self.folder):
            if block.title:
                path = Path(block.title)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            if block.language == "yaml":
                yaml.safe_load(block.text)
            elif block.language == "python" and block.how != "no":
                self._python(block, started=started)
            elif block.language == "console" and block.how != "no":
                for command in block.commands():
                    self._command(command, block.where, started=started)

    def _python(self, block: Block, *, started: bool) -> None:
        code = compile(block.text, block.where, "exec")
        if started and not block.title:
            exec(code, self.namespace)

    def _command(self, command: str, where: str, *, started: bool) -> None:
        words = shlex.split(command)
        if words[0] == "mea-ray" and not set("|&;<>$(") & set(command):
            from mea_ray.cli.main import main

            with warnings.catch_warnings(), _only_read(not started):
                code = main(words[1:])
            assert code == 0, f"{where}: {command!r} exits with {code}"
        elif started:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command], env=self._environment(), text=True, capture_output=True
            )
            assert done.returncode == 0, f"{where}: {command!r} exits with {done.returncode}: {done.stderr}"
        else:
            subprocess.run(["bash", "-n", "-c", command], check=True)

    def _environment(self) -> dict[str, str]:
        tools = self.folder / ".tools"
        if not tools.exists():
            tools.mkdir()
            # Scripts, since a link to the interpreter would not find the packages of its environment.
            for name, module in {"mea-ray": " -m mea_ray", "python": ""}.items():
                shim = tools / name
                shim.write_text(f'#!/bin/sh\nexec {sys.executable}{module} "$@"\n')
                shim.chmod(0o755)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _only_read(only_read: bool) -> Iterator[None]:
    """Have ``run``, ``sweep``, ``calibrate`` and the rest read their arguments and their config, and start nothing."""
    if not only_read:
        yield
        return
    started = (
        "mea_ray.cli.commands.check_address",
        "mea_ray.cli.commands.run_sweep",
        "mea_ray.cli.commands.run_local",
        "mea_ray.cli.commands.measure",
        "mea_ray.cli.train.train",
        "mea_ray.cli.commit.run",
        "mea_ray.cli.nulls.nulls",
        "mea_ray.cli.steal.steal",
        "mea_ray.cli.serve.usage",
        "mea_ray.cli.verify.verify",
        "mea_ray.cli.commands.render_report",
        "mea_ray.cli.commands.put_on_record",
        "mea_ray.cli.commands.print_results_as",
        "mea_ray.cli.commands.render_pages",
        "mea_ray.report.calibration.run",
        "mea_ray.cli.sync.send",
        "mea_ray.cli.status.print_status",
        "mea_ray.sweep.status.open_folder",
        "mea_ray.sweep.status.read_status",
    )
    patches = [mock.patch(name, return_value=False) for name in started]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()
