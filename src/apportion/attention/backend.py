"""The attention seam: `plan` once a step, `run` once a layer. Metadata is passed down, never global."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(slots=True)
class AttentionMetadata:
    """One batch as one layer group sees it. All tensors int32, on the host; `plan` brings them where the kernels want them.

    query_start_loc [R+1]: rows of request r are query_start_loc[r]..query_start_loc[r+1].
    seq_lens [R]: context length of request r, this step's tokens included; the i-th of its n query rows stands at seq_len - n + i.
    block_table [R, max_blocks]: entries in 256-byte units from the arena's base, -1 where dead.
    handle: what the kernel made of it in `plan` (work items, pointers); opaque here. One of an earlier step may be given to be filled anew.
    """

    num_requests: int
    num_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    handle: Any = None


@dataclass(slots=True)
class ForwardContext:
    """Passed down, never global. positions int32 [T]; metadata: one per layer group, in the order of the model's kv groups."""

    positions_T: Tensor
    metadata: tuple[AttentionMetadata, ...]


class AttentionBackend(Protocol):
    """How a batch attends. One object per layer group; `plan` makes no host sync.

    generation: changes when the memory that plans lie in has moved, so that what remembers its addresses is void.
    """

    @property
    def generation(self) -> int: ...

    @property
    def recomputed(self) -> Any:
        """Rows whose softmax left the range of a unified maximum, ever: a number, or a tensor of one on the device."""

    def unify(self, layer: int, phi_H: Tensor) -> None:
        """kernels/ops.PagedAttention.unify."""

    def plan(self, metadata: AttentionMetadata) -> AttentionMetadata:
        """Prepare `metadata` (fill `handle`) for every layer of the group."""

    def run(
        self,
        layer: int,
        qkv_TC: Tensor,
        positions_T: Tensor,
        out_TC: Tensor,
        metadata: AttentionMetadata,
        q_norm_D: Tensor | None = None,
        k_norm_D: Tensor | None = None,
    ) -> Tensor:
        """Normalize (where the layer has per-head norms) and rotate q and k, store k and v of the new tokens, attend.

        Returns out [T, H * v_head_dim]. qkv may be written to.
        """
