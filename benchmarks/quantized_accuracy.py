"""What each number format loses: a trained model, held-out text and retrieval, by the functions behind `apportion eval`.

    python benchmarks/quantized_accuracy.py --calibration train.jsonl.xz --text val.jsonl.xz [--model FOLDER] [--only fp8,...] [--write]

Every line is a candidate against the original in float32 (`eval compare`; the A/A floor is the original as it is stored, in bfloat16).
Some are held against that, too, in what they find in their context (`eval recovery`); then each method against rounding at the same
bits, token by token. With --write the figures go to benchmarks/results, and into the tables of docs/quantization.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apportion import LLM, quantize
from apportion.assets import DEFAULT_MODEL
from apportion.evaluate.answers import accuracy, ask
from apportion.evaluate.compare import Comparison, compare
from apportion.evaluate.likelihood import by_cluster
from apportion.evaluate.recovery import recovery
from apportion.evaluate.retrieval import retrieval_items
from apportion.evaluate.statistics import Estimate, bootstrap, ratio
from apportion.evaluate.subject import describe
from apportion.evaluate.text import cut_windows, read_documents

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "scripts")]
from pages import write_part  # noqa: E402
from run_all import RESULTS, machine  # noqa: E402

NLL_BAR, KV_BAR, RECOVERY_BAR = 0.005, 0.003, 0.99
TASKS, LENGTHS = ("passkey", "mqar"), (256, 512)  # both models were trained on rows of 256 and 640 tokens
WINDOW = 512


@dataclass(frozen=True)
class Candidate:
    """scheme and method: of a checkpoint that is made first. keywords: of LLM. bar: the most that the loss may grow, of itself. retrieval:
    whether what is kept of it is measured; of those with a bar, at least RECOVERY_BAR."""

    name: str
    scheme: str = ""
    method: str = "rtn"
    keywords: tuple[tuple[str, str], ...] = ()
    kv_cache: bool = False
    bar: float | None = None
    retrieval: bool = False


CANDIDATES = (
    Candidate("fp8", keywords=(("quantization", "fp8"),), bar=NLL_BAR, retrieval=True),
    Candidate("int8", keywords=(("quantization", "int8"),), bar=NLL_BAR, retrieval=True),
    Candidate("fp8 gptq", "fp8", "gptq", bar=NLL_BAR, retrieval=True),
    Candidate("fp8 static", "fp8_static", retrieval=True),
    Candidate("fp8 KV", keywords=(("kv_cache_dtype", "fp8"),), bar=KV_BAR),
    Candidate("fp8 and calibrated fp8 KV", "fp8", kv_cache=True),
    *(Candidate(f"{scheme} {method}", scheme, method) for scheme in ("w4a16", "w3a16", "w2a16") for method in ("rtn", "gptq", "awq")),
)


class Study:
    """The original in float32 and as it is stored, the text, the questions, and what was made of them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.calibration = read_documents(args.calibration)
        self.reference, self.original = self.open(dtype="float32"), self.open()
        tokenizer = self.original.tokenizer
        self.windows = cut_windows([tokenizer.encode(text) for text in read_documents(args.text)], WINDOW, None)
        self.floor = self.compare(self.original)
        self.items = []
        if args.retrieval_samples:
            self.items = retrieval_items(tokenizer, tasks=TASKS, lengths=LENGTHS, num_samples=args.retrieval_samples)
        self.answers = ask(self.original, self.items)

    def about(self) -> dict[str, Any]:
        floor = as_dicts(self.floor.metrics())
        counts = {"num_tokens": floor["nll_difference"]["num"], "num_items": len(self.items)}
        return counts | {"score_original": accuracy(self.answers).as_dict(), "floor": floor}

    def open(self, **keywords: Any) -> LLM:
        return LLM(**({"model": self.args.model, "kv_cache_memory": 128 << 20, "num_threads": self.args.threads} | keywords))

    def compare(self, llm: LLM) -> Comparison:
        return compare(self.reference, {"": llm}, self.windows)[""]

    def keywords(self, candidate: Candidate) -> dict[str, Any]:
        found: dict[str, Any] = dict(candidate.keywords)
        if candidate.scheme:
            found["model"] = self.folder / candidate.name.replace(" ", "-")
            quantize(
                str(self.args.model), found["model"], candidate.scheme, candidate.method, self.calibration, kv_cache=candidate.kv_cache,
                num_samples=self.args.num_samples, max_seq_len=WINDOW,
            )  # fmt: skip
        return found

    def row(self, candidate: Candidate) -> tuple[dict[str, Any], Comparison]:
        with self.open(**self.keywords(candidate)) as llm:
            found, about = self.compare(llm), describe(llm)
            row: dict[str, Any] = {"name": candidate.name, "bar": candidate.bar, "metrics": as_dicts(found.metrics())}
            row |= {"weight_bytes": about["weight_bytes"], "kv_bytes_per_token": about["kv_bytes_per_token"]}
            if candidate.retrieval and self.items:
                ours = ask(llm, self.items)
                row |= as_dicts({"recovery": recovery(self.answers, ours), "score": accuracy(ours)})
                row["recovery_by_task"] = {
                    f"{task} {length}": recovery(*([a for a in side if (a.item.task, a.item.row["length"]) == (task, length)]
                                                   for side in (self.answers, ours))).as_dict()
                    for task in TASKS for length in LENGTHS
                }  # fmt: skip
        return row, found


