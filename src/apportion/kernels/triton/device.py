"""Facts of the device a tensor lies on, asked once."""

from __future__ import annotations

from functools import cache

import torch
from triton.runtime.driver import driver

STAND_INS = {"cpu": 8, "meta": 132}  # for the interpreter, so that contexts are cut into splits; for offline compilation, an H200's


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type in STAND_INS:
        return STAND_INS[device.type]
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def float8_units() -> tuple[str, ...]:
    """Elements of float8 that the matrix units of Triton's target take."""
    target = driver.active.get_current_target()
    if target.backend == "cuda":
        return ("e4m3",) if target.arch >= 89 else ()
    return ("e4m3fnuz",) if target.arch == "gfx942" else ()
