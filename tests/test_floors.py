"""The floors of the design, read from the imports: a module imports only from its own floor and from lower ones."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rooms import MODULES, PACKAGE, Import, arrows, imports, levels, parsed, room, room_of

FLOORS: dict[str, int] = {
    **dict.fromkeys(("__init__", "core", "config", "results", "storage"), 0),
    **dict.fromkeys(("data", "models"), 1),
    **dict.fromkeys(("training", "evaluation"), 2),
    **dict.fromkeys(("pretext", "watermarks", "attacks", "removal", "detection", "verification", "blackbox"), 3),
    "experiment": 4,
    **dict.fromkeys(("service", "tracking"), 5),
    **dict.fromkeys(("sweep", "calibration"), 6),
    **dict.fromkeys(("__main__", "api", "cli", "report", "bench"), 7),
}
SCIENCE = {"pretext", "watermarks", "attacks", "removal", "detection", "verification", "blackbox"}
RAY_FLOOR = 5


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def named(package: str, *, at_import: bool = False) -> list[tuple[Path, Import]]:
    """Every import of a package, or only those that happen when a module is imported."""
    return [
        (path, each)
        for path in MODULES
        for each in imports(path)
        if each.name.split(".")[0] == package and (each.at_import or not at_import)
    ]


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in MODULES} == set(FLOORS)


def test_no_module_lies_loose_beside_the_rooms() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} <= {"__init__.py", "__main__.py"}


def test_a_module_imports_only_from_its_floor_and_below() -> None:
    offenders = [
        f"{where(path, each.line)}: {room(path)} (L{FLOORS[room(path)]}) imports {each.name}"
        for path, each in named("mea_ray")
        # The package's front door names the public surface, and imports it only when it is used.
        if FLOORS.get(room_of(each.name), 0) > FLOORS[room(path)] and room(path) != "__init__"
    ]
    assert not offenders, "\n".join(offenders)


def test_there_is_no_circle_of_rooms() -> None:
    graph = {name: others for name, others in arrows().items() if name != "__init__"}
    assert max(levels(graph).values()) <= 13


def test_the_science_rooms_are_blind_to_each_other() -> None:
    offenders = [
        f"{where(path, each.line)}: {each.name}"
        for path, each in named("mea_ray")
        if room(path) in SCIENCE and room_of(each.name) in SCIENCE - {room(path)}
    ]
    assert not offenders, "\n".join(offenders)


def test_ray_stays_above_the_science() -> None:
    offenders = [where(path, each.line) for path, each in named("ray") if FLOORS[room(path)] < RAY_FLOOR]
    assert not offenders


def test_wandb_is_imported_only_in_tracking_and_only_when_used() -> None:
    offenders = [where(path, each.line) for path, each in named("wandb") if each.at_import or room(path) != "tracking"]
    assert not offenders


def test_lightly_is_imported_only_when_used() -> None:
    assert not [where(path, each.line) for path, each in named("lightly", at_import=True)]


def test_the_command_line_imports_nothing_heavy_before_it_needs_it() -> None:
    heavy = {"torch", "ray", "numpy", "matplotlib", "pydantic", "mea_ray"}
    light = {"mea_ray.cli.bench", "mea_ray.cli.keys", "mea_ray.cli.options"}
    offenders = [
        f"{module}: {each.name}"
        for module in ("main", "bench", "keys", "options")
        for each in imports(PACKAGE / "cli" / f"{module}.py")
        if each.at_import and each.name not in light and each.name.split(".")[0] in heavy
    ]
    assert not offenders, "\n".join(offenders)


def test_the_device_is_named_in_one_place_only() -> None:
    offenders = []
    for path in MODULES:
        if path.relative_to(PACKAGE).as_posix() == "training/device.py":
            continue
        for node in ast.walk(parsed(path)):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            named_here = text.startswith("cuda") or "CUDA_VISIBLE_DEVICES" in text
            if named_here or (isinstance(node, ast.Attribute) and node.attr == "cuda"):
                offenders.append(where(path, getattr(node, "lineno", 0)))
    assert not offenders


def test_no_two_classes_have_the_same_name() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(where(path, node.lineno))
    assert not {name: lines for name, lines in places.items() if len(lines) > 1}


VERBS = {"told", "said", "heard", "kept", "held", "shown", "found"}
"""What something is cannot be read from these; the glossary in CONTRIBUTING has names."""


def test_names_are_nouns_of_the_field() -> None:
    offenders = []
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = node.name
            if name.strip("_").lower() in VERBS:
                offenders.append(f"{where(path, getattr(node, 'lineno', 0))}: {name}")
    assert not offenders, "\n".join(offenders)


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text(
        "import ray\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import other\n"
        "def f():\n    from mea_ray.sweep import plan\nclass C:\n    import wandb.sdk\n"
    )
    result = {(each.name, each.at_import) for each in imports(source)}
    assert result == {
        ("ray", True),
        ("typing", True),
        ("other", True),
        ("mea_ray.sweep", False),
        ("wandb.sdk", True),
    }


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match="a -> b -> c -> a"):
        levels({"a": {"b"}, "b": {"c"}, "c": {"a"}})
