"""Print what is over the size budgets, and the size of each room. Exit status 1 when anything is over.

Budgets: a Python file 400 lines, a kernel file (csrc, kernels/) 600, a model file 250, a function 60, `engine/` 3,000 in all,
60 flags to a CLI verb, 10 environment variables. `WAIVERS` holds the breaches that have a reason.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "apportion"
FUNCTION, ENGINE, FLAGS, VARIABLES = 60, 3000, 60, 10
WAIVERS: dict[str, str] = {}  # "path" or "path:function" -> the reason


def file_budget(path: Path) -> int:
    relative = path.relative_to(ROOT).as_posix()
    if relative.startswith(("csrc/", "src/apportion/kernels/")):
        return 600
    if relative.startswith("src/apportion/models/"):
        return 250
    return 400


def long_functions(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION:
                found.append((f"{node.name} (line {node.lineno})", length))
    return found


def breaches(sources: list[Path]) -> list[str]:
    over = []
    for path in sources:
        name = path.relative_to(ROOT).as_posix()
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > file_budget(path) and name not in WAIVERS:
            over.append(f"{name}: {length} lines, budget {file_budget(path)}")
        if path.suffix == ".py":
            over += [
                f"{name}: function {function} has {lines} lines, budget {FUNCTION}"
                for function, lines in long_functions(path)
                if f"{name}:{function.split()[0]}" not in WAIVERS
            ]
    for path in sources:
        flags = path.read_text(encoding="utf-8").count("add_argument(") if path.parent.name == "cli" else 0
        if flags > FLAGS:
            over.append(f"{path.relative_to(ROOT)}: {flags} flags, budget {FLAGS}")
    variables = set(re.findall(r"APPORTION_[A-Z_]+", (PACKAGE / "core" / "env.py").read_text(encoding="utf-8")))
    if len(variables) > VARIABLES:
        over.append(f"core/env.py: {len(variables)} environment variables, budget {VARIABLES}")
    return over


def main() -> int:
    sources = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")])
    rooms: Counter[str] = Counter()
    for path in sources:
        parts = path.relative_to(ROOT).parts
        room = "csrc" if parts[0] == "csrc" else (parts[2] if len(parts) > 3 else "face")
        rooms[room] += len(path.read_text(encoding="utf-8").splitlines())
    tests = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py"))
    for room, lines in sorted(rooms.items()):
        print(f"{room:12} {lines:6}")
    print(f"{'total':12} {sum(rooms.values()):6}\n{'tests':12} {tests:6}")
    over = breaches(sources)
    if rooms["engine"] > ENGINE:
        over.append(f"engine/: {rooms['engine']} lines in all, budget {ENGINE}")
    for line in over:
        print(f"over budget: {line}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
