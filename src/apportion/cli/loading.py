"""An LLM from the command line's flags, its memory plan and progress shown on stderr when somebody watches."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from apportion.cli.flags import engine_keywords

if TYPE_CHECKING:
    from apportion.engine.memory_plan import MemoryPlan
    from apportion.llm import LLM


def load_llm(args: argparse.Namespace, *, quiet: bool = False, **instead: Any) -> LLM:
    """quiet: show nothing. Otherwise the memory plan comes before anything is loaded, and on a terminal a progress bar after it.

    instead: keywords of LLM that count in place of the flags.
    """
    from apportion.engine.build import plan_engine
    from apportion.llm import LLM, engine_config

    keywords = {"model": getattr(args, "model", None), "tokenizer": getattr(args, "tokenizer", None)} | engine_keywords(args) | instead
    tokenizer = keywords.pop("tokenizer")
    blueprint = plan_engine(engine_config(**keywords))
    if quiet:
        return LLM.from_blueprint(blueprint, tokenizer=tokenizer)
    print(memory_line(blueprint.memory), file=sys.stderr)
    if not sys.stderr.isatty():
        return LLM.from_blueprint(blueprint, tokenizer=tokenizer)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    with Progress(TextColumn("loading"), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        return LLM.from_blueprint(
            blueprint, tokenizer=tokenizer, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )


def memory_line(plan: MemoryPlan) -> str:
    """The plan on one line."""
    from apportion.engine.memory_plan import format_bytes

    rows = dict(plan.rows())
    free, total = rows.pop("free"), rows.pop("total")
    lengths = ", ".join(f"max_model_len {model.max_model_len}" for model in plan.models)
    parts = " + ".join(f"{format_bytes(size)} {name}" for name, size in rows.items())
    return f"memory: {parts} = {format_bytes(total)} of {format_bytes(free)} free; {lengths}"
