"""Versions and command line of a result."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("mea_ray", "torch", "torchvision", "torchjd", "numpy", "scipy", "scikit-learn", "pydantic", "ray")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on; from a git checkout its commit, too."""
    installed = {"python": platform.python_version()}
    commit = _commit(Path(__file__).resolve())
    if commit is not None:
        installed["commit"] = commit
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree, or an optional package
            continue
    return installed


def command_line() -> str:
    """Return the command line of this process, in a form that can be typed again."""
    program = Path(sys.argv[0]).name
    return shlex.join(["mea-ray" if program == "__main__.py" else program, *sys.argv[1:]])


@lru_cache(maxsize=1)
def _commit(source: Path) -> str | None:
    """Return the commit that ``source`` was checked out at, with ``+changes`` if tracked files differ from it.

    None if git does not track the file: installed as a package, perhaps into another project's repository.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None
