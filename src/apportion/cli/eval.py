"""`apportion eval TASK MODEL`: quality through the engine. A table, or JSON, and with --output the report, its rows and plots."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.cli.flags import add_engine_flags, engine_keywords, parse_bytes
from apportion.cli.loading import load_llm
from apportion.core.errors import InvalidParameter

if TYPE_CHECKING:
    from apportion.evaluate.likelihood import Progress
    from apportion.evaluate.qa import Protocol
    from apportion.evaluate.report import Report
    from apportion.evaluate.statistics import Estimate
    from apportion.llm import LLM

FULL_PRECISION, FLOOR = "float32", "bfloat16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    ppl = tasks.add_parser("ppl", help="perplexity of a text")
    compare = tasks.add_parser("compare", help="what another model or precision loses on a text: NLL, KL, top-1 agreement")
    retrieval = tasks.add_parser("retrieval", help="passkeys, needles, associations and variables found in a context")
    generate = tasks.add_parser("generate", help="free-running text, scored by the model in full precision; repetition, empty outputs")
    qa = tasks.add_parser("qa", help="questions of a file, answered exactly")
    recovery = tasks.add_parser("recovery", help="what a compressed model keeps of its original's retrieval and answers")
    for task in (ppl, compare):
        _add_text(task)
        task.add_argument("--window", type=int, metavar="N", help="tokens scored together (default: the model's longest, up to 2048)")
        task.add_argument("--stride", type=int, metavar="N", help="tokens between windows (default: the window)")
    for task in (compare, generate, recovery):
        _add_models(task)
    compare.add_argument("--no-floor", dest="floor", action="store_false", help="leave out the A/A run (the reference in bfloat16)")
    compare.add_argument("--scratch-folder", type=Path, metavar="FOLDER", help="for the reference's distributions (default: the system's)")
    _add_text(generate)
    generate.add_argument("--num-prompts", type=int, default=32, metavar="N", help="pieces of the text to continue (default: 32)")
    generate.add_argument("--prompt-len", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    generate.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an output (default: 512)")
    generate.add_argument("--temperature", type=float, default=1.0, help="default: 1, where the text's KL to the reference is told")
    for task in (retrieval, recovery):
        _add_grid(task)
    _add_questions(qa, required=True)
    _add_questions(recovery, required=False)
    for task in tasks.choices.values():
        task.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id (default: the bundled model)")
        task.add_argument("--tokenizer", metavar="FOLDER_OR_ID", help="where the tokenizer is, if not beside the model")
        task.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="write report.json, samples.jsonl and plots there")
        task.add_argument("--json", action="store_true", help="the report as one JSON object on stdout")
        task.add_argument("-q", "--quiet", action="store_true", help="nothing but the result")
        task.add_argument("--data-seed", type=int, default=0, metavar="N", help="of task items, sampling and the bootstrap (default: 0)")
        add_engine_flags(task, model=False)


def _add_text(task: argparse.ArgumentParser) -> None:
    task.add_argument("--text", type=Path, required=True, metavar="FILE", help="any text; .jsonl: its 'text' fields; .gz, .xz: unpacked")


def _add_models(task: argparse.ArgumentParser) -> None:
    """Two models at once: MODEL is the original, in full precision; the candidate is what the flags and --candidate say."""
    described = "keywords of LLM, such as dtype=bfloat16 or model=FOLDER"
    task.add_argument(
        "--candidate", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=f"what is held against it: {described}"
    )
    task.add_argument("--reference", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of the reference (dtype=float32)")


def _add_grid(task: argparse.ArgumentParser) -> None:
    task.add_argument("--tasks", nargs="+", metavar="NAME", help="passkey, needle, multi_needle, mqar, copy, variable_tracking")
    task.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of text and question (default: powers of two that fit)")
    task.add_argument("--depths", type=float, nargs="+", metavar="D", help="where the evidence stands, 0 to 1 (default: 0 .25 .5 .75 1)")
    task.add_argument("--num-samples", type=int, metavar="N", help="of each task, length and depth (default: 10)")
    task.add_argument("--filler", type=Path, metavar="FILE", help="prose around the evidence (default: a bundled passage)")


def _add_questions(task: argparse.ArgumentParser, *, required: bool) -> None:
    task.add_argument("--questions", type=Path, required=required, metavar="FILE", help="jsonl of 'question' and 'answer' (one or a list)")
    task.add_argument("--chat", action="store_true", help="ask through the chat template")
    task.add_argument("--template", metavar="TEXT", help=r"of a prompt, with {question} (default: 'Question: {question}\nAnswer:')")
    task.add_argument("--answer-pattern", metavar="REGEX", help="its last match is the answer, in the model's text and in the file's")
    task.add_argument("--num-shots", type=int, metavar="N", help="entries of the file given as examples (default: 0)")
    task.add_argument("--max-answer-tokens", type=int, metavar="N", help="default: 32; with a pattern 256")


def run(args: argparse.Namespace) -> int:
    report = RUNS[args.task](args)
    report.command = f"apportion {shlex.join(args.arguments)}"
    if args.output:
        _write(report, args.output, args.quiet)
    if args.json:
        print(json.dumps(report.as_dict(), allow_nan=False))
    else:
        _print(report)
    return 0


def _ppl(args: argparse.Namespace) -> Report:
    from apportion.evaluate.likelihood import perplexity_report
    from apportion.evaluate.text import read_documents

    documents = read_documents(args.text)
    with load_llm(args, quiet=args.quiet) as llm, _progress(args.quiet) as progress:
        return perplexity_report(llm, documents, window=args.window, stride=args.stride, seed=args.data_seed, progress=progress)


def _compare(args: argparse.Namespace) -> Report:
    from apportion.evaluate.compare import comparison_report
    from apportion.evaluate.text import read_documents

    documents = read_documents(args.text)
    _need_candidate(args)
    with ExitStack() as stack:
        reference, candidate, floor = _load_models(args, stack, with_floor=args.floor)
        return comparison_report(
            reference,
            candidate,
            documents,
            floor=floor,
            window=args.window,
            stride=args.stride,
            seed=args.data_seed,
            scratch_folder=args.scratch_folder,
            progress=stack.enter_context(_progress(args.quiet)),
        )


def _retrieval(args: argparse.Namespace) -> Report:
    from apportion.evaluate.retrieval import retrieval_report

    grid = _grid(args)
    with load_llm(args, quiet=args.quiet) as llm, _progress(args.quiet) as progress:
        return retrieval_report(llm, **grid, seed=args.data_seed, progress=progress)


def _generate(args: argparse.Namespace) -> Report:
    from apportion.evaluate.generation import generation_report
    from apportion.evaluate.text import read_documents

    documents = read_documents(args.text)
    with ExitStack() as stack:
        judge, candidate, _ = _load_models(args, stack)
        return generation_report(
            judge,
            candidate,
            documents,
            num_prompts=args.num_prompts,
            prompt_len=args.prompt_len,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.data_seed,
            progress=stack.enter_context(_progress(args.quiet)),
        )


def _qa(args: argparse.Namespace) -> Report:
    from apportion.evaluate.qa import qa_report
    from apportion.evaluate.text import read_jsonl

    entries, protocol = read_jsonl(args.questions), _protocol(args)
    with load_llm(args, quiet=args.quiet) as llm, _progress(args.quiet) as progress:
        return qa_report(llm, entries, protocol, progress=progress)


def _recovery(args: argparse.Namespace) -> Report:
    from apportion.evaluate.compare import check_same_tokens
    from apportion.evaluate.qa import qa_items
    from apportion.evaluate.recovery import recovery_report
    from apportion.evaluate.retrieval import lengths_that_fit, retrieval_items
    from apportion.evaluate.text import read_jsonl

    grid, protocol = _grid(args), _protocol(args)
    entries = read_jsonl(args.questions) if args.questions else []
    _need_candidate(args)
    with ExitStack() as stack:
        original, candidate, _ = _load_models(args, stack)
        check_same_tokens(original, candidate)
        items = retrieval_items(original.tokenizer, **{"lengths": lengths_that_fit(original)} | grid, seed=args.data_seed)
        items += qa_items(original, entries, protocol) if entries else []
        progress = stack.enter_context(_progress(args.quiet))
        return recovery_report(original, candidate, items, seed=args.data_seed, progress=progress)


RUNS = {"ppl": _ppl, "compare": _compare, "retrieval": _retrieval, "generate": _generate, "qa": _qa, "recovery": _recovery}


def _grid(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the retrieval grid, as keywords."""
    from apportion.evaluate.text import read_text

    given = {name: getattr(args, name) for name in ("tasks", "lengths", "depths", "num_samples")}
    filler = {"filler": read_text(args.filler)} if args.filler else {}
    return {name: value for name, value in given.items() if value is not None} | filler


