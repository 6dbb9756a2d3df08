"""Compile every tile of every Triton kernel for every target, without a GPU, and write the record (`make triton-sweep`).

python scripts/triton_sweep.py [--out benchmarks/results/triton-sweep.json] [target ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMAT = "apportion triton sweep 1"
COLUMNS = ("workload", "kernel", "target", "registers", "spills", "shared_bytes", "num_warps", "matrix", "operands")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="sm_80, sm_89, sm_90, gfx942; all unless given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "triton-sweep.json")
    args = parser.parse_args(arguments)
    from importlib.metadata import version

    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["rows"] if args.out.exists() and args.targets else []
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    fresh = list(compiled(args.targets))
    targets = {row["target"] for row in fresh}
    rows = sorted([row for row in rows if row["target"] not in targets] + fresh, key=lambda row: (row["target"], row["workload"]))
    lines = ",\n".join(json.dumps([row[column] for column in COLUMNS]) for row in rows)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    facts = {"format": FORMAT, "command": "make triton-sweep", "commit": commit, "triton": version("triton"), "columns": COLUMNS}
    head = json.dumps(facts)[:-1]
    args.out.write_text(f'{head}, "rows": [\n{lines}\n]}}\n')
    spilled = [row for row in rows if row["spills"]]
    print(f"{len(rows)} kernels compiled, {len(spilled)} of them spill; {args.out}")
    return 0


def compiled(targets: Sequence[str]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "apportion.kernels.triton.offline", "--sweep", *targets]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
