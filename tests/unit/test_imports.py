"""The layering of the package, read from its source: who may import whom, and what nobody may use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from stagewire import cli
from stagewire.ring.rules import timeouts
from support.import_graph import circles, floors, graph_of, read_package, ties

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "stagewire"
# Imports point downward: to a later entry, or within the same one.
LAYERS = [
    "__main__",
    "cli",
    "commands",
    "front",
    "launch",
    "vllm_plugin",
    "checkpoint",
    "ring",
    "wire",
    "observe",
    "config",
    "plan",
    "home",
    "folders",
    "machine",
    "version",
    "errors",
]
# Rooms of vllm_plugin, top to bottom.
ROOMS = ["entry", "head", "host", "member", "ranks", "worker", "loading", "codec", "seams"]
# Within ring, top to bottom, as the docstrings of its rooms list them. The rules are pure.
RING = [
    "ring",
    "observer",
    "transport.zmq_transport",
    "transport.callers",
    "transport.diagnosis",
    "transport.link",
    "transport.routes",
    "transport.listener",
    "transport.probe",
    "transport.sockets",
    "transport.curve",
    "transport.greeting",
    "transport.tcp_counters",
    "transport.security",
    "transport.hosts",
    "transport.memory",
    "transport.interface",
    "rules.state",
    "rules.linking",
    "rules.epochs",
    "rules.waiting",
    "rules.predecessor",
    "rules.successor",
    "rules.rendezvous",
    "rules.phases",
    "rules.admission",
    "rules.notices",
    "rules.actions",
    "rules.timeouts",
]
PURE_RING = RING[RING.index("rules.state") :]
WORLD = {"threading", "queue", "time", "socket", "os", "random", "secrets", "asyncio", "selectors"}
# At the level of cli: what users of the package touch.
ENTRANCES = {"__init__": "cli", "llm": "cli"}
PACKAGE = read_package(SOURCE)
NAMES = {module.path: name for name, module in PACKAGE.items()}
MODULES = sorted(NAMES)
IDS = [str(path.relative_to(SOURCE)) for path in MODULES]

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "marshal", "dill", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def layer(module: str) -> str:
    """``stagewire.ring.rules.state`` -> ``ring``."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return ENTRANCES.get(name, name)


