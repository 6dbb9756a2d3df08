"""The torch-free half of the KV cache: what a block holds, byte by byte.

A layer group is the set of layers that share a window and a format; a block holds `block_size` tokens of K and V of every
layer of its group. Inside a block everything is laid out in dwords, `lanes = 4 // element_bytes` values to the dword:

    layer i at  i * layer_bytes
      K         [kv head][head_dim / lanes][block_size][lanes]      a dword row = `lanes` channels of all tokens
      V         [kv head][block_size / lanes][v_head_dim][lanes]    a dword row = `lanes` tokens of all channels

so that scores and outputs both accumulate down the rows with no horizontal sums, and a 16-bit block is at once the B operand
of a matrix tile instruction. A latent group (MLA) has one row kind only, the V layout, of width `head_dim`
(= kv_lora_rank + rope dims); values are its first `v_head_dim` channels.

Blocks are addressed in units of 256 bytes (`UNIT_BYTES`): kernels compute `base + entry * 256` in 64 bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from apportion.core.errors import InvalidParameter

UNIT_BYTES = 256


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How one cached number is stored. `name` is the value of `kv_cache_dtype`. scaled: divided by a scale of its layer and head."""

    name: str
    element_bytes: int
    scaled: bool = False

    @property
    def lanes(self) -> int:
        return 4 // self.element_bytes


_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}
KV_FORMATS = {name: KVFormat(name, size, scaled=size == 1) for name, size in _ELEMENT_BYTES.items()}
ALIASES = {"fp8": "fp8_e4m3"}


def kv_format(name: str) -> KVFormat:
    try:
        return KV_FORMATS[ALIASES.get(name, name)]
    except KeyError:
        raise InvalidParameter(f"unknown kv_cache_dtype {name!r}; known: {', '.join((*KV_FORMATS, *ALIASES))}") from None


@dataclass(frozen=True, slots=True)
class KVGroupSpec:
    """One layer group of one model on one rank.

    layers: model layer indices, in order. head_dim: channels of a key (or of the latent). v_head_dim: channels of a value.
    sliding_window: tokens a query sees, itself included; None for all.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    format: KVFormat
    block_size: int
    sliding_window: int | None = None
    latent: bool = False

    @property
    def k_bytes(self) -> int:
        """Bytes of K of one layer in one block (of the whole latent, for a latent group)."""
        lanes = self.format.lanes
        rows = -(-self.head_dim // lanes)
        return self.num_kv_heads * rows * self.block_size * 4

    @property
    def v_bytes(self) -> int:
        if self.latent:
            return 0
        return self.num_kv_heads * (self.block_size // self.format.lanes) * self.v_head_dim * 4

    @property
    def layer_bytes(self) -> int:
        return -(-(self.k_bytes + self.v_bytes) // 64) * 64

    @property
    def block_bytes(self) -> int:
        return -(-(self.layer_bytes * len(self.layers)) // UNIT_BYTES) * UNIT_BYTES

    @property
    def token_bytes(self) -> float:
        return self.block_bytes / self.block_size

    def layer_offset(self, layer: int) -> int:
        """Byte offset of model layer `layer` inside a block."""
        return self.layers.index(layer) * self.layer_bytes