def as_dicts(estimates: dict[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.as_dict() for name, estimate in estimates.items()}


def gain(nearest: Comparison, better: Comparison) -> Estimate:
    """NLL of a method's checkpoint less that of rounding, paired over the same text."""
    pairs = zip(nearest.candidate, better.candidate, strict=True)
    rows = np.array([(len(b.nll), (b.nll - n.nll).sum()) for n, b in pairs])
    return bootstrap(by_cluster([s.window for s in better.candidate], rows), ratio(1, 0), num=int(rows[:, 0].sum()))


def gains(candidates: Sequence[Candidate], found: Mapping[str, Comparison]) -> dict[str, Estimate]:
    """Of every method whose rounding to the same scheme was measured, too."""
    pairs = [(f"{c.scheme} rtn", c.name) for c in candidates if c.scheme and c.method != "rtn"]
    return {name: gain(found[nearest], found[name]) for nearest, name in pairs if {nearest, name} <= found.keys()}


def verdict(row: dict[str, Any]) -> str:
    """Of a row with a bar: by the unfavourable ends of its intervals."""
    if row["bar"] is None:
        return ""
    lost = row["metrics"]["nll_difference"]["high"] / row["metrics"]["nll_reference"]["value"]
    kept = row.get("recovery", {}).get("low", 1.0)
    return "met" if lost <= row["bar"] and kept >= RECOVERY_BAR else "missed"


def table(results: dict[str, Any]) -> str:
    rows, floor = results["rows"], results["floor"]
    reference = floor["nll_reference"]["value"]
    moved, same = floor["nll_difference"]["value"] / reference, floor["top1_agreement"]["value"]
    text = f"{results['model']}: {results['num_tokens']:,} tokens of held-out text in windows of {WINDOW}, NLL {reference:.4f} in float32"
    asked = f"{results['num_items']:,} questions ({', '.join(TASKS)} at {' and '.join(map(str, LENGTHS))} tokens)"
    right = f"of {asked} the original answers {results['score_original']['value']:.1%}." if results["num_items"] else "no questions asked."
    lines = [
        f"{text}; in bfloat16 it moves by {moved:+.3%} and {same:.2%} of the most likely tokens stay (the A/A floor). Intervals of 95 %;",
        right,
        "",
        "| | weights, MB | NLL | interval | bar | same top-1 | retrieval kept | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lost, kept = row["metrics"]["nll_difference"], row.get("recovery")
        shares = [lost[key] / reference for key in ("value", "low", "high")]
        retrieval = f"{kept['value']:.2%} ({kept['low']:.2%} .. {kept['high']:.2%})" if kept else ""
        bar = "" if row["bar"] is None else f"{row['bar']:.1%}"
        lines.append(
            f"| {row['name']} | {row['weight_bytes'] / 1e6:.2f} | {shares[0]:+.3%} | {shares[1]:+.3%} .. {shares[2]:+.3%} | {bar} | "
            f"{row['metrics']['top1_agreement']['value']:.2%} | {retrieval} | {verdict(row)} |"
        )
    lines += ["", "| against rounding to nearest, the same text | NLL, nat a token | interval |", "|---|---|---|"]
    for name, lost in results["gains"].items():
        lines.append(f"| {name} | {lost['value']:+.4f} | {lost['low']:+.4f} .. {lost['high']:+.4f} |")
    return "\n".join(lines)


def write_page() -> None:
    """The tables of docs/quantization.md, from all that was kept: one of each model, of each candidate the newest row."""
    models: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("quantized_accuracy-*.json"), key=lambda path: (path.stem[-10:], path.stem)):
        found = json.loads(path.read_text())
        before = models.setdefault(found["model"], found)
        rows = {row["name"]: row for row in before["rows"] + found["rows"]}
        asked = found if found["num_items"] else before
        models[found["model"]] = (
            found | {key: asked[key] for key in ("num_items", "score_original")}
            | {"rows": [rows[c.name] for c in CANDIDATES if c.name in rows], "gains": before["gains"] | found["gains"]}
        )  # fmt: skip
    write_part(ROOT / "docs" / "quantization.md", "accuracy", "benchmarks/quantized_accuracy.py", "\n\n".join(map(table, models.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--calibration", type=Path, help="text that methods may see")
    parser.add_argument("--text", type=Path, help="text that none has seen")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration sequences of 512 tokens")
    parser.add_argument("--retrieval-samples", type=int, default=200, help="of each task, length and depth; 0: none")
    parser.add_argument("--only", default=",".join(c.name for c in CANDIDATES), help="names of candidates, separated by commas")
    parser.add_argument("--part", default="", help="what the results file is called beside the model, where a study takes several runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results and write the page's tables")
    parser.add_argument("--table", action="store_true", help="write the page's tables from what was kept, and measure nothing")
    args = parser.parse_args()
    if args.table:
        return write_page()
    if args.calibration is None or args.text is None:
        parser.error("--calibration and --text are needed to measure")
    wanted = [candidate for candidate in CANDIDATES if candidate.name in args.only.split(",")]
    name = f"{args.model.parent.name}-{args.model.name}"
    about = {"model": name, "command": " ".join(["python", *sys.argv]), "machine": machine()}
    path = RESULTS / f"quantized_accuracy-{name}{args.part and '-' + args.part}-{datetime.date.today().isoformat()}.json"
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        study = Study(args, Path(folder))
        for candidate in wanted:
            row, found[candidate.name] = study.row(candidate)
            rows.append(row)
            print(candidate.name, json.dumps(row["metrics"]["nll_difference"]), row.get("recovery", ""), flush=True)
            results = about | study.about() | {"rows": rows, "gains": as_dicts(gains(wanted, found))}
            if args.write:
                path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    if args.write:
        write_page()


if __name__ == "__main__":
    main()
