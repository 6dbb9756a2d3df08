"""Compiles the kernels for GPUs that are not there, by making the same calls on tensors without data, and reads what the compiler says.

Registers, spills and shared memory decide whether a kernel is fast at all; whether products are `wgmma` on Hopper is read off the code.
`python -m apportion.kernels.triton.offline` prints one line of JSON for each kernel; scripts/triton_sweep.py collects them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from apportion.core.kv_spec import KVGroupSpec, kv_format
from apportion.kernels.interval_table import Choice
from apportion.kernels.ops import AttentionSpec, ExpertsSpec, LinearSpec, RouteSpec, SamplingRows
from apportion.kernels.triton.linear import TritonLinear, choose_splits
from apportion.kernels.triton.ops import TritonOps
from apportion.kernels.triton.tiles import Tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "gfx942": 65_536}  # bytes that one block can have
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Compiled:
    """registers: of a thread. spills: bytes of the thread's stack (registers on AMD). matrix: the kind of matrix instruction, or ''.

    operands: what it multiplies, as the target spells it.
    """

    workload: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int
    matrix: str
    operands: str


class _Absent:
    """A driver for Triton that knows a target and has no device."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._name]

    def get_current_device(self) -> str:
        return self._name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Inside, launching a kernel compiles it for `target` and appends the result to the list."""
    found: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        found.append(kernel)
        return kernel

    driver.set_active(_Absent(target))
    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = launch


def resources(workload: str, target: str, kernel: Any) -> Compiled:
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        number = {key: int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in ("vgpr_count", "vgpr_spill_count")}
        registers, spills = number["vgpr_count"], number["vgpr_spill_count"]
        matrix, products = "mfma" if "v_mfma" in code else "", re.findall(r"v_mfma_[fi]32_\d+x\d+x\d+_(\w+)", code)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, spills = (int(re.search(rf"{key}:(\d+)", report)[1]) for key in ("REG", "STACK"))
        code = kernel.asm["ptx"]
        matrix = "wgmma" if "wgmma.mma_async" in code else "mma" if "mma.sync" in code else ""
        products = re.findall(r"mma\S*\.m\d+n\d+k\d+\S*?\.[fs]32\.(\w+)\.", code)
    operands = " ".join(sorted(set(products)))
    return Compiled(workload, kernel.name, target, registers, spills, kernel.metadata.shared, kernel.metadata.num_warps, matrix, operands)


# -- what is compiled: the calls of a model of 8 B parameters, of a mixture and of latent attention, on tensors without data ----------

Workload = Callable[[TritonOps], None]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(rows: int, tile: int = 0) -> Workload:
    def run(ops: TritonOps) -> None:
        splits = choose_splits(4096, 4096, 132, ops.tiles.flat[tile])
        op = TritonLinear(LinearSpec(4096, 4096, "bfloat16"), ops.tiles.flat, lambda _: Choice("flat", tile, splits))
        op.bind(_empty(op.nbytes, dtype=torch.uint8))
        op(_empty(rows, 4096))

    return run


def _coded(rows: int, scheme: str) -> Workload:
    def run(ops: TritonOps) -> None:
        op = ops.linear(LinearSpec(4096, 4096, scheme))
        op.bind(_empty(op.nbytes, dtype=torch.uint8))
        op(_empty(rows, 4096))

    return run


def _mixed_experts(ops: TritonOps) -> None:
    """Half the experts in 4 bits, half in float8."""
    schemes = (("int4_g128_bf16",) * 3,) * 4 + (("e4m3_channel@e4m3_token",) * 3,) * 4
    op = ops.experts(ExpertsSpec(8, 4096, 14336, schemes))
    op.bind(_empty(op.nbytes, dtype=torch.uint8))
    op(_empty(16, 4096), _empty(16, 2, dtype=torch.int32), _empty(16, 2, dtype=torch.float32))


def _experts(rows: int, tile: int = 0) -> Workload:
    def run(ops: TritonOps) -> None:
        op = ops.experts(ExpertsSpec(8, 4096, 14336, (("bfloat16",) * 3,)))
        op.tile = ops.tiles.experts[tile]
        op.bind(_empty(op.nbytes, dtype=torch.uint8))
        op(_empty(rows, 4096), _empty(rows, 2, dtype=torch.int32), _empty(rows, 2, dtype=torch.float32))

    return run


def _attention(count: int, unified: bool = False, window: int | None = None, tile: int = 0, kv: str = "bfloat16") -> Workload:
    """32 query heads over 8 kv heads of 128 channels; `count` new tokens of each of 16 requests."""

    def run(ops: TritonOps) -> None:
        group = KVGroupSpec((0,), 8, 128, 128, kv_format(kv), 32, window)
        scales = _empty(2, 8, dtype=torch.float32) if group.format.scaled else None
        op = ops.paged_attention(AttentionSpec(32, group, 128**-0.5, 128), _empty(1 << 30, dtype=torch.uint8))
        op.decode_tile, op.prefill_tile = ops.tiles.decode[tile], ops.tiles.prefill[tile]
        if unified:
            op.unify(0, _empty(32, dtype=torch.float32))
        starts = torch.arange(0, 17 * count, count, dtype=torch.int32)
        handle = op.plan(starts, torch.full((16,), 4096).int(), torch.zeros(16, 128).int(), 16, 16 * count)
        qkv = _empty(16 * count, 48 * 128)
        op.write(0, qkv, _empty(16 * count, dtype=torch.int32), _empty(8192, 128, dtype=torch.float32), handle, scales=scales)
        op.run(0, qkv, _empty(16 * count, 4096), handle, scales)

    return run


def _latent(count: int, tile: int = 0, kv: str = "bfloat16") -> Workload:
    def run(ops: TritonOps) -> None:
        group = KVGroupSpec((0,), 1, 576, 512, kv_format(kv), 32, latent=True)
        scales = _empty(2, 1, dtype=torch.float32) if group.format.scaled else None
        op = ops.latent_attention(AttentionSpec(16, group, 0.1, 64), _empty(1 << 30, dtype=torch.uint8))
        op.decode_tile, op.prefill_tile = ops.tiles.latent_decode[tile], ops.tiles.latent_prefill[tile]
        starts = torch.arange(0, 17 * count, count, dtype=torch.int32)
        handle = op.plan(starts, torch.full((16,), 4096).int(), torch.zeros(16, 128).int(), 16, 16 * count)
        op.write(0, _empty(16 * count, 576), handle, scales)
        op.run(0, _empty(16 * count, 16, 576), _empty(16 * count, 16, 512), handle, scales)

    return run


def _rowwise(ops: TritonOps) -> None:
    x, weight = _empty(16, 4096), _empty(4096, dtype=torch.float32)
    ops.rms_norm(x, weight, 1e-5)
    ops.add_rms_norm(x, _empty(16, 4096, dtype=torch.float32), weight, 1e-5)
    ops.silu_mul(_empty(16, 28672))
    ops.rotate(_empty(16, 32, 128), _empty(16, dtype=torch.int32), _empty(8192, 128, dtype=torch.float32), False)
    ops.route(_empty(16, 64, dtype=torch.float32), RouteSpec(64, 6))


def _rounding(ops: TritonOps) -> None:
    """Norms and gates that end in codes, of a row and of groups."""
    for scheme in ("e4m3_channel@e4m3_token", "e4m3_b128x128@e4m3_g128"):
        rounding = ops.linear(LinearSpec(4096, 4096, scheme)).rounding
        rounding.rms_norm(_empty(16, 4096), _empty(16, 4096, dtype=torch.float32), _empty(4096, dtype=torch.float32), 1e-5)
        rounding.silu_mul(_empty(16, 28672))


def _sampling(ops: TritonOps) -> None:
    logits = _empty(16, 128_256, dtype=torch.float32)
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "position": torch.int64}
    ops.sample(
        logits,
        SamplingRows(**{name: _empty(16, dtype=dtypes.get(name, torch.float32)) for name in SamplingRows.__dataclass_fields__}),
    )
    ops.apply_bitmask(logits, _empty(4, dtype=torch.int32), _empty(4, 16_032, dtype=torch.uint8))


CODED = (  # the first seven have every way through the kernel
    "e4m3_channel@e4m3_token", "e4m3_b128x128@e4m3_g128", "int4_g128_zp_bf16", "int3_g128", "int8_channel@int8_token",
    "int4_g128@int8_token", "e4m3fnuz_channel@e4m3fnuz_token", "int4_g128_bf16", "int2_g128", "e4m3_channel", "int8_channel",
)  # fmt: skip
DEFAULT: dict[str, Workload] = {
    "rowwise": _rowwise,
    "rounding": _rounding,
    "sampling": _sampling,
    "linear-16": _linear(16),
    "linear-64": _linear(64),
    **{f"linear-16-{scheme}": _coded(16, scheme) for scheme in CODED[:7]},
    "experts-16": _experts(16),
    "experts-mixed": _mixed_experts,
    "experts-512": _experts(512),
    "decode": _attention(1),
    "decode-unified": _attention(1, unified=True),
    "decode-window": _attention(1, window=1024),
    "prefill": _attention(128),
    "prefill-unified": _attention(128, unified=True),
    "decode-fp8_e4m3": _attention(1, unified=True, kv="fp8_e4m3"),
    "prefill-fp8_e4m3": _attention(128, kv="fp8_e4m3"),
    "latent-decode-fp8_e4m3": _latent(1, kv="fp8_e4m3"),
    "latent-decode": _latent(1),
    "latent-prefill": _latent(128),
}


def sweep() -> dict[str, Workload]:
    """Every tile of every kernel that has several."""
    found = DEFAULT | {f"linear-{rows}-{scheme}": _coded(rows, scheme) for rows in (16, 64) for scheme in CODED}
    for kv in ("fp8_e4m3", "fp8_e5m2"):
        found |= {f"decode-online-{kv}": _attention(1, kv=kv), f"decode-{kv}": _attention(1, True, kv=kv)}
        found |= {f"prefill-{kv}": _attention(128, kv=kv)}
        found |= {f"latent-decode-{kv}": _latent(1, kv=kv), f"latent-prefill-{kv}": _latent(128, kv=kv)}
    for i in range(1, len(Tiles().flat)):
        found |= {f"linear-{rows}-tile{i}": _linear(rows, i) for rows in (16, 64)}
    for i in range(1, len(Tiles().experts)):
        found |= {f"experts-{rows}-tile{i}": _experts(rows, i) for rows in (16, 512)}
    for i in range(1, len(Tiles().decode)):
        found |= {f"decode-tile{i}": _attention(1, tile=i), f"decode-unified-tile{i}": _attention(1, True, tile=i)}
        found[f"prefill-tile{i}"] = _attention(128, tile=i)
    for i in range(1, len(Tiles().latent_decode)):
        found |= {f"latent-decode-tile{i}": _latent(1, i), f"latent-prefill-tile{i}": _latent(128, i)}
    return found


def compile_all(target: str, workloads: dict[str, Workload]) -> Iterator[Compiled]:
    seen = set()
    for name, workload in workloads.items():
        with compiling(target) as found:
            workload(TritonOps(False, torch.device("meta"), SHARED_LIMIT[target]))
        for kernel in found:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                yield resources(name, target, kernel)


def main(targets: list[str], whole: bool) -> None:
    for target in targets or TARGETS:
        for compiled in compile_all(target, sweep() if whole else DEFAULT):
            print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if word != "--sweep"], "--sweep" in sys.argv)
