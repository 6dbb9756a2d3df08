"""The stages, in order: what each measures and the seconds that it may take. A stage that runs out of them keeps what it has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from attention import attention
from experts import experts
from linears import large, linear, quantized
from machine import Machine
from runs import batch, claims, decode

ROOT = Path(__file__).resolve().parents[2]
CONFORMANCE_SECONDS = 110


def device(machine: Machine) -> dict[str, Any]:
    """What the GPU is, and two ceilings: a large copy (bytes read and written) and a large product on random data."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if machine.dry:
        return {"name": "interpreter", "multiprocessors": 4, "l2_bytes": 1 << 20, "bytes_per_s": 1e9, "flop_per_s": 1e9, **versions}
    facts = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = machine.microseconds([partial(target.copy_, source)])
    target = source = None  # 8 GiB
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_us = machine.microseconds([partial(torch.matmul, a, b)])
    return {
        "name": facts.name,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "l2_bytes": facts.L2_cache_size,
        "capability": list(torch.cuda.get_device_capability()),
        "bytes_per_s": 2 * (1 << 32) / copy_us * 1e6,
        "flop_per_s": 2 * 8192**3 / product_us * 1e6,
        **versions,
    }


def conformance(machine: Machine) -> dict[str, Any]:
    """tests/conformance on the GPU. A dry run collects them only: the test suite runs them in the interpreter."""
    if not find_spec("pytest"):
        return {"passed": None, "summary": "not run: pytest is not installed (pip install pytest hypothesis)", "tail": []}
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-p", "no:cacheprovider", "tests/conformance"]
    command += ["--collect-only"] * machine.dry
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=CONFORMANCE_SECONDS)
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return {"passed": None, "summary": f"not whole after {CONFORMANCE_SECONDS} s", "tail": out.splitlines()[-5:]}
    lines = run.stdout.strip().splitlines() or [run.stderr[-500:]]
    return {"passed": run.returncode == 0, "summary": lines[-1], "tail": [] if run.returncode == 0 else lines[-40:]}


STAGES: dict[str, tuple[Callable[[Machine], dict[str, Any]], int]] = {
    "device": (device, 10),
    "conformance": (conformance, CONFORMANCE_SECONDS),
    "linear": (linear, 75),
    "quantized": (quantized, 35),
    "large": (large, 20),
    "attention": (attention, 60),
    "experts": (experts, 30),
    "decode": (decode, 70),
    "batch": (batch, 60),
    "claims": (claims, 400),
}
DEFAULT = tuple(name for name in STAGES if name != "claims")  # within eight minutes
