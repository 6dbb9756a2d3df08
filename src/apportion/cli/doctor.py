"""`apportion doctor`: what this machine offers, which kernels run on it and why, and what is missing with its fix."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from apportion import __version__

# optional package -> (what needs it, how to get it)
OPTIONAL = {
    "gguf": ("reading GGUF files, and writing them to compare with llama.cpp", "pip install '.[gguf]' in the checkout"),
    "sentencepiece": ("models whose only tokenizer file is tokenizer.model", "pip install sentencepiece protobuf"),
}
LITTLE_MEMORY = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know: what is missing or slow, and the fix."""

    what: str
    fix: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--kernels", default="auto", help="explain this choice of kernels instead of auto")


def run(args: argparse.Namespace) -> int:
    report, findings = examine(args.kernels)
    if args.json:
        print(json.dumps({**report, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0
    for title, facts in report.items():
        print(title)
        for name, value in facts.items():
            print(f"  {name:18} {_text(value)}")
    print("missing" if findings else "nothing is missing")
    for finding in findings:
        print(f"  {finding.what}\n    fix: {finding.fix}")
    return 0


def examine(kernels: str = "auto") -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """The report by section, and what is missing. Errors: Unsupported for kernels that cannot be chosen."""
    import torch

    from apportion.engine.memory_plan import format_bytes
    from apportion.kernels.cpu.extension import features
    from apportion.kernels.dispatch import choose, implementations
    from apportion.platforms.cpu import processor_name
    from apportion.platforms.platform import select_platform

    device = select_platform()
    chosen, why = choose(device.name, kernels)
    extension = features()
    sets = {name: "yes" if state["available"] else f"no: {state['reason']}" for name, state in extension["sets"].items()}
    report = {
        "software": {"apportion": __version__, "python": platform.python_version(), "system": platform.platform(), **_versions()},
        "machine": {
            "processor": processor_name(),
            "cores": device.num_cores,
            "memory": format_bytes(device.total_memory()),
            "free memory": format_bytes(device.free_memory()),
        },
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu capability": torch.backends.cpu.get_cpu_capability(),
        },
        "kernels": {
            "chosen": chosen.name,
            "because": why,
            "instruction sets": sets,
            "known": [i.name for i in implementations()],
            "batch invariant": chosen.capability.batch_invariant,
        },
        "number formats": _formats(chosen.make(None)),
    }
    absent = [(name, *entry) for name, entry in OPTIONAL.items() if find_spec(name) is None]
    findings = [Finding(f"{name} is not installed: needed for {needs_it}", fix) for name, needs_it, fix in absent]
    if extension["absent"]:
        findings.insert(
            0,
            Finding(
                f"the reference kernels run, many times slower: {extension['absent']}", "install a C++20 compiler and CMake, then reinstall"
            ),
        )
    if device.free_memory() < LITTLE_MEMORY:
        findings.append(
            Finding(f"only {format_bytes(device.free_memory())} of memory are free", "close something, or raise the container's limit")
        )
    return report, findings


def _formats(ops: Any) -> dict[str, str]:
    """What is stored in which format, and what it is computed in, here."""
    from apportion.core.number_format import Scheme
    from apportion.quant.checkpoint import PRESETS

    found = {}
    for name, spelt in PRESETS.items():
        scheme = Scheme.parse(spelt.format(scale="_bf16"))
        method = ops.method(scheme.name) if hasattr(ops, "method") else "dequantized for every call, computed in float32"
        inputs = scheme.activation.name if scheme.activation else "as they are"
        found[name] = f"weights stored as {scheme.weight.name}, inputs {inputs}; {method}"
    return found | {"kv fp8": "one byte a number, widened to float32 as it is read; queries stay in float32"}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("numpy", "tokenizers", "safetensors") if find_spec(name)}


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({entry})" for name, entry in value.items()) or "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
