"""Kernels in Triton for NVIDIA and AMD GPUs. Knows what they need to run; must not know models or the engine.

TRITON_INTERPRET=1 runs the same kernels on the CPU, in Triton's interpreter: slow, for tests.
"""

import os
from importlib.util import find_spec
from typing import Any

from apportion.core.kv_spec import KV_FORMATS
from apportion.kernels.dispatch import Capability, Implementation
from apportion.platforms.cuda import why_not
from apportion.platforms.platform import GPUS, ComputeShare

ROUNDED_INPUTS = ("e4m3", "e5m2", "int8", "int4", "int3", "int2")  # elements of weights under which an input is rounded to bfloat16
FLOAT8_ERROR = 2.0**-9  # matrix units that add 32 float8 products in 14 bits, one of them as large as the sum
ROUNDED_QUERIES = ("fp8_e4m3", "fp8_e5m2")  # cached formats under which queries and probabilities are


def _make(share: ComputeShare | None) -> Any:
    import torch

    from apportion.kernels.triton.ops import TritonOps

    if interpreted():
        return TritonOps(True, torch.device("cpu"), shared_bytes=1 << 20)
    import triton

    from apportion.kernels.interval_table import device_slug, shipped

    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    table = shipped(device_slug(facts.name), {"torch": torch.__version__, "triton": triton.__version__})
    return TritonOps(False, torch.device("cuda", torch.cuda.current_device()), facts.shared_memory_per_block_optin, table)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def implementations() -> list[Implementation]:
    missing = "" if find_spec("triton") else "triton is not installed; pip install 'triton==3.6.*'"
    if interpreted():
        devices = {"triton": ("cpu", missing)}
    else:
        devices = {f"triton-{name}": (name, missing or why_not(name)) for name in GPUS}
    return [
        Implementation(
            name,
            rank=-1 if device == "cpu" else 100,  # the interpreter is never the best choice
            capability=Capability(
                device,
                kv_dtypes=tuple(KV_FORMATS),
                rounds_activations=("bfloat16", "float16", *ROUNDED_INPUTS, *ROUNDED_QUERIES),
                float8_error=0.0 if device == "cpu" else FLOAT8_ERROR,
            ),
            make=_make,
            unavailable=unavailable,
        )
        for name, (device, unavailable) in devices.items()
    ]
