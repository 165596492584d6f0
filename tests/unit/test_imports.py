"""The layering of the package, read from its source: who may import whom, and what nobody may use."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagewire.ring import timeouts

SOURCE = Path(__file__).parents[2] / "src" / "stagewire"
# Imports point downward: to a later entry, or within the same one.
LAYERS = [
    "__main__",
    "cli",
    "commands",
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
    "errors",
]
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
    "timeouts",
]
PURE_RING = RING[RING.index("rules.state") :]
WORLD = {"threading", "queue", "time", "socket", "os", "random", "secrets", "asyncio", "selectors"}
# At the level of cli: what users of the package touch.
ENTRANCES = {"__init__": "cli", "offline": "cli"}
MODULES = sorted(SOURCE.rglob("*.py"))
IDS = [str(path.relative_to(SOURCE)) for path in MODULES]

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "marshal", "dill", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def layer(module: str) -> str:
    """``stagewire.ring.rules.state`` -> ``ring``."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return ENTRANCES.get(name, name)


def module_name(path: Path) -> str:
    parts = ("stagewire", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; ``from stagewire.ring import timeouts`` is a module, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            assert node.module is not None
            if node.module == "stagewire":
                yield from (f"stagewire.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
            else:
                folder = SOURCE.parent / node.module.replace(".", "/")
                submodules = [alias.name for alias in node.names if (folder / f"{alias.name}.py").exists()]
                yield from (f"{node.module}.{name}" for name in submodules)
                if len(submodules) < len(node.names):
                    yield node.module


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


@pytest.mark.parametrize("name", [name for name in RING if name != "timeouts"])
def test_every_time_limit_of_the_ring_is_in_one_place(name: str) -> None:
    """Who asks after how long something is given up looks there; tests change it there."""
    text = (SOURCE / "ring" / f"{name.replace('.', '/')}.py").read_text()
    assert not re.findall(r"^[A-Z_]+(?<!_PER)_(?:S|MS) = ", text, re.MULTILINE)
    assert "from stagewire.ring.timeouts import" not in text  # of a copy tests would change nothing


def test_the_table_of_when_a_peer_is_lost_names_what_there_is() -> None:
    text = ast.get_docstring(ast.parse((SOURCE / "ring" / "timeouts.py").read_text())) or ""
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
        "import sys, stagewire.observe.status, stagewire.observe.timings, stagewire.vllm_plugin;"
        "sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", self_check], check=False, timeout=60).returncode == 0
