"""The bytes behind the blocks: a KV arena as one uint8 tensor, and the copies a step asks for. Knows offsets, not owners."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from apportion.core.errors import InternalError, Unsupported
from apportion.core.kv_spec import UNIT_BYTES
from apportion.core.schedule import KVOp, KVOpKind
from apportion.platforms.arena import Arena


class KVStorage:
    """One rank's KV. `tensor` is what attention kernels are given: entry e of a block table is byte e * 256 of it."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena

    @property
    def tensor(self) -> Tensor:
        return self.arena.tensor

    def run(self, ops: Iterable[KVOp]) -> None:
        """Execute kv_ops in order: a later one sees what an earlier one wrote."""
        for op in ops:
            if op.kind is KVOpKind.QUANTIZE:
                raise Unsupported(f"KV group {op.group} has no format to re-store block {op.src} in")
            src, dst = op.src * UNIT_BYTES, op.dst * UNIT_BYTES
            if min(src, dst) < 0 or max(src, dst) + op.num_bytes > self.arena.nbytes:
                raise InternalError(f"{op} lies outside the KV arena of {self.arena.nbytes} bytes")
            self.tensor[dst : dst + op.num_bytes] = self.tensor[src : src + op.num_bytes]
