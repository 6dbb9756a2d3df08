"""Decoder transformers (GPT and Llama families, mixtures of experts) for training: one operator per kernel that runs.

Dims: b batch, s tokens of a sequence, m model, g groups of query heads that share a KV head, q = heads of a group + 2 (its keys and
values), d head dim, f ffn, e experts, c places in an expert, v vocab, n the two halves of a gated projection. Tensor parallelism cuts g, f
and v; sequence parallelism cuts s of norms and sums; expert parallelism cuts e. Rotary embedding counts as part of attention.
"""

from __future__ import annotations

import math

from apportion.core.errors import InvalidParameter, Unsupported
from apportion.core.model_spec import ModelSpec, MoeSpec
from apportion.simulator.models.builder import Builder
from apportion.simulator.ops import Model


def transformer(
    spec: ModelSpec,
    batch: int,
    seq_len: int,
    *,
    gated: bool = True,
    fused_attention: bool = True,
    dropout: bool = False,
    capacity_factor: float = 1.25,
    name: str = "transformer",
) -> Model:
    """A decoder with its loss. gated: SwiGLU and RMS norm (Llama); otherwise GELU, layer norm and biases (GPT).

    fused_attention: one kernel that keeps no scores; otherwise scores, softmax and the product with the values are operators of their own,
    as before FlashAttention. dropout: of probabilities and of what both halves of a layer add; a mask is a byte per element.

    capacity_factor: places per expert and sequence, as a multiple of seq_len * top_k / num_experts (GShard); tokens beyond are dropped.
    Errors: Unsupported for latent attention and for shared experts; InvalidParameter for heads that do not divide.
    """
    if spec.latent is not None:
        raise Unsupported(f"the simulator has no latent attention, which {spec.architecture} uses")
    if spec.num_heads % spec.num_kv_heads:
        raise InvalidParameter(f"{spec.num_heads} attention heads are not a multiple of {spec.num_kv_heads} KV heads")
    b = Builder(name, spec.dtype)
    tokens = b.input("tokens", batch, seq_len, dtype="int32")
    labels = b.input("labels", batch, seq_len, dtype="int32")
    table = b.weight("embed", spec.vocab, spec.hidden)
    x = b.op("embed", "embedding", "b s, v m -> b s m", tokens, table)
    for i in range(spec.num_layers):
        x = _attention(b, spec, f"layers.{i}", x, gated, fused_attention, dropout)
        x = _mlp(b, spec, f"layers.{i}", x, gated, capacity_factor, dropout)
    x = _norm(b, "final_norm", x, spec.hidden, gated)
    head = table if spec.tied else b.weight("head", spec.vocab, spec.hidden)
    logits = b.op("head", "einsum", "b s m, v m -> b s v", x, head)
    b.op("loss", "cross_entropy", "b s v, b s -> ", logits, labels, opaque="v", scale=1 / (batch * seq_len))
    return b.model


def _norm(b: Builder, path: str, x: str, hidden: int, gated: bool) -> str:
    if gated:
        return b.op(path, "rms_norm", "b s m, m -> b s m", x, b.weight(path, hidden), opaque="m")
    bias = b.weight(f"{path}.bias", hidden)
    return b.op(path, "layer_norm", "b s m, m, m -> b s m", x, b.weight(path, hidden), bias, opaque="m")


def _dropped(b: Builder, path: str, x: str, dims: str, opaque: str = "") -> str:
    """The mask stands for a drawn one: it costs its memory, and lets everything pass."""
    mask = b.op(f"{path}_mask", "nonzero", f"{dims} -> {dims}", x, opaque=opaque, dtype="bool", stop_gradient=True, fused=True)
    return b.op(f"{path}_drop", "einsum", f"{dims}, {dims} -> {dims}", x, mask, opaque=opaque)


