"""What each number format loses: the bundled model (or any), held-out text and retrieval, through `apportion eval`.

    python benchmarks/quantized_accuracy.py --calibration train.jsonl.xz --text val.jsonl.xz [--model FOLDER] [--only fp8,...] [--write]

Every line is a candidate against the original in float32 (`eval compare`; the A/A floor is the original in bfloat16). Some are held
against it as it is stored, in retrieval, too (`eval recovery`); then each method against rounding at the same bits, token by token.
With --write the figures go to benchmarks/results, and into the tables of docs/quantization.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion import quantize
from apportion.assets import DEFAULT_MODEL
from apportion.evaluate.text import read_documents

sys.path.insert(0, str(Path(__file__).parent))
from run_all import machine

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "quantization.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- accuracy: written by benchmarks/quantized_accuracy.py -->", "<!-- accuracy: end -->"
NLL_BAR, KV_BAR, RECOVERY_BAR = 0.005, 0.003, 0.99


@dataclass(frozen=True)
class Candidate:
    """scheme and method: of a checkpoint that is made first. keywords: of LLM. bar: the most that the loss may grow, of itself. retrieval:
    whether what is kept of it is measured; of those with a bar, at least RECOVERY_BAR."""

    name: str
    scheme: str = ""
    method: str = "rtn"
    keywords: tuple[str, ...] = ()
    kv_cache: bool = False
    bar: float | None = None
    retrieval: bool = False


CANDIDATES = (
    Candidate("fp8", keywords=("quantization=fp8",), bar=NLL_BAR, retrieval=True),
    Candidate("int8", keywords=("quantization=int8",), bar=NLL_BAR, retrieval=True),
    Candidate("fp8 static", "fp8_static", retrieval=True),
    Candidate("fp8 KV", keywords=("kv_cache_dtype=fp8",), bar=KV_BAR),
    Candidate("fp8 and calibrated fp8 KV", "fp8", kv_cache=True, retrieval=True),
    *(Candidate(f"{scheme} {method}", scheme, method) for scheme in ("w4a16", "w3a16", "w2a16") for method in ("rtn", "gptq", "awq")),
)


class Study:
    """The original, its calibration text, and what was made of them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.texts = read_documents(args.calibration)

    def checkpoint(self, candidate: Candidate) -> Path:
        folder = self.folder / candidate.name.replace(" ", "-")
        if not folder.exists():
            quantize(
                str(self.args.model), folder, candidate.scheme, candidate.method, self.texts, kv_cache=candidate.kv_cache,
                num_samples=self.args.num_samples, max_seq_len=512,
            )  # fmt: skip
        return folder

    def evaluate(self, task: str, model: Path, candidate: list[str], *rest: str) -> dict[str, Any]:
        command = ["eval", task, str(model), "--candidate", *candidate, "--json", "--quiet", "--num-threads", str(self.args.threads), *rest]
        done = subprocess.run([sys.executable, "-m", "apportion.cli.main", *command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"apportion {' '.join(command)}: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def compare(self, model: Path, candidate: list[str], *rest: str) -> dict[str, Any]:
        return self.evaluate("compare", model, candidate, "--text", str(self.args.text), "--window", "512", *rest)

    def row(self, candidate: Candidate) -> dict[str, Any]:
        keywords = list(candidate.keywords)
        if candidate.scheme:
            keywords.append(f"model={self.checkpoint(candidate)}")
        found = self.compare(self.args.model, keywords)
        row: dict[str, Any] = {"name": candidate.name, "bar": candidate.bar, "metrics": found["metrics"], "floor": found["floor"]}
        row |= {"weight_bytes": found["subject"]["weight_bytes"], "kv_bytes_per_token": found["subject"]["kv_bytes_per_token"]}
        if candidate.retrieval and self.args.retrieval_samples:
            grid = ("--tasks", "passkey", "mqar", "--lengths", "512", "--num-samples", str(self.args.retrieval_samples))
            found = self.evaluate("recovery", self.args.model, keywords, "--reference", "dtype=auto", *grid)
            row["recovery"] = found["metrics"]["recovery"]
        return row

    def gain(self, scheme: str, method: str) -> dict[str, Any]:
        """NLL of a method's checkpoint less that of rounding, paired over the same text."""
        nearest, better = (self.checkpoint(next(c for c in CANDIDATES if c.name == f"{scheme} {m}")) for m in ("rtn", method))
        found = self.compare(nearest, [f"model={better}"], "--reference", "dtype=auto", "--no-floor")
        return {"scheme": scheme, "method": method, "nll_difference": found["metrics"]["nll_difference"]}


def verdict(row: dict[str, Any]) -> str:
    """Of a row with a bar: by the unfavourable ends of its intervals."""
    if row["bar"] is None:
        return ""
    lost = row["metrics"]["nll_difference"]["high"] / row["metrics"]["nll_reference"]["value"]
    kept = row.get("recovery", {}).get("low", 1.0)
    return "met" if lost <= row["bar"] and kept >= RECOVERY_BAR else "missed"


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    reference, floor = rows[0]["metrics"]["nll_reference"]["value"], rows[0]["floor"]
    moved, same = floor["nll_difference"]["value"] / reference, floor["top1_agreement"]["value"]
    text = f"{results['model']}: {results['num_tokens']:,} tokens of held-out text in windows of 512, NLL {reference:.4f} in float32"
    lines = [
        f"{text}; in bfloat16 it moves by {moved:+.3%} and {same:.2%} of the most likely tokens stay (the A/A floor). Intervals of 95 %.",
        "",
        "| | weights, MB | NLL | interval | bar | same top-1 | retrieval kept | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lost, kept = row["metrics"]["nll_difference"], row.get("recovery")
        shares = [lost[key] / reference for key in ("value", "low", "high")]
        retrieval = f"{kept['value']:.1%} ({kept['low']:.1%} .. {kept['high']:.1%})" if kept else ""
        bar = "" if row["bar"] is None else f"{row['bar']:.1%}"
        lines.append(
            f"| {row['name']} | {row['weight_bytes'] / 1e6:.2f} | {shares[0]:+.3%} | {shares[1]:+.3%} .. {shares[2]:+.3%} | {bar} | "
            f"{row['metrics']['top1_agreement']['value']:.2%} | {retrieval} | {verdict(row)} |"
        )
    lines += ["", "| against rounding to nearest, the same text | NLL, nat a token | interval |", "|---|---|---|"]
    for gain in results["gains"]:
        lost = gain["nll_difference"]
        lines.append(f"| {gain['scheme']} {gain['method']} | {lost['value']:+.4f} | {lost['low']:+.4f} .. {lost['high']:+.4f} |")
    return "\n".join(lines)


def write_page() -> None:
    """The tables of docs/quantization.md, from the newest results of every model."""
    newest = {}
    for path in sorted(RESULTS.glob("quantized_accuracy-*.json")):
        results = json.loads(path.read_text())
        newest[results["model"]] = results
    head, begin, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{PAGE.relative_to(ROOT)} has lost its markers: {BEGIN} and {END}")
    PAGE.write_text("\n\n".join([f"{head}{BEGIN}", *map(table, newest.values()), f"{END}{tail}"]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--calibration", type=Path, required=True, help="text that methods may see")
    parser.add_argument("--text", type=Path, required=True, help="text that none has seen")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration sequences of 512 tokens")
    parser.add_argument("--retrieval-samples", type=int, default=100, help="of each task and depth; 0: none")
    parser.add_argument("--only", default=",".join(c.name for c in CANDIDATES), help="names of candidates, separated by commas")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results and write the page's tables")
    args = parser.parse_args()
    wanted = args.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        study = Study(args, Path(folder))
        rows = []
        for candidate in CANDIDATES:
            if candidate.name in wanted:
                rows.append(study.row(candidate))
                print(candidate.name, json.dumps(rows[-1]["metrics"]["nll_difference"]), rows[-1].get("recovery", ""), flush=True)
        pairs = [(c.scheme, c.method) for c in CANDIDATES if c.name in wanted and c.scheme and c.method != "rtn"]
        gains = [study.gain(scheme, method) for scheme, method in pairs]
    name = f"{args.model.parent.name}-{args.model.name}"
    command = " ".join(["python", *sys.argv])
    results = {"model": name, "command": command, "machine": machine(), "rows": rows, "gains": gains}
    results["num_tokens"] = rows[0]["metrics"]["nll_difference"]["num"]
    print(table(results))
    if args.write:
        path = RESULTS / f"quantized_accuracy-{name}-{datetime.date.today().isoformat()}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        write_page()


if __name__ == "__main__":
    main()
