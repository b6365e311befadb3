"""The floors of the design, kept by reading the imports: a module imports only from its own floor and lower ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mea_ray"
FLOORS: dict[str, int] = {
    **dict.fromkeys(("__init__", "choices", "config", "config_running", "registry", "types", "errors", "files"), 0),
    **dict.fromkeys(("seeding", "results", "trees", "versions"), 0),
    **dict.fromkeys(("data", "models"), 1),
    **dict.fromkeys(("training", "metrics", "probes", "outliers"), 2),
    **dict.fromkeys(("pretext", "watermarks", "attacks", "removal", "detection", "verification", "blackbox"), 3),
    **dict.fromkeys(("pipeline", "preflight", "encoders", "removing", "detecting", "forging", "serving", "proving"), 4),
    **dict.fromkeys(("service", "artifacts", "tracking", "storage", "lease"), 5),
    "sweep": 6,
    **dict.fromkeys(("cli", "cli_bench", "cli_options", "__main__", "report", "bench"), 7),
}
SCIENCE = {"pretext", "watermarks", "attacks", "removal", "detection", "verification", "blackbox"}
RAY_FLOOR = 5
MAX_LINES = 400
MODULES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import: what it names, and whether it happens when the module is imported."""

    name: str
    at_import: bool
    line: int


def part_of(dotted: str) -> str:
    """``mea_ray.attacks.base`` -> ``attacks``."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[Import]:
    """Every import outside of ``if TYPE_CHECKING``, those inside functions included."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, at_import, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            if module == "mea_ray":  # `from mea_ray import metrics` names a part
                yield from (Import(f"mea_ray.{alias.name}", at_import, node.lineno) for alias in node.names)
            else:
                yield Import(module, at_import, node.lineno)
        inside = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
        for child in children:
            yield from walk(child, inside)

    yield from walk(parsed(path), True)


@pytest.fixture(params=MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def module(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_every_part_has_a_floor() -> None:
    assert {part(path) for path in MODULES} <= set(FLOORS), "a new top-level part needs a floor in this test"


def test_a_module_imports_only_from_its_floor_and_below(module: Path) -> None:
    own = part(module)
    for each in imports(module):
        if each.name.split(".")[0] != "mea_ray":
            continue
        other = part_of(each.name)
        if other not in FLOORS:  # `from mea_ray import __version__`
            continue
        assert FLOORS[other] <= FLOORS[own], f"{module}:{each.line}: {own} (L{FLOORS[own]}) imports {each.name}"


def test_the_science_folders_are_blind_to_each_other(module: Path) -> None:
    own = part(module)
    if own in SCIENCE:
        others = {part_of(each.name) for each in imports(module) if each.name.startswith("mea_ray.")}
        assert not (others & SCIENCE) - {own}


def test_ray_stays_above_the_science(module: Path) -> None:
    if FLOORS[part(module)] < RAY_FLOOR:
        assert not [each for each in imports(module) if each.name.split(".")[0] == "ray"]


def test_wandb_is_imported_only_in_tracking_and_only_when_used(module: Path) -> None:
    found = [each for each in imports(module) if each.name.split(".")[0] == "wandb"]
    assert not found or part(module) == "tracking"
    assert not [each for each in found if each.at_import]


def test_lightly_is_imported_only_when_used(module: Path) -> None:
    assert not [each for each in imports(module) if each.name.split(".")[0] == "lightly" and each.at_import]


def test_the_command_line_imports_nothing_heavy_before_it_needs_it() -> None:
    heavy = {"torch", "ray", "numpy", "matplotlib", "pydantic", "mea_ray"}
    own = {"mea_ray.cli_bench", "mea_ray.cli_options"}
    for module in ("cli", "cli_bench", "cli_options"):
        names = {each.name for each in imports(PACKAGE / f"{module}.py") if each.at_import}
        light = {name for name in names if any(name == part or name.startswith(f"{part}.") for part in own)}
        assert not {name.split(".")[0] for name in names - light} & heavy, module


def test_the_device_is_named_in_one_place_only(module: Path) -> None:
    if module.relative_to(PACKAGE).as_posix() == "training/device.py":
        return
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith("cuda"), f"{module}:{node.lineno}"
            assert "CUDA_VISIBLE_DEVICES" not in node.value, f"{module}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "cuda", f"{module}:{node.lineno}"


def test_files_stay_short_enough_to_be_read(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text(
        "import ray\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import other\n"
        "def f():\n    from mea_ray.sweep import plan\nclass C:\n    import wandb.sdk\n"
    )
    found = {(each.name, each.at_import) for each in imports(source)}
    assert found == {
        ("ray", True),
        ("typing", True),
        ("other", True),
        ("mea_ray.sweep", False),
        ("wandb.sdk", True),
    }
