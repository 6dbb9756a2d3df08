"""Every Triton kernel compiled, in its default shape, for GPUs that are not there; what the compiler says of registers and memory."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")

KERNELS = {
    "rms_norm_kernel", "silu_mul_kernel", "rotate_kernel", "route_kernel", "sample_kernel", "bitmask_kernel", "flat_kernel",
    "add_splits_kernel", "align_kernel", "gate_up_kernel", "down_kernel", "weigh_kernel", "paged_kernel", "combine_kernel",
    "unified_combine_kernel", "latent_kernel", "write_kernel", "write_latent_kernel", "coded_kernel", "round_kernel",
    "norm_round_kernel", "gate_round_kernel",
    "grouped_kernel",
}  # fmt: skip
PRODUCTS = {
    "coded_kernel",
    "grouped_kernel",
    "flat_kernel",
    "gate_up_kernel",
    "down_kernel",
    "paged_kernel",
    "unified_combine_kernel",
    "latent_kernel",
}
# What may leave the registers. Sums over 512 latent channels fill those of a thread, and no smaller tile is left; the tile of prefill
# that fits sm_80 and sm_89 is a little too much for gfx942, and a second walk, online, behind that of prefill for all.
FULL = ("latent-decode", "latent-decode-fp8_e4m3", "latent-prefill")
SPILLS = {
    **{(workload, target): 64 for workload in FULL for target in ("sm_80", "sm_89")},
    ("latent-decode-fp8_e4m3", "sm_90"): 64,
    ("prefill", "gfx942"): 32,
    **{("prefill-unified", target): 32 for target in ("sm_80", "sm_89", "sm_90")},
    ("prefill-unified", "gfx942"): 96,
    ("prefill-fp8_e4m3", "gfx942"): 80,
}
OPERANDS = {  # 8-bit numbers that the matrix units take as they stand
    "linear-16-e4m3_channel@e4m3_token": {"sm_80": "bf16", "sm_89": "e4m3", "sm_90": "e4m3", "gfx942": "bf16"},
    "linear-16-e4m3_b128x128@e4m3_g128": {"sm_80": "bf16", "sm_89": "e4m3", "sm_90": "e4m3", "gfx942": "bf16"},
    "linear-16-e4m3fnuz_channel@e4m3fnuz_token": {"sm_80": "bf16", "sm_89": "bf16", "sm_90": "bf16", "gfx942": "fp8_fp8"},
    "linear-16-int8_channel@int8_token": {"sm_80": "s8", "sm_89": "s8", "sm_90": "s8", "gfx942": "i8"},
    "linear-16-int4_g128@int8_token": {"sm_80": "s8", "sm_89": "s8", "sm_90": "s8", "gfx942": "i8"},
}
WGMMA = {"flat_kernel", "coded_kernel", "gate_up_kernel", "down_kernel", "grouped_kernel"}  # weights stand on the side that is 64 wide


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "gfx942"])
def test_every_kernel_compiles(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "apportion.kernels.triton.offline", target]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    from apportion.kernels.triton.offline import SHARED_LIMIT

    found = defaultdict(list)
    for line in run.stdout.splitlines():
        compiled = json.loads(line)
        found[compiled["kernel"]].append(compiled)
        assert compiled["target"] == target
        if compiled["kernel"] == "coded_kernel" and compiled["workload"] in OPERANDS:
            assert compiled["operands"] == OPERANDS[compiled["workload"]][target], compiled
        assert compiled["shared_bytes"] <= SHARED_LIMIT[target], compiled
        assert compiled["registers"] <= (512 if target == "gfx942" else 255), compiled
        assert compiled["spills"] <= SPILLS.get((compiled["workload"], target), 0), compiled
    assert set(found) == KERNELS
    for name in PRODUCTS:
        matrices = {compiled["matrix"] for compiled in found[name]}
        if target == "gfx942":
            assert matrices == {"mfma"}, name
        else:
            assert matrices <= {"mma", "wgmma"}, name
        if target == "sm_90" and name in WGMMA:
            assert matrices == {"wgmma"}, name
