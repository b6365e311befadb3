"""The import graph of the package, read from its source: ``python tests/helpers/rooms.py`` prints it.

A *room* is a folder of ``mea_ray``; an arrow leads from a room to another that it imports from. Its *level* is the
length of the longest way down from it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mea_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import: what it names, and whether it happens when the module is imported."""

    name: str
    at_import: bool
    line: int


def room_of(dotted: str) -> str:
    """``mea_ray.attacks.base`` -> ``attacks``; the package itself is ``__init__``."""
    pieces = dotted.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import outside of ``if TYPE_CHECKING``, those inside functions included."""
    return tuple(_walk(parsed(path), path, at_import=True))


def _walk(node: ast.AST, path: Path, *, at_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, at_import, node.lineno)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{path}:{node.lineno}: relative import"
        module = node.module or ""
        if module == "mea_ray":  # `from mea_ray import data` names a room
            yield from (Import(f"mea_ray.{alias.name}", at_import, node.lineno) for alias in node.names)
        else:
            yield Import(module, at_import, node.lineno)
    inside = at_import and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    children = node.orelse if _is_type_checking(node) else ast.iter_child_nodes(node)  # type: ignore[attr-defined]
    for child in children:
        yield from _walk(child, path, at_import=inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def arrows() -> dict[str, set[str]]:
    """Return the rooms that each room imports from."""
    rooms = {room(path) for path in MODULES}
    collected: dict[str, set[str]] = {name: set() for name in rooms}
    for path in MODULES:
        for each in imports(path):
            if each.name.split(".")[0] == "mea_ray" and room_of(each.name) in rooms - {room(path), "__init__"}:
                collected[room(path)].add(room_of(each.name))
    return collected


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the level of each room.

    Raises:
        ValueError: There is a circle; the message names the way around it.
    """
    known: dict[str, int] = {}

    def level(name: str, way: tuple[str, ...]) -> int:
        if name in way:
            raise ValueError("a circle of imports: " + " -> ".join((*way[way.index(name) :], name)))
        if name not in known:
            known[name] = 1 + max((level(other, (*way, name)) for other in sorted(graph[name])), default=0)
        return known[name]

    for name in graph:
        level(name, ())
    return known


if __name__ == "__main__":
    graph = arrows()
    on = levels(graph)
    for name in sorted(graph, key=lambda each: (-on[each], each)):
        print(f"{on[name]:2}  {name:13} <- {' '.join(sorted(graph[name], key=lambda each: (-on[each], each)))}")
    print(f"{len(graph)} rooms, {max(on.values())} levels, {sum(map(len, graph.values()))} arrows, no circle")