def _attention(b: Builder, spec: ModelSpec, layer: str, x: str, gated: bool, fused: bool, dropout: bool) -> str:
    groups, per_group, head_dim = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads, spec.head_dim
    h = _norm(b, f"{layer}.attn_norm", x, spec.hidden, gated)
    w = b.weight(f"{layer}.attn.qkv", groups, per_group + 2, head_dim, spec.hidden)
    qkv = b.op(f"{layer}.attn.qkv", "einsum", "b s m, g q d m -> b s g q d", h, w)
    if not gated or spec.qkv_bias:
        bias = b.weight(f"{layer}.attn.qkv_bias", groups, per_group + 2, head_dim)
        qkv = b.op(f"{layer}.attn.qkv_bias", "add", "b s g q d, g q d -> b s g q d", qkv, bias, fused=True)
    if fused:
        h = b.op(f"{layer}.attn.sdpa", "attention", "b s g _ d -> b s g r d", qkv, opaque="s r d", sizes={"r": per_group})
    else:
        sizes = {"r": per_group, "t": b.model.tensors[qkv].shape[1]}
        h = b.op(f"{layer}.attn.core.scores", "scores", "b s g _ d -> b g r s t", qkv, opaque="s r d t", sizes=sizes)
        h = b.op(f"{layer}.attn.core.softmax", "softmax", "b g r s t -> b g r s t", h, opaque="s r t")
        h = _dropped(b, f"{layer}.attn.core.softmax", h, "b g r s t", "s r t") if dropout else h
        h = b.op(f"{layer}.attn.core.attend", "attend", "b g r s t, b t g _ d -> b s g r d", h, qkv, opaque="s r d t")
    w = b.weight(f"{layer}.attn.out", spec.hidden, groups, per_group, head_dim)
    h = b.op(f"{layer}.attn.out", "einsum", "b s g r d, m g r d -> b s m", h, w)
    if not gated or spec.out_bias:
        h = b.op(f"{layer}.attn.out_bias", "add", "b s m, m -> b s m", h, b.weight(f"{layer}.attn.out_bias", spec.hidden), fused=True)
    h = _dropped(b, f"{layer}.attn_out", h, "b s m") if dropout else h
    return b.op(f"{layer}.attn_add", "add", "b s m, b s m -> b s m", x, h)


def _mlp(b: Builder, spec: ModelSpec, layer: str, x: str, gated: bool, capacity_factor: float, dropout: bool) -> str:
    h = _norm(b, f"{layer}.mlp_norm", x, spec.hidden, gated)
    if spec.moe is not None and int(layer.split(".")[1]) in spec.moe.layers:
        h = _moe(b, spec.moe, f"{layer}.moe", h, spec.hidden, capacity_factor)
    elif gated:
        h = b.op(f"{layer}.mlp.up", "einsum", "b s m, n f m -> b s n f", h, b.weight(f"{layer}.mlp.up", 2, spec.ffn, spec.hidden))
        h = b.op(f"{layer}.mlp.act", "silu_mul", "b s _ f -> b s f", h)
        h = b.op(f"{layer}.mlp.down", "einsum", "b s f, m f -> b s m", h, b.weight(f"{layer}.mlp.down", spec.hidden, spec.ffn))
    else:
        h = b.op(f"{layer}.mlp.up", "einsum", "b s m, f m -> b s f", h, b.weight(f"{layer}.mlp.up", spec.ffn, spec.hidden))
        h = b.op(f"{layer}.mlp.up_bias", "add", "b s f, f -> b s f", h, b.weight(f"{layer}.mlp.up_bias", spec.ffn), fused=True)
        h = b.op(f"{layer}.mlp.act", "gelu", "b s f -> b s f", h)
        h = b.op(f"{layer}.mlp.down", "einsum", "b s f, m f -> b s m", h, b.weight(f"{layer}.mlp.down", spec.hidden, spec.ffn))
        h = b.op(f"{layer}.mlp.down_bias", "add", "b s m, m -> b s m", h, b.weight(f"{layer}.mlp.down_bias", spec.hidden), fused=True)
    h = _dropped(b, f"{layer}.mlp_out", h, "b s m") if dropout else h
    return b.op(f"{layer}.mlp_add", "add", "b s m, b s m -> b s m", x, h)


def _moe(b: Builder, moe: MoeSpec, path: str, x: str, hidden: int, capacity_factor: float) -> str:
    """GShard's form (arXiv:2006.16668, section 2.2): a sequence is a group, an expert takes c of its tokens."""
    if moe.num_shared:
        raise Unsupported(f"the simulator has no shared experts; {path!r} asks for {moe.num_shared}")
    seq_len = b.model.tensors[x].shape[1]
    capacity = min(seq_len, max(1, math.ceil(capacity_factor * seq_len * moe.top_k / moe.num_experts)))
    logits = b.op(f"{path}.router", "einsum", "b s m, e m -> b s e", x, b.weight(f"{path}.router", moe.num_experts, hidden))
    places = b.op(f"{path}.route", "route", "b s e -> b s e c", logits, opaque="s e c", sizes={"c": capacity}, top_k=moe.top_k)
    taken = b.op(f"{path}.taken", "nonzero", "b s e c -> b s e c", places, opaque="s e c", stop_gradient=True)
    h = b.op(f"{path}.dispatch", "einsum", "b s m, b s e c -> b e c m", x, taken, role="dispatch")
    w = b.weight(f"{path}.experts.up", moe.num_experts, 2, moe.ffn, hidden)
    h = b.op(f"{path}.experts.up", "einsum", "b e c m, e n f m -> b e c n f", h, w)
    h = b.op(f"{path}.experts.act", "silu_mul", "b e c _ f -> b e c f", h)
    w = b.weight(f"{path}.experts.down", moe.num_experts, hidden, moe.ffn)
    h = b.op(f"{path}.experts.down", "einsum", "b e c f, e m f -> b e c m", h, w)
    return b.op(f"{path}.combine", "einsum", "b e c m, b s e c -> b s m", h, places, role="combine")
