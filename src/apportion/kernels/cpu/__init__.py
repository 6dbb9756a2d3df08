"""The CPU kernels of csrc/cpu, bound. Knows the compiled module and why it may be absent; must not know models or engine."""

from dataclasses import replace
from functools import partial
from typing import Any

from apportion.core.env import ENV
from apportion.core.kv_spec import KV_FORMATS
from apportion.kernels.cpu import extension
from apportion.kernels.dispatch import Capability, Implementation
from apportion.platforms.cpu import processor_model, processor_name
from apportion.platforms.platform import ComputeShare

BF16_PRODUCTS = {"avx512bf16": "dot products of bf16 pairs", "amx": "bf16 matrix tiles"}  # sets that multiply bf16 by bf16, and how
BYTE_PRODUCTS = dict.fromkeys(("avx512vnni", "avx512bf16"), "dot products of four bytes") | {"amx": "int8 matrix tiles"}  # and integers
ROUNDS_ACTIVATIONS = dict.fromkeys(BF16_PRODUCTS, ("bfloat16", "e4m3", "e5m2", *(f"int{bits}" for bits in range(2, 9))))
KERNELS = "2"  # grows with changes that make measured choices void
RANKS = {"generic": 10, "avx2": 20, "avx512": 30, "avx512vnni": 32, "avx512bf16": 35, "amx": 40}


def table_name(isa: str) -> str:
    """Of this machine's dispatch table: its processor and the instruction set."""
    from apportion.kernels.interval_table import device_slug

    return f"{device_slug(processor_name())}-{isa}"


def table_versions() -> dict[str, str]:
    """What a dispatch table is held to beside its name."""
    return {"cpu kernels": KERNELS, "processor model": processor_model()}


def _make(isa: str, share: ComputeShare | None) -> Any:
    import os

    import torch

    from apportion.kernels.cpu.ops import CpuOps
    from apportion.kernels.interval_table import shipped

    torch.set_num_threads(1)  # the team's threads do the work; torch's own would compete with them for the cores
    num_threads = share.num_threads if share else len(os.sched_getaffinity(0))
    cores = list(share.cores) if share and share.pinned else []
    table = replace(shipped(table_name(isa), table_versions()), otherwise="the packed kernel goes by its own rule")
    return CpuOps(extension.load().ThreadTeam(num_threads, cores), isa, table)


def implementations() -> list[Implementation]:
    """One for every instruction set compiled, best last; where nothing is compiled, one that says why."""
    sets = extension.features()["sets"] or {"generic": {"available": False, "reason": extension.ABSENT}}
    found = []
    for isa, state in sets.items():
        unavailable = "" if state["available"] else f"this processor {state['reason']}" if extension.available() else state["reason"]
        if ENV.isa and isa != ENV.isa:
            unavailable = f"APPORTION_ISA pins '{ENV.isa}'"
        rounds = ROUNDS_ACTIVATIONS.get(isa, ())
        capability = Capability("cpu", isa, kv_dtypes=tuple(KV_FORMATS), batch_invariant=True, rounds_activations=rounds)
        found.append(Implementation(f"cpu-{isa}", RANKS[isa], capability, partial(_make, isa), unavailable))
    return found
