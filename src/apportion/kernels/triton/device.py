"""Facts of the device a tensor lies on, asked once."""

from __future__ import annotations

from functools import cache

import torch

STAND_INS = {"cpu": 8, "meta": 132}  # for the interpreter, so that contexts are cut into splits; for offline compilation, an H200's


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type in STAND_INS:
        return STAND_INS[device.type]
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
