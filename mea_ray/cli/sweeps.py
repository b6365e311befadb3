"""The sweeps that come with mea_ray: ``mea-ray sweep quickstart`` needs no clone."""

from __future__ import annotations

from pathlib import Path

from mea_ray.config import load_tree
from mea_ray.core.errors import ConfigError
from mea_ray.core.words import nearest

PACKAGE = Path(__file__).parents[1]


def shipped() -> Path:
    """Return the folder of the sweeps: inside the package when installed, beside it in a checkout without links."""
    inside = PACKAGE / "sweeps"
    return inside if inside.is_dir() else PACKAGE.parent / "sweeps"


def names() -> list[str]:
    """Return the names of the sweeps that come with mea_ray."""
    return sorted(path.stem for path in shipped().glob("*.yaml"))


def find(file: Path) -> Path:
    """Return the YAML file that the command line refers to.

    Args:
        file: A file, or the name of a sweep that comes with mea_ray.

    Raises:
        ConfigError: It is neither.
    """
    if file.is_file():
        return file
    name = str(file)
    known = names()
    if name in known:
        return shipped() / f"{name}.yaml"
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give a YAML file, or one of the sweeps that come with mea_ray: {known}")
    if file.suffix in {".yaml", ".yml"}:
        if file.stem in known:
            raise ConfigError(f"there is no file {file}; {file.stem} comes with mea_ray: leave out folder and suffix")
        near = [str(path) for path in sorted(file.parent.glob("*.y*ml"))] if file.parent.is_dir() else []
        raise ConfigError(f"there is no file {file}{nearest(name, near) or '; check the path'}")
    raise ConfigError(
        f"there is no file {file}, and no sweep of that name comes with mea_ray{nearest(name, known) or '.'} Known: "
        f"{', '.join(known)}"
    )


def description(name: str) -> str:
    """Return what a sweep that comes with mea_ray shows, in one sentence."""
    text = str(load_tree(shipped() / f"{name}.yaml").get("description", ""))
    return text.split(". ")[0].rstrip(".") + "."
