"""The shapes of a model: the one source for memory plan, KV bytes, loader and simulator. No torch, no files.

core/hf_config reads them from a Hugging Face config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from apportion.core.config import DTYPES
from apportion.core.errors import InvalidParameter
from apportion.core.kv_spec import KVGroupSpec, kv_format


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    rotary_dim: leading channels of a head that are rotated. interleaved: pairs are (2i, 2i+1) instead of (i, i + rotary_dim / 2).
    scaling: 'default', 'linear', 'dynamic', 'yarn' or 'llama3'; parameters: its own numbers, by their Hugging Face names.
    """

    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    scaling: str = "default"
    parameters: dict[str, float] = field(default_factory=dict)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature of attention for a context stretched by `factor` (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture layer. layers: model layer indices that are mixtures; the others are dense.

    ffn: width of one routed expert; shared_ffn: width of all `num_shared` shared experts together.
    """

    num_experts: int
    top_k: int
    ffn: int
    layers: tuple[int, ...]
    num_shared: int = 0
    shared_ffn: int = 0
    shared_gate: bool = False  # Qwen2-MoE: a sigmoid gate on the shared expert
    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2). q_lora_rank 0: queries are projected directly."""

    kv_lora_rank: int
    q_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder.

    max_position: the longest context it is made for, rope scaling included. dtype: of the checkpoint. tied: the output projection is the
    embedding table. windows: per layer, the sliding window in tokens (itself included) or None. head_dim: channels of a query and a key
    before any absorption. qkv_bias: of latent attention's down-projections, too. quantized_bytes: of all weights as this engine packs them,
    where formats other than one dtype are decided on. kv_cache_dtype: what the checkpoint was made for, None where it says nothing.
    """

    architecture: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_position: int
    dtype: str
    rope: RopeSpec
    norm_eps: float
    tied: bool
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoeSpec | None = None
    latent: LatentSpec | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    quantized_bytes: int | None = None
    kv_cache_dtype: str | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """The spec of a config.json, old or new style.

        Errors: Unsupported for an architecture, rope type or activation that is not known; CheckpointError for a field that is missing or
        makes no sense.
        """
        from apportion.core.hf_config import read_spec

        return read_spec(config)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        fields = dict(data)
        fields["rope"] = RopeSpec(**fields["rope"])
        if fields["moe"] is not None:
            fields["moe"] = MoeSpec(**(fields["moe"] | {"layers": tuple(fields["moe"]["layers"])}))
        if fields["latent"] is not None:
            fields["latent"] = LatentSpec(**fields["latent"])
        fields["windows"] = tuple(fields["windows"])
        fields["eos_token_ids"] = tuple(fields["eos_token_ids"])
        return cls(**fields)

    def kv_groups(self, kv_dtype: str, block_size: int, tp_size: int = 1) -> tuple[KVGroupSpec, ...]:
        """Layers that share a window, as one rank stores them; in the order of the first ones. kv_dtype 'auto': the checkpoint's own."""
        kv = kv_format((self.kv_cache_dtype or self.dtype) if kv_dtype == "auto" else kv_dtype)
        num_kv_heads = self.kv_heads_per_rank(tp_size)
        head_dim, v_head_dim = self.head_dim, self.head_dim
        if self.latent is not None:  # every rank keeps the whole latent: all heads read it
            num_kv_heads, head_dim, v_head_dim = 1, self.latent.kv_lora_rank + self.latent.qk_rope_dim, self.latent.kv_lora_rank
        return tuple(
            KVGroupSpec(
                layers=tuple(i for i, w in enumerate(self.windows) if w == window),
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                v_head_dim=v_head_dim,
                format=kv,
                block_size=block_size,
                sliding_window=window,
                latent=self.latent is not None,
            )
            for window in dict.fromkeys(self.windows)
        )

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by before the softmax."""
        scale = float(self.head_dim**-0.5)
        if self.latent is not None and self.rope.parameters.get("mscale_all_dim"):  # DeepSeek-V2 warms the softmax, others the cosines
            scale *= yarn_mscale(self.rope.parameters["factor"], self.rope.parameters["mscale_all_dim"]) ** 2
        return scale

    def heads_per_rank(self, tp_size: int) -> int:
        if self.num_heads % tp_size:
            raise InvalidParameter(f"tensor_parallel_size {tp_size} does not divide the {self.num_heads} attention heads")
        return self.num_heads // tp_size

    def kv_heads_per_rank(self, tp_size: int) -> int:
        """At least one: with more ranks than KV heads, ranks share them by holding copies."""
        self.heads_per_rank(tp_size)
        if max(self.num_kv_heads, tp_size) % min(self.num_kv_heads, tp_size):
            raise InvalidParameter(f"tensor_parallel_size {tp_size} and {self.num_kv_heads} KV heads: one must divide the other")
        return max(1, self.num_kv_heads // tp_size)

    def kv_bytes_per_token(self, kv_dtype: str, block_size: int, tp_size: int = 1) -> float:
        """Bytes of all groups for one token that no window has dropped, on one rank."""
        return sum(group.token_bytes for group in self.kv_groups(kv_dtype, block_size, tp_size))

    @property
    def num_parameters(self) -> int:
        matrices, vectors = self._parameters()
        return matrices + vectors

    def weight_bytes(self, dtype: str = "auto", tp_size: int = 1) -> int:
        """Bytes of packed weights on one rank, to about one percent: matrices in `dtype`, norms and biases in float32."""
        if self.quantized_bytes is not None:
            return self.quantized_bytes // tp_size
        matrices, vectors = self._parameters()
        return matrices * DTYPES[self.dtype if dtype == "auto" else dtype] // tp_size + vectors * 4

    def activation_bytes(self, num_tokens: int, num_logit_rows: int, tp_size: int = 1) -> int:
        """Bytes of a step's largest buffers on one rank: float32, reused by every layer.

        Gates and ups count, though only kernels that cannot gate inside the product store them.
        """
        width = self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads) // tp_size
        if (m := self.latent) is not None:  # queries, absorbed queries, attended latents, values
            width = self.num_heads * (self.head_dim + 2 * m.kv_lora_rank + m.qk_rope_dim + m.v_dim) // tp_size
        ffn = max(self.ffn, (self.moe.top_k * self.moe.ffn + self.moe.shared_ffn) if self.moe else 0)
        per_token = 4 * self.hidden + width + 3 * ffn // tp_size
        return 4 * (num_tokens * per_token + 2 * num_logit_rows * self.vocab)

    def _parameters(self) -> tuple[int, int]:
        """(numbers in matrices, numbers in vectors) of the whole model."""
        attention = self._attention_parameters()
        dense = 3 * self.hidden * self.ffn, (2 * self.ffn + self.hidden) * self.mlp_bias
        matrices = self.vocab * self.hidden * (1 if self.tied else 2)
        vectors = self.hidden * (2 * self.num_layers + 1)
        num_mixtures = 0
        if self.moe is not None:
            moe, num_mixtures = self.moe, len(self.moe.layers)
            wide = moe.num_experts * moe.ffn + moe.shared_ffn
            matrices += num_mixtures * self.hidden * (3 * wide + moe.num_experts + moe.shared_gate)
        num_dense = self.num_layers - num_mixtures
        matrices += self.num_layers * attention[0] + num_dense * dense[0]
        vectors += self.num_layers * attention[1] + num_dense * dense[1]
        return matrices, vectors

    def _attention_parameters(self) -> tuple[int, int]:
        heads, hidden = self.num_heads, self.hidden
        if (m := self.latent) is not None:
            q_width = heads * (m.qk_nope_dim + m.qk_rope_dim)
            queries = m.q_lora_rank * (hidden + q_width) if m.q_lora_rank else hidden * q_width
            latent = hidden * (m.kv_lora_rank + m.qk_rope_dim) + m.kv_lora_rank * heads * (m.qk_nope_dim + m.v_dim)
            return queries + latent + heads * m.v_dim * hidden, m.q_lora_rank + m.kv_lora_rank
        qkv = (heads + 2 * self.num_kv_heads) * self.head_dim
        vectors = qkv * self.qkv_bias + hidden * self.out_bias + 2 * self.head_dim * self.qk_norm
        return hidden * (qkv + heads * self.head_dim), vectors
