"""`apportion simulate run | rank | calibrate`: how fast a parallel strategy would be on a cluster, and whether it would fit."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.core.errors import InvalidParameter

if TYPE_CHECKING:
    from apportion.simulator.run import Result

SURE = 0.9  # share of draws that must agree for an order to count as known
PLAN_FLAGS = ("tp", "pp", "dp", "num_micro_batches", "schedule", "chunks", "zero", "recompute", "grad_dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    modes = parser.add_subparsers(metavar="run|rank|calibrate", required=True)
    run_ = modes.add_parser("run", help="one strategy: time, memory, where the time goes")
    run_.add_argument("strategy", nargs="?", metavar="STRATEGY.yaml", help="the whole question as a file; or use the flags")
    _add_question(run_)
    run_.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")
    run_.add_argument("--memory-png", metavar="FILE", help="draw the memory of a step")
    _add_output(run_)
    run_.set_defaults(mode=_run)
    rank = modes.add_parser("rank", help="many strategies: which is faster, and which differences are known")
    rank.add_argument("strategies", nargs="+", metavar="STRATEGY.yaml")
    _add_output(rank)
    rank.set_defaults(mode=_rank)
    calibrate = modes.add_parser("calibrate", help="fit efficiencies and link speeds to a few measured steps")
    calibrate.add_argument("rows", metavar="ROWS.yaml", help="measured steps, and plans to predict")
    calibrate.add_argument("--choose", type=int, metavar="N", help="only say which N of the rows to measure; they need no times yet")
    calibrate.add_argument("--out", metavar="FILE", help="write the fit, for 'calibration:' of a strategy file or --calibration")
    calibrate.add_argument("--json", action="store_true", help="one JSON object")
    calibrate.set_defaults(mode=_calibrate)


def _add_question(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("without a file", argument_default=argparse.SUPPRESS)
    group.add_argument("--model", help="a decoder of the library (gpt2-xl, llama-3-8b, ...) or a config.json")
    group.add_argument("--cluster", metavar="NODE", help="kind of node (dgx-a100, dgx-h100, 8x-a800, ...)")
    group.add_argument("--num-nodes", type=int)
    group.add_argument("--batch", type=int, help="sequences per step")
    group.add_argument("--seq-len", type=int)
    for name in ("tp", "pp", "dp"):
        group.add_argument(f"--{name}", type=int)
    group.add_argument("--num-micro-batches", type=int)
    group.add_argument("--schedule", choices=("1f1b", "gpipe"))
    group.add_argument("--chunks", type=int, help="pipeline stages of each device (interleaved)")
    group.add_argument("--zero", type=int, choices=range(4))
    group.add_argument("--recompute", choices=("none", "selective", "full"))
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--grad-dtype", choices=("float32", "bfloat16", "float16"))
    group.add_argument("--detail", choices=("auto", "operators", "stages"))
    group.add_argument("--calibration", metavar="FILE", help="what `simulate calibrate --out` wrote")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of words")
    parser.add_argument("--num-draws", type=int, default=16, help="executions with drawn costs, for the band (default 16)")


def run(args: argparse.Namespace) -> int:
    code: int = args.mode(args)
    return code


def _run(args: argparse.Namespace) -> int:
    from apportion.simulator.strategy_file import read_question
    from apportion.simulator.trace import memory_png, perfetto

    given = {k: v for k, v in vars(args).items() if k in ("model", "cluster", "num_nodes", "batch", "seq_len", *PLAN_FLAGS)}
    if args.strategy:
        if given:
            raise InvalidParameter(f"give a strategy file or flags, not both: --{sorted(given)[0].replace('_', '-')}")
        question = read_question(_yaml(args.strategy), folder=Path(args.strategy).parent, name=Path(args.strategy).stem)
    else:
        question = read_question(_from_flags(args, given), name="run")
    result = question.answer(args.num_draws)
    if args.trace:
        _write(args.trace, json.dumps(perfetto(result)).encode())
    if args.memory_png:
        _write(args.memory_png, memory_png(result))
    if args.json:
        print(json.dumps(result.as_dict() | {"detail": question.detail}, indent=2))
    else:
        _say(result, question.detail)
    return 0


def _from_flags(args: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    for name in ("model", "cluster", "batch", "seq_len"):
        if name not in given:
            raise InvalidParameter(
                f"give a strategy file, or at least --model, --cluster, --batch and --seq-len (no --{name.replace('_', '-')})"
            )
    plan = {name: given[name] for name in PLAN_FLAGS if name in given}
    plan |= {"sequence_parallel": True} if getattr(args, "sequence_parallel", False) else {}
    data: dict[str, Any] = {name: given[name] for name in ("model", "batch", "seq_len")}
    data |= {"cluster": {"node": given["cluster"], "num_nodes": given.get("num_nodes", 1)}, "plan": plan}
    return data | {name: getattr(args, name) for name in ("detail", "calibration") if hasattr(args, name)}


def _say(result: Result, detail: str) -> None:
    low, high = result.band
    print(f"time        {_time(result.seconds)} a step, band {_time(low)} to {_time(high)}")
    print(f"throughput  {result.throughput:.4g} samples/s")
    worst = max(result.memory.values(), key=lambda m: m.peak)
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in worst.categories.items() if size > 0.005 * worst.peak)
    print(f"memory      {worst.peak / 1e9:.2f} GB on {worst.device} ({result.verdict.get(worst.device, 'host memory')}): {parts}")
    busiest = max(result.breakdown, key=lambda d: result.breakdown[d].compute)
    shares = {name: seconds / result.seconds for name, seconds in asdict(result.breakdown[busiest]).items()}
    print(f"{busiest:11} " + ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in shares.items()))
    print("costs       " + "; ".join(f"{share:.0%} {source}" for source, share in list(result.sources.items())[:6]))
    print(f"graph       {result.num_tasks} tasks ({detail})")
    if any(source.startswith("extrapolated") for source in result.sources):
        print("note: some costs are extrapolated beyond what was measured", file=sys.stderr)


def _rank(args: argparse.Namespace) -> int:
    from apportion.simulator.run import faster
    from apportion.simulator.strategy_file import read_question

    if args.num_draws < 2:
        raise InvalidParameter(f"a ranking needs at least 2 draws to know what is certain, got {args.num_draws}")
    results = []
    for path in args.strategies:
        results.append(read_question(_yaml(path), folder=Path(path).parent, name=Path(path).stem).answer(args.num_draws))
    results.sort(key=lambda r: (not r.fits, r.seconds))
    sure = [faster(a, b) for a, b in zip(results, results[1:], strict=False)]
    if args.json:
        rows = [r.as_dict() | {"faster_than_next": s} for r, s in zip(results, [*sure, None], strict=True)]
        print(json.dumps({"ranking": rows, "sure": SURE}, indent=2))
        return 0
    for i, result in enumerate(results):
        low, high = result.band
        peak = max(result.peak_bytes.values()) / 1e9
        mark = (
            ""
            if i == len(sure) or sure[i] >= SURE or not result.fits
            else f"  ~ the next is within the band ({sure[i]:.0%} of draws faster)"
        )
        fits = "" if result.fits else "  OUT OF MEMORY"
        print(f"{i + 1:2}. {_time(result.seconds):>9} [{_time(low)} to {_time(high)}] {peak:7.2f} GB  {result.name}{fits}{mark}")
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from apportion.simulator.cost.calibrate import WHOLE
    from apportion.simulator.strategy_file import read_rows

    calibration, ahead = read_rows(_yaml(args.rows), Path(args.rows).parent, timed=args.choose is None)
    if args.choose is not None:
        print("\n".join(row.name for row in calibration.design(args.choose)))
        return 0
    fit = calibration.fit()
    choice = {name: "whole" if value == WHOLE else value for name, value in fit.choice.items()}
    predicted = [{"name": row.name, "seconds": calibration.predict(fit, row), "measured": row.seconds or None} for row in ahead]
    data = {
        "parameters": asdict(fit.parameters), "choice": choice, "spread": fit.spread, "left_out": dict(fit.left_out),
        "rows": [row.name for row in calibration.rows], "predicted": predicted,
    }  # fmt: skip
    if args.out:
        _write(args.out, (json.dumps(data, indent=2) + "\n").encode())
    if args.json:
        print(json.dumps(data, indent=2))
        return 0
    print("parameters  " + ", ".join(f"{name} {value:.3g}" for name, value in data["parameters"].items()))
    if choice:
        print("chosen      " + ", ".join(f"{name} {value}" for name, value in choice.items()))
    for name, error in fit.left_out.items():
        print(f"left out    {name}: predicted {error:+.1%}")
    print(f"band        predictions are taken to be right within {fit.spread:.1%} (one standard deviation)")
    for entry in predicted:
        measured = f", measured {_time(entry['measured'])} ({entry['seconds'] / entry['measured'] - 1:+.1%})" if entry["measured"] else ""
        print(f"predicted   {entry['name']}: {_time(entry['seconds'])}{measured}")
    return 0


def _write(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise InvalidParameter(f"{path!r} cannot be written: {error.strerror}") from None


def _yaml(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise InvalidParameter(f"{path!r} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping):
        raise InvalidParameter(f"{path!r} holds {type(data).__name__}, not a mapping of fields")
    return data


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
