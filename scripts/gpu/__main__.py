"""`python3 scripts/gpu`: everything that needs a GPU, in one command, on a machine without network and without an installation.

It runs from src/, stage by stage, and writes benchmarks/results/<gpu>-<date>.json after each, so that it may be stopped and started again:
stages that stand in the file for the same commit are not run again. It stops before a stage that would not end in time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("stages", nargs="*", help="those to run, in order; all unless given (device is always known)")
    parser.add_argument("--again", action="store_true", help="also stages that the results hold already")
    parser.add_argument("--seconds", type=float, default=480, help="start no stage that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    args = parser.parse_args()
    from apportion.core.errors import ApportionError
    from apportion.platforms.platform import GPUS, select_platform

    try:
        platform = select_platform("auto")
        if platform.name not in GPUS:
            platform = select_platform("cuda")  # says why not
    except ApportionError as error:
        print(error, file=sys.stderr)
        return 2
    from stages import STAGES

    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    return run_stages(args)


def run_stages(args: argparse.Namespace) -> int:
    import torch
    from stages import STAGES

    from apportion.kernels.interval_table import device_slug

    gpu = device_slug(torch.cuda.get_device_name())
    path = args.out / f"{gpu}-{datetime.date.today()}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    commit = _commit()
    if results.get("commit") != commit:
        results = {"commit": commit, "stages": {}}
    started, wanted = time.monotonic(), ["device", *(stage for stage in args.stages or STAGES if stage != "device")]
    failed = False
    for stage in wanted:
        run, estimate = STAGES[stage]
        if stage in results["stages"] and not args.again:
            print(f"{stage}: known")
            continue
        if time.monotonic() - started + estimate > args.seconds:
            print(f"{stage}: not run, it takes about {estimate} s and --seconds {args.seconds:g} leaves less")
            continue
        begun = time.monotonic()
        results["stages"][stage] = found = run(results["stages"])
        found["seconds"] = round(time.monotonic() - begun, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        if "table" in found:
            shipped = args.out.parent.parent / "src/apportion/kernels/tables/dispatch" if args.out == RESULTS else args.out
            shipped.mkdir(parents=True, exist_ok=True)
            (shipped / f"{gpu}.json").write_text(json.dumps(found["table"], indent=1) + "\n")
        print(f"{stage}: {found['seconds']} s", flush=True)
        if found.get("passed") is False:
            failed = True
            print("\n".join(found["tail"]))
    print(f"\n{table(results['stages'])}\n\n{path}")
    return 1 if failed else 0


def table(stages: dict[str, Any]) -> str:
    """What was measured, its floor, and the share of it that was reached."""
    lines = [f"{'':44}{'us':>10}{'floor':>10}{'reached':>9}{'peer':>10}{'speedup':>9}"]

    def line(what: str, us: float, floor: float, other: float | None = None) -> None:
        versus = f"{other:10.1f}{other / us:8.2f}x" if other else ""
        lines.append(f"{what:44}{us:10.1f}{floor:10.1f}{100 * floor / us:8.0f}%{versus}")

    for row in stages.get("linear", {}).get("rows", []):
        line(f"linear {row['n']}x{row['c']} T={row['t']}", row["flat"]["us"], row["floor_us"], row["library_us"])
    for row in stages.get("attention", {}).get("rows", []):
        for kind in ("online", "unified"):
            line(f"decode R={row['requests']} context={row['context']} {kind}", row[kind]["us"], row["floor_us"], row["peer_us"])
    for row in stages.get("experts", {}).get("rows", []):
        line(f"experts 8x14336 T={row['t']}", row["us"], row["floor_us"])
    if "engine" in stages:
        found = stages["engine"]
        line("Llama-3-8B shape, decode of one request", found["decode_ms"] * 1e3, found["floor_ms"] * 1e3)
        lines.append(f"256 requests, 512 in, 128 out: {found['output_tokens_per_s']:.0f} output tokens/s")
    return "\n".join(lines)


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
