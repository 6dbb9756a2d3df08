"""The shapes of a model, read from its Hugging Face config.json: the one source for memory plan, KV bytes, loader and simulator."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. scaling: 'default', 'linear', 'dynamic', 'yarn', 'llama3'; parameters: its own numbers, by HF name."""

    theta: float = 10000.0
    rotary_dim: int = 0
    interleaved: bool = False
    scaling: str = "default"
    parameters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture layer. layers: model layer indices that are mixtures; the others are dense."""

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
    """One decoder. windows: per layer, the sliding window in tokens or None."""

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