def module_name(path: Path) -> str:
    return NAMES[path]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; ``from stagewire import x`` counts as ``stagewire.x``."""
    return (each.name for each in PACKAGE[NAMES[path]].imports)


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_point_downward(path: Path) -> None:
    own = LAYERS.index(layer(module_name(path)))
    for name in imports(path):
        if name.split(".")[0] == "stagewire" and name != "stagewire":
            assert LAYERS.index(layer(name)) >= own, f"{module_name(path)} imports {name}, which is above it"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_plugin_point_downward(room: str) -> None:
    allowed = set(ROOMS[ROOMS.index(room) :])
    for name, module in PACKAGE.items():
        if name.split(".")[1:3] == ["vllm_plugin", room]:
            above = [each.name for each in module.imports if room_in_plugin(each.name) not in {None, *allowed}]
            assert above == [], f"{name} imports {above}, above it"


def room_in_plugin(module: str) -> str | None:
    parts = module.split(".")
    return parts[2] if parts[:2] == ["stagewire", "vllm_plugin"] and len(parts) > 2 else None


def test_the_rooms_of_the_plugin_are_listed() -> None:
    assert {path.name for path in (SOURCE / "vllm_plugin").iterdir() if path.is_dir() and any(path.glob("*.py"))} == {
        *ROOMS
    }


def test_no_imports_in_a_circle() -> None:
    assert describe_circles(graph_of(PACKAGE)) == []


def describe_circles(graph: Mapping[str, set[str]]) -> list[str]:
    """The imports that tie each circle, so that a failure says what to cut."""
    return [f"{importer} imports {imported}" for importer, imported in ties(graph)]


def test_each_module_has_a_name_of_its_own() -> None:
    stems = Counter(module.path.stem for module in PACKAGE.values())
    assert [name for name, count in stems.items() if count > 1 and name != "__init__"] == []


@pytest.mark.parametrize(
    ("edges", "found", "tied", "highest"),
    [
        ("ab bc ac", [], [], {"a": 2, "b": 1, "c": 0}),
        ("ab ba", ["ab"], ["ba"], {"a": 1, "b": 0}),
        ("aa", ["a"], ["aa"], {"a": 0}),
        ("ab bc cb dc", ["bc"], ["cb"], {"a": 2, "b": 1, "c": 0, "d": 1}),
        ("ab bc ca cd de ed", ["abc", "de"], ["bc", "ed"], {"a": 1, "b": 0, "c": 2, "d": 1, "e": 0}),
    ],
)
def test_circles_are_found(edges: str, found: list[str], tied: list[str], highest: dict[str, int]) -> None:
    graph: dict[str, set[str]] = {name: set() for name in sorted(set(edges) - {" "})}
    for edge in edges.split():
        graph[edge[0]].add(edge[1])
    assert ["".join(circle) for circle in circles(graph)] == found
    assert ["".join(tie) for tie in ties(graph)] == tied
    assert floors(graph) == highest


def test_each_subcommand_is_a_module_of_its_name_and_uses_no_other() -> None:
    names = {name: f"stagewire.commands.{name.replace('-', '_')}" for name in cli._COMMANDS}
    assert {name: command.module for name, command in cli._COMMANDS.items()} == {
        name: sys.modules[module] for name, module in names.items()
    }
    graph = graph_of(PACKAGE)
    assert [(module, graph[module] & set(names.values())) for module in names.values()] == [
        (module, set()) for module in names.values()
    ]


def test_the_house_can_be_drawn() -> None:
    drawn = subprocess.run([ROOT / "scripts" / "rooms"], capture_output=True, text=True, check=True, timeout=60)
    assert {line.split()[1] for line in drawn.stdout.splitlines() if line[:5].strip().isdecimal()} >= {"cli", "launch"}


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_who_may_import_what(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    if layer(module_name(path)) != "vllm_plugin":
        assert "vllm" not in roots
    if not module_name(path).startswith("stagewire.ring.transport."):
        assert "zmq" not in roots
    if layer(module_name(path)) == "plan":
        assert roots <= {*sys.stdlib_module_names, "stagewire"}
        assert {name for name in imports(path) if name.startswith("stagewire")} <= {
            "stagewire.errors",
            "stagewire.plan.ranges",
        }


@pytest.mark.parametrize("name", RING)
def test_the_ring_within_itself(name: str) -> None:
    used = set(imports(SOURCE / "ring" / f"{name.replace('.', '/')}.py"))
    inside = {module.removeprefix("stagewire.ring.") for module in used if module.startswith("stagewire.ring.")}
    assert inside <= set(RING[RING.index(name) + 1 :])
    if name in PURE_RING:
        assert not {module.split(".")[0] for module in used} & {*WORLD, "zmq", "psutil", "torch"}


def test_the_ring_is_listed() -> None:
    found = {module_name(path).removeprefix("stagewire.ring.") for path in (SOURCE / "ring").rglob("*.py")}
    assert found == {"stagewire.ring", "rules", "transport", *RING}


@pytest.mark.parametrize("name", [name for name in RING if name != "rules.timeouts"])
def test_every_time_limit_of_the_ring_is_in_one_place(name: str) -> None:
    """Who asks after how long something is given up looks there; tests change it there."""
    text = (SOURCE / "ring" / f"{name.replace('.', '/')}.py").read_text()
    assert not re.findall(r"^[A-Z_]+(?<!_PER)_(?:S|MS) = ", text, re.MULTILINE)
    assert "from stagewire.ring.rules.timeouts import" not in text  # of a copy tests would change nothing


def test_the_table_of_when_a_peer_is_lost_names_what_there_is() -> None:
    text = ast.get_docstring(ast.parse((SOURCE / "ring" / "rules" / "timeouts.py").read_text())) or ""
    files = re.findall(r"(?:rules|transport)/\w+\.py", text)
    assert len(files) >= 10
    assert all((SOURCE / "ring" / file).exists() for file in files)
    names = set(re.findall(r"\b[A-Z]+_[A-Z_]+_M?S\b|ALIVE_S|STALL_S", text))
    assert len(names) >= 8
    assert names <= set(vars(timeouts))


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_nothing_is_executed_because_a_peer_said_so(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN_MODULES
    used = set(calls(path))
    assert not used & FORBIDDEN_CALLS
    assert not {name for name in used if name.endswith("torch.load") or "pickle" in name.lower()}


@pytest.mark.parametrize(
    "name", ["ring.ring", "ring.transport.zmq_transport", "wire.codec", "wire.tensors", "plan", "config"]
)
def test_light_modules_stay_light(name: str) -> None:
    self_check = f"import sys, stagewire.{name}; sys.exit(bool({{'torch', 'vllm'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", self_check], check=False, timeout=60).returncode == 0


def test_the_status_channel_is_light() -> None:
    self_check = (
        "import sys, stagewire.observe.status_events, stagewire.observe.timings, stagewire.vllm_plugin;"
        "sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", self_check], check=False, timeout=60).returncode == 0
