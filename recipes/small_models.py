"""The decoders that train_small.py trains: Llama and Qwen3-MoE, in the parameter names of their checkpoints.

Plain torch, written to be compiled: `state_dict()` is what a checkpoint of transformers or of the engine holds (experts apart, which
train as stacked tensors and are taken apart by `checkpoint_of`). Legend: B batch, T tokens, H query heads, G kv heads, D head dim,
M model dim, F ffn dim, E experts, V vocab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding, halves rotated together (the layout of Llama checkpoints in transformers)."""
    left, right = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        model_dim, self.head_dim = config["hidden_size"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(model_dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(model_dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(model_dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, model_dim, bias=False)
        normed = config["model_type"].startswith("qwen3")
        self.q_norm = RMSNorm(self.head_dim, config["rms_norm_eps"]) if normed else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config["rms_norm_eps"]) if normed else nn.Identity()

    def forward(self, x_BTM: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x_BTM.shape
        heads = (batch, tokens, -1, self.head_dim)
        q = rotate(self.q_norm(self.q_proj(x_BTM).view(heads)), cos, sin).transpose(1, 2)
        k = rotate(self.k_norm(self.k_proj(x_BTM).view(heads)), cos, sin).transpose(1, 2)
        v = self.v_proj(x_BTM).view(heads).transpose(1, 2)
        out = (
            causal_attention(q, k, v)
            if x_BTM.device.type == "cpu"
            else (functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


def causal_attention(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v with whole score matrices: at a thousand tokens faster on a CPU, backward too, than torch's tiled one."""
    batch, heads, tokens, dim = q_BHTD.shape
    kv_heads = k_BGTD.shape[1]
    q = (q_BHTD * dim**-0.5).reshape(batch, kv_heads, heads // kv_heads * tokens, dim)
    scores = (q @ k_BGTD.transpose(-1, -2)).view(batch, heads, tokens, tokens)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    weights = functional.softmax(scores.float().masked_fill(later, float("-inf")), dim=-1).to(v_BGTD.dtype)
    return (weights.view(batch, kv_heads, -1, tokens) @ v_BGTD).view(batch, heads, tokens, dim)


class MLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        model_dim, ffn_dim = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(model_dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(model_dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


ROWS = 128  # of an expert, rounded up


class MoE(nn.Module):
    """Top-k experts over a softmax router, their weights renormalised. `load` holds the last batch's share of tokens per expert."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        experts, model_dim, ffn_dim = config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]
        self.gate = nn.Linear(model_dim, experts, bias=False)
        self.gate_EFM = nn.Parameter(torch.randn(experts, ffn_dim, model_dim) * 0.02)
        self.up_EFM = nn.Parameter(torch.randn(experts, ffn_dim, model_dim) * 0.02)
        self.down_EMF = nn.Parameter(torch.randn(experts, model_dim, ffn_dim) * 0.02)
        self.top_k = config["num_experts_per_tok"]
        self.load, self.balance = torch.zeros(experts), torch.zeros(())

    @torch.compiler.disable
    def forward(self, x_BTM: Tensor) -> Tensor:
        x = x_BTM.flatten(0, 1)
        probs = functional.softmax(self.gate(x).float(), dim=-1)
        top, chosen = probs.topk(self.top_k, dim=-1)
        counts = torch.bincount(chosen.flatten(), minlength=probs.shape[1])
        self.load = counts / counts.sum()
        self.balance = probs.shape[1] * (self.load * probs.mean(0)).sum()  # Switch Transformer, equation 4
        # rows by expert, each expert's padded to a multiple: few shapes, so that a CPU's generated kernels are found again
        expert, order = chosen.flatten().sort(stable=True)
        padded = (counts + ROWS - 1) // ROWS * ROWS
        place = torch.arange(len(order), device=x.device) + ((padded - counts).cumsum(0) - (padded - counts))[expert]
        sizes = padded.tolist()
        source = torch.full((sum(sizes),), len(x), device=x.device).index_copy(0, place, order // self.top_k)
        weights = (top / top.sum(-1, keepdim=True)).flatten()[order].to(x.dtype)
        scale = torch.zeros(len(source), dtype=x.dtype, device=x.device).index_copy(0, place, weights)
        pieces = functional.pad(x, (0, 0, 0, 1)).index_select(0, source).split(sizes)
        stacks = (weight.to(x.dtype).unbind(0) for weight in (self.gate_EFM, self.up_EFM, self.down_EMF))
        outputs = [(functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T for rows, gate, up, down in zip(pieces, *stacks, strict=True)]
        out = torch.zeros(len(x) + 1, x.shape[1], dtype=x.dtype, device=x.device)
        return out.index_add(0, source, torch.cat(outputs) * scale[:, None])[:-1].view_as(x_BTM)


class Block(nn.Module):
    def __init__(self, config: dict[str, Any], layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        is_mixture = "num_experts" in config and layer not in config["mlp_only_layers"]
        self.mlp = MoE(config) if is_mixture else MLP(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def attend(self, x_BTM: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x_BTM = x_BTM + self.self_attn(self.input_layernorm(x_BTM), cos, sin)
        return x_BTM, self.post_attention_layernorm(x_BTM)

    def forward(self, x_BTM: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTM, normed = self.attend(x_BTM, cos, sin)
        return x_BTM + self.mlp(normed)


class Decoder(nn.Module):
    """Token ids [B, T] -> hidden states [B, T, M] of the last layer, normed; the output embedding is the input one."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config["num_hidden_layers"]))
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        half = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        angles = torch.arange(config["max_position_embeddings"])[:, None] * config["rope_parameters"]["rope_theta"] ** -half
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                depth = (
                    (2 * config["num_hidden_layers"]) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight", "down_EMF")) else 1.0
                )
                nn.init.normal_(parameter, std=0.02 * depth)

    def forward(self, ids_BT: Tensor) -> Tensor:
        tokens = ids_BT.shape[1]
        x = self.embed_tokens(ids_BT)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, cos, sin = x.to(dtype), self.cos[:tokens].to(dtype), self.sin[:tokens].to(dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def mixtures(self) -> list[MoE]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]


_EXPERT_NAMES = {"gate_EFM": "gate_proj", "up_EFM": "up_proj", "down_EMF": "down_proj"}


def checkpoint_of(model: Decoder) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by the names transformers gives them."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        head, _, last = name.rpartition(".")
        if last in _EXPERT_NAMES:
            tensors |= {f"model.{head}.experts.{e}.{_EXPERT_NAMES[last]}.weight": weight for e, weight in enumerate(tensor)}
        else:
            tensors[f"model.{name}"] = tensor
    return tensors


def load_checkpoint(model: Decoder, tensors: dict[str, Tensor]) -> None:
    """The inverse. Errors: RuntimeError naming what is missing, left over or misshapen."""
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer, block in enumerate(model.layers):
        for last, spelt in _EXPERT_NAMES.items() if isinstance(block.mlp, MoE) else ():
            names = [f"model.layers.{layer}.mlp.experts.{e}.{spelt}.weight" for e in range(len(block.mlp.load))]
            state[f"layers.{layer}.mlp.{last}"] = torch.stack([tensors[name] for name in names])
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
