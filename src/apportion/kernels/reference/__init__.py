"""Plain torch: the oracle that every kernel is held to, and the complete fallback of an install without a compiler."""

from typing import Any

from apportion.core.kv_spec import KV_FORMATS
from apportion.kernels.dispatch import Capability, Implementation
from apportion.platforms.platform import ComputeShare


def _make(share: ComputeShare | None) -> Any:
    import torch

    from apportion.kernels.reference.ops import ReferenceOps

    if share is not None:
        torch.set_num_threads(share.num_threads)  # its threads are torch's
    return ReferenceOps()


def implementations() -> list[Implementation]:
    capability = Capability(device="cpu", kv_dtypes=tuple(KV_FORMATS), limits=("float32 copies of 16-bit weights are made at every call",))
    return [Implementation(name="reference", rank=0, capability=capability, make=_make)]
