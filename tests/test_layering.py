"""Imports only go down the floors, and the control plane is plain Python."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import apportion

PACKAGE = Path(apportion.__file__).parent

# Rooms of one floor do not know each other; a room may use any room of a lower floor, and itself.
FLOORS = (
    ("core", "assets"),
    ("platforms",),
    ("kernels", "processor"),
    ("kvcache", "parallel", "quant"),
    ("attention",),
    ("layers",),
    ("models",),
    ("engine", "compress"),
    ("serving", "simulator", "evaluate"),
    ("planner",),
    ("face", "compat"),
    ("bench",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACE = {"llm", "quantization", "__init__", "version"}  # modules directly in the package

# Importing these must not import torch.
CONTROL_PLANE = (
    "core", "kvcache/arena", "kvcache/block_pool", "kvcache/prefix_cache", "kvcache/kv_cache_manager", "engine/scheduler",
    "engine/policies", "engine/share_policies", "engine/lane", "engine/engine", "simulator", "planner",
)  # fmt: skip


def room_of(module: str) -> str:
    """The room of a dotted name inside the package: 'apportion.core.errors' -> 'core', 'apportion.llm' -> 'face'."""
    first = [*module.split("."), "__init__"][1]
    return first if first in FLOOR else "face"


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything of ours that the file imports, wherever in the file and however it is spelt."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from apportion import kernels` names a room only in its last word
            yield from ((node.lineno, f"{module}.{alias.name}" if module == "apportion" else module) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("apportion."):
            target = node.value.partition(":")[0]  # a registry's 'package.module:attribute'
            if all(word.isidentifier() for word in target.split(".")):
                yield node.lineno, target


def violations(path: Path) -> list[str]:
    relative = path.relative_to(PACKAGE)
    room = room_of(".".join(("apportion", *relative.with_suffix("").parts)))
    found = []
    for line, module in imports_of(path):
        if module.split(".")[0] != "apportion":
            continue
        target = room_of(module)
        if target != room and FLOOR[target] >= FLOOR[room]:
            found.append(f"{relative}:{line}: {room} (floor {FLOOR[room]}) imports {module} (floor {FLOOR[target]})")
    return found


def test_imports_only_go_down():
    assert not [v for path in sorted(PACKAGE.rglob("*.py")) for v in violations(path)]


def test_every_room_has_a_floor():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(FLOOR), f"rooms without a floor: {rooms - set(FLOOR)}"
    assert {path.stem for path in PACKAGE.glob("*.py")} <= FACE


@pytest.mark.parametrize(
    "source, allowed",
    [
        ("from apportion.core.errors import InternalError", True),
        ("from apportion.kvcache.arena import Slab", True),
        ("def f():\n    from apportion.engine import engine", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import apportion.models.llama", False),
        ("from apportion import layers", False),
        ("from ..quant import scheme", False),
        ("ENTRIES = {'x': 'apportion.engine.engine:Engine'}", False),
        ("'''Text about apportion. and engine.'''", True),
    ],
)
def test_the_rule_sees(tmp_path, monkeypatch, source, allowed):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "apportion")
    path = tmp_path / "apportion/kvcache/thing.py"
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert (not violations(path)) == allowed


def test_the_control_plane_needs_no_torch():
    modules = []
    for name in CONTROL_PLANE:
        path = PACKAGE / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        modules += [".".join(("apportion", *f.relative_to(PACKAGE).with_suffix("").parts)) for f in files if f.exists()]
    assert "apportion.core.schedule" in modules
    program = "import sys, importlib\nsys.modules['torch'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.returncode == 0, done.stderr
