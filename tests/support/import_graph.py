"""Which module of a package imports which, read from the source: nothing is imported, nothing has to be installed.

Standard library only: tests/unit/test_imports.py and scripts/rooms both use it. A graph maps each name to those that it
imports. An import counts wherever it stands, also inside a function or below `if TYPE_CHECKING`. `import a.b` also
runs `a/__init__.py`; that does not count, or every module would import the package's front door.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Function", "Import", "Module", "circles", "floors", "graph_of", "read_package", "rooms_of", "ties"]

Graph = Mapping[str, set[str]]


@dataclass(frozen=True)
class Import:
    """``name``: of a module. ``from a import b`` imports ``a.b`` where that is one, else ``a``."""

    name: str
    line: int


@dataclass(frozen=True)
class Function:
    name: str
    line: int
    num_lines: int


@dataclass(frozen=True)
class Module:
    """One file. ``room``: its folder below the package, or the file itself where it lies beside the rooms."""

    name: str
    path: Path
    room: str
    num_lines: int
    imports: tuple[Import, ...]
    functions: tuple[Function, ...]


def read_package(folder: Path) -> dict[str, Module]:
    """Every module of the package in ``folder``, by its full name.

    Raises:
        ValueError: a relative import, which would hide the room.
    """
    paths = {_module_name(folder, path): path for path in sorted(folder.rglob("*.py"))}
    return {name: _read(folder, name, path, set(paths)) for name, path in paths.items()}


def _module_name(folder: Path, path: Path) -> str:
    parts = (folder.name, *path.relative_to(folder).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(folder: Path, name: str, path: Path, known: set[str]) -> Module:
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    parent = path.relative_to(folder).parent.as_posix()
    functions = (
        Function(node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    imports = [each for node in nodes for each in _imports(node, path, known)]
    room = path.stem if parent == "." else parent
    return Module(name, path, room, text.count("\n"), tuple(imports), tuple(functions))


def _imports(node: ast.AST, path: Path, known: set[str]) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level or node.module is None:
            raise ValueError(f"{path}:{node.lineno}: a relative import hides the room")
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield Import(inner if inner in known else node.module, node.lineno)


def graph_of(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """What each module imports of ``modules``; a file that imports itself counts."""
    return {name: {each.name for each in module.imports if each.name in modules} for name, module in modules.items()}


def rooms_of(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """What each room imports of the others."""
    rooms: dict[str, set[str]] = {module.room: set() for module in modules.values()}
    for name, imported in graph_of(modules).items():
        room = modules[name].room
        rooms[room] |= {modules[other].room for other in imported} - {room}
    return rooms


def circles(graph: Graph) -> list[list[str]]:
    """Each set of names that all import each other, over others or not; largest first. Empty when there are no circles.

    Tarjan's strongly connected components.
    """
    found: list[list[str]] = []
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        path.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in path:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = path.index(name)
            own = path[at:]
            del path[at:]
            if len(own) > 1 or name in graph[name]:
                found.append(sorted(own))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(found, key=lambda circle: (-len(circle), circle))


def ties(graph: Graph) -> list[tuple[str, str]]:
    """Few edges without which there would be no circle: those against the order of Eades, Lin and Smyth (1993)."""
    left = {name: set(graph[name]) for circle in circles(graph) for name in circle}
    left = {name: imported & left.keys() for name, imported in left.items()}
    top: list[str] = []
    bottom: list[str] = []

    def balance(name: str) -> int:
        return len(left[name]) - sum(name in imported for imported in left.values())

    while left:
        sink = next((name for name in sorted(left) if not left[name]), None)
        best = sink or max(sorted(left), key=balance)
        (bottom if sink else top).append(best)
        del left[best]
        for imported in left.values():
            imported.discard(best)
    order = {name: at for at, name in enumerate([*top, *reversed(bottom)])}
    return [(a, b) for a in sorted(order) for b in sorted(graph[a]) if b in order and order[b] <= order[a]]


def floors(graph: Graph) -> dict[str, int]:
    """How high each name stands: 0 imports none of the others; the rest stand one above the highest that they import.

    What ties a circle is left out.
    """
    up = set(ties(graph))
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 1 + max((floor(other) for other in graph[name] if (name, other) not in up), default=-1)
        return found[name]

    for name in graph:
        floor(name)
    return found