def _protocol(args: argparse.Namespace) -> Protocol:
    from apportion.evaluate.qa import Protocol

    given = {"template": args.template, "num_shots": args.num_shots, "max_tokens": args.max_answer_tokens}
    given = {name: value for name, value in given.items() if value is not None}
    return Protocol(chat=args.chat, answer_pattern=args.answer_pattern, **given)


def _need_candidate(args: argparse.Namespace) -> None:
    if not args.candidate:
        raise InvalidParameter(f"{args.task} needs --candidate KEY=VALUE: what to hold against the model, such as dtype=bfloat16")


def _load_models(args: argparse.Namespace, stack: ExitStack, *, with_floor: bool = False) -> tuple[LLM, LLM, LLM | None]:
    """(reference, candidate, floor). The floor is the reference in the other float precision; it may be the candidate itself."""
    reference = {"dtype": FULL_PRECISION} | parse_keywords(args.reference)
    candidate = parse_keywords(args.candidate)
    floor = reference | {"dtype": FLOOR if reference["dtype"] == FULL_PRECISION else FULL_PRECISION}

    def load(keywords: dict[str, Any]) -> LLM:
        return stack.enter_context(load_llm(args, quiet=args.quiet, **keywords))

    loaded = load(reference), load(candidate)
    if not with_floor:
        return *loaded, None
    same = engine_keywords(args) | candidate == engine_keywords(args) | floor
    return *loaded, loaded[1] if same else load(floor)


