"""Every number of the README's table, in one run: the peers, then each promise with its bar.

    python benchmarks/run_all.py [--only peers,floor] [--rounds 5] [--threads 2] [--cases decode-1] [--report-only]

`make bench` installs the peers and calls this. Sections run one after another, each in a process of its own; results are merged into
benchmarks/results/MACHINE-DATE.json section by section, so that a run can be interrupted and resumed with --only, and the README's
table is made anew from that file. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: written by make bench -->", "<!-- measured: end -->"
PEER_TITLES = {
    "apportion": "apportion",
    "llama_cpp": "llama.cpp",
    "openvino": "OpenVINO",
    "vllm": "vLLM CPU",
    "transformers": "transformers",
}
SECTION_NAMES = ("peers", "floor", "attention", "prefix", "overhead", "scheduler", "sampling", "loading", "startup", "memory")


def machine() -> dict[str, Any]:
    """What was measured on: processor, the vector sets that matter, cores, memory, commit."""
    info = Path("/proc/cpuinfo").read_text()
    flags = set(re.search(r"^flags\s*:(.*)$", info, re.M)[1].split())
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "processor": re.search(r"^model name\s*:\s*(.*)$", info, re.M)[1],
        "sets": [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16") if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "commit": found.stdout.strip(),
        "python": sys.version.split()[0],
    }


def result_path(about: dict[str, Any]) -> Path:
    words = re.sub(r"\(.*?\)|processor|cpu|@.*", "", about["processor"], flags=re.I)
    best = about["sets"][-1].replace("_", "") if about["sets"] else "generic"
    name = "-".join([*re.findall(r"[a-z0-9]+", words.lower()), best, f"{about['cores']}c"])
    return RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"


def run_section(name: str, args: argparse.Namespace) -> Any:
    """The section's results, from a child process. Errors: CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        if name == "peers":
            command = ["compare_peers.py", "--rounds", str(args.rounds), "--threads", str(args.threads), "--output", str(out)]
            command += ["--cases", args.cases] if args.cases else []
            command += ["--engines", args.engines] if args.engines else []
        else:
            command = ["sections.py", name, str(args.threads), str(out)]
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / command[0]), *command[1:]], check=True)
        return json.loads(out.read_text())


def merge(results: dict[str, Any], name: str, found: Any) -> None:
    """Cases of the peers are merged one by one: --cases measures some of them again."""
    if name == "peers" and name in results:
        cases = results["peers"]["cases"] | found["cases"]
        found["cases"] = cases
    results[name] = found


def peers_table(peers: dict[str, Any]) -> list[str]:
    engines = [e for e in PEER_TITLES if any(e in case["engines"] for case in peers["cases"].values())]
    lines = [
        "| tok/s (MB read per token) | " + " | ".join(PEER_TITLES[e] for e in engines) + " | memory floor | against | to reach | |",
        "|---|" + "---|" * (len(engines) + 4),
    ]
    for name, case in peers["cases"].items():
        cells = [_cell(case["engines"].get(engine)) for engine in engines]
        floor = case.get("floor_tokens_per_s")
        bars = [b for b in case.get("bars", []) if b["ratio"] is not None]
        ratios = ", ".join(f"{b['ratio']:.2f}x {PEER_TITLES[b['against']]}" for b in bars)
        to_reach = ", ".join(f"{b['to_reach']}x" for b in bars)
        met = _mark(all(b["met"] for b in bars)) if bars else ""
        lines.append(f"| {' | '.join([name.replace('-', ' '), *cells, f'{floor:.0f}' if floor else '', ratios, to_reach, met])} |")
    return lines


def _cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return ""
    traffic = f" ({figures['bytes_per_token'] / 1e6:.0f})" if figures["bytes_per_token"] else ""
    return f"{figures['tokens_per_s']:.0f} {figures['dtype']}{traffic}"


def _mark(met: bool | None) -> str:
    return {True: "met", False: "missed", None: ""}[met]


def promises_table(results: dict[str, Any]) -> list[str]:
    lines = ["| promise | measured | bar | | |", "|---|---|---|---|---|"]
    for name in SECTION_NAMES[1:]:
        for row in results.get(name, ()):
            bar = "" if row["bar"] is None else f"{row['bar']:.3g} {row['unit']}"
            lines.append(f"| {row['what']} | {row['value']:.3g} {row['unit']} | {bar} | {_mark(row['met'])} | {row['note']} |")
    return lines


def report(results: dict[str, Any], path: Path) -> str:
    about = results["machine"]
    intro = (
        f"Measured on {about['cores']} cores of {about['processor']} ({', '.join(about['sets'])}), commit {about['commit']},"
        f" `make bench`; all figures: `{path.relative_to(ROOT)}`. Prompt 128, output 128, two threads each, interleaved rounds,"
        " every peer in its faster dtype; the memory floor is what reading a step's bytes allows at the measured bandwidth."
    )
    lines = [intro, ""]
    if "peers" in results:
        lines += [*peers_table(results["peers"]), ""]
    return "\n".join([*lines, *promises_table(results)])


def write_readme(text: str) -> bool:
    """Put the tables between the markers of README.md; False where it has none."""
    readme = ROOT / "README.md"
    if not readme.exists() or BEGIN not in (old := readme.read_text()):
        return False
    before, rest = old.split(BEGIN, 1)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTION_NAMES), help=f"sections: {','.join(SECTION_NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison with the peers")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--cases", help="of the comparison with the peers, such as decode-1,prefill-512")
    parser.add_argument("--engines", help="of the comparison with the peers, such as apportion,vllm")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write the table from the stored results")
    args = parser.parse_args()
    about = machine()
    path = result_path(about)
    results = json.loads(path.read_text()) if path.exists() else {}
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for name in () if args.report_only else args.only.split(","):
        print(f"== {name}", flush=True)
        try:
            found = run_section(name, args)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: failed with status {error.returncode}", file=sys.stderr)
            continue
        merge(results, name, found)
        results["machine"] = about
        path.write_text(json.dumps(results, indent=1) + "\n")
        for row in found if name != "peers" else ():
            print(f"{row['what']}: {row['value']:.4g} {row['unit']} {_mark(row['met'])} {row['note']}", flush=True)
    if "machine" in results:
        text = report(results, path)
        path.with_suffix(".md").write_text(text + "\n")
        print(f"{path.relative_to(ROOT)}; README {'updated' if write_readme(text) else 'has no markers for the table'}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
