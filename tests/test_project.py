"""The project's own promises: the README's commands are the ones that are run, and versions are pinned once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEST_COMMAND = "pip install -e '.[dev]' && pytest"
MAIN_COMMAND = "pip install -e '.[dev]' && mea-ray sweep sweeps/quickstart.yaml"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_readme_shows_the_two_commands() -> None:
    lines = read("README.md").splitlines()
    assert any(line.removeprefix("$ ").startswith(MAIN_COMMAND) for line in lines)
    assert any(line.removeprefix("$ ").startswith(TEST_COMMAND) for line in lines)


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    script = read(".ci/run")
    assert TEST_COMMAND in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0


def test_every_command_in_the_readme_exists() -> None:
    from mea_ray.cli.main import main

    for verb in set(re.findall(r"mea-ray (\w+)", read("README.md"))):
        assert main([verb, "--help"]) == 0, verb


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_every_path_in_a_page_exists(page: str) -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", read(page)):
        assert (ROOT / path).exists(), path


def test_the_readme_can_be_read_to_its_end() -> None:
    text = read("README.md")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


def test_the_citation_names_this_version() -> None:
    from mea_ray import __version__

    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"## {__version__}" in read("CHANGELOG.md")


@pytest.mark.parametrize(("repository", "package"), [("ruff-pre-commit", "ruff"), ("mirrors-mypy", "mypy")])
def test_pre_commit_and_the_dev_extra_pin_the_same_versions(repository: str, package: str) -> None:
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (revision,) = [hook["rev"] for hook in hooks if hook["repo"].endswith(repository)]
    assert f'"{package}=={revision.removeprefix("v")}"' in read("pyproject.toml")


def test_the_licence_is_apache_2() -> None:
    assert "Apache License" in read("LICENSE") and "Version 2.0" in read("LICENSE")
    assert 'license = "Apache-2.0"' in read("pyproject.toml")


def test_no_module_leaves_unfinished_business() -> None:
    for path in (ROOT / "mea_ray").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "TODO" not in text and "FIXME" not in text, path


OTHER_NAMES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "pydantic_core": "pydantic"}
"""Packages whose modules are called otherwise; pydantic fixes the version of pydantic-core itself."""


def test_everything_that_is_imported_is_declared() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [each for extra in project["optional-dependencies"].values() for each in extra]
    declared = {re.split(r"[\[><=]", each)[0].lower() for each in [*project["dependencies"], *optional]}
    for path in (ROOT / "mea_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module]
            for module in {name.split(".")[0] for name in names} - {"mea_ray", *sys.stdlib_module_names}:
                package = OTHER_NAMES.get(module, module).replace("_", "-").lower()
                assert package in declared, f"{path} imports {module}"
