"""`python3 scripts/gpu`: everything that needs a GPU, in one command, on a machine without network and without an installation.

It runs from src/, stage by stage, and writes benchmarks/results/<gpu>-<date>.json after each, so that it may be stopped and started
again: stages that stand in the file for the same commit are not run again. Each has seconds of its own; the default ones take eight
minutes together.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = ROOT / "src" / "apportion" / "kernels" / "tables" / "dispatch"
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "src"), str(ROOT)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("stages", nargs="*", help="those to run, in order (device is always known); default: all but claims")
    parser.add_argument("--again", action="store_true", help="also stages that the results hold already")
    parser.add_argument("--seconds", type=float, default=480, help="start no stage that could end later (default: 480)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--dry", action="store_true", help="no GPU: every stage on tiny shapes in Triton's interpreter; times mean nothing")
    args = parser.parse_args()
    if args.dry:
        if args.out == RESULTS:
            parser.error("--dry measures nothing worth keeping: name a folder with --out")
        os.environ["TRITON_INTERPRET"] = "1"
        from tests.triton_interpreter import mend

        mend()
    from apportion.core.errors import ApportionError
    from apportion.platforms.platform import GPUS, select_platform

    try:
        platform = select_platform("cpu" if args.dry else "auto")
        if platform.name not in GPUS and not args.dry:
            platform = select_platform("cuda")  # says why not
    except ApportionError as error:
        print(f"{error}, or --dry to run every stage without a GPU on tiny shapes", file=sys.stderr)
        return 2
    from machine import Machine
    from stages import DEFAULT, STAGES

    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    return run_stages(Machine(platform, args.dry), args.stages or list(DEFAULT), args)


def run_stages(machine: Any, wanted: list[str], args: argparse.Namespace) -> int:
    from stages import STAGES, device

    from apportion.kernels.interval_table import IntervalTable, device_slug

    machine.facts = device(machine)
    gpu = device_slug(machine.facts["name"])
    path = args.out / f"{gpu}-{datetime.date.today()}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    if results.get("commit") != commit:
        results = {"commit": commit, "command": "python3 scripts/gpu", "stages": {}}
    results["stages"]["device"] = machine.facts
    args.out.mkdir(parents=True, exist_ok=True)
    started, failed = time.monotonic(), False
    for stage in (stage for stage in wanted if stage != "device"):
        run, seconds = STAGES[stage]
        if stage in results["stages"] and not args.again:
            print(f"{stage}: known")
            continue
        begun = time.monotonic()
        if begun - started + seconds > args.seconds:
            print(f"{stage}: not run, it may take {seconds} s and --seconds {args.seconds:g} leaves less")
            continue
        machine.deadline = begun + seconds
        results["stages"][stage] = found = run(machine)
        found["seconds"] = round(time.monotonic() - begun, 1)
        path.write_text(json.dumps(results, indent=1) + "\n")
        if found.get("table", {}).get("rows"):
            tables = TABLES if args.out == RESULTS else args.out
            tables.mkdir(parents=True, exist_ok=True)
            made, target = IntervalTable.from_dict(found["table"], gpu), tables / f"{gpu}.json"
            target.write_text((made.merged_over(json.loads(target.read_text())) if target.exists() else made).to_json())
        cut = ", cut short" if time.monotonic() > machine.deadline else ""
        print(f"{stage}: {found['seconds']} s{cut} {found.get('summary', '')}", flush=True)
        if found.get("passed") is False:
            failed = True
            print("\n".join(found["tail"]))
    print(f"\n{table(results['stages'])}\n\n{path}")
    return 1 if failed else 0


def table(stages: dict[str, Any]) -> str:
    """What was measured, the floor of its bytes, the share of it that was reached, and the peer."""
    lines = [f"{'microseconds':52}{'measured':>10}{'floor':>10}{'reached':>9}{'peer':>10}{'speedup':>9}"]
    for found in stages.values():
        for row in found.get("rows", []):
            us, floor, peer = row["us"], row["floor_us"], row["peer_us"]
            versus = f"{peer:10.1f}{peer / us:8.2f}x" if peer else ""
            gap = f"  host gap {row['host_gap']:.1%}" if "host_gap" in row else ""
            lines.append(f"{row['what']:52}{us:10.1f}{floor:10.1f}{100 * floor / us:8.0f}%{versus}{gap}")
    for stage, found in stages.items():
        summary = (
            {name: value for name, value in found.items() if isinstance(value, float) and name != "seconds"} if stage != "device" else {}
        )
        lines += [f"{stage} {name}: {value:.3g}" for name, value in summary.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