def parse_keywords(pairs: list[str]) -> dict[str, Any]:
    """['dtype=bfloat16', 'max-num-seqs=8'] -> keywords of LLM. Errors: InvalidParameter for what is no pair, or given twice."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InvalidParameter(f"{pair!r} is not KEY=VALUE")
        if key in found:
            raise InvalidParameter(f"{key} is given twice")
        found[key] = parse_bytes(text) if key.endswith("_memory") else _value(text)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr where somebody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("evaluating", total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _write(report: Report, folder: Path, quiet: bool) -> None:
    """report.json, samples.jsonl and PNG plots."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.write(folder / "report.json")
        if report.samples:
            lines = (json.dumps(sample, allow_nan=False) for sample in report.samples)
            (folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise InvalidParameter(f"the report cannot be written to {folder}: {error}") from error
    try:
        from apportion.evaluate.plots import plot
    except ModuleNotFoundError:
        print("no plots: matplotlib is not installed (pip install '.[bench]')", file=sys.stderr)
        return
    for path in plot(report, folder):
        if not quiet:
            print(f"wrote {path}", file=sys.stderr)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table(title=f"{report.task}: {Path(report.subject['model']).name}", title_justify="left")
    level = next((f"{e.level:.0%} interval" for e in report.metrics.values() if e.low is not None), "interval")
    for column in ("metric", "value", level, *(["A/A floor"] if report.floor else []), "of"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, estimate in report.metrics.items():
        floor = [_number(report.floor[name].value) if name in report.floor else ""] if report.floor else []
        table.add_row(name, _number(estimate.value), _interval(estimate), *floor, f"{estimate.num:,}")
    console.print(table)
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    rate = f"{report.num_tokens:,} tokens in {report.wall_s:.1f} s ({report.tokens_per_s:,.0f} tokens/s)" if report.tokens_per_s else ""
    console.print(f"{settings}; {rate}" if rate else settings, highlight=False)
    for note in report.notes:
        console.print(note, highlight=False)


def _interval(estimate: Estimate) -> str:
    if estimate.low is None and estimate.high is None:
        return ""
    return f"{_number(estimate.low)} .. {_number(estimate.high)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}" if abs(value) >= 1e-2 else f"{value:.3g}"
